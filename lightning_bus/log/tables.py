"""Rows as files that other tools read: JSON lines, or Parquet where pyarrow is installed.

A table has columns in a fixed order, each with a type by the name of pyarrow's function: "int64", "string" and so on,
"list float32", and two more:

    json      any value: itself in JSON lines, its JSON as text in Parquet, whose columns have one type
    messages  chat messages. In Parquet every message has the same fields, content that is no text is its JSON

Memory does not grow with the table: rows go out in batches.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, get_args

import msgspec
import numpy as np

from lightning_bus.errors import CallError

Format = Literal["jsonl", "parquet"]
Row = dict[str, Any]

ROWS_PER_BATCH = 2000
BYTES_PER_BATCH = 32 << 20


class Table(Protocol):
    """A file that takes rows. To be closed by leaving its context."""

    rows: int

    def add(self, row: Row, size: int = 0) -> None:
        """Add a row. size: about how many bytes it takes, where rows may be large."""

    def __enter__(self) -> Table: ...

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_table(directory: Path, name: str, form: Format, columns: dict[str, str]) -> Table:
    """Return the table <directory>/<name>.<form>."""
    path = directory / f"{name}.{form}"
    return _Parquet(path, columns) if form == "parquet" else _JsonLines(path)


def check_format(form: str) -> None:
    """Raise CallError for a format that there is not, and for Parquet where pyarrow is missing."""
    if form not in get_args(Format):
        raise CallError(f"there is no format {form!r}. Choose from: {', '.join(get_args(Format))}.")
    if form == "parquet":
        _pyarrow()


class _JsonLines:
    """One JSON object a line. Bytes become base64, NaN becomes null."""

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self._file = path.open("wb", buffering=1 << 20)

    def add(self, row: Row, size: int = 0) -> None:
        self._file.write(_json(row) + b"\n")
        self.rows += 1

    def __enter__(self) -> _JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class _Parquet:
    """A Parquet file, compressed, a row group a batch."""

    def __init__(self, path: Path, columns: dict[str, str]) -> None:
        self.rows = 0
        self._arrow = _pyarrow()
        self._json = [name for name, kind in columns.items() if kind == "json"]
        self._messages = [name for name, kind in columns.items() if kind == "messages"]
        self._schema: Any = self._arrow.schema([(name, self._type(kind)) for name, kind in columns.items()])
        parquet: Any = importlib.import_module("pyarrow.parquet")
        self._writer: Any = parquet.ParquetWriter(str(path), self._schema, compression="zstd")
        self._batch: list[Row] = []
        self._bytes = 0

    def add(self, row: Row, size: int = 0) -> None:
        for name in self._json:
            row[name] = None if row[name] is None else _json(row[name]).decode()
        for name in self._messages:
            row[name] = [_with_text(message) for message in row[name]]
        self._batch.append(row)
        self._bytes += size
        self.rows += 1
        if len(self._batch) >= ROWS_PER_BATCH or self._bytes >= BYTES_PER_BATCH:
            self._flush()

    def __enter__(self) -> _Parquet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._batch:
            self._writer.write_batch(self._arrow.RecordBatch.from_pylist(self._batch, schema=self._schema))
        self._batch = []
        self._bytes = 0

    def _type(self, kind: str) -> Any:
        arrow = self._arrow
        if kind.startswith("list "):
            return arrow.list_(self._type(kind.removeprefix("list ")))
        if kind != "messages":
            return arrow.string() if kind == "json" else getattr(arrow, kind)()
        text = arrow.string()
        call = {"id": text, "type": text, "function": arrow.struct({"name": text, "arguments": text})}
        message = {
            "role": text, "content": text, "tool_calls": arrow.list_(arrow.struct(call)), "tool_call_id": text,
            "name": text, "reasoning_content": text,
        }  # fmt: skip
        return arrow.list_(arrow.struct(message))


def _with_text(message: Row) -> Row:
    content = message.get("content")
    return message if isinstance(content, str) else {**message, "content": _json(content).decode()}


def _json(value: Any) -> bytes:
    return msgspec.json.encode(value, enc_hook=_plain)


def _plain(value: Any) -> Any:
    """Return what JSON has for what it has not: lists for arrays, text for MessagePack's extensions."""
    return value.tolist() if isinstance(value, np.ndarray) else str(value)


def _pyarrow() -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as exc:
        raise CallError(
            "Parquet needs pyarrow, which is not installed. pip install 'lightning-bus[parquet]', or export as jsonl."
        ) from exc
