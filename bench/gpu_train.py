"""bench.gpu's training: whole steps of Qwen3's shapes with random weights, as train_step takes them.

What always holds: before a shape is timed, two of its layers compute log-probs and gradients in 16 bits that are those of
float32 with the plainest attention; a case is timed from packs to updated weights, in the order of their worth, since the
phase's time may end.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bench.gpu_parts import DisagreesError, Here, check_close
from lightning_bus.adapters import Row
from trainer.data.batch import PackedBatch, pack_rows
from trainer.optimize.losses import dapo
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.step import StepMetrics, train_step
from trainer.policy.attention import BACKENDS, choose_backend
from trainer.policy.logprob import token_scores
from trainer.policy.lora import add_adapter
from trainer.policy.precision import checkpoint_activations, forward_precision

# K scored tokens.


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    intermediate: int
    vocabulary: int = 151_936


SHAPES = {
    "0.6B": Shape(28, 1024, 16, 8, 128, 3072),
    "4B": Shape(36, 2560, 32, 8, 128, 9728),
}
TINY_SHAPES = {
    "0.6B": Shape(2, 32, 4, 2, 8, 48, vocabulary=128),
    "4B": Shape(3, 32, 4, 1, 8, 64, vocabulary=128),
}
RANK = 16
MFU_PEAK_FLOPS_PER_S = 989e12  # dense bfloat16, H100 SXM and H200; prime-rl's figures are over the same


@dataclass(frozen=True)
class Case:
    """One step.

    row_tokens  how long the rows of a micro-batch are; one row, as prime-rl's fake data is, unless given
    head        the head's operands: "tf32" rounds them as the matrix units do, still with more bits than the 16-bit head
                of those it is compared with; "float32" is exact and slow
    """

    size: str
    form: str  # "full", or "lora16"
    tokens: int  # of a micro-batch
    recompute: bool
    micro_batches: int = 2
    row_tokens: int | None = None
    head: Literal["tf32", "float32"] = "tf32"
    needs_s: float = 20.0  # for building the model, one step to warm up and one to time

    @property
    def name(self) -> str:
        rows = f"/rows_of_{self.row_tokens}" if self.row_tokens else ""
        head = "" if self.head == "tf32" else f"/head_{self.head}"
        return f"{self.size}/{self.form}/{self.tokens // 1000}k/{'recompute' if self.recompute else 'keep'}{rows}{head}"


K16, K65 = 16_384, 65_536
CASES = (
    Case("0.6B", "full", K16, recompute=True),
    Case("0.6B", "full", K65, recompute=True, needs_s=45),
    Case("0.6B", "lora16", K16, recompute=True),
    Case("4B", "lora16", K16, recompute=True, needs_s=30),
    Case("0.6B", "full", K16, recompute=False),
    Case("0.6B", "full", K16, recompute=True, head="float32"),
    Case("0.6B", "full", K16, recompute=False, micro_batches=8, row_tokens=1024, needs_s=25),
    Case("0.6B", "full", K65, recompute=False, needs_s=45),
    Case("4B", "lora16", K65, recompute=True, needs_s=90),
    Case("4B", "lora16", K16, recompute=False, needs_s=30),
    Case("4B", "lora16", K65, recompute=False, needs_s=70),
)


def train(here: Here) -> Iterator[dict[str, Any]]:
    shapes = TINY_SHAPES if here.tiny else SHAPES
    backend = choose_backend("auto", device=here.device, dtype=here.dtype)
    agreed: set[str] = set()
    for size, shape in shapes.items():
        row = here.case(f"{size}/agreement", lambda s=shape: agreement(here, s, backend))
        if "error" not in row:
            agreed.add(size)
        yield row
    for case in CASES:
        if case.size not in agreed:
            yield {"case": case.name, "error": "not timed, for its shape disagrees with the reference"}
            continue
        wanted = tiny(case) if here.tiny else case
        row = here.case(
            case.name,
            lambda c=wanted, s=shapes[case.size]: timed_steps(here, c, s, backend),
            needs_s=1.0 if here.tiny else case.needs_s,
        )
        yield {**row, "attention": backend}


def tiny(case: Case) -> Case:
    return replace(case, tokens=case.tokens // 256, row_tokens=case.row_tokens and case.row_tokens // 64)


def timed_steps(here: Here, case: Case, shape: Shape, backend: str) -> dict[str, Any]:
    torch.set_float32_matmul_precision("high" if case.head == "tf32" else "highest")
    model = build(shape, here.device, backend)
    if case.form == "lora16":
        add_adapter(model, RANK)
    forward_precision(model, here.dtype)
    if case.recompute:
        checkpoint_activations(model)
    optimizer = Optimizer(model, lr=1e-6)
    length = case.row_tokens or case.tokens
    rows = make_rows([length] * (case.micro_batches * case.tokens // length), shape.vocabulary)
    packs = pack_rows(rows, token_budget=case.tokens)
    train_step(model, optimizer, packs[:1], dapo())
    here.clean()
    steps: list[StepMetrics] = []
    while len(steps) < (1 if here.tiny else 3):
        steps.append(train_step(model, optimizer, packs, dapo()))
        if here.left_s() < 2 * steps[-1].step_s + 5.0:  # leave time for the next case to say that it has none
            break
    best = sorted(steps, key=lambda step: step.step_s)[len(steps) // 2]
    if not best.applied:
        raise DisagreesError(f"the step was skipped: loss {best.loss}, gradient norm {best.grad_norm}")
    flops_per_s = best.flops / best.step_s
    return {
        "tokens": best.num_tokens,
        "micro_batches": len(packs),
        "n": len(steps),
        "tokens_per_s": round(best.tokens_per_s, 1),
        "spread": [round(q(step.tokens_per_s for step in steps), 1) for q in (min, max)],
        "mfu_percent": round(100 * flops_per_s / MFU_PEAK_FLOPS_PER_S, 2) if here.device.type == "cuda" else None,
        "forward_s": round(best.forward_s, 4),
        "backward_s": round(best.backward_s, 4),
        "update_s": round(best.update_s, 4),
        "peak_bytes": best.peak_bytes,
        "trained_parameters": sum(weight.numel() for weight in optimizer.parameters.values()),
    }


def agreement(here: Here, shape: Shape, backend: str) -> dict[str, Any]:
    """Two layers of the shape: log-probs and gradients in 16 bits against float32 and one attention call a row."""
    torch.set_float32_matmul_precision("highest")
    two = replace(shape, layers=2)
    reference = build(two, here.device, BACKENDS["rows"])
    model = copy.deepcopy(reference)
    model.set_attn_implementation(backend)
    forward_precision(model, here.dtype)
    lengths = [12, 5, 7] if here.tiny else [700, 33, 291]
    (pack,) = (on(pack, here.device) for pack in pack_rows(make_rows(lengths, two.vocabulary), token_budget=1024))
    found_K = token_scores(model, pack).logprobs_K
    expected_K = token_scores(reference, pack).logprobs_K
    (-found_K.mean()).backward()
    (-expected_K.mean()).backward()
    worst = float((found_K - expected_K).detach().abs().max())
    if not worst <= 0.1:
        raise DisagreesError(f"log-probs differ by up to {worst:.3g} nats, 0.1 was expected")
    errors = {}
    for (name, weight), (_, wide) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert weight.grad is not None
        assert wide.grad is not None
        errors[name] = check_close(weight.grad, wide.grad, 0.05, f"gradient of {name}")
    mean = float((found_K - expected_K).detach().abs().mean())
    return {"attention": backend, "logprob_worst": worst, "logprob_mean": mean, "gradient_worst": max(errors.values())}


def build(shape: Shape, device: torch.device, attention: str) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with device:
        return Qwen3ForCausalLM._from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def make_rows(lengths: Sequence[int], vocabulary: int) -> list[Row]:
    """Rows of which all but the first token are trained, each a rollout."""
    rng = np.random.default_rng(0)
    return [
        Row(
            rollout_id=f"r-{at}",
            attempt=1,
            group=f"g-{at}",
            token_ids=rng.integers(0, vocabulary, length).astype(np.int32),
            trained=np.arange(length) > 0,
            logprobs=np.full(length, -np.log(vocabulary), np.float32),
            temperatures=np.ones(length, np.float32),
            version_oldest=0,
            version_newest=0,
            span_ids=(bytes(8),),
            advantages=np.full(length, rng.normal(), np.float32),
        )
        for at, length in enumerate(lengths)
    ]


def on(pack: PackedBatch, device: torch.device) -> PackedBatch:
    tensors = {name: getattr(pack, name) for name in pack.__slots__}
    return replace(
        pack, **{name: value.to(device) for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    )
