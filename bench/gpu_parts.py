"""bench.gpu's phases but training: attention backends, the head, and the weight copy.

A phase is a generator of rows, each {"case": name, what was measured}. What always holds: see bench/gpu.py.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from trainer.policy.attention import BACKENDS, RowLayout, choose_backend
from trainer.policy.logprob import chunked_logprobs
from trainer.serving.slots import WeightSlots, shm_directory

# T packed tokens, H query heads, G key/value heads, E width of a head, K scored tokens, V vocabulary, D model width.


@dataclass(frozen=True)
class Here:
    """Where a phase runs, and until when (time.monotonic)."""

    device: torch.device
    tiny: bool
    until_s: float

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def left_s(self) -> float:
        return self.until_s - time.monotonic()

    def clean(self) -> None:
        """Forget what an earlier case left, and begin to watch the memory."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def seconds(self, work: Callable[[], object], *, times: int = 5) -> float:
        """The median of `times` runs after one to warm up, waiting for the device before and after each."""
        work()
        taken = []
        for _ in range(times):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def case(self, name: str, measure: Callable[[], dict[str, Any]], *, needs_s: float = 0.0) -> dict[str, Any]:
        """Measure one case; memory that is not there, time that is not left and disagreement are rows, too."""
        if self.left_s() < needs_s:
            return {"case": name, "skipped": f"{self.left_s():.0f} s are left of the phase, about {needs_s:.0f} needed"}
        self.clean()
        try:
            return {"case": name, **measure()}
        except torch.OutOfMemoryError:
            return {"case": name, "out_of_memory": True, "peak_bytes": self.peak_bytes()}
        except Exception as exc:  # a backend may fail in its own ways, and the others are still to be measured
            return {"case": name, "error": f"{type(exc).__name__}: {exc}"[:500]}


class DisagreesError(Exception):
    """The result is not the reference's, so its time would say nothing."""


def check_close(found: Tensor, reference: Tensor, limit: float, what: str) -> float:
    """Return the relative error in the norm; raise DisagreesError above the limit, and where it is not finite."""
    found, reference = found.detach().double(), reference.detach().double()
    error = float((found - reference).norm() / reference.norm())
    if not error <= limit:
        raise DisagreesError(f"{what}: relative error {error:.3g}, at most {limit:g} was expected")
    return error


# -- attention --------------------------------------------------------------------------------------------------------

QUERY_HEADS, KV_HEADS, HEAD_WIDTH = 16, 8, 128  # Qwen3-0.6B's
DENSE_TOKENS_MAX = 16_384  # sdpa makes a T x T mask


def attention(here: Here) -> Iterator[dict[str, Any]]:
    many, one = ([5, 30, 17, 12], [64]) if here.tiny else ([300, 2100, 700, 1200, 3808, 84] * 2, [16_384])
    # flex last: its first call compiles, and may take longer than there is time.
    for backend in sorted(BACKENDS, key=lambda name: name == "flex"):
        for layout_name, lengths in {"many_rows": many, "one_row": one}.items():
            name = f"{backend}/{layout_name}"
            try:
                choose_backend(backend, device=here.device, dtype=here.dtype)
            except ValueError as exc:
                yield {"case": name, "skipped": str(exc)}
                continue
            if backend == "sdpa" and sum(lengths) > DENSE_TOKENS_MAX:
                yield {"case": name, "skipped": f"a mask of {sum(lengths)} x {sum(lengths)}"}
                continue
            needs_s = 20.0 if backend == "flex" and not here.tiny else 1.0
            yield here.case(name, lambda b=backend, lo=lengths: attention_case(here, b, lo), needs_s=needs_s)


def attention_case(here: Here, backend: str, lengths: Sequence[int]) -> dict[str, Any]:
    layout = RowLayout(lengths, here.device)
    tokens = layout.num_tokens
    rng = torch.Generator(here.device).manual_seed(0)

    def random(heads: int) -> Tensor:
        shape = (1, heads, tokens, HEAD_WIDTH)
        return torch.randn(shape, device=here.device, dtype=here.dtype, generator=rng).requires_grad_()

    inputs = [random(QUERY_HEADS), random(KV_HEADS), random(KV_HEADS)]
    grad_1THE = torch.randn((1, tokens, QUERY_HEADS, HEAD_WIDTH), device=here.device, generator=rng).to(here.dtype)

    def outcome(name: str, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        attend = AttentionInterface()[BACKENDS[name]]
        output_1THE, _ = attend(torch.nn.Module(), *given, None, scaling=HEAD_WIDTH**-0.5, row_layout=layout)
        return output_1THE, *torch.autograd.grad(output_1THE, given, grad_1THE.to(output_1THE.dtype))

    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    errors = [
        check_close(found, expected, 0.02, what)
        for found, expected, what in zip(
            outcome(backend, inputs), outcome("rows", wide), ("output", "dQ", "dK", "dV"), strict=True
        )
    ]
    del wide

    def forward() -> Tensor:
        attend = AttentionInterface()[BACKENDS[backend]]
        return attend(torch.nn.Module(), *inputs, None, scaling=HEAD_WIDTH**-0.5, row_layout=layout)[0]

    forward_s = here.seconds(forward)
    both_s = here.seconds(lambda: outcome(backend, inputs))
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    flops = 4 * QUERY_HEADS * HEAD_WIDTH * pairs
    return {
        "tokens": tokens,
        "difference": max(errors),  # relative, in the norm
        "forward_ms": round(forward_s * 1e3, 3),
        "both_ms": round(both_s * 1e3, 3),
        "forward_tflops": round(flops / forward_s / 1e12, 1),
        "both_tflops": round(3.5 * flops / both_s / 1e12, 1),  # a flash backward has five products, forward two
        "peak_bytes": here.peak_bytes(),
    }


# -- the head ---------------------------------------------------------------------------------------------------------


# What the operands are: float32 without the matrix units; float32 rounded to TensorFloat-32 by them (10 bits of mantissa,
# where bfloat16 has 7); bfloat16. Sums are float32 in all of them.
HEADS = ("chunked/float32", "chunked/tf32", "chunked/bfloat16", "full/float32")


def head(here: Here) -> Iterator[dict[str, Any]]:
    vocabulary, shapes = (151_936, {"0.6B": (1024, 8192), "4B": (2560, 8192)})
    if here.tiny:
        vocabulary, shapes = 300, {"0.6B": (16, 64)}
    for size, (width, tokens) in shapes.items():
        for form in HEADS:
            yield here.case(
                f"{size}/{form}",
                lambda f=form, w=width, t=tokens: head_case(here, f, w, t, vocabulary),
                needs_s=1.0 if here.tiny else 4.0,
            )


def head_case(here: Here, form: str, width: int, tokens: int, vocabulary: int) -> dict[str, Any]:
    rng = torch.Generator(here.device).manual_seed(0)
    # As in training: hidden states in 16 bits, the head's master weight in 32.
    weight_VD = (torch.randn((vocabulary, width), device=here.device, generator=rng) * 0.05).requires_grad_()
    hidden_KD = torch.randn((tokens, width), device=here.device, generator=rng).to(here.dtype).requires_grad_()
    targets_K = torch.randint(vocabulary, (tokens,), device=here.device, generator=rng)
    temperatures_K = torch.full((tokens,), 0.7, device=here.device)

    def outcome(form: str, some: slice) -> tuple[Tensor, ...]:
        kind, _, operands = form.partition("/")
        torch.set_float32_matmul_precision("high" if operands == "tf32" else "highest")
        if kind == "chunked":
            head_dtype = torch.bfloat16 if operands == "bfloat16" else None
            logprobs_K, _ = chunked_logprobs(
                hidden_KD[some], weight_VD, targets_K[some], temperatures_K[some], head_dtype=head_dtype
            )
        else:
            logits_KV = hidden_KD[some].float() @ weight_VD.T / temperatures_K[some][:, None]
            logprobs_K = logits_KV.log_softmax(-1).gather(-1, targets_K[some][:, None]).squeeze(-1)
        return logprobs_K, *torch.autograd.grad(-logprobs_K.mean(), (hidden_KD, weight_VD))

    few = slice(0, min(tokens, 512))
    errors = [
        check_close(found, expected, 0.02, what)
        for found, expected, what in zip(
            outcome(form, few), outcome("full/float32", few), ("log-probs", "dHidden", "dWeight"), strict=True
        )
    ]
    here.clean()
    held = torch.cuda.memory_allocated(here.device) if here.device.type == "cuda" else 0
    both_s = here.seconds(lambda: outcome(form, slice(None)), times=3)
    peak = here.peak_bytes()
    return {
        "tokens": tokens,
        "difference": max(errors),  # relative, in the norm
        "both_ms": round(both_s * 1e3, 2),
        "tokens_per_s": round(tokens / both_s),
        "tflops": round(6 * tokens * vocabulary * width / both_s / 1e12, 1),
        "peak_bytes": None if peak is None else peak - held,  # beyond the arguments
    }


# -- the weight copy --------------------------------------------------------------------------------------------------


def copy(here: Here) -> Iterator[dict[str, Any]]:
    numel = 1 << 14 if here.tiny else 1 << 30  # 2 GiB in 16 bits: as Qwen3-0.6B and its optimiser's neighbours
    yield here.case("device_to_device", lambda: copy_case(here, numel, "device"))
    yield here.case("device_to_pinned_host", lambda: copy_case(here, numel, "pinned"), needs_s=2.0)
    yield here.case("device_to_shm_as_pushed", lambda: copy_case(here, numel, "pushed"), needs_s=5.0)


def copy_case(here: Here, numel: int, where: str) -> dict[str, Any]:
    rng = torch.Generator(here.device).manual_seed(0)
    # A layer's matrices, as a model has them: one call of copy each.
    tensors = {
        f"layers.{at}.weight": torch.randn(numel // 64, device=here.device, generator=rng).bfloat16()
        for at in range(64)
    }
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    if where == "pushed":
        slots = WeightSlots(shm_directory(), f"bench-gpu-{time.time_ns()}")
        versions = iter(range(1000))
        try:
            seconds = here.seconds(lambda: slots.write(tensors, str(next(versions))), times=3)
        finally:
            slots.unlink()
        return {"bytes": nbytes, "seconds": round(seconds, 4), "gb_per_s": round(nbytes / seconds / 1e9, 2)}
    pin = where == "pinned" and here.device.type == "cuda"
    device = here.device if where == "device" else torch.device("cpu")
    targets = {
        name: torch.empty_like(tensor, device=device, pin_memory=pin if device.type == "cpu" else False)
        for name, tensor in tensors.items()
    }

    def copied() -> None:
        for name, tensor in tensors.items():
            targets[name].copy_(tensor, non_blocking=True)

    seconds = here.seconds(copied)
    if not all(torch.equal(targets[name], tensor.to(device)) for name, tensor in tensors.items()):
        raise DisagreesError(f"{where}: the copy differs")
    return {"bytes": nbytes, "seconds": round(seconds, 5), "gb_per_s": round(nbytes / seconds / 1e9, 2)}
