"""How many model calls a second come out of the log as typed records?

From LMDB to `ModelCall` with numpy arrays: LogReader, checksum, decode_spans, model_call; one process, one thread, a
log in the page cache. And the same over Client.follow from a broker in its own process. `calls_per_s` has one span a
record, as the gateway writes them; `…_20` has 20.

The floor is per core, so it is compared with calls per second of processor time. On a machine that does nothing else
`calls_per_s`, by the clock, is the same; beside other work it is what the other work left over.

    python -m bench.read --json          about half a minute; the last line is one JSON object
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench import common
from lightning_bus import Client, Kind, Record, decode_spans, model_call
from lightning_bus.log.reader import LogReader
from lightning_bus.log.store import LogWriter
from lightning_bus.spans import encode_spans

CHUNKS = (1, 20)  # spans a record
CALLS_PER_SECOND = 20_000  # written to the log for each second of measuring
MAP_BYTES_MAX = 1 << 36
CALLS_PER_S_FLOOR = 100_000


def fill(directory: Path, calls: int, per_record: int) -> None:
    """Write a log of model calls, as a broker would."""
    bodies = [
        encode_spans([common.model_call_span(at + number) for number in range(per_record)])
        for at in range(0, 200, per_record)
    ]
    log = LogWriter(directory, map_bytes_max=MAP_BYTES_MAX)
    for first in range(0, calls // per_record, 512):
        log.commit(
            [
                Record(at, Kind.SPANS, "gateway-0", 1, at + 1, 0, "r-1", 1, per_record, 0, bodies[at % len(bodies)])
                for at in range(first, min(first + 512, calls // per_record))
            ]
        )
    log.close()


def typed(record: Record) -> int:
    """Make every span of a record a ModelCall; return how many there were."""
    calls = [model_call(span) for span in decode_spans(record.body)]
    assert not calls[0].untrainable
    return len(calls)


@dataclass(slots=True)
class Reading:
    """Calls per second of runs: by the clock, and by this process's own processor time."""

    per_s: list[float] = field(default_factory=list[float])
    per_cpu_s: list[float] = field(default_factory=list[float])

    @contextmanager
    def timed(self, calls: int) -> Generator[None]:
        began, began_cpu = time.perf_counter(), time.process_time()
        yield
        self.per_s.append(calls / (time.perf_counter() - began))
        self.per_cpu_s.append(calls / (time.process_time() - began_cpu))

    def figures(self, prefix: str, suffix: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, values in (("calls_per_s", self.per_s), ("calls_per_cpu_s", self.per_cpu_s)):
            result[f"{prefix}{name}{suffix}"] = common.median(values)
            result[f"{prefix}{name}{suffix}_spread"] = common.spread(values)
        return result


def read_local(directory: Path, calls: int, reading: Reading) -> None:
    with LogReader(directory) as log, reading.timed(calls):
        found = sum(map(typed, log.records()))
    assert found == calls


async def read_fetch(address: str, calls: int, reading: Reading) -> None:
    async with Client(address, role="trainer") as client:
        found = 0
        with reading.timed(calls):
            async with aclosing(client.follow()) as records:
                async for record in records:
                    found += typed(record)
                    if found == calls:
                        break


def main() -> None:
    options = common.parse(common.parser(__doc__, seconds=2.0, runs=5))
    local = {chunk: Reading() for chunk in CHUNKS}
    fetched = {chunk: Reading() for chunk in CHUNKS}
    calls = int(CALLS_PER_SECOND * options.seconds)
    with common.workspace(options.dir) as directory:
        for chunk in CHUNKS:
            log = directory / f"log{chunk}"
            fill(log, calls, chunk)
            read_local(log, calls, Reading())  # into the page cache
            with common.broker(log) as broker:
                for _ in range(options.runs):
                    read_local(log, calls, local[chunk])
                    common.run_async(partial(read_fetch, broker.address, calls, fetched[chunk]))
            shutil.rmtree(log)
        summary: dict[str, Any] = {"bench": "read", "machine": common.machine(directory)}
    summary |= {"n": options.runs, "calls": calls}
    for chunk, suffix in zip(CHUNKS, ("", "_20"), strict=True):
        summary |= local[chunk].figures("", suffix) | fetched[chunk].figures("fetch_", suffix)
    summary["calls_per_s_floor"] = CALLS_PER_S_FLOOR
    summary["ok"] = summary["calls_per_cpu_s"] >= CALLS_PER_S_FLOOR
    common.finish(summary, options.json)


if __name__ == "__main__":
    main()
