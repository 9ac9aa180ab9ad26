"""One optimiser step: forward and backward over the packs, a finite check, one update.

The denominator is counted over all packs of all ranks before the first backward, so the gradient is that of one mean
over the whole step however the rows were packed and dealt out. Packs are bounded in tokens and their gradients add up,
so accumulation is by tokens: the budget says what fits into memory, the rows of the step how large its batch is. A step
whose loss or gradient is not finite changes nothing but a counter.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from trainer.data.batch import PackedBatch, idle_pack
from trainer.optimize.cost import peak_flops_per_s, step_flops
from trainer.optimize.losses import Loss, add_metrics, inputs_of, is_maximum, mean_metrics
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.parallel import loss_name, packed, run
from trainer.policy.attention.layout import sent
from trainer.policy.logprob import CHUNK_TOKENS, token_scores
from trainer.ranks import everyone, lead, led, num_ranks


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one step did, on all ranks together.

    applied         False when the step was skipped because its loss or gradient was not finite
    loss            the weighted sum over tokens divided by the denominator
    means           the loss's own metrics, averaged over trained tokens
    grad_norm       before clipping
    lr              the rate of this update
    num_packs       forward passes of each rank
    num_tokens      of the rows, prompts too
    trained_tokens  tokens that the loss saw
    flops           of the mathematics, once; see `cost.step_flops`
    peak_bytes      the most that the device's allocator held at a time, on this rank; None on a CPU
    *_s             seconds spent in each phase, on this rank
    """

    applied: bool
    loss: float
    means: dict[str, float]
    grad_norm: float
    lr: float
    num_packs: int
    num_rows: int
    num_tokens: int
    trained_tokens: int
    forward_s: float
    backward_s: float
    update_s: float
    flops: float = 0.0
    peak_bytes: int | None = None
    peak_flops_per_s: float | None = None  # of all ranks' devices; None: not known

    @property
    def step_s(self) -> float:
        return self.forward_s + self.backward_s + self.update_s

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.step_s

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, 0 … 1: of what the devices could have computed meanwhile. None: not known."""
        return self.flops / self.step_s / self.peak_flops_per_s if self.peak_flops_per_s else None


def train_step(
    model: PreTrainedModel,
    optimizer: Optimizer,
    packs: Sequence[PackedBatch],
    loss: Loss,
    *,
    denominator: float | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> StepMetrics:
    """Take one optimiser step on the packs and say how it went.

    packs        on the leader of several ranks all of them, dealt out here (`pack_rows(ranks=...)` made them even);
                 else this rank's, as many as every other rank has
    denominator  what the weighted sum over tokens is divided by; the sum of the denominators of all packs of all ranks
                 unless given

    Every rank calls it, and each gets the same metrics. Raises ValueError when there is nothing to train on, when ranks
    have different numbers of packs, and when there are several ranks and the model is not sharded.
    """
    device = next(model.parameters()).device
    ranks = num_ranks()
    if led(model) is not None:
        packs = [*packs, *(idle_pack() for _ in range(-len(packs) % ranks))]
        options = {"denominator": denominator, "chunk_tokens": chunk_tokens}
        lead(model, "step", packs=[packed(pack) for pack in packs], loss=loss_name(loss), **options)
        packs = packs[::ranks]
    if ranks > 1 and not isinstance(model, FSDPModule):
        raise ValueError(f"{ranks} ranks train a model that is not sharded, so none would see the others' gradients")
    step = _counted(model, packs, denominator)
    watch = _Stopwatch(device)
    losses: list[Tensor] = []
    totals: dict[str, Tensor] = {}
    optimizer.zero_grad()
    # All at once: a few numbers a token, and the device need not be waited for between two packs.
    placed = [on_device(pack, device) for pack in packs]
    for pack in placed:
        watch.mark("forward")
        # FSDP averages gradients over ranks; what is wanted is their sum.
        pack_loss, metrics = run(model, _pack_loss, model, pack, loss, step.denominator / ranks, chunk_tokens)
        watch.mark("backward")
        pack_loss.backward()
        losses.append(pack_loss.detach() / ranks)
        add_metrics(totals, metrics)
    watch.mark("update")
    step_loss, all_totals = _reduced(losses, totals)
    grad_norm = optimizer.clip()
    lr = optimizer.lr
    applied = math.isfinite(step_loss) and math.isfinite(grad_norm)
    if applied:
        optimizer.step()
    else:
        optimizer.skip()
    seconds = watch.seconds()
    peak = peak_flops_per_s(device)
    return StepMetrics(
        applied=applied,
        loss=step_loss,
        means=mean_metrics(all_totals, step.trained_tokens),
        grad_norm=grad_norm,
        lr=lr,
        num_packs=len(packs),
        num_rows=step.num_rows,
        num_tokens=step.num_tokens,
        trained_tokens=step.trained_tokens,
        forward_s=seconds["forward"],
        backward_s=seconds["backward"],
        update_s=seconds["update"],
        flops=step.flops,
        peak_bytes=watch.peak_bytes(),
        peak_flops_per_s=peak and peak * ranks,
    )


def _pack_loss(
    model: PreTrainedModel, pack: PackedBatch, loss: Loss, denominator: float, chunk_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    scores = token_scores(model, pack, chunk_tokens=chunk_tokens)
    if not len(scores.logprobs_K):  # an idle pack: zero, with a way back through every layer
        return scores.logprobs_K.sum(), {}
    loss_K, metrics = loss(inputs_of(pack, scores.logprobs_K, scores.entropies_K))
    return (loss_K * pack.scored(pack.weights_T)).sum() / denominator, metrics


@dataclass(frozen=True, slots=True)
class _Counts:
    denominator: float
    trained_tokens: int
    num_rows: int
    num_tokens: int
    flops: float


def _counted(model: PreTrainedModel, packs: Sequence[PackedBatch], denominator: float | None) -> _Counts:
    """Count what all ranks are about to train on."""
    held = [pack for pack in packs if pack.row_indices]
    mine = [
        len(packs),
        sum(int(pack.trained_T.sum()) for pack in packs),
        sum(len(pack.row_indices) for pack in held),
        sum(pack.num_tokens for pack in held),
        step_flops(model, held),
        [pack.denominator for pack in packs],
    ]
    num_packs, trained_tokens, num_rows, num_tokens, flops, denominators = zip(*everyone(mine), strict=True)
    if len(set(num_packs)) > 1:
        raise ValueError(f"ranks have {num_packs} packs: each needs as many, see pack_rows(ranks=...)")
    if denominator is None:
        denominator = math.fsum(one for of_rank in denominators for one in of_rank)
    if sum(trained_tokens) == 0 or not denominator > 0:
        raise ValueError(
            f"{sum(num_packs)} packs hold {sum(trained_tokens)} trained tokens and the denominator is {denominator}: "
            "wait for rollouts that can teach before taking a step"
        )
    return _Counts(denominator, sum(trained_tokens), sum(num_rows), sum(num_tokens), sum(flops))


def _reduced(losses: Sequence[Tensor], totals: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
    """Return the step's loss and totals over all ranks. One copy from the device, so one wait for it."""
    names = list(totals)
    values = torch.stack([one.double() for one in (*losses, *totals.values())]).tolist()
    mine = [math.fsum(values[: len(losses)]), dict(zip(names, values[len(losses) :], strict=True))]
    all_losses, all_totals = zip(*everyone(mine), strict=True)
    found: dict[str, float] = {}
    for of_rank in all_totals:  # a rank with idle packs alone has none
        for name, value in of_rank.items():
            found[name] = (
                value if name not in found else max(found[name], value) if is_maximum(name) else found[name] + value
            )
    return math.fsum(all_losses), found


def on_device(pack: PackedBatch, device: torch.device) -> PackedBatch:
    """Return the pack with its tensors there, and with the places of its trained tokens.

    Nothing waits for a GPU: its copies are of pinned memory, behind what the device has been given to do already.
    """
    if pack.places_K is None:
        pack = replace(pack, places_K=pack.trained_T.nonzero().squeeze(-1))
    if pack.token_ids_T.device == device:
        return pack
    tensors = {field.name: getattr(pack, field.name) for field in fields(pack)}
    return replace(pack, **{name: sent(one, device) for name, one in tensors.items() if isinstance(one, Tensor)})


class _Stopwatch:
    """Seconds by phase. On a GPU the times are the device's own, read at the end, so that no phase waits for another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def mark(self, phase: str) -> None:
        """Begin a phase, and end the one before."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """End the last phase and return what each took in all."""
        self.mark("end")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found: dict[str, float] = {}
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                took_s = start.elapsed_time(end) / 1e3
            else:
                took_s = float(end) - float(start)  # pyright: ignore[reportArgumentType]
            found[phase] = found.get(phase, 0.0) + took_s
        return found

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None
