"""bench.gpu's training: whole steps of Qwen3's shapes with random weights, as train_step takes them.

What always holds: before a shape is timed, two of its layers compute log-probs and gradients in 16 bits that are those of
float32 with the plainest attention, by each kernel and in compiled form; of the kernels that agree each case takes the one
that is fastest for its rows; a case is timed from packs to updated weights, in the order of their worth, since the phase's
time may end.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bench.gpu_parts import DisagreesError, Here, attention_seconds, check_close
from lightning_bus.adapters import Row
from trainer.data.batch import PackedBatch, pack_rows
from trainer.optimize.losses import dapo
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.step import StepMetrics, train_step
from trainer.policy.attention import BACKENDS, choose_backend
from trainer.policy.logprob import head_precision, token_scores
from trainer.policy.lora import add_adapter
from trainer.policy.precision import checkpoint_activations, compile_layers, forward_precision

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


# What may be chosen for a case. flex is measured by itself: compiling it for every shape would take the phase's time.
KERNELS = ("flash", "varlen", "rows")
COMPILING_S = 60.0  # of two layers, before anything compiled is timed
STEPS_S = 10.0  # a case is timed again until this is over, three times at most

Activations = Literal["recompute", "recompute_but_attention", "keep"]


@dataclass(frozen=True)
class Case:
    """One step.

    activations  "recompute" is all of a layer, as those we compare with do; "recompute_but_attention" keeps what the
                 attention kernel gave
    compiled     the layers run through torch.compile
    row_tokens   how long the rows of a micro-batch are; one row, as prime-rl's fake data is, unless given
    head         the head's operands: "tf32" rounds them as the matrix units do, still with more bits than the 16-bit head
                 of those it is compared with; "bfloat16" is theirs; "float32" is exact and slow
    """

    size: str
    form: str  # "full", or "lora16"
    tokens: int  # of a micro-batch
    activations: Activations = "recompute"
    compiled: bool = False
    micro_batches: int = 2
    row_tokens: int | None = None
    head: Literal["tf32", "float32", "bfloat16"] = "tf32"
    needs_s: float = 15.0  # for building the model, one micro-batch to warm up and one step to time

    @property
    def name(self) -> str:
        parts = [self.size, self.form, f"{self.tokens // 1000}k", self.activations]
        parts += [f"rows_of_{self.row_tokens}"] * bool(self.row_tokens)
        parts += ["compiled"] * self.compiled + [f"head_{self.head}"] * (self.head != "tf32")
        return "/".join(parts)


K16, K65 = 16_384, 65_536
BEST: dict[str, Any] = {"compiled": True, "head": "bfloat16"}
# By their worth: first what the published rows are matched by, then what should be faster, then what says why.
CASES = (
    Case("0.6B", "full", K16),
    Case("0.6B", "full", K65, needs_s=40),
    Case("0.6B", "lora16", K16),
    Case("0.6B", "full", K16, "keep", **BEST),
    Case("0.6B", "full", K65, "recompute_but_attention", **BEST, needs_s=35),
    Case("4B", "lora16", K16, needs_s=20),
    Case("4B", "lora16", K65, needs_s=60),
    Case("0.6B", "full", K16, compiled=True),
    Case("0.6B", "full", K16, "keep", compiled=True, micro_batches=8, row_tokens=1024, needs_s=20),
    Case("0.6B", "full", K65, "keep", **BEST, needs_s=35),
    Case("4B", "lora16", K65, "recompute_but_attention", **BEST, needs_s=60),
    Case("4B", "lora16", K16, "keep", **BEST, needs_s=20),
    Case("0.6B", "full", K16, "keep"),
    Case("0.6B", "full", K16, head="float32"),
    Case("0.6B", "lora16", K16, "keep", **BEST),
    # About 130 KB a token and layer for 0.6B and 260 KB for 4B are kept where nothing is compiled: more than 141 GB each.
    Case("0.6B", "full", K65, "keep", needs_s=25),
    Case("4B", "lora16", K16, "keep", needs_s=20),
)


def train(here: Here) -> Iterator[dict[str, Any]]:
    shapes = TINY_SHAPES if here.tiny else SHAPES
    runs = [name for name in KERNELS if _runs(here, name)]
    agreed: dict[str, list[str]] = {size: [] for size in shapes}
    compiled: set[str] = set()
    fastest: dict[tuple[str, int], str] = {}
    for size, shape in shapes.items():
        for name in runs:
            row = here.case(f"{size}/agreement/{name}", lambda s=shape, n=name: agreement(here, s, n), again=True)
            agreed[size] += [name] * ("logprob_worst" in row)
            yield row
    for case in CASES:
        wanted, shape = tiny(case) if here.tiny else case, shapes[case.size]
        if case.name in here.done:
            continue
        if not agreed[case.size]:
            yield {"case": case.name, "error": "not timed, for its shape disagrees with the reference"}
            continue
        rows = (case.size, wanted.row_tokens or wanted.tokens)
        if rows not in fastest:
            row = here.case(
                f"{case.size}/attention/rows_of_{rows[1]}",
                lambda s=shape, w=wanted: chosen(here, s, w, agreed[case.size]),  # noqa: B023 - called at once
                again=True,
                needs_s=1.0 if here.tiny else 10.0,
            )
            fastest[rows] = row.get("fastest", agreed[case.size][0])
            yield row
        if case.compiled and case.size not in compiled:
            row = here.case(
                f"{case.size}/agreement/compiled",
                lambda s=shape, n=fastest[rows]: agreement(here, s, n, compiled=True),
                again=True,
                needs_s=1.0 if here.tiny else COMPILING_S,
            )
            if "logprob_worst" in row:
                compiled.add(case.size)
            yield row
        if case.compiled and case.size not in compiled:
            yield {"case": case.name, "skipped": "its layers could not be compiled, or not in time, or disagree"}
            continue
        row = here.case(
            case.name,
            lambda w=wanted, s=shape, n=fastest[rows]: timed_steps(here, w, s, BACKENDS[n]),
            needs_s=1.0 if here.tiny else case.needs_s,
        )
        yield {**row, "attention": fastest[rows]}


def _runs(here: Here, name: str) -> bool:
    try:
        choose_backend(name, device=here.device, dtype=here.dtype)
    except ValueError:
        return False
    return True


def chosen(here: Here, shape: Shape, case: Case, names: Sequence[str]) -> dict[str, Any]:
    """Milliseconds of one layer's attention, forward and backward, for the rows of a micro-batch, and who was fastest."""
    length = case.row_tokens or case.tokens
    lengths = [length] * (case.tokens // length)
    heads = shape.heads, shape.kv_heads, shape.head_width
    took_s = {name: attention_seconds(here, name, lengths, heads) for name in names}
    return {
        **{f"{name}_ms": round(s * 1e3, 3) for name, s in took_s.items()},
        "fastest": min(took_s, key=took_s.__getitem__),
    }


def tiny(case: Case) -> Case:
    return replace(case, tokens=case.tokens // 256, row_tokens=case.row_tokens and case.row_tokens // 64)


def timed_steps(here: Here, case: Case, shape: Shape, backend: str) -> dict[str, Any]:
    torch.set_float32_matmul_precision("highest" if case.head == "float32" else "high")
    model = build(shape, here.device, backend)
    if case.form == "lora16":
        add_adapter(model, RANK)
    forward_precision(model, here.dtype)
    if case.head == "bfloat16":
        head_precision(model, here.dtype)
    if case.compiled:
        compiled_layers(here, model)
    if case.activations != "keep":
        checkpoint_activations(model, keep_attention=case.activations == "recompute_but_attention")
    optimizer = Optimizer(model, lr=1e-6)
    length = case.row_tokens or case.tokens
    rows = make_rows([length] * (case.micro_batches * case.tokens // length), shape.vocabulary)
    packs = pack_rows(rows, token_budget=case.tokens)
    train_step(model, optimizer, packs[:1], dapo())
    here.clean()
    steps: list[StepMetrics] = []
    while len(steps) < (1 if here.tiny else 3) and sum(step.step_s for step in steps) < STEPS_S:
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


def compiled_layers(here: Here, model: PreTrainedModel) -> None:
    if not here.tiny:  # which shows that everything else runs: compiling takes a minute, and tests/unit/trainer has it
        compile_layers(model)


def agreement(here: Here, shape: Shape, backend: str, *, compiled: bool = False) -> dict[str, Any]:
    """Two layers of the shape: log-probs and gradients in 16 bits against float32 and one attention call a row."""
    torch.set_float32_matmul_precision("highest")
    two = replace(shape, layers=2)
    reference = build(two, here.device, BACKENDS["rows"])
    model = copy.deepcopy(reference)
    model.set_attn_implementation(BACKENDS[backend])
    forward_precision(model, here.dtype)
    if compiled:
        compiled_layers(here, model)
    lengths = [12, 5, 7] if here.tiny else [700, 33, 291]
    (pack,) = (on(pack, here.device) for pack in pack_rows(make_rows(lengths, two.vocabulary), token_budget=1024))
    began = time.perf_counter()
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
    return {
        "attention": backend,
        "logprob_worst": worst,
        "logprob_mean": mean,
        "gradient_worst": max(errors.values()),
        "seconds": round(time.perf_counter() - began, 1),  # compiling counts
    }


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
