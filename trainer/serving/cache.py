"""The engine's key/value cache: one slot per request, allocated once and written in place.

Always holds: the requests of one forward pass own neighbouring slots, so what attention reads is a view and never
a gather; the token at position p of a request lies at column p of its slot; every column holds a finite number,
because a masked NaN would still poison the softmax-weighted sum.

It stands in for a `transformers` cache: a model's attention calls `update` once per layer and forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

# B requests of one forward pass, Q new tokens of each (short ones padded), S columns read, H heads, D head width.

COLUMNS_START = 256  # grows by doubling; most agent calls are short, and untouched columns cost page faults


class SlotCache(Cache):
    """Keys and values of every layer as (slots, H, columns, D); `aim` says where the next forward pass writes."""

    def __init__(self, slot_count: int) -> None:
        super().__init__(layers=[])
        self._slot_count = slot_count
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._slots_B1 = torch.zeros((0, 1), dtype=torch.int64)
        self._columns_BQ = torch.zeros((0, 0), dtype=torch.int64)
        self._read = (slice(0, 0), slice(None), slice(0, 0))

    def aim(self, first_slot: int, columns_BQ: Tensor, columns_read: int) -> None:
        """Point the next forward pass at slots first_slot..first_slot+B-1.

        columns_BQ    (B, Q) int64  where each new token goes in its slot
        columns_read  S: how many columns attention sees; the caller's mask hides what a row must not see
        """
        last_slot = first_slot + columns_BQ.shape[0]
        self._slots_B1 = torch.arange(first_slot, last_slot, device=columns_BQ.device)[:, None]
        self._columns_BQ = columns_BQ
        self._read = (slice(first_slot, last_slot), slice(None), slice(0, columns_read))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values, each (B, H, Q, D); return the (B, H, S, D) it is to read."""
        columns_read: int = self._read[2].stop
        if layer_idx == len(self._keys):
            self._keys.append(self._grown(None, columns_read, key_states))
            self._values.append(self._grown(None, columns_read, value_states))
        elif self._keys[layer_idx].shape[2] < columns_read:
            self._keys[layer_idx] = self._grown(self._keys[layer_idx], columns_read, key_states)
            self._values[layer_idx] = self._grown(self._values[layer_idx], columns_read, value_states)
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[self._slots_B1, :, self._columns_BQ] = key_states.transpose(1, 2)
        values[self._slots_B1, :, self._columns_BQ] = value_states.transpose(1, 2)
        return keys[self._read], values[self._read]

    def copy_slot(self, source_slot: int, target_slot: int, columns: int) -> None:
        """Make the target slot's first `columns` columns equal the source's."""
        for store in (*self._keys, *self._values):
            store[target_slot, :, :columns] = store[source_slot, :, :columns]

    def wipe(self) -> None:
        """Zero everything: after a pass that failed or made a NaN no slot may keep one."""
        for store in (*self._keys, *self._values):
            store.zero_()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # the engine always passes positions and a 4-D mask, so no model derives them from here

    def _grown(self, old: Tensor | None, columns_needed: int, like: Tensor) -> Tensor:
        columns = COLUMNS_START if old is None else old.shape[2]
        while columns < columns_needed:
            columns *= 2
        shape = (self._slot_count, like.shape[1], columns, like.shape[3])
        new = torch.zeros(shape, dtype=like.dtype, device=like.device)  # zeros, not empty: see the top
        if old is not None:
            new[:, :, : old.shape[2]] = old
        return new
