"""One step against the slow twin, and that nothing about packing can be seen in the gradient."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.reference import losses as reference
from tests.reference.policy_step import as_float64, step_loss
from tests.reference.rows import make_rows, tiny_llama
from trainer.data.batch import pack_rows
from trainer.optimize.losses import (
    LossInputs,
    cispo,
    compose,
    geometric_mask,
    gspo,
    ppo_clip,
    reinforce,
    sft,
)
from trainer.optimize.optimizer import Optimizer, learning_rate
from trainer.optimize.step import train_step
from trainer.policy.logprob import token_scores

LENGTHS = [11, 4, 27, 18, 2, 9]
ADVANTAGES = np.array([1.0, -0.5, 0.25, -1.5, 2.0, 0.0], dtype=np.float32)
LOSSES = {
    "sft": (sft, reference.sft),
    "ppo_clip": (ppo_clip(), reference.ppo_clip(0.2, 0.28)),
    "cispo": (cispo(), reference.weighted(0.0, 4.0)),
    "reinforce": (reinforce(), reference.weighted(0.0, 2.0)),
    "gspo": (gspo(clip_low=0.05, clip_high=0.05), reference.ppo_clip(0.05, 0.05, level="sequence")),
    "masked, with an entropy bonus": (
        compose(cispo(), corrections=[geometric_mask(low=0.95, high=1.05)], entropy_bonus=0.3),
        reference.composed(reference.weighted(0.0, 4.0), reference.geometric_mask(0.95, 1.05), entropy_bonus=0.3),
    ),
}


def near_policy_rows(model, seed=10):
    """Rows whose behaviour log-probs lie around the model's own, as from a policy a few updates old."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in make_rows(seed, LENGTHS):
        (pack,) = pack_rows([row], [1.0], token_budget=64)
        with torch.no_grad():
            current = token_scores(model, pack).logprobs_K.double().numpy()
        logprobs = row.logprobs.copy()
        logprobs[row.trained] = current + rng.normal(0, 0.3, len(current))
        rows.append(replace(row, logprobs=logprobs))
    rows[5] = replace(rows[5], rollout_id=rows[0].rollout_id)
    return [replace(row, group=f"g-{index // 2 % 2}") for index, row in enumerate(rows)]


def loss_and_gradients(model, rows, advantages, loss, *, token_budget, order=None, **how):
    """The step's loss and gradients before any update, by stopping the optimiser from applying them."""
    order = range(len(rows)) if order is None else order
    packs = pack_rows(
        [rows[k] for k in order],
        np.asarray(advantages)[list(order)],
        token_budget=token_budget,
        **how,
    )
    optimizer = Optimizer(model, lr=0.0, grad_norm_max=float("inf"))
    gradients = {}
    for name, weight in model.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda w, name=name: gradients.__setitem__(name, w.grad.clone()))
    return train_step(model, optimizer, packs, loss).loss, gradients


NORMALISATIONS = [
    {"normalise": "token"},
    {"normalise": "sequence"},
    {"normalise": "rollout"},
    {"normalise": "group"},
    {"normalise": "fixed", "fixed_length": 8},
]


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, {"normalise": "token"}) for name in LOSSES] + [("cispo", how) for how in NORMALISATIONS[1:]],
)
def test_a_step_has_the_loss_and_gradients_of_the_slow_twin(name, how):
    loss, row_loss = LOSSES[name]
    model = tiny_llama()
    rows = near_policy_rows(model)
    found, gradients = loss_and_gradients(model, rows, ADVANTAGES, loss, token_budget=40, **how)
    twin = as_float64(model)
    expected = step_loss(twin, rows, ADVANTAGES.tolist(), row_loss, **how)
    assert found == pytest.approx(float(expected.detach()), abs=2e-5)
    expected.backward()
    for weight_name, weight in twin.named_parameters():
        torch.testing.assert_close(gradients[weight_name].double(), weight.grad, rtol=2e-4, atol=2e-5, msg=weight_name)


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, {"normalise": "rollout"}) for name in LOSSES] + [("gspo", how) for how in NORMALISATIONS],
)
def test_loss_and_gradients_do_not_depend_on_packing(name, how):
    loss, _ = LOSSES[name]
    rows = near_policy_rows(tiny_llama())
    expected, expected_gradients = loss_and_gradients(tiny_llama(), rows, ADVANTAGES, loss, token_budget=1000, **how)
    for token_budget, order in ((27, None), (40, None), (40, [5, 3, 1, 0, 2, 4]), (1000, [4, 2, 0, 1, 3, 5])):
        found, gradients = loss_and_gradients(
            tiny_llama(), rows, ADVANTAGES, loss, token_budget=token_budget, order=order, **how
        )
        assert found == pytest.approx(expected, abs=1e-5)
        for weight_name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[weight_name], rtol=1e-4, atol=1e-5)


def test_a_row_with_advantage_zero_counts_in_the_denominator_only():
    model = tiny_llama()
    rows = near_policy_rows(model)
    alone, _ = loss_and_gradients(model, rows[:1], [1.0], cispo(), token_budget=1000)
    both, _ = loss_and_gradients(model, rows[:2], [1.0, 0.0], cispo(), token_budget=1000)
    trained = [int(row.trained.sum()) for row in rows[:2]]
    assert both == pytest.approx(alone * trained[0] / sum(trained), rel=1e-5)


def test_a_denominator_from_outside_is_used_as_it_is():
    model = tiny_llama()
    packs = pack_rows(near_policy_rows(model), ADVANTAGES, token_budget=1000)
    trained = sum(int(pack.trained_T.sum()) for pack in packs)
    own = train_step(model, Optimizer(model, lr=0.0), packs, sft)
    given = train_step(model, Optimizer(model, lr=0.0), packs, sft, denominator=2.0 * trained)
    assert given.loss == pytest.approx(own.loss / 2, rel=1e-6)


def test_steps_on_the_same_rows_lower_the_loss_and_the_metrics_say_what_was_done():
    model = tiny_llama()
    rows = make_rows(10, LENGTHS)
    packs = pack_rows(rows, np.ones(6), token_budget=30, temperature=1.0)
    optimizer = Optimizer(model, lr=3e-3)
    steps = [train_step(model, optimizer, packs, sft) for _ in range(15)]
    assert steps[-1].loss < steps[0].loss / 2
    first = steps[0]
    assert (first.num_rows, first.num_tokens, first.num_packs) == (6, sum(LENGTHS), len(packs))
    assert first.trained_tokens == sum(int(row.trained.sum()) for row in rows)
    assert first.applied and first.tokens_per_s > 0 and first.means["entropy"] > 0
    assert optimizer.updates == 15


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(where):
    model = tiny_llama()
    packs = pack_rows(make_rows(10, LENGTHS), ADVANTAGES, token_budget=30)
    optimizer = Optimizer(model, lr=1e-3, warmup_updates=5)
    train_step(model, optimizer, packs, sft)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    moments = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    lr = optimizer.lr

    def broken(inputs: LossInputs):
        if where == "loss":
            return inputs.logprobs_K * float("nan"), {}
        return (inputs.logprobs_K - inputs.logprobs_K.detach()).sqrt(), {}  # 0, and steeper than any number

    metrics = train_step(model, optimizer, packs, broken)
    assert not metrics.applied
    assert math.isfinite(metrics.loss) == (where == "gradient")
    assert (optimizer.updates, optimizer.skipped, optimizer.lr) == (1, 1, lr)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert all(torch.equal(tensor, moments[name]) for name, tensor in optimizer.tensors().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_a_step_without_trained_tokens_is_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match="0 packs hold 0 trained tokens"):
        train_step(model, Optimizer(model, lr=1e-3), [], sft)


def test_only_matrices_decay():
    model = tiny_llama()
    norms = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.ndim < 2}
    matrices = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.ndim >= 2}
    optimizer = Optimizer(model, lr=0.1, weight_decay=0.5)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, weight in model.named_parameters():
        expected = norms[name] if name in norms else matrices[name] * (1 - 0.1 * 0.5)
        torch.testing.assert_close(weight.detach(), expected)


def test_gradients_are_clipped_to_the_norm_and_the_old_norm_is_reported():
    model = tiny_llama()
    optimizer = Optimizer(model, lr=0.1, grad_norm_max=0.5)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    count = sum(weight.numel() for weight in model.parameters())
    assert optimizer.clip() == pytest.approx(count**0.5, rel=1e-5)
    clipped = sum(float(weight.grad.square().sum()) for weight in model.parameters() if weight.grad is not None)
    assert clipped**0.5 == pytest.approx(0.5, rel=1e-4)


def test_the_schedule_climbs_then_falls_as_named():
    def rates(schedule, updates):
        return [learning_rate(u, lr=1.0, warmup_updates=2, schedule=schedule, total_updates=12) for u in updates]

    assert rates("constant", (0, 1, 2, 50)) == [0.5, 1.0, 1.0, 1.0]
    assert rates("linear", (0, 1, 2, 7, 12, 50)) == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0, 0.0])
    assert rates("cosine", (0, 1, 2, 7, 12, 50)) == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0, 0.0])
    assert rates("cosine", (4,))[0] > rates("linear", (4,))[0]


def test_an_optimizer_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="needs a total_updates beyond the warm-up"):
        Optimizer(tiny_llama(), lr=1e-3, schedule="cosine")
    with pytest.raises(ValueError, match="is not known"):
        Optimizer(tiny_llama(), lr=1e-3, schedule="sawtooth")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="float32"):
        Optimizer(tiny_llama().bfloat16(), lr=1e-3)


def test_optimiser_state_of_another_model_is_refused_and_changes_nothing():
    model = tiny_llama()
    optimizer = Optimizer(model, lr=1e-3)
    train_step(model, optimizer, pack_rows(make_rows(10, LENGTHS), ADVANTAGES, token_budget=100), sft)
    before = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    for foreign in ({"head.bias/exp_avg": torch.zeros(3)}, {"model.norm.weight/exp_avg": torch.zeros(3)}):
        with pytest.raises(ValueError, match="this model has"):
            optimizer.load_tensors(foreign)
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.tensors().items())
