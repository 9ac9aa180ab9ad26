"""Each loss against a loop over rows and tokens in float64, value and gradient, and what theory says of one and another."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import losses as reference
from trainer.optimize.losses import (
    NAMED,
    Kl,
    KlShaping,
    LossInputs,
    add_metrics,
    cispo,
    compose,
    dapo,
    dppo,
    dr_grpo,
    geometric_mask,
    grpo,
    gspo,
    icepop,
    mean_metrics,
    off_policy_mask,
    ppo_clip,
    reinforce,
    sft,
    tis,
)

LENGTHS = [7, 1, 19, 3, 12, 18]
INFINITY = math.inf
GEOMETRIC = {"low": 0.95, "high": 1.08}

# Limits lie where the tokens below do, so that every branch is taken on some of them.
CASES = {
    "sft": (sft, reference.sft),
    "ppo_clip": (ppo_clip(clip_low=0.2, clip_high=0.28), reference.ppo_clip(0.2, 0.28)),
    "dual_clip": (ppo_clip(clip_high=0.2, dual_clip=1.5), reference.ppo_clip(0.2, 0.2, 1.5)),
    "gspo": (gspo(clip_low=0.02, clip_high=0.03), reference.ppo_clip(0.02, 0.03, level="sequence")),
    "gspo_token": (
        gspo(clip_low=0.02, clip_high=0.03, level="sequence_token"),
        reference.ppo_clip(0.02, 0.03, level="sequence_token"),
    ),
    "cispo": (cispo(clip_low=0.3, clip_high=1.0), reference.weighted(0.7, 2.0)),
    "cispo_sequence": (
        cispo(clip_low=0.02, clip_high=0.03, level="sequence"),
        reference.weighted(0.98, 1.03, "sequence"),
    ),
    "reinforce": (reinforce(ratio_max=1.5), reference.weighted(0.0, 1.5)),
    "reinforce_sequence": (reinforce(ratio_max=1.01, level="sequence"), reference.weighted(0.0, 1.01, "sequence")),
    "reinforce_plain": (reinforce(ratio_max=None), reference.plain),
    "dppo_tv": (dppo(mask_low=0.05, mask_high=0.1), reference.dppo("tv", 0.05, 0.1, 20.0)),
    "dppo_kl": (
        dppo(divergence="kl", mask_low=0.01, mask_high=0.02, ratio_max=1.5),
        reference.dppo("kl", 0.01, 0.02, 1.5),
    ),
    "tis": (compose(reinforce(ratio_max=None), corrections=[tis(cap=1.5)]), reference.weighted(0.0, 1.5)),
    "tis_sequence": (
        compose(reinforce(ratio_max=None), corrections=[tis(cap=1.5, level="sequence")]),
        reference.composed(reference.plain, reference.tis(1.5, "sequence")),
    ),
    "icepop_beside_a_ratio": (
        compose(grpo(clip=0.3), corrections=[icepop(low=0.8, high=1.3)]),
        reference.composed(reference.ppo_clip(0.3, 0.3), reference.icepop(0.8, 1.3, "token", False)),
    ),
    "icepop_alone": (
        compose(reinforce(ratio_max=None), corrections=[icepop(low=0.5, high=2.0, level="sequence")]),
        reference.composed(reference.plain, reference.icepop(0.5, 2.0, "sequence", True)),
    ),
    "masks": (
        compose(dapo(), corrections=[geometric_mask(**GEOMETRIC), off_policy_mask(delta=0.02)]),
        reference.composed(
            reference.ppo_clip(0.2, 0.28),
            reference.both(reference.geometric_mask(**GEOMETRIC), reference.off_policy_mask(0.02)),
        ),
    ),
    "everything": (
        compose(
            cispo(clip_high=1.0),
            corrections=[icepop(low=0.7, high=1.5), geometric_mask(**GEOMETRIC)],
            kl=Kl(coefficient=0.3, kind="k3", importance_weighted=True),
            entropy_bonus=0.1,
        ),
        reference.composed(
            reference.weighted(0.0, 2.0),
            reference.both(reference.icepop(0.7, 1.5, "token", False), reference.geometric_mask(**GEOMETRIC)),
            reference.kl(0.3, "k3", weight="with gradient"),
            entropy_bonus=0.1,
        ),
    ),
    "kl_k3": (
        compose(grpo(), kl=Kl(coefficient=0.3, kind="k3")),
        reference.composed(reference.ppo_clip(0.2, 0.2), kl=reference.kl(0.3, "k3")),
    ),
    "kl_k2": (
        compose(grpo(), kl=Kl(coefficient=0.3, importance_weighted=True)),
        reference.composed(reference.ppo_clip(0.2, 0.2), kl=reference.kl(0.3, "k2", weight="number")),
    ),
    "kl_to_behaviour": (
        compose(dppo(), kl=Kl(coefficient=0.002, to="behaviour")),
        reference.composed(reference.dppo("tv", 0.2, 0.2, 20.0), kl=reference.kl(0.002, "k2", "behaviour")),
    ),
    "kl_shaping": (
        compose(cispo(), kl=KlShaping(coefficient=0.4)),
        reference.composed(reference.weighted(0.0, 4.0), shaping=lambda token: 0.4 * (token.now - token.reference)),
    ),
}
DECOUPLED = {  # with proximal log-probs, corrections are of proximal / behaviour and may weigh beside any policy term
    "ppo_clip": CASES["ppo_clip"],
    "gspo": CASES["gspo"],
    "cispo": CASES["cispo"],
    "dppo_tv": CASES["dppo_tv"],
    "tis": (
        compose(ppo_clip(), corrections=[tis(cap=1.2), geometric_mask(**GEOMETRIC)]),
        reference.composed(
            reference.ppo_clip(0.2, 0.28),
            reference.both(reference.tis(1.2, "token"), reference.geometric_mask(**GEOMETRIC)),
        ),
    ),
    "icepop": (
        compose(gspo(clip_low=0.02, clip_high=0.03), corrections=[icepop(low=0.8, high=1.3)]),
        reference.composed(reference.ppo_clip(0.02, 0.03, level="sequence"), reference.icepop(0.8, 1.3, "token", True)),
    ),
    "icepop_beside_dppo": (  # whose weight is current / behaviour: proximal / behaviour is in it
        compose(dppo(mask_low=0.05, mask_high=0.1), corrections=[icepop(low=0.8, high=1.3)]),
        reference.composed(reference.dppo("tv", 0.05, 0.1, 20.0), reference.icepop(0.8, 1.3, "token", False)),
    ),
    "off_policy_mask": (
        compose(cispo(clip_low=0.3, clip_high=1.0), corrections=[off_policy_mask(delta=0.02)]),
        reference.composed(reference.weighted(0.7, 2.0), reference.off_policy_mask(0.02)),
    ),
}


def batch(lengths=LENGTHS, *, proximal=False, seed=0, absurd=True):
    """One pack in float64: rows that drifted by different amounts, some tokens absurdly, advantages by token."""
    rng = np.random.default_rng(seed)
    num_tokens = sum(lengths)
    row = np.repeat(np.arange(len(lengths)), lengths)
    behaviour = -rng.exponential(0.7, num_tokens) - 1e-3
    current = np.minimum(behaviour + rng.normal(0, 0.3, num_tokens) + rng.normal(0, 0.08, len(lengths))[row], -1e-4)
    if absurd:
        current[8:11] = behaviour[8:11] - [15.0, 12.0, 40.0]
        behaviour[20] = -30.0
    others = current + rng.normal(0, 0.4, (2, num_tokens))
    return LossInputs(
        logprobs_K=torch.tensor(current, requires_grad=True),
        behaviour_logprobs_K=torch.tensor(behaviour),
        advantages_K=torch.tensor(rng.normal(0, 1, num_tokens)),
        entropies_K=torch.tensor(rng.exponential(1, num_tokens), requires_grad=True),
        row_K=torch.tensor(row),
        num_rows=len(lengths),
        staleness_K=torch.tensor(rng.integers(-1, 7, len(lengths))[row]),
        reference_logprobs_K=torch.tensor(others[0]),
        proximal_logprobs_K=torch.tensor(others[1]) if proximal else None,
    )


def simple(current, behaviour, advantages, rows=None):
    current, behaviour, advantages = (torch.as_tensor(x, dtype=torch.float64) for x in (current, behaviour, advantages))
    return LossInputs(
        logprobs_K=current.requires_grad_(),
        behaviour_logprobs_K=behaviour,
        advantages_K=advantages,
        entropies_K=torch.full_like(behaviour, 0.25).requires_grad_(),
        row_K=torch.arange(len(current)) if rows is None else torch.tensor(rows),
        num_rows=len(current) if rows is None else max(rows) + 1,
    )


def on_policy(inputs):
    return replace(inputs, behaviour_logprobs_K=inputs.logprobs_K.detach(), proximal_logprobs_K=None)


def part(inputs, rows):
    """These rows of a pack as a pack of their own, in that order."""
    at_K = torch.cat([torch.nonzero(inputs.row_K == row).squeeze(-1) for row in rows])
    lengths = [int((inputs.row_K == row).sum()) for row in rows]
    columns = ("logprobs_K", "behaviour_logprobs_K", "advantages_K", "entropies_K", "staleness_K")
    return at_K, LossInputs(
        **{name: getattr(inputs, name)[at_K] for name in columns},
        row_K=torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths)),
        num_rows=len(rows),
        reference_logprobs_K=inputs.reference_logprobs_K[at_K],
        proximal_logprobs_K=None if inputs.proximal_logprobs_K is None else inputs.proximal_logprobs_K[at_K],
    )


def gradient(loss_K, inputs, weights_K=None):
    total = (loss_K if weights_K is None else loss_K * weights_K).sum()
    found = torch.autograd.grad(total, (inputs.logprobs_K, inputs.entropies_K), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(inputs.advantages_K) if one is None else one for one in found]


def by_the_twin(row_loss, inputs):
    """(K,) losses by the slow twin, with their own leaves in place of the inputs'."""
    logprobs = [value.detach().clone().requires_grad_() for value in inputs.logprobs_K]
    entropies = [value.detach().clone().requires_grad_() for value in inputs.entropies_K]
    losses = []
    for row in range(inputs.num_rows):
        losses += row_loss(
            [
                reference.Token(
                    logprobs[k],
                    float(inputs.behaviour_logprobs_K[k]),
                    float(inputs.advantages_K[k]),
                    entropies[k],
                    float(inputs.reference_logprobs_K[k]),
                    None if inputs.proximal_logprobs_K is None else float(inputs.proximal_logprobs_K[k]),
                )
                for k in torch.nonzero(inputs.row_K == row).squeeze(-1).tolist()
            ]
        )
    return torch.stack(losses), logprobs, entropies


TAME = {"kl_k3", "kl_k2", "kl_to_behaviour", "kl_shaping", "everything", "dppo_kl"}  # their twins clamp nothing


BOTH = [(name, False) for name in CASES] + [(name, True) for name in DECOUPLED]


@pytest.mark.parametrize(("name", "proximal"), BOTH)
def test_a_loss_equals_the_loop_over_tokens(name, proximal):
    loss, row_loss = (DECOUPLED if proximal else CASES)[name]
    inputs = batch(proximal=proximal, absurd=name not in TAME)
    found_K, _ = loss(inputs)
    expected_K, logprobs, entropies = by_the_twin(row_loss, inputs)
    torch.testing.assert_close(found_K, expected_K)
    weights_K = torch.linspace(0.5, 2, len(found_K), dtype=torch.float64)
    ours = gradient(found_K, inputs, weights_K)
    theirs = torch.autograd.grad((expected_K * weights_K).sum(), logprobs + entropies, allow_unused=True)
    theirs_K = torch.stack([torch.zeros((), dtype=torch.float64) if one is None else one for one in theirs])
    torch.testing.assert_close(torch.cat(ours), theirs_K)


POLICY_GRADIENTS = {
    name: case[0] for name, case in CASES.items() if name != "sft" and "kl" not in name and name != "everything"
}


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_on_policy_every_loss_has_the_gradient_of_reinforce(name):
    inputs = on_policy(batch())
    # GSPO gives each token the mean of its row's advantages, so there they are equal within a row.
    inputs = replace(inputs, advantages_K=inputs.row_means(inputs.advantages_K))
    loss_K, metrics = POLICY_GRADIENTS[name](inputs)
    torch.testing.assert_close(gradient(loss_K, inputs)[0], -inputs.advantages_K)
    assert float(metrics["ratio"]) == pytest.approx(len(loss_K))
    for metric in ("clip_share", "kl_k1", "kl_k2", "kl_k3", "logprob_difference", "masked_share"):
        assert float(metrics.get(metric, 0.0)) == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=20)  # each compares a dozen losses
@given(st.integers(0, 100), st.booleans())
def test_one_loss_equals_another_where_theory_says_so(seed, proximal):
    def same(first, second, inputs):
        (one_K, _), (other_K, _) = first(inputs), second(inputs)
        torch.testing.assert_close(one_K, other_K)
        torch.testing.assert_close(gradient(one_K, inputs)[0], gradient(other_K, inputs)[0])

    inputs = batch([4, 1, 6], seed=seed, proximal=proximal, absurd=False)
    one_token_rows = batch([1] * 11, seed=seed, proximal=proximal, absurd=False)
    by_row, by_token = (gspo(clip_low=0.1, clip_high=0.1, level=level) for level in ("sequence", "sequence_token"))
    same(by_row, grpo(clip=0.1), one_token_rows)
    same(by_token, grpo(clip=0.1), one_token_rows)
    same(dr_grpo(clip=0.1), ppo_clip(clip_low=0.1, clip_high=0.1), inputs)
    same(cispo(clip_low=1.0, clip_high=1.0), reinforce(ratio_max=2.0), inputs)
    same(compose(dapo()), dapo(), inputs)
    same(compose(dapo(), corrections=[geometric_mask(low=0, high=INFINITY)], kl=Kl(coefficient=0.0)), dapo(), inputs)
    positive = replace(inputs, advantages_K=inputs.advantages_K.abs())
    same(ppo_clip(clip_high=0.1, dual_clip=1.2), ppo_clip(clip_high=0.1), positive)
    truncated = compose(reinforce(ratio_max=None), corrections=[tis(cap=INFINITY)])
    same(truncated, compose(reinforce(ratio_max=None), corrections=[icepop(low=0, high=INFINITY)]), inputs)
    if not proximal:
        same(compose(reinforce(ratio_max=None), corrections=[tis()]), reinforce(ratio_max=2.0), inputs)
    flat = replace(inputs, advantages_K=inputs.row_means(inputs.advantages_K))
    same_gradient = [gradient(loss(flat)[0], flat)[0] for loss in (by_row, by_token)]
    torch.testing.assert_close(*same_gradient)


@settings(max_examples=40)
@given(st.permutations(range(6)), st.integers(1, 6), st.sampled_from(BOTH))
def test_neither_losses_nor_gradients_nor_metrics_depend_on_how_rows_share_packs(order, cut, case):
    name, proximal = case
    loss = (DECOUPLED if proximal else CASES)[name][0]
    inputs = batch(proximal=proximal)
    whole_K, whole = loss(inputs)
    expected = gradient(whole_K, inputs)
    found_K = torch.zeros_like(whole_K)
    totals = {}
    gradients = [torch.zeros_like(whole_K), torch.zeros_like(whole_K)]
    for rows in (order[:cut], order[cut:]):
        if rows:
            at_K, piece = part(inputs, rows)
            loss_K, metrics = loss(piece)
            found_K[at_K] = loss_K.detach()
            gradients = [a + b for a, b in zip(gradients, gradient(loss_K, inputs), strict=True)]
            add_metrics(totals, metrics)
    torch.testing.assert_close(found_K, whole_K.detach())
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert totals.keys() == whole.keys()
    for key, value in whole.items():
        assert not totals[key].requires_grad
        torch.testing.assert_close(totals[key], value.detach())


@pytest.mark.parametrize(
    ("name", "options", "behaviour_is_current", "of"),
    [
        ("k2", {}, True, "reverse"),
        ("k3", {}, True, "forward"),
        ("k1", {"importance_weighted": True}, False, "reverse"),
        ("k2", {"importance_weighted": True}, False, "reverse"),
        ("k3", {"importance_weighted": True}, False, "reverse"),
    ],
)
def test_the_expected_gradient_of_a_kl_term_is_what_its_docstring_says(name, options, behaviour_is_current, of):
    """Summed over the whole of a small vocabulary, as often as the behaviour would sample each word."""
    logits_V, others_2V = (
        torch.randn(7, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 7, dtype=torch.float64),
    )
    current_V = logits_V.log_softmax(-1)
    reference_V, behaviour_V = others_2V.log_softmax(-1)
    if behaviour_is_current:
        behaviour_V = current_V.detach()
    inputs = replace(simple(current_V.detach(), behaviour_V, torch.zeros(7)), reference_logprobs_K=reference_V)
    inputs = replace(inputs, logprobs_K=current_V)
    expected_loss = (behaviour_V.exp() * Kl(coefficient=1.0, kind=name, **options).loss(inputs)).sum()
    (found_V,) = torch.autograd.grad(expected_loss, logits_V, retain_graph=True)
    reverse = (current_V.exp() * (current_V - reference_V)).sum()
    forward = (reference_V.exp() * (reference_V - current_V)).sum()
    (wanted_V,) = torch.autograd.grad(reverse if of == "reverse" else forward, logits_V)
    torch.testing.assert_close(found_V, wanted_V)
    if name != "k2":
        torch.testing.assert_close(expected_loss, reverse)  # k1 and k3 are also right in value


def test_kl_shaping_has_on_average_the_gradient_of_kl():
    logits_V, reference_V = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
    current_V, reference_V = logits_V.log_softmax(-1), reference_V.log_softmax(-1)
    inputs = replace(simple(current_V.detach(), current_V.detach(), torch.zeros(7)), reference_logprobs_K=reference_V)
    inputs = replace(inputs, logprobs_K=current_V)
    loss_K, _ = compose(reinforce(ratio_max=None), kl=KlShaping(coefficient=1.0))(inputs)
    (found_V,) = torch.autograd.grad((current_V.detach().exp() * loss_K).sum(), logits_V, retain_graph=True)
    (wanted_V,) = torch.autograd.grad((current_V.exp() * (current_V - reference_V)).sum(), logits_V)
    torch.testing.assert_close(found_V, wanted_V)


def test_a_clipped_token_has_no_gradient_only_where_its_advantage_agrees():
    inputs = simple([1.0, 1.0, -1.0, -1.0], torch.zeros(4), [1.0, -1.0, 1.0, -1.0])
    loss_K, metrics = ppo_clip()(inputs)
    assert (gradient(loss_K, inputs)[0] == 0).tolist() == [True, False, False, True]
    assert (metrics["clip_high_share"], metrics["clip_low_share"], metrics["clip_share"]) == (1, 1, 2)


def test_cispo_keeps_the_gradient_of_every_token_and_tells_which_it_held():
    inputs = simple([3.0, -3.0, 0.1], torch.zeros(3), [1.0, 1.0, 1.0])
    loss_K, metrics = cispo(clip_low=0.5, clip_high=3.0)(inputs)
    torch.testing.assert_close(gradient(loss_K, inputs)[0], torch.tensor([-4.0, -0.5, -math.exp(0.1)]).double())
    assert (metrics["clip_high_share"], metrics["clip_low_share"], metrics["clip_share"]) == (1, 1, 2)
    assert cispo()(inputs)[1]["clip_low_share"] == 0


def test_dual_clip_stops_a_bad_token_that_became_likely():
    inputs = simple([2.0, 0.5, 2.0], torch.zeros(3), [-1.0, -1.0, 1.0])
    loss_K, metrics = ppo_clip(dual_clip=3.0)(inputs)
    torch.testing.assert_close(loss_K.detach(), torch.tensor([3.0, math.exp(0.5), -1.28], dtype=torch.float64))
    assert (gradient(loss_K, inputs)[0] == 0).tolist() == [True, False, True]
    assert metrics["clip_high_share"] == 2


def test_dppo_masks_by_probability_where_ppo_masks_by_ratio():
    rare_doubled, sure_fell = (math.log(0.002), math.log(0.001)), (math.log(0.7), math.log(0.99))
    inputs = simple([rare_doubled[0], sure_fell[0]], [rare_doubled[1], sure_fell[1]], [1.0, -1.0])
    for loss in (dppo(), dppo(divergence="kl")):
        assert (gradient(loss(inputs)[0], inputs)[0] == 0).tolist() == [False, True]
    assert (gradient(ppo_clip(clip_low=0.3)(inputs)[0], inputs)[0] == 0).tolist() == [True, False]


def test_what_is_dropped_is_counted_and_stays_in_the_denominator():
    inputs = simple([0.0, 0.0, -3.0, 0.2], torch.zeros(4), torch.ones(4), rows=[0, 0, 1, 1])
    loss_K, metrics = compose(cispo(), corrections=[geometric_mask(low=0.9, high=1.1)])(inputs)
    assert (loss_K == 0).tolist() == [True, True, True, True]  # the first two because log π = 0
    assert (gradient(loss_K, inputs)[0] == 0).tolist() == [False, False, True, True]
    assert (metrics["masked_share"], metrics["correction"]) == (2, 2)


def test_no_gradient_flows_through_a_correction():
    inputs = batch(absurd=False)
    loss_K, _ = compose(reinforce(ratio_max=None), corrections=[tis(level="sequence")])(inputs)
    alone_K, _ = reinforce(ratio_max=None)(inputs)
    weight_K = (loss_K / alone_K).detach()
    torch.testing.assert_close(gradient(loss_K, inputs)[0], weight_K * gradient(alone_K, inputs)[0])


def test_an_absurd_ratio_stays_finite():
    for proximal in (False, True):
        inputs = batch(proximal=proximal)
        for loss, _ in (DECOUPLED if proximal else CASES).values():
            loss_K, metrics = loss(inputs)
            assert torch.isfinite(loss_K).all()
            assert all(torch.isfinite(one).all() for one in gradient(loss_K, inputs))
            assert all(math.isfinite(float(value)) for value in metrics.values())


def test_a_nan_is_never_swallowed():
    """Not even by a mask. What a policy term has no use for, it may be told."""
    for name, (loss, _) in CASES.items():
        for column in ("logprobs_K", "behaviour_logprobs_K")[: 1 if name in ("sft", "reinforce_plain") else 2]:
            inputs = batch(absurd=False)
            poisoned_K = getattr(inputs, column).detach().clone()
            poisoned_K[3] = math.nan
            loss_K, _ = loss(replace(inputs, **{column: poisoned_K}))
            assert math.isnan(float(loss_K.detach().sum())), (name, column)


def test_metrics_tell_numerics_from_policy_lag():
    inputs = simple([-1.0, -3.0, -2.0, -2.0], [-2.0, -1.0, -2.5, -2.0], torch.ones(4))
    inputs = replace(inputs, staleness_K=torch.tensor([0, 2, -1, 9]))
    _, metrics = ppo_clip()(inputs)
    means = mean_metrics({name: float(value) for name, value in metrics.items()}, 4)
    assert means["kl_k1"] == pytest.approx((-1 + 2 - 0.5) / 4)
    assert means["kl_k2"] == pytest.approx((1 + 4 + 0.25) / 2 / 4)
    assert means["kl_k3"] == pytest.approx((math.e - 2 + math.exp(-2) + 1 + math.exp(0.5) - 1.5) / 4)
    assert means["logprob_difference"] == pytest.approx(3.5 / 4)
    assert means["logprob_difference_max"] == 2
    assert means["ratio_max"] == pytest.approx(math.e)
    assert means["entropy"] == pytest.approx(0.25)
    by_staleness = {name: value for name, value in means.items() if "_staleness_" in name}
    expected = {"0": (1.0, 0.5), "2": (2.0, 2.0), "unknown": (0.5, 0.125), "4_up": (0.0, 0.0)}
    for age, (difference, k2) in expected.items():
        assert by_staleness.pop(f"share_staleness_{age}") == 0.25
        assert by_staleness.pop(f"logprob_difference_staleness_{age}") == pytest.approx(difference)
        assert by_staleness.pop(f"kl_k2_staleness_{age}") == pytest.approx(k2)
    assert not by_staleness


def test_the_reference_is_reported_as_soon_as_there_is_one():
    inputs = replace(
        simple([-1.0, -3.0], torch.zeros(2), torch.ones(2)), reference_logprobs_K=torch.tensor([-2.0, -3.0])
    )
    for loss in (cispo(), compose(cispo(), kl=KlShaping(coefficient=0.1))):
        _, metrics = loss(inputs)
        assert float(metrics["reference_kl_k1"]) == pytest.approx(1.0)
        assert float(metrics["reference_kl_k2"]) == pytest.approx(0.5)
        assert float(metrics["reference_kl_k3"]) == pytest.approx(math.exp(-1))


def test_every_named_loss_can_be_made():
    inputs = batch()
    for named in NAMED.values():
        assert torch.isfinite(named.make()(inputs)[0]).all()


def test_what_cannot_be_meant_is_refused():
    for bad, message in (
        (lambda: ppo_clip(clip_low=1.5), "clip_low=1.5 is outside"),
        (lambda: ppo_clip(dual_clip=1.2), "dual_clip=1.2 is not above"),
        (lambda: ppo_clip(level="row"), "level='row' is not known"),  # pyright: ignore[reportArgumentType]
        (lambda: cispo(clip_high=-0.1), "clip_high=-0.1 is outside"),
        (lambda: reinforce(ratio_max=-1), "ratio_max=-1 is outside"),
        (lambda: dppo(mask_low=-0.1), "mask_low=-0.1 is outside"),
        (lambda: icepop(low=2.0, high=1.0), "high=1.0 is outside"),
        (lambda: Kl(coefficient=-1.0), "coefficient=-1.0 is outside"),
        (lambda: Kl(coefficient=1.0, kind="k1"), "k1 as a loss has a gradient of zero"),
        (lambda: compose(cispo(), entropy_bonus=-1.0), "entropy_bonus=-1.0 is outside"),
        (lambda: compose(cispo(), corrections=[tis(), icepop()]), "2 corrections weigh by the same ratio"),
        (lambda: compose(cispo(), corrections=[tis()])(batch()), "tis would count it twice"),
        (lambda: compose(dppo(), corrections=[tis()]), "whatever proximal log-probs there are"),
        (
            lambda: compose(cispo(), kl=Kl(coefficient=0.1))(replace(batch(), reference_logprobs_K=None)),
            "needs reference_logprobs_K",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
