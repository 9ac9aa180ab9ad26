"""The same rows through TRL's GRPOTrainer (recorded, tests/reference/trl) and, packed, through ours.

Where we and TRL mean different things by a word:

    bnpo       TRL averages the tokens of each micro-batch, then micro-batches; ours is global, so that the number of
               packs cannot be seen. The two agree for one micro-batch, which is what was recorded
    grpo       a mean over rows of the mean over each row's tokens: normalise="sequence"
    dr_grpo    over rows x max_completion_length: normalise="fixed"
    cispo      TRL's epsilon_high is the greatest ratio itself, ours is what it may exceed 1 by. TRL has no lower clip
    gspo       loss_type="grpo" with importance_sampling_level="sequence"; its KL term stays a token's
    entropy    TRL's bonus is a mean over tokens whatever the loss is normalised by; ours goes with the loss, so the two
               agree where that is a mean over tokens
    delta      TRL's upper limit of the ratio is PPO's dual clip
    beta       TRL weights the KL term by the ratio unless told otherwise; Kl(importance_weighted=True)
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_bus.adapters import Row
from trainer.data.batch import Normalise, PackedBatch, pack_rows
from trainer.optimize import losses
from trainer.optimize.losses import Kl, Loss
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.step import train_step
from trainer.policy.attention import choose_backend
from trainer.policy.logprob import token_scores

FIXTURES = Path(__file__).parents[2] / "reference" / "trl" / "trl.npz"
TOKEN_BUDGET = 40  # the six rows make two packs or more
TOLERANCE = 1e-5  # absolute; what was promised is 1e-4, what is reached about 5e-7
with np.load(FIXTURES, allow_pickle=False) as recorded_arrays:
    ARRAYS = dict(recorded_arrays)
ABOUT: dict[str, Any] = json.loads(str(ARRAYS["about"]))

NORMALISE: dict[str, Normalise] = {
    "grpo": "sequence",
    "bnpo": "token",
    "dr_grpo": "fixed",
    "dapo": "token",
    "cispo": "token",
    "gspo": "sequence",
}


def model() -> LlamaForCausalLM:
    made = LlamaForCausalLM._from_config(LlamaConfig(**ABOUT["config"]), attn_implementation=choose_backend("rows"))
    flat, at = torch.from_numpy(ARRAYS["weights"]), 0
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(flat[at : at + weight.numel()].view_as(weight))
            at += weight.numel()
    assert at == len(flat)
    return made.eval()


def row_of(at: int, given: dict[str, Any]) -> Row:
    start = len(given["prompt"])
    trained = np.array([False] * start + [bool(flag) for flag in given["tool_mask"]])
    length = len(trained)
    return Row(
        rollout_id=f"r-{at}",
        attempt=1,
        group=f"g-{at // 2}",
        token_ids=np.array(given["prompt"] + given["completion"], np.int32),
        trained=trained,
        logprobs=of_trained(given, "old"),
        temperatures=np.full(length, ABOUT["temperature"], np.float32),
        version_oldest=0,
        version_newest=0,
        span_ids=(bytes(8),),
        advantages=np.full(length, given["advantage"], np.float32),
    )


def of_trained(given: dict[str, Any], name: str) -> np.ndarray:
    values = np.array([0.0] * len(given["prompt"]) + given[name], np.float32)
    return np.where([False] * len(given["prompt"]) + [bool(flag) for flag in given["tool_mask"]], values, 0)


def packs(normalise: Normalise = "token", fixed_length: int | None = None) -> list[PackedBatch]:
    rows = [row_of(at, given) for at, given in enumerate(ABOUT["rows"])]
    made = pack_rows(rows, token_budget=TOKEN_BUDGET, normalise=normalise, fixed_length=fixed_length)
    assert len(made) > 1
    return [pack.with_logprobs(reference_K=recorded(pack, "reference")) for pack in made]


def recorded(pack: PackedBatch, name: str) -> torch.Tensor:
    """(K,) what was recorded of the scored tokens of a pack, in its order."""
    given = [ABOUT["rows"][at] for at in pack.row_indices]
    values = [value for row in given for value, flag in zip(row[name], row["tool_mask"], strict=True) if flag]
    return torch.tensor(values)


def loss_of(case: str, options: dict[str, Any]) -> tuple[Loss, dict[str, Any]]:
    """What TRL's options are in ours: the loss, and how it is normalised."""
    name = case.split("_kl")[0]
    low, high = options.get("epsilon", 0.2), options["epsilon_high"]
    if options["loss_type"] == "cispo":
        policy = losses.cispo(clip_low=1.0, clip_high=high - 1)
    else:
        level = options.get("importance_sampling_level", "token")
        policy = losses.ppo_clip(clip_low=low, clip_high=high, dual_clip=options.get("delta"), level=level)
    beta, masked = options.get("beta", 0.0), options.get("off_policy_mask_threshold")
    weighted = options.get("use_bias_correction_kl", False)
    made = losses.compose(
        policy,
        corrections=[] if masked is None else [losses.off_policy_mask(delta=masked)],
        kl=Kl(coefficient=beta, kind="k3", importance_weighted=weighted) if beta else None,
        entropy_bonus=options.get("entropy_coef", 0.0),
    )
    normalise = NORMALISE.get(name, "token")
    fixed = options["max_completion_length"] if normalise == "fixed" else None
    return made, {"normalise": normalise, "fixed_length": fixed}


@cache
def ours(case: str) -> tuple[float, np.ndarray]:
    """The loss, and all gradients in one vector."""
    loss, normalised = loss_of(case, ABOUT["cases"][case]["options"])
    policy, gradients = model(), {}
    optimizer = Optimizer(policy, lr=0.0, grad_norm_max=float("inf"))
    for name, weight in policy.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda w, name=name: gradients.__setitem__(name, w.grad.clone()))
    metrics = train_step(policy, optimizer, packs(**normalised), loss)
    return metrics.loss, torch.cat([gradients[name].flatten() for name, _ in policy.named_parameters()]).numpy()


def test_packed_logprobs_and_entropies_are_those_of_trl():
    policy = model()
    for pack in packs():
        with torch.no_grad():
            scores = token_scores(policy, pack)
        torch.testing.assert_close(scores.logprobs_K, recorded(pack, "current"), atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(scores.entropies_K, recorded(pack, "entropies"), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", ABOUT["cases"])
def test_loss_and_gradients_are_those_of_trl(case):
    loss, gradients = ours(case)
    assert loss == pytest.approx(ABOUT["cases"][case]["loss"], abs=TOLERANCE)
    np.testing.assert_allclose(gradients, ARRAYS[case], atol=TOLERANCE, rtol=0)
    assert np.abs(gradients).max() > 0.05, "gradients this small would agree with anything"


def test_each_case_has_a_gradient_of_its_own():
    """Else an option that does nothing would go unseen. bnpo and dapo are one thing in a single micro-batch."""
    names = [case for case in ABOUT["cases"] if not case.startswith("bnpo")]
    for at, one in enumerate(names):
        for other in names[at + 1 :]:
            assert np.abs(ARRAYS[one] - ARRAYS[other]).max() > 1e-3, (one, other)
