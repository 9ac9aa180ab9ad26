"""The log as tables that other tools read: one row a span, one row a rollout, as JSON lines or as Parquet.

Both formats have the same columns in the same order. Token ids and log-probs are columns of their own; the other
attributes, labels and tasks are JSON: objects in JSON lines, text in Parquet, whose columns have one type. Each span
carries what its rollout came to, as that stands while exporting, so most questions need no join.

Memory does not grow with the log: rows go out in batches. The directory appears whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from lightning_bus import messages as m
from lightning_bus.log.backup import appearing
from lightning_bus.log.reader import LogReader
from lightning_bus.log.tables import ROWS_PER_BATCH, Format, Row, check_format, open_table
from lightning_bus.records import Kind, Record
from lightning_bus.spans import LOGPROBS, PROMPT_IDS, RESPONSE_IDS, REWARD, Span, decode_spans

ROLLOUTS_REMEMBERED = 10_000  # spans of a rollout stand close together in the log
PACKED = {"prompt_token_ids": PROMPT_IDS, "response_token_ids": RESPONSE_IDS, "response_logprobs": LOGPROBS}

# Column → its type; see `tables`.
SPAN_COLUMNS = {
    "offset": "int64",  # of the record that holds it
    "producer": "string",
    "rollout_id": "string",
    "attempt": "int64",
    "sequence": "int64",
    "span_id": "string",  # hexadecimal, as all ids
    "trace_id": "string",
    "parent_id": "string",
    "name": "string",
    "start_ns": "int64",
    "end_ns": "int64",
    "error": "string",
    "prompt_token_ids": "list int64",
    "response_token_ids": "list int64",
    "response_logprobs": "list float32",
    "reward": "float64",  # the span's own
    "attributes": "json",
    "group": "string",  # from here on: of its rollout
    "labels": "json",
    "status": "string",
    "last_attempt": "int64",  # spans of earlier ones were recorded, and then the lease was lost
    "rollout_reward": "float64",
}
ROLLOUT_COLUMNS = {
    "rollout_id": "string",
    "group": "string",
    "labels": "json",
    "status": "string",
    "attempt": "int64",
    "worker": "string",
    "reward": "float64",
    "error": "string",
    "model": "string",
    "priority": "int64",
    "task": "json",
}


class Exported(NamedTuple):
    """What was written: how many rows, from the records [first_offset, end_offset)."""

    spans: int
    rollouts: int
    first_offset: int
    end_offset: int


def export(
    reader: LogReader, target: Path, form: Format, progress: Callable[[int, int], None] | None = None
) -> Exported:
    """Write spans.<form> and rollouts.<form> into a new directory `target`.

    form      "jsonl" or "parquet"; the second needs the extra lightning-bus[parquet]
    progress  called now and then with how many records are done, and how many there are

    A log that is being written is exported as far as it goes now. Raises CallError when the target is not empty or
    pyarrow is missing, RemoteProtocolError on a damaged record.
    """
    check_format(form)
    first_offset, end_offset = reader.first_offset, reader.end_offset
    with appearing(target) as draft:
        with open_table(draft, "spans", form, SPAN_COLUMNS) as spans:
            for row in _span_rows(reader, first_offset, end_offset, progress or (lambda done, total: None)):
                spans.add(*row)
        with open_table(draft, "rollouts", form, ROLLOUT_COLUMNS) as rollouts:
            for rollout in reader.rollouts():
                rollouts.add(_rollout_row(rollout), len(rollout.submission.task))
    return Exported(spans.rows, rollouts.rows, first_offset, end_offset)


# -- rows -----------------------------------------------------------------------------------------------------------------


def _span_rows(
    reader: LogReader, first_offset: int, end_offset: int, progress: Callable[[int, int], None]
) -> Iterator[tuple[Row, int]]:
    """Yield a row for each span, and about how many bytes it takes."""

    @lru_cache(ROLLOUTS_REMEMBERED)
    def rollout_facts(rollout_id: str) -> Row:
        rollout = reader.rollout(rollout_id) if rollout_id else None
        if rollout is None:  # of no rollout, or of one that was forgotten since
            return {"group": None, "labels": None, "status": None, "last_attempt": None, "rollout_reward": None}
        return {
            "group": rollout.submission.group,
            "labels": rollout.submission.labels,
            "status": rollout.status.value,
            "last_attempt": rollout.attempt,
            "rollout_reward": rollout.reward,
        }

    for record in reader.records(first_offset):
        if record.offset >= end_offset:
            break
        if record.kind is Kind.SPANS:
            for span in decode_spans(record.body):
                row = _span_row(record, span) | rollout_facts(record.rollout_id)
                yield row, len(record.body) // max(1, record.span_count)
        if (record.offset - first_offset) % ROWS_PER_BATCH == 0:
            progress(record.offset - first_offset, end_offset - first_offset)
    progress(end_offset - first_offset, end_offset - first_offset)


def _span_row(record: Record, span: Span) -> Row:
    attributes = dict(span.attributes)
    return {
        "offset": record.offset,
        "producer": record.producer,
        "rollout_id": record.rollout_id,
        "attempt": record.attempt,
        "sequence": span.sequence,
        "span_id": span.span_id.hex(),
        "trace_id": span.trace_id.hex(),
        "parent_id": None if span.parent_id is None else span.parent_id.hex(),
        "name": span.name,
        "start_ns": span.start_ns,
        "end_ns": span.end_ns,
        "error": span.error,
        "prompt_token_ids": _unpacked(attributes, PROMPT_IDS, "<u4"),
        "response_token_ids": _unpacked(attributes, RESPONSE_IDS, "<u4"),
        "response_logprobs": _unpacked(attributes, LOGPROBS, "<f4"),
        "reward": _number(attributes.get(REWARD)),
        "attributes": attributes,
    }


def _unpacked(attributes: dict[str, Any], name: str, dtype: str) -> Any:
    """Take a packed attribute out as an array; None where there is none, or where it is something else and stays."""
    value = attributes.get(name)
    if not isinstance(value, bytes) or len(value) % 4:
        return None
    del attributes[name]
    return np.frombuffer(value, dtype)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _rollout_row(rollout: m.Rollout) -> Row:
    submission = rollout.submission
    try:
        task = msgspec.msgpack.decode(submission.task)
    except msgspec.DecodeError:  # not MessagePack: as base64, so that nothing is lost
        task = submission.task
    return {
        "rollout_id": submission.rollout_id,
        "group": submission.group,
        "labels": submission.labels,
        "status": rollout.status.value,
        "attempt": rollout.attempt,
        "worker": rollout.worker,
        "reward": rollout.reward,
        "error": rollout.error,
        "model": submission.model,
        "priority": submission.priority,
        "task": task,
    }
