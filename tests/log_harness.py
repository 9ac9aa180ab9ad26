"""What tests of the log on disk share: records, a writer, and readers in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from lightning_bus.log.layout import find_segments
from lightning_bus.log.reader import LogReader
from lightning_bus.log.store import LogWriter
from lightning_bus.records import Kind, Record
from tests.bus_fixtures import ROOT

MAP_BYTES = 1 << 30
SEGMENT_BYTES = 64 << 10
BODY = b"x" * 10_000
LARGE_SEGMENT_BYTES = 1 << 40  # larger than anything written here
encode = msgspec.msgpack.encode


def record(offset: int, body: bytes = b"body") -> Record:
    return Record(offset, Kind.SPANS, "p", 1, offset + 1, 0, "", 0, 1, 0, body)


@contextmanager
def writer(path: Path, map_bytes_max: int = MAP_BYTES, segment_bytes: int = LARGE_SEGMENT_BYTES) -> Iterator[LogWriter]:
    with closing(LogWriter(path, map_bytes_max=map_bytes_max, segment_bytes=segment_bytes)) as log:
        yield log


def data_file(path: Path) -> Path:
    """The newest segment's file."""
    return find_segments(path)[-1].file


def bodies(path: Path) -> list[bytes]:
    with LogReader(path) as reader:
        return [record.body for record in reader.records()]


_READER = """
import sys
from pathlib import Path
from lightning_bus.log.reader import LogReader
with LogReader(Path(sys.argv[1])) as reader:
    for _ in sys.stdin:
        print(reader.end_offset, sum(len(record.body) for record in reader.records()), flush=True)
"""


@contextmanager
def reader_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _READER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        yield process


def ask(process: subprocess.Popen[str]) -> tuple[int, int]:
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    offset, size = process.stdout.readline().split()
    return int(offset), int(size)
