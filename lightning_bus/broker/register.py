"""Every rollout that the broker knows, those that are over in as few bytes as will do.

    register["r-1"].attempt        register.get("r-9")        register.pack("r-1")

A rollout whose end is final is kept encoded, its task replaced by a digest: a third of the memory, and a broker keeps
millions of them until retention drops their history. It comes out as a copy: packed rollouts never change. What always
holds. The order is that of submission. A rollout that is not packed comes out as the one object that there is of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import msgspec

from lightning_bus import messages as m
from lightning_bus.lifecycle import Status

_STATUSES = tuple(Status)
_PLACE = {status: place for place, status in enumerate(_STATUSES)}
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(m.Rollout).decode


class Register(Mapping[str, m.Rollout]):
    """Rollouts by id."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: dict[str, m.Rollout | bytes] = {}  # packed: place of the status, then the rollout as MessagePack

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __contains__(self, rollout_id: object) -> bool:
        return rollout_id in self._kept

    def __getitem__(self, rollout_id: str) -> m.Rollout:
        kept = self._kept[rollout_id]
        return _unpack(kept) if isinstance(kept, bytes) else kept

    def find(self, rollout_id: str) -> m.Rollout | None:
        """Return the rollout, None when it is not known."""
        kept = self._kept.get(rollout_id)
        return _unpack(kept) if isinstance(kept, bytes) else kept

    def live(self, rollout_id: str) -> m.Rollout | None:
        """Return the rollout unless it is packed or not known."""
        kept = self._kept.get(rollout_id)
        return None if isinstance(kept, bytes) else kept

    def unpacked(self) -> Iterator[m.Rollout]:
        """Yield all that are not packed."""
        return (kept for kept in self._kept.values() if not isinstance(kept, bytes))

    def status_of(self, rollout_id: str) -> Status | None:
        """Return how a rollout stands, None when it is not known; this costs nothing."""
        kept = self._kept.get(rollout_id)
        if isinstance(kept, bytes):
            return _STATUSES[kept[0]]
        return None if kept is None else kept.status

    def same_task(self, rollout_id: str, task: bytes) -> bool:
        """True when that is the task of a known rollout."""
        kept = self._kept[rollout_id]
        if isinstance(kept, bytes):
            return _decode(memoryview(kept)[1:]).submission.task == _digest(task)
        return kept.submission.task == task

    def add(self, rollout: m.Rollout) -> None:
        self._kept[rollout.submission.rollout_id] = rollout

    def pack(self, rollout_id: str) -> None:
        """Let go of a rollout's task, and of the object: nothing will change it any more."""
        rollout = self._kept[rollout_id]
        assert not isinstance(rollout, bytes), "packed once"
        assert rollout.status.terminal
        submission = msgspec.structs.replace(rollout.submission, task=_digest(rollout.submission.task))
        packed = msgspec.structs.replace(rollout, submission=submission)
        self._kept[rollout_id] = bytes((_PLACE[rollout.status],)) + _encode(packed)

    def remove(self, rollout_id: str) -> None:
        del self._kept[rollout_id]


def _unpack(packed: bytes) -> m.Rollout:
    rollout = _decode(memoryview(packed)[1:])
    rollout.submission = msgspec.structs.replace(rollout.submission, task=b"")
    return rollout


def _digest(task: bytes) -> bytes:
    return hashlib.blake2b(task, digest_size=16).digest()
