"""bench.gpu's phases but training: attention backends, the head, and the weight copy.

A phase is a generator of rows, each {"case": name, what was measured}. What always holds: see bench/gpu.py.
"""

from __future__ import annotations

import gc
import json
import os
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
    """Where a phase runs, and until when (time.monotonic).

    done  cases that an earlier process of the phase has measured, or ended at
    """

    device: torch.device
    tiny: bool
    until_s: float
    done: frozenset[str] = frozenset()

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

    def case(
        self, name: str, measure: Callable[[], dict[str, Any]], *, needs_s: float = 0.0, again: bool = False
    ) -> dict[str, Any]:
        """Measure one case; memory that is not there, time that is not left and disagreement are rows, too.

        again  also where an earlier process has done it: what comes later builds on it

        Raises ContextLostError, with the row, when the device answers nothing any more.
        """
        if name in self.done and not again:
            return {"case": name, "skipped": "done"}
        if self.left_s() < needs_s:
            return {"case": name, "skipped": f"{self.left_s():.0f} s are left of the phase, about {needs_s:.0f} needed"}
        print(json.dumps({"begun": name}), flush=True)  # who is killed in it cannot say so afterwards
        self.clean()
        try:
            return {"case": name, **measure()}
        except torch.OutOfMemoryError:
            return {"case": name, "out_of_memory": True, "peak_bytes": self.peak_bytes()}
        except Exception as exc:  # a backend may fail in its own ways, and the others are still to be measured
            row = {"case": name, "error": f"{type(exc).__name__}: {exc}"[:500]}
            if self.lost():
                raise ContextLostError(row) from exc
            return row

    def lost(self) -> bool:
        """Whether the device is of no more use to this process, as after an illegal access."""
        try:
            self.wait()
        except Exception:
            return True
        return False


class ContextLostError(Exception):
    """The process must end; its argument is the row of the case that it ended at."""


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


Heads = tuple[int, int, int]  # of queries, of keys and values, and their width


def attention_case(here: Here, backend: str, lengths: Sequence[int]) -> dict[str, Any]:
    heads = QUERY_HEADS, KV_HEADS, HEAD_WIDTH
    inputs, outcome = attention_work(here, lengths, heads)
    # In float32 a kernel may not exist, and T x T scores of all heads not fit: the first and the last group of heads do.
    times = QUERY_HEADS // KV_HEADS
    groups = [0, KV_HEADS - 1]
    of_queries = [group * times + at for group in groups for at in range(times)]
    picked = of_queries, groups, groups
    wide = [tensor.detach()[:, heads].float().requires_grad_() for tensor, heads in zip(inputs, picked, strict=True)]
    found = outcome(backend, inputs)
    parts = [found[0][:, :, of_queries], *(grad[:, heads] for grad, heads in zip(found[1:], picked, strict=True))]
    expected = outcome("rows", wide, heads=of_queries)
    errors = [
        check_close(part, wanted, 0.02, what)
        for part, wanted, what in zip(parts, expected, ("output", "dQ", "dK", "dV"), strict=True)
    ]
    del wide, found, parts, expected
    here.clean()
    forward_s = here.seconds(lambda: outcome(backend, inputs, backward=False))
    both_s = here.seconds(lambda: outcome(backend, inputs))
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    flops = 4 * QUERY_HEADS * HEAD_WIDTH * pairs
    return {
        "tokens": sum(lengths),
        "difference": max(errors),  # relative, in the norm
        "forward_ms": round(forward_s * 1e3, 3),
        "both_ms": round(both_s * 1e3, 3),
        "forward_tflops": round(flops / forward_s / 1e12, 1),
        "both_tflops": round(3.5 * flops / both_s / 1e12, 1),  # a flash backward has five products, forward two
        "peak_bytes": here.peak_bytes(),
    }


def attention_seconds(here: Here, backend: str, lengths: Sequence[int], heads: Heads) -> float:
    """What one layer's attention takes, forward and backward."""
    here.clean()
    inputs, outcome = attention_work(here, lengths, heads)
    return here.seconds(lambda: outcome(backend, inputs), times=2)


def attention_work(
    here: Here, lengths: Sequence[int], heads: Heads
) -> tuple[list[Tensor], Callable[..., tuple[Tensor, ...]]]:
    """Return random queries, keys and values, and a function of a backend and them: the output and their gradients."""
    layout = RowLayout(lengths, here.device)
    query_heads, kv_heads, width = heads
    rng = torch.Generator(here.device).manual_seed(0)

    def random(heads: int) -> Tensor:
        # As a model has them: a projection's (tokens, heads, width), seen as (heads, tokens, width).
        shape = (1, layout.num_tokens, heads, width)
        return torch.randn(shape, device=here.device, dtype=here.dtype, generator=rng).transpose(1, 2).requires_grad_()

    inputs = [random(query_heads), random(kv_heads), random(kv_heads)]
    grad_1THE = torch.randn_like(inputs[0].detach()).transpose(1, 2)

    def outcome(
        name: str, given: Sequence[Tensor], *, backward: bool = True, heads: Sequence[int] | None = None
    ) -> tuple[Tensor, ...]:
        attend = AttentionInterface()[BACKENDS[name]]
        output_1THE, _ = attend(torch.nn.Module(), *given, None, scaling=width**-0.5, row_layout=layout)
        if not backward:
            return (output_1THE,)
        grad = grad_1THE if heads is None else grad_1THE[:, :, heads]
        return output_1THE, *torch.autograd.grad(output_1THE, given, grad.to(output_1THE.dtype))

    return inputs, outcome


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
    numel = 1 << 14 if here.tiny else 1 << 30  # 2 GiB in 16 bits: as a model of one billion weights
    room = os.statvfs(shm_directory())
    pushed = min(numel, room.f_bavail * room.f_frsize // 8)  # two files of 2 bytes each, and half of it is left
    yield here.case("device_to_device", lambda: copy_case(here, numel, "device"))
    yield here.case("device_to_pinned_host", lambda: copy_case(here, numel, "pinned"), needs_s=2.0)
    yield here.case("device_to_shm_as_pushed", lambda: copy_case(here, pushed, "pushed"), needs_s=5.0)


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
