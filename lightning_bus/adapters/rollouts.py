"""Log records → finished rollouts, in the log's order.

A rollout is handed out once, when its last event says how it ended, with the spans of the attempt that ended it;
spans of attempts that were given up are left behind. The assembler keeps only what is unfinished, and knows from
which offset a successor would have to read to be where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lightning_bus.adapters.rewards import Reward
from lightning_bus.lifecycle import TERMINAL, Status
from lightning_bus.log.codec import decode_event
from lightning_bus.otel.rewards import final_reward
from lightning_bus.records import Kind, Record
from lightning_bus.spans import RecordedSpans, Span, rewarded_of

# Looked up once for every record of a log, and enumerations are slow at it.
_SPANS, _ROLLOUT = Kind.SPANS, Kind.ROLLOUT
_STATUS_OF = {status.value: status for status in Status}


@dataclass(frozen=True, slots=True)
class FinishedRollout:
    """How a rollout ended, and the spans of its last attempt in log order."""

    rollout_id: str
    group: str
    labels: dict[str, str]
    status: Status
    attempt: int
    reward: float | None
    error: str
    spans: Sequence[Span]  # from a log: RecordedSpans
    first_offset: int  # of its submission
    end_offset: int  # just past its last event
    task_body: bytes = b""  # as it was submitted: MessagePack
    judged: float | list[Reward] | None = None  # what a reward hook said of it, which is then its reward
    not_judged: str = ""  # why a hook that was asked gave nothing; it has no reward then, and `error` the details

    @property
    def task(self) -> Any:
        """The task as its submitter gave it; None where it is not MessagePack."""
        try:
            return msgspec.msgpack.decode(self.task_body)
        except msgspec.DecodeError:
            return None


@dataclass(slots=True)
class Assembler:
    """Feed it every record, in order; it answers with a rollout when one ends."""

    next_offset: int = 0
    _open: dict[str, _Open] = field(default_factory=dict[str, "_Open"])

    def feed(self, record: Record) -> FinishedRollout | None:
        """Take one record; return the rollout that it ended, if it ended one.

        Records of rollouts whose submission lies before the first record fed are passed over.
        """
        assert record.offset >= self.next_offset, (
            f"record {record.offset} after {self.next_offset}: the log has one order"
        )
        self.next_offset = record.offset + 1
        if record.kind is _SPANS:
            rollout = self._open.get(record.rollout_id)
            if rollout is not None:
                rollout.chunks.append((record.attempt, record.body))
        elif record.kind is _ROLLOUT:
            return self._on_event(record)
        return None

    @property
    def low_offset(self) -> int:
        """Whoever reads from here misses nothing that is unfinished."""
        return min((rollout.first_offset for rollout in self._open.values()), default=self.next_offset)

    def _on_event(self, record: Record) -> FinishedRollout | None:
        event = decode_event(record)
        if event.what == "submit":
            self._open[record.rollout_id] = _Open(record.offset, event.task, [])
            return None
        status = _STATUS_OF.get(event.status) or Status(event.status)
        if status not in TERMINAL or record.rollout_id not in self._open:
            return None
        rollout = self._open.pop(record.rollout_id)
        spans = RecordedSpans([body for attempt, body in rollout.chunks if attempt == record.attempt])
        reward = event.reward
        if reward is None:  # its agent returned none, but may have emitted one, in a subprocess or over OTLP
            reward = final_reward(rewarded_of(spans))
        return FinishedRollout(
            rollout_id=record.rollout_id,
            group=event.group,
            labels=event.labels,
            status=status,
            attempt=record.attempt,
            reward=reward if status is Status.SUCCEEDED else None,
            error=event.error,
            spans=spans,
            first_offset=rollout.first_offset,
            end_offset=record.offset + 1,
            task_body=rollout.task,
        )


@dataclass(slots=True)
class _Open:
    first_offset: int
    task: bytes
    chunks: list[tuple[int, bytes]]
