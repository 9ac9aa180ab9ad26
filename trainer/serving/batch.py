"""The running requests and the forward passes over them: prompts join, every row gets a token, finished rows leave.

Always holds: row i of `rows` owns slot i of the cache; `lengths[slot]` columns of a slot hold the keys and values
of `ids[slot, :lengths[slot]]`; a slot is marked pure only while all of them were made by the weights in use, and
only pure slots lend their prefix to another request. So a prompt that starts like an earlier conversation, or like
its neighbours of the same group, is computed from where they part, and never from stale weights.

Nothing here knows of threads, sockets or time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from trainer.serving.cache import SlotCache
from trainer.serving.errors import EngineFailedError
from trainer.serving.request import Delta, Request
from trainer.serving.sampling import BatchSampler

# B running rows, N joining rows, Q new tokens of each joining row (padded), S cache columns, V vocabulary.

REUSE_TOKENS_MIN = 16  # copying a shorter prefix costs about what computing it costs
PREFILL_WIDTH_MIN = 32  # prompts are joined with prompts of like length, in doubling classes from here


class Batch:
    """Up to `rows_max` requests that advance together, one token a step."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows_max: int,
        retained_max: int,
        context_tokens: int,
        prefill_tokens_max: int,
        end_ids: frozenset[int],
    ) -> None:
        self.rows: list[Request] = []
        self.prefix_tokens_reused = 0
        self.prompt_tokens_computed = 0
        self._model = model
        self._device = next(model.parameters()).device
        self._rows_max = rows_max
        self._context_tokens = context_tokens
        self._prefill_tokens_max = prefill_tokens_max
        self._end_ids = end_ids
        # Slots past rows_max keep the keys and values of finished requests, the oldest replaced first.
        slots = rows_max + retained_max
        self._cache = SlotCache(slots)
        self._ids = np.zeros((slots, context_tokens + 1), dtype=np.int32)
        self._lengths = np.zeros(slots, dtype=np.int64)
        self._pure = np.zeros(slots, dtype=np.bool_)
        self._salts = np.zeros(slots, dtype=np.int64)
        self._retained: deque[int] = deque(range(rows_max, slots))
        self._sampler: BatchSampler | None = None  # of the present rows; None after they change

    def join(self, waiting: deque[Request], version: str) -> bool:
        """Move some waiting requests into the batch, compute their prompts and sample their first tokens.

        Oldest first, as many as fit one forward pass; call again until it returns False (nothing could join).
        """
        joining, rest = self._choose(waiting)
        if not joining:
            return False
        first_slot = len(self.rows)
        self.rows += [request for request, _, _ in joining]
        self._sampler = None
        waiting.clear()
        waiting.extend(rest)
        shared_N = np.array([shared for _, _, shared in joining], dtype=np.int64)
        lengths_N = np.array([len(request.prompt_ids) for request, _, _ in joining], dtype=np.int64)
        for slot, (request, source, shared) in enumerate(joining, start=first_slot):
            if shared:
                self._cache.copy_slot(source, slot, shared)
            self._ids[slot, : len(request.prompt_ids)] = request.prompt_ids
            self._lengths[slot] = len(request.prompt_ids)
            self._salts[slot] = _salt_number(request.cache_salt)
            self._pure[slot] = True
        self.prefix_tokens_reused += int(shared_N.sum())
        self.prompt_tokens_computed += int((lengths_N - shared_N).sum())

        new_Q = np.arange(int((lengths_N - shared_N).max()))
        columns_NQ = shared_N[:, None] + new_Q
        # Columns past a row's own end hold padding: never read before the row's real tokens overwrite them.
        ids_NQ = np.take_along_axis(
            self._ids[first_slot : first_slot + len(joining)],
            np.minimum(columns_NQ, lengths_N[:, None] - 1),
            axis=1,
        )
        last_N, last_of_row_N = np.unique(lengths_N - shared_N - 1, return_inverse=True)
        logits_NUV = self._forward(first_slot, ids_NQ, columns_NQ, torch.from_numpy(last_N).to(self._device))
        rows = [(request.params, request.generator) for request, _, _ in joining]
        sampler = BatchSampler(rows, self._device)
        logits_NV = logits_NUV[torch.arange(len(joining)), torch.from_numpy(last_of_row_N)]
        self._take(first_slot, sampler, logits_NV, version)
        return True

    def step(self, version: str) -> None:
        """One more token for every row."""
        count = len(self.rows)
        columns_B1 = self._lengths[:count, None].copy()
        ids_B1 = np.take_along_axis(self._ids[:count], columns_B1, axis=1)
        logits_B1V = self._forward(0, ids_B1, columns_B1, 1)
        self._lengths[:count] += 1
        if self._sampler is None:
            self._sampler = BatchSampler([(row.params, row.generator) for row in self.rows], self._device)
        self._take(0, self._sampler, logits_B1V[:, -1], version)

    def leave(self, leaving: Callable[[Request], bool]) -> list[Request]:
        """Take out the rows for which `leaving` holds and return them; what they computed stays for reuse."""
        gone: list[Request] = []
        for slot in reversed(range(len(self.rows))):
            if not leaving(self.rows[slot]):
                continue
            gone.append(self.rows[slot])
            self._retain(slot)
            last = len(self.rows) - 1
            if slot != last:
                self._copy(last, slot)
                self.rows[slot] = self.rows[last]
            self.rows.pop()
            self._sampler = None
        # A slot beyond the running rows is nobody's source: the next to join overwrites it.
        self._pure[len(self.rows) : self._rows_max] = False
        return gone[::-1]

    def weights_changed(self) -> None:
        """Nothing computed so far may be lent to another request; running rows go on with what they have."""
        self._pure[:] = False

    def reset(self) -> list[Request]:
        """Drop and return all rows and forget everything computed: after a failed step nothing can be trusted."""
        gone, self.rows = self.rows, []
        self._pure[:] = False
        self._sampler = None
        self._cache.wipe()
        return gone

    def _choose(self, waiting: deque[Request]) -> tuple[list[tuple[Request, int, int]], list[Request]]:
        """Split waiting into those that join now, as (request, source slot, tokens shared with it), and the rest."""
        joining: list[tuple[Request, int, int]] = []
        rest: list[Request] = []
        room = self._rows_max - len(self.rows)
        width_class = widest = 0
        for request in waiting:
            if len(joining) == room:
                rest.append(request)
                continue
            source, shared = self._longest_prefix(request)
            # Half of a group arrives at once. Its first member goes ahead and the others copy from it in the next
            # pass, a moment later.
            if any(_common(request, other) >= shared + REUSE_TOKENS_MIN for other, _, _ in joining):
                rest.append(request)
                continue
            new = len(request.prompt_ids) - shared
            if not joining:
                width_class = _width_class(new)
            wider = max(widest, new)
            fits = not joining or wider * (len(joining) + 1) <= self._prefill_tokens_max
            if fits and _width_class(new) == width_class:
                joining.append((request, source, shared))
                widest = wider
            else:
                rest.append(request)
        return joining, rest

    def _longest_prefix(self, request: Request) -> tuple[int, int]:
        # The last prompt token is always computed: its logits start the completion.
        prompt = request.prompt_ids[:-1]
        if len(prompt) < REUSE_TOKENS_MIN:
            return 0, 0
        lent = np.flatnonzero(self._pure & (self._salts == _salt_number(request.cache_salt)))
        if len(lent) == 0:
            return 0, 0
        equal = self._ids[lent, : len(prompt)] == prompt
        shared = np.minimum(np.where(equal.all(1), len(prompt), equal.argmin(1)), self._lengths[lent])
        best = int(shared.argmax())
        return (int(lent[best]), int(shared[best])) if shared[best] >= REUSE_TOKENS_MIN else (0, 0)

    def _forward(
        self,
        first_slot: int,
        ids_BQ: NDArray[np.int32],
        columns_BQ: NDArray[np.int64],
        keep: int | torch.Tensor,
    ) -> torch.Tensor:
        columns_read = int(columns_BQ.max()) + 1
        columns = torch.from_numpy(columns_BQ).to(self._device)
        mask = torch.zeros((*columns_BQ.shape, columns_read), dtype=self._model.dtype, device=self._device)
        hidden = torch.arange(columns_read, device=self._device) > columns[:, :, None]
        mask.masked_fill_(hidden, -torch.inf)
        self._cache.aim(first_slot, columns, columns_read)
        output = self._model(
            input_ids=torch.from_numpy(ids_BQ.astype(np.int64)).to(self._device),
            # Padding may run past the context; a learned position table must not be asked for it.
            position_ids=columns.clamp(max=self._context_tokens - 1),
            attention_mask=mask[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = output.logits
        return logits

    def _take(self, first_slot: int, sampler: BatchSampler, logits_BV: torch.Tensor, version: str) -> None:
        sampled = sampler.sample(logits_BV)
        if not all(map(math.isfinite, sampled.logprobs)):
            raise EngineFailedError(
                f"the model gave a log-prob that is not finite under weight version {version!r}. "
                "Push weights without NaN or infinity and send the request again."
            )
        rows = self.rows[first_slot:]
        lengths = self._lengths[first_slot : first_slot + len(rows)]
        self._ids[np.arange(first_slot, first_slot + len(rows)), lengths] = sampled.token_ids
        tops: Sequence[list[tuple[int, float]]] = sampled.top or [[]] * len(rows)
        for row, token_id, logprob, top in zip(rows, sampled.token_ids, sampled.logprobs, tops, strict=True):
            row.take(token_id, logprob, top, version)
            self._check_end(row, token_id)
            if row.on_tokens is not None:
                row.on_tokens(Delta([token_id], [logprob], [top], last=row.finish_reason is not None))

    def _check_end(self, row: Request, token_id: int) -> None:
        if row.stop is not None and row.detokenizer is not None:
            row.stop.push(row.detokenizer.push([token_id]))
            if row.stop.found is not None:
                row.finish_reason, row.stop_reason = "stop", row.stop.found
                return
        if token_id in row.params.stop_token_ids:
            row.finish_reason, row.stop_reason = "stop", token_id
        elif token_id in self._end_ids and not row.params.ignore_eos:
            row.finish_reason = "stop"
        elif len(row.token_ids) >= row.tokens_max:
            row.finish_reason = "length"

    def _retain(self, slot: int) -> None:
        if self._pure[slot] and self._retained and self._lengths[slot] >= REUSE_TOKENS_MIN:
            kept = self._retained[0]
            self._retained.rotate(-1)
            self._copy(slot, kept)

    def _copy(self, source: int, target: int) -> None:
        # One column further than computed: the id sampled last waits there for its forward pass.
        length = int(self._lengths[source])
        self._cache.copy_slot(source, target, length)
        self._ids[target, : length + 1] = self._ids[source, : length + 1]
        for array in (self._lengths, self._pure, self._salts):
            array[target] = array[source]


def _common(request: Request, other: Request) -> int:
    if request.cache_salt != other.cache_salt:
        return 0
    length = min(len(request.prompt_ids), len(other.prompt_ids))
    equal = request.prompt_ids[:length] == other.prompt_ids[:length]
    return length if equal.all() else int(equal.argmin())


def _width_class(tokens: int) -> int:
    return max(PREFILL_WIDTH_MIN, 1 << (tokens - 1).bit_length())


def _salt_number(salt: str | None) -> int:
    return 0 if salt is None else hash(salt)
