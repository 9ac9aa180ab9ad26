"""Each loss against a loop over tokens in float64, value and gradient, and what its metrics say."""

import math

import numpy as np
import pytest
import torch

from tests.reference import policy_step as reference
from trainer.optimize.losses import LossInputs, cispo, ppo_clip, reinforce, sft

CASES = {
    "sft": (sft, reference.sft_token),
    "ppo_clip": (ppo_clip(clip_low=0.2, clip_high=0.28), reference.ppo_clip_token(0.2, 0.28)),
    "cispo": (cispo(clip_low=0.3, clip_high=1.0), reference.cispo_token(0.3, 1.0)),
    "reinforce": (reinforce(ratio_max=1.5), reference.reinforce_token(1.5)),
}


def tokens(num_tokens=60):
    rng = np.random.default_rng(0)
    behaviour = -rng.exponential(2.0, num_tokens)
    current = behaviour + rng.normal(0, 0.5, num_tokens)
    current[:4] = behaviour[:4] + [15.0, -15.0, 12.0, -40.0]  # beyond the clamp
    advantages = rng.normal(0, 1, num_tokens)
    return torch.tensor(current, requires_grad=True), torch.tensor(behaviour), torch.tensor(advantages)


def inputs(current, behaviour, advantages):
    return LossInputs(current, behaviour, advantages, entropies_K=torch.full_like(behaviour, 0.25))


@pytest.mark.parametrize("name", CASES)
def test_a_loss_equals_the_loop_over_tokens(name):
    loss, token_loss = CASES[name]
    current, behaviour, advantages = tokens()
    found_K, _ = loss(inputs(current, behaviour, advantages))
    twin = current.detach().clone().requires_grad_()
    expected_K = torch.stack([token_loss(twin[k], float(behaviour[k]), float(advantages[k])) for k in range(len(twin))])
    torch.testing.assert_close(found_K, expected_K)
    found_K.sum().backward()
    expected_K.sum().backward()
    torch.testing.assert_close(current.grad, twin.grad)


@pytest.mark.parametrize("name", [name for name in CASES if name != "sft"])
def test_on_policy_every_loss_has_the_policy_gradient(name):
    current, _, advantages = tokens()
    loss_K, metrics = CASES[name][0](inputs(current, current.detach(), advantages))
    loss_K.sum().backward()
    torch.testing.assert_close(current.grad, -advantages)
    assert float(metrics["ratio"]) == len(current)
    assert metrics["clip_share"] == metrics["kl_k1"] == metrics["kl_k2"] == 0


@pytest.mark.parametrize("name", CASES)
def test_metrics_are_sums_that_add_over_parts(name):
    loss, _ = CASES[name]
    current, behaviour, advantages = tokens()
    _, whole = loss(inputs(current, behaviour, advantages))
    parts = [loss(inputs(current[s], behaviour[s], advantages[s]))[1] for s in (slice(0, 25), slice(25, None))]
    for key, value in whole.items():
        torch.testing.assert_close(sum(float(part[key].detach()) for part in parts), float(value.detach()))


def test_a_clipped_token_has_no_gradient_only_where_its_advantage_agrees():
    current = torch.tensor([1.0, 1.0, -1.0, -1.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss_K, metrics = ppo_clip()(inputs(current, torch.zeros(4), advantages))
    loss_K.sum().backward()
    assert (current.grad == 0).tolist() == [True, False, False, True]
    assert metrics["clip_share"] == 2


def test_cispo_keeps_the_gradient_of_every_token():
    current = torch.tensor([3.0, -3.0], requires_grad=True)
    loss_K, metrics = cispo(clip_low=1.0, clip_high=3.0)(inputs(current, torch.zeros(2), torch.ones(2)))
    loss_K.sum().backward()
    torch.testing.assert_close(current.grad, torch.tensor([-4.0, -math.exp(-3.0)]))
    assert metrics["clip_share"] == 1


def test_an_absurd_ratio_stays_finite():
    current = torch.tensor([0.0], requires_grad=True)
    for loss in (ppo_clip(), cispo(), reinforce()):
        loss_K, metrics = loss(inputs(current, torch.tensor([-1e4]), torch.tensor([-1.0])))
        assert torch.isfinite(loss_K).all()
        assert math.isfinite(float(metrics["ratio"]))


def test_the_mismatch_metrics_say_how_far_the_policy_moved():
    _, metrics = ppo_clip()(inputs(torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -1.0]), torch.ones(2)))
    assert float(metrics["kl_k1"]) == pytest.approx(-1 + 2)
    assert float(metrics["kl_k2"]) == pytest.approx((1 + 4) / 2)
    assert float(metrics["logprob_difference"]) == pytest.approx(1 + 2)
    assert float(metrics["entropy"]) == pytest.approx(0.5)


def test_limits_outside_their_range_are_refused():
    for bad in (
        lambda: ppo_clip(clip_low=1.5),
        lambda: cispo(clip_high=-0.1),
        lambda: reinforce(ratio_max=-1),
    ):
        with pytest.raises(ValueError, match="is outside"):
            bad()
