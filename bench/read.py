"""How many model calls a second come out of the log as typed records?

From LMDB to `ModelCall` with numpy arrays: LogReader, checksum, decode_spans, model_call; one process, one thread, a
log in the page cache. And the same over Client.fetch from a broker in its own process. `calls_per_s` has one span a
record, as the gateway writes them; `calls_per_s_20` has 20.

    python -m bench.read --json          about half a minute; the last line is one JSON object
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from bench import common
from lightning_bus import Client, Kind, Record, decode_spans, model_call
from lightning_bus.log.store import LogReader, LogWriter
from lightning_bus.spans import encode_spans

CHUNKS = (1, 20)  # spans a record
CALLS_PER_SECOND = 20_000  # written to the log for each second of measuring
FETCH_BYTES = 4 << 20
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


def read_local(directory: Path) -> float:
    with LogReader(directory) as log:
        began = time.perf_counter()
        calls = sum(typed(record) for record in log.records())
        return calls / (time.perf_counter() - began)


async def read_fetch(address: str) -> float:
    async with Client(address, role="bench") as client:
        calls = offset = 0
        began = time.perf_counter()
        while True:
            records, offset, end_offset = await client.fetch(offset, bytes_max=FETCH_BYTES)
            calls += sum(typed(record) for record in records)
            if offset >= end_offset:
                return calls / (time.perf_counter() - began)


def main() -> None:
    options = common.parse(common.parser(__doc__, seconds=2.0, runs=5))
    local: dict[int, list[float]] = {chunk: [] for chunk in CHUNKS}
    fetched: dict[int, list[float]] = {chunk: [] for chunk in CHUNKS}
    calls = int(CALLS_PER_SECOND * options.seconds)
    with common.workspace(options.dir) as directory:
        for chunk in CHUNKS:
            log = directory / f"log{chunk}"
            fill(log, calls, chunk)
            read_local(log)  # into the page cache
            with common.broker(log) as broker:

                async def fetch(address: str = broker.address) -> float:
                    return await read_fetch(address)

                for _ in range(options.runs):
                    local[chunk].append(read_local(log))
                    fetched[chunk].append(common.run_async(fetch))
            shutil.rmtree(log)
        summary: dict[str, Any] = {"bench": "read", "machine": common.machine(directory)}
    rate = common.median(local[1])
    summary |= {
        "n": options.runs,
        "calls": calls,
        "calls_per_s": rate,
        "calls_per_s_spread": common.spread(local[1]),
        "calls_per_s_20": common.median(local[20]),
        "calls_per_s_20_spread": common.spread(local[20]),
        "fetch_calls_per_s": common.median(fetched[1]),
        "fetch_calls_per_s_spread": common.spread(fetched[1]),
        "fetch_calls_per_s_20": common.median(fetched[20]),
        "fetch_calls_per_s_20_spread": common.spread(fetched[20]),
        "calls_per_s_floor": CALLS_PER_S_FLOOR,
        "ok": rate >= CALLS_PER_S_FLOOR,
    }
    common.finish(summary, options.json)


if __name__ == "__main__":
    main()
