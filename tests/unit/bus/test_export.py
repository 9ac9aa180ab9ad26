"""The log as JSON lines and as Parquet, read back with the tools that people would use."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lightning_bus import messages as m
from lightning_bus.errors import CallError
from lightning_bus.lifecycle import Status
from lightning_bus.log.export import ROLLOUT_COLUMNS, ROWS_PER_BATCH, SPAN_COLUMNS, Exported, Format, export
from lightning_bus.log.reader import LogReader
from lightning_bus.log.store import LogWriter
from lightning_bus.records import Kind, Put, Record, Table
from lightning_bus.spans import LOGPROBS, PROMPT_IDS, RESPONSE_IDS, REWARD, Span, encode_spans, pack_ids, pack_logprobs
from tests.bus_fixtures import span

encode = msgspec.msgpack.encode
Rows = list[dict[str, Any]]


def write_log(path: Path, *chunks: list[Span]) -> None:
    """A log of these chunks, of rollout r-1 when their spans are, and r-1 itself, submitted and done."""
    submission = m.Submission("r-1", encode({"question": "1 + 1"}), "g-1", labels={"split": "train"})
    with closing(LogWriter(path, map_bytes_max=1 << 30, segment_bytes=100_000)) as log:
        log.commit(
            [
                Put(Table.ROLLOUTS, b"r-1", encode(m.Rollout(submission, Status.QUEUED))),
                Put(Table.ROLLOUTS, b"r-2", encode(m.Rollout(m.Submission("r-2", b"\xc1"), Status.QUEUED))),
                Put(Table.STANDINGS, b"r-1", encode(m.Standing(Status.SUCCEEDED, 2, "w-1", 0.5))),
            ]
        )
        for spans in chunks:
            scope = spans[0].rollout_id, spans[0].attempt
            end = log.end_offset
            log.commit([Record(end, Kind.SPANS, "gw", 1, end + 1, 0, *scope, len(spans), 0, encode_spans(spans))])
            log.commit([Record(end + 1, Kind.ROLLOUT, "", 0, 0, 0, "r-1", 1, 0, 0, b"")])


def call(**attributes: Any) -> Span:
    packed = {PROMPT_IDS: pack_ids([1, 2]), RESPONSE_IDS: pack_ids([4_000_000_000]), LOGPROBS: pack_logprobs([-0.5])}
    return span("chat", "r-1", 2, **packed, **attributes)


def read_jsonl(path: Path) -> tuple[Rows, Rows]:
    spans, rollouts = (
        [json.loads(line) for line in (path / name).read_text().splitlines()]
        for name in ("spans.jsonl", "rollouts.jsonl")
    )
    return spans, rollouts


def read_parquet(path: Path) -> tuple[Rows, Rows]:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'lightning-bus[parquet]'")
    tables = [parquet.read_table(path / name).to_pylist() for name in ("spans.parquet", "rollouts.parquet")]
    for row in (row for table in tables for row in table):
        for name in ("attributes", "labels", "task"):
            if row.get(name) is not None:
                row[name] = json.loads(row[name])
    return tables[0], tables[1]


FORMATS = pytest.mark.parametrize(("form", "read"), [("jsonl", read_jsonl), ("parquet", read_parquet)])
Read = Callable[[Path], tuple[Rows, Rows]]


def exported(tmp_path: Path, form: Format, read: Read) -> tuple[Exported, Rows, Rows]:
    if form == "parquet":
        pytest.importorskip("pyarrow", reason="pip install 'lightning-bus[parquet]'")
    with LogReader(tmp_path / "log") as reader:
        result = export(reader, tmp_path / "out", form)
    spans, rollouts = read(tmp_path / "out")
    return result, spans, rollouts


@FORMATS
def test_a_span_is_a_row_with_all_that_it_holds_and_what_its_rollout_came_to(
    tmp_path: Path, form: Format, read: Read
) -> None:
    one = call(**{REWARD: 0.25, "tools": ["calc", {"n": 1}], "raw": b"\x00\xff"})
    write_log(tmp_path / "log", [one])
    result, spans, rollouts = exported(tmp_path, form, read)
    assert result == Exported(1, 2, 0, 2)
    (row,) = spans
    assert list(row) == list(SPAN_COLUMNS)
    assert row == {
        "offset": 0, "producer": "gw", "rollout_id": "r-1", "attempt": 2, "sequence": 0,
        "span_id": one.span_id.hex(), "trace_id": one.trace_id.hex(), "parent_id": None, "name": "chat",
        "start_ns": one.start_ns, "end_ns": one.end_ns, "error": "",
        "prompt_token_ids": [1, 2], "response_token_ids": [4_000_000_000], "response_logprobs": [-0.5], "reward": 0.25,
        "attributes": {REWARD: 0.25, "tools": ["calc", {"n": 1}], "raw": "AP8="},
        "group": "g-1", "labels": {"split": "train"}, "status": "succeeded", "last_attempt": 2, "rollout_reward": 0.5,
    }  # fmt: skip
    assert [list(row) for row in rollouts] == [list(ROLLOUT_COLUMNS)] * 2
    assert rollouts[0] == {
        "rollout_id": "r-1", "group": "g-1", "labels": {"split": "train"}, "status": "succeeded", "attempt": 2,
        "worker": "w-1", "reward": 0.5, "error": "", "model": "", "priority": 0, "task": {"question": "1 + 1"},
    }  # fmt: skip
    assert (rollouts[1]["rollout_id"], rollouts[1]["status"], rollouts[1]["task"]) == ("r-2", "queued", "wQ==")


@FORMATS
def test_what_is_not_there_is_null_and_what_is_malformed_stays_an_attribute(
    tmp_path: Path, form: Format, read: Read
) -> None:
    write_log(tmp_path / "log", [span("step", **{LOGPROBS: "not packed", REWARD: "high"})])
    _, (row,), _ = exported(tmp_path, form, read)
    assert (row["response_logprobs"], row["prompt_token_ids"], row["reward"]) == (None, None, None)
    assert row["attributes"] == {LOGPROBS: "not packed", REWARD: "high"}
    assert (row["group"], row["status"], row["labels"]) == (None, None, None)


@FORMATS
def test_all_spans_of_a_long_log_are_exported_in_its_order(tmp_path: Path, form: Format, read: Read) -> None:
    chunks = [[call(text="x" * 500) for _ in range(100)] for _ in range(ROWS_PER_BATCH // 100 + 3)]
    write_log(tmp_path / "log", *chunks)
    result, spans, _ = exported(tmp_path, form, read)
    expected = [one.span_id.hex() for chunk in chunks for one in chunk]
    assert result.spans == len(expected)
    assert [row["span_id"] for row in spans] == expected


@FORMATS
def test_an_empty_log_is_exported_as_tables_without_rows(tmp_path: Path, form: Format, read: Read) -> None:
    with closing(LogWriter(tmp_path / "log", map_bytes_max=1 << 30)):
        pass
    assert exported(tmp_path, form, read) == (Exported(0, 0, 0, 0), [], [])


def test_progress_is_told_up_to_the_end(tmp_path: Path) -> None:
    write_log(tmp_path / "log", [call()], [call()])
    told: list[tuple[int, int]] = []
    with LogReader(tmp_path / "log") as reader:
        export(reader, tmp_path / "out", "jsonl", lambda done, total: told.append((done, total)))
    assert told[-1] == (4, 4)


def test_an_export_overwrites_nothing(tmp_path: Path) -> None:
    write_log(tmp_path / "log", [call()])
    with LogReader(tmp_path / "log") as reader:
        export(reader, tmp_path / "out", "jsonl")
        with pytest.raises(CallError, match="not an empty directory. Nothing is overwritten"):
            export(reader, tmp_path / "out", "jsonl")


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    write_log(tmp_path / "log", [call()])

    def give_up(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with LogReader(tmp_path / "log") as reader, pytest.raises(KeyboardInterrupt):
        export(reader, tmp_path / "out", "jsonl", give_up)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write_log(tmp_path / "log", [call()])
    with LogReader(tmp_path / "log") as reader:
        with pytest.raises(CallError, match=r"pip install 'lightning-bus\[parquet\]', or export as jsonl"):
            export(reader, tmp_path / "out", "parquet")
        with pytest.raises(CallError, match="there is no format 'csv'. Choose from: jsonl, parquet"):
            export(reader, tmp_path / "out", "csv")  # type: ignore[arg-type]
