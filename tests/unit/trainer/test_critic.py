"""The critic against a loop in float64 over rows by themselves, and what must never reach what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.reference.policy_step import as_float64
from tests.reference.rows import make_rows, tiny_llama
from trainer.data.batch import pack_rows
from trainer.optimize.optimizer import Optimizer
from trainer.policy.critic import Critic, critic_of, explained_variance, row_values, value_loss, value_step
from trainer.policy.model import named_weights
from trainer.policy.precision import checkpoint_activations, forward_precision

LENGTHS = [11, 4, 27, 18, 2, 9]


def spread_out(critic: Critic, seed: int = 1) -> Critic:
    """Give the head weights, so that values differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        critic.head.weight.copy_(torch.randn(critic.head.weight.shape, generator=generator) / 5)
        critic.head.bias.fill_(0.3)
    return critic


def packed(rows, token_budget=40, **more):
    return pack_rows(rows, np.zeros(len(rows)), token_budget=token_budget, temperature=1.0, **more)


def twin_values(critic: Critic, policy, row):
    """(L,) in float64, of one row by itself, by transformers' eager attention."""
    model = as_float64(policy)
    output = model(input_ids=torch.tensor(row.token_ids.astype("int64"))[None], output_hidden_states=True)
    weight, bias = critic.head.weight.detach().double(), critic.head.bias.detach().double()
    return output.hidden_states[-1][0] @ weight[0] + bias


def targets_of(rows, seed=3):
    rng = np.random.default_rng(seed)
    targets = [np.where(row.trained, rng.normal(size=len(row.token_ids)), 0).astype(np.float32) for row in rows]
    old = [rng.normal(0, 0.5, len(row.token_ids)).astype(np.float32) for row in rows]
    return targets, old


def test_a_new_critic_says_0_of_everything() -> None:
    rows = make_rows(10, LENGTHS)
    assert not any(one.any() for one in row_values(critic_of(tiny_llama()), packed(rows), len(rows)))


@pytest.mark.parametrize("kind", ["own", "head"])
@pytest.mark.parametrize("token_budget", [27, 40, 1000])
def test_values_equal_those_of_every_row_by_itself(kind, token_budget) -> None:
    policy, rows = tiny_llama(), make_rows(10, LENGTHS)
    critic = spread_out(critic_of(policy, kind=kind))
    found = row_values(critic, packed(rows, token_budget), len(rows))
    for row, values in zip(rows, found, strict=True):
        expected = twin_values(critic, policy, row).detach().numpy()
        np.testing.assert_allclose(values, expected, atol=5e-5)


def test_a_value_knows_nothing_of_the_token_that_it_is_before() -> None:
    (row,) = make_rows(10, [18])
    critic = spread_out(critic_of(tiny_llama()))
    (before,) = row_values(critic, packed([row]), 1)
    row.token_ids[9] = (row.token_ids[9] + 1) % 37
    (after,) = row_values(critic, packed([row]), 1)
    assert np.array_equal(before[:9], after[:9])
    assert not np.isclose(before[9:], after[9:]).any()


def test_a_critic_of_its_own_shares_no_weight_with_the_policy() -> None:
    policy = tiny_llama()
    policy.model.layers[0].requires_grad_(False)
    critic = critic_of(policy)
    ours = {weight.data_ptr() for weight in critic.parameters()}
    assert not ours & {weight.data_ptr() for weight in policy.parameters()}
    assert all(weight.requires_grad for weight in critic.parameters())
    assert not any("lm_head" in name for name in critic.state_dict())


def test_a_head_on_the_policy_sends_it_no_gradient_and_does_not_hold_it() -> None:
    policy, rows = tiny_llama(), make_rows(10, LENGTHS)
    critic = spread_out(critic_of(policy, kind="head"))
    assert set(critic.state_dict()) == {"head.weight", "head.bias", "steps"}
    before = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    targets, old = targets_of(rows)
    value_step(critic, Optimizer(critic, lr=1e-2), packed(rows), targets, old)
    assert all(weight.grad is None and torch.equal(weight, before[name]) for name, weight in policy.named_parameters())


def test_a_smaller_model_can_be_the_critic_and_one_with_fewer_token_ids_cannot(tmp_path: Path) -> None:
    policy = tiny_llama()
    tiny_llama(hidden_size=16, intermediate_size=16).save_pretrained(tmp_path / "small")
    critic = critic_of(policy, directory=tmp_path / "small")
    rows = make_rows(10, LENGTHS)
    assert [len(one) for one in row_values(critic, packed(rows), len(rows))] == LENGTHS
    tiny_llama(vocab_size=30).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="30 token ids and the policy 37"):
        critic_of(policy, directory=tmp_path / "other")
    with pytest.raises(ValueError, match="leave .* out"):
        critic_of(policy, kind="head", directory=tmp_path / "small")
    with pytest.raises(ValueError, match="is not known"):
        critic_of(policy, kind="both")  # pyright: ignore[reportArgumentType]


def test_the_value_loss_draws_back_to_the_old_value_only_where_it_went_too_far() -> None:
    """Old value 0, clip 0.2, target 1: nothing draws on a value past 0.2 on the way to the target."""
    values = torch.tensor([0.1, 0.5, -0.5, 1.5], dtype=torch.float64, requires_grad=True)
    ones, zeros = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    loss, clipped = value_loss(values, ones, zeros, clip=0.2)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.405, 0.32, 1.125, 0.32])
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([-0.9, 0.0, -1.5, 0.0])
    assert clipped.tolist() == [False, True, False, True]
    free, none = value_loss(values.detach(), ones, zeros, clip=0.0)
    assert free.tolist() == pytest.approx([0.405, 0.125, 1.125, 0.125])
    assert not none.any()
    with pytest.raises(ValueError, match="value clip"):
        value_loss(values, ones, zeros, clip=-1.0)


def loss_and_gradients(critic, rows, targets, old, *, token_budget, normalise):
    gradients = {}
    for name, weight in critic.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda w, name=name: gradients.__setitem__(name, w.grad.clone()))
    optimizer = Optimizer(critic, lr=1e-9, grad_norm_max=float("inf"))
    step = value_step(critic, optimizer, packed(rows, token_budget, normalise=normalise), targets, old, clip=0.2)
    return step, gradients


@pytest.mark.parametrize("normalise", ["token", "rollout"])
def test_a_step_of_the_critic_has_the_loss_and_gradients_of_the_slow_twin_however_rows_are_packed(normalise) -> None:
    policy, rows = tiny_llama(), make_rows(10, LENGTHS)
    targets, old = targets_of(rows)
    twin = as_float64(policy)
    head = spread_out(critic_of(policy)).head.double()
    by_row = []
    for row, target, before in zip(rows, targets, old, strict=True):
        hidden = twin.model(input_ids=torch.tensor(row.token_ids.astype("int64"))[None]).last_hidden_state[0]
        values = head(hidden).squeeze(-1)
        losses = []
        for t in np.flatnonzero(row.trained):
            value, worth, was = values[t - 1], float(target[t]), float(before[t - 1])
            held = torch.clamp(value, was - 0.2, was + 0.2)
            losses.append(0.5 * torch.maximum((value - worth) ** 2, (held - worth) ** 2))
        by_row.append(torch.stack(losses))
    expected = (
        torch.stack([one.mean() for one in by_row]).mean() if normalise == "rollout" else torch.cat(by_row).mean()
    )
    expected.backward()
    for token_budget in (27, 40, 1000):
        critic = spread_out(critic_of(policy))
        step, gradients = loss_and_gradients(critic, rows, targets, old, token_budget=token_budget, normalise=normalise)
        assert step.applied
        assert 0 < step.clip_share < 1
        assert step.loss == pytest.approx(float(expected.detach()), abs=2e-5)
        torch.testing.assert_close(gradients["head.weight"].double(), head.weight.grad, rtol=2e-4, atol=2e-5)
        for name, weight in twin.model.named_parameters():
            found = gradients["backbone." + name].double()
            torch.testing.assert_close(found, weight.grad, rtol=2e-4, atol=2e-5, msg=name)


def test_steps_towards_the_same_targets_explain_more_and_more_of_them() -> None:
    rows = make_rows(10, LENGTHS)
    targets, _ = targets_of(rows)
    critic = critic_of(tiny_llama())
    optimizer = Optimizer(critic, lr=3e-3)
    mask = [row.trained for row in rows]

    def explained(values):
        told = [one[:-1][trained[1:]] for one, trained in zip(values, mask, strict=True)]
        true = [one[trained] for one, trained in zip(targets, mask, strict=True)]
        return explained_variance(np.concatenate(told), np.concatenate(true))

    first = row_values(critic, packed(rows), len(rows))
    for _ in range(60):
        value_step(critic, optimizer, packed(rows), targets, first, clip=0.0)
    assert explained(first) == 0.0
    assert explained(row_values(critic, packed(rows), len(rows))) > 0.9


def test_explained_variance_is_1_of_who_knows_0_of_who_guesses_the_mean_and_unknown_of_what_never_varies() -> None:
    targets = np.array([0.0, 1.0, 1.0, 0.5])
    assert explained_variance(targets, targets) == 1.0
    assert explained_variance(np.full(4, 0.625), targets) == 0.0
    assert explained_variance(1 - targets, targets) == pytest.approx(-3.0)
    assert explained_variance(targets, np.ones(4)) is None
    assert explained_variance(np.zeros(0), np.zeros(0)) is None


def test_a_step_of_the_critic_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    rows = make_rows(10, LENGTHS)
    targets, old = targets_of(rows)
    critic = spread_out(critic_of(tiny_llama()))
    optimizer = Optimizer(critic, lr=1e-2)
    before = {name: weight.clone() for name, weight in critic.state_dict().items()}
    targets[0][rows[0].trained] = np.nan
    assert not value_step(critic, optimizer, packed(rows), targets, old).applied
    assert (optimizer.updates, optimizer.skipped) == (0, 1)
    assert all(torch.equal(weight, before[name]) for name, weight in critic.state_dict().items())


def test_a_critic_of_a_policy_that_computes_in_16_bits_and_recomputes_still_has_weights_of_its_own() -> None:
    policy = forward_precision(checkpoint_activations(tiny_llama()), torch.bfloat16)
    rows = make_rows(10, LENGTHS)
    critic = spread_out(critic_of(policy))
    whole = row_values(spread_out(critic_of(tiny_llama())), packed(rows), len(rows))
    before = row_values(critic, packed(rows), len(rows))
    for one, other in zip(before, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=0.15)  # of values of order 1, at 8 bits of mantissa
    targets, old = targets_of(rows)
    value_step(critic, Optimizer(critic, lr=1e-2), packed(rows), targets, old)
    assert all(weight.grad is None for weight in policy.parameters())
    after = row_values(critic, packed(rows), len(rows))
    assert any(not np.allclose(one, other, atol=0.02) for one, other in zip(before, after, strict=True))
    moved = [
        name
        for name, weight in critic.backbone.named_parameters()
        if "q_proj" in name and not torch.equal(weight, policy.model.get_parameter(name))
    ]
    assert len(moved) == 2, "every layer's own"


def test_a_critic_beside_an_adapter_begins_from_the_base_and_is_kept_whole(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from trainer.policy.lora import add_adapter

    policy = tiny_llama()
    policy.save_pretrained(tmp_path / "base")
    add_adapter(policy, 2)
    with pytest.raises(ValueError, match="name a directory"):
        critic_of(policy)
    critic = critic_of(policy, directory=tmp_path / "base")
    assert len(dict(named_weights(critic))) == len(critic.state_dict())
    assert set(dict(named_weights(critic_of(policy, kind="head")))) == {"head.weight", "head.bias", "steps"}
