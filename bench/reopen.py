"""How long does a broker take to open its log again after it was killed?

A process writes big records until the log holds --gb, and is killed with SIGKILL in the middle of the next. Then the
log is opened for writing, its state is loaded and its last record is read: what a broker does before it listens. Nothing
is scanned, so the size should not matter; `small_ms` is the same of a log a hundredth as large. `cold_ms` is after the
log's pages were dropped from the page cache, as after a reboot.

    python -m bench.reopen --json          writes and removes 10 GB; the last line is one JSON object
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from bench import common
from lightning_bus.config import BrokerSection
from lightning_bus.log.codec import decode_record
from lightning_bus.log.store import LogWriter
from lightning_bus.records import Kind, Record

RECORD_BYTES = 1 << 20
RECORDS_PER_COMMIT = 8
REOPEN_MS_FLOOR = 1000.0
SPARE_BYTES = 2 << 30  # left free on the disk
DEFAULTS = BrokerSection()


def open_log(directory: Path) -> LogWriter:
    return LogWriter(directory, map_bytes_max=DEFAULTS.map_bytes_max, segment_bytes=DEFAULTS.segment_bytes)


def write_until_killed(directory: Path, size: int) -> None:
    """Write for ever; say so once there is that much."""
    log = open_log(directory)
    body = os.urandom(RECORD_BYTES)
    said = False
    while True:
        first = log.end_offset
        log.commit(
            [
                Record(first + at, Kind.SPANS, "bench", 1, first + at + 1, 0, "r-1", 1, 1, first, body)
                for at in range(RECORDS_PER_COMMIT)
            ]
        )
        if not said and log.end_offset * RECORD_BYTES >= size:
            said = True
            common.report({"end_offset": log.end_offset})


def killed_log(directory: Path, size: int) -> None:
    """Leave a log of that size whose writer was killed."""
    command = [sys.executable, "-m", "bench.reopen", "--write", str(directory), str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit("the writer ended before its log was large enough; see above")
        process.kill()


def reopen_ms(directory: Path) -> float:
    began = time.perf_counter()
    with closing(open_log(directory)) as log:
        snapshot = log.load()
        (value,), end_offset = log.read(log.end_offset - 1, 1)
        took_ms = (time.perf_counter() - began) * 1000
        assert decode_record(value).offset == snapshot.next_offset - 1 == end_offset - 1
    return took_ms


def drop_from_cache(directory: Path) -> None:
    for file in directory.rglob("data.mdb"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def repeated(directory: Path, runs: int, before: Callable[[Path], None] = lambda directory: None) -> list[float]:
    samples: list[float] = []
    for _ in range(runs):
        before(directory)
        samples.append(reopen_ms(directory))
    return samples


def main() -> None:
    if sys.argv[1:2] == ["--write"]:
        write_until_killed(Path(sys.argv[2]), int(sys.argv[3]))
    made = common.parser(__doc__, seconds=0.0, runs=10)
    made.add_argument("--gb", type=float, default=10.0, help="size of the log; 1 GB is 10^9 bytes")
    options = common.parse(made)
    if options.quick:
        options.gb = min(options.gb, 0.2)
    size = int(options.gb * 1e9)
    with common.workspace(options.dir) as directory:
        if shutil.disk_usage(directory).free < size + SPARE_BYTES:
            raise SystemExit(f"{directory} has no room for {options.gb:g} GB. Give --dir DIRECTORY or a smaller --gb.")
        killed_log(directory / "small", size // 100)
        killed_log(directory / "log", size)
        first = reopen_ms(directory / "log")
        warm = repeated(directory / "log", options.runs)
        cold = repeated(directory / "log", options.runs, drop_from_cache)
        small = repeated(directory / "small", options.runs)
        written = sum(file.stat().st_size for file in (directory / "log").rglob("data.mdb"))
        segments = sum(1 for _ in (directory / "log").rglob("data.mdb"))
        summary: dict[str, Any] = {"bench": "reopen", "machine": common.machine(directory)}
    slowest = max(first, *warm, *cold)
    summary |= {
        "n": options.runs,
        "gb": round(written / 1e9, 2),
        "segments": segments,
        "after_kill_ms": round(first, 2),
        "warm_ms": common.median(warm, 2),
        "warm_ms_spread": common.spread(warm, 2),
        "cold_ms": common.median(cold, 2),
        "cold_ms_spread": common.spread(cold, 2),
        "small_ms": common.median(small, 2),
        "reopen_ms": round(slowest, 2),
        "reopen_ms_floor": REOPEN_MS_FLOOR,
        "ok": slowest <= REOPEN_MS_FLOOR,
    }
    common.finish(summary, options.json)


if __name__ == "__main__":
    main()
