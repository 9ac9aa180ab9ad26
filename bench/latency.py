"""How long does a caller wait for its acknowledgement?

One client, one batch of 20 spans outstanding: encode nothing, send, wait until it is durable, again. `fsync_ms` is the
same bytes appended to a file with fdatasync in the same run, in turns: what the disk alone takes.

    python -m bench.latency --json          about ten seconds; the last line is one JSON object
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from bench import common
from lightning_bus import Client
from lightning_bus.spans import encode_spans

SPANS = 20
WARMUP = 50
ACK_MS_P50_FLOOR = 3.0


async def ack_ms(address: str, blob: bytes, seconds: float) -> list[float]:
    samples: list[float] = []
    async with Client(address, role="bench") as bus:
        for _ in range(WARMUP):
            await bus.append_blob("", 0, blob, SPANS)
        until = time.perf_counter() + seconds
        while (began := time.perf_counter()) < until:
            await bus.append_blob("", 0, blob, SPANS)
            samples.append((time.perf_counter() - began) * 1000)
    return samples


def fsync_ms(directory: Path, blob: bytes, seconds: float) -> list[float]:
    samples: list[float] = []
    with open(directory / "raw", "ab", buffering=0) as file:
        until = time.perf_counter() + seconds
        while (began := time.perf_counter()) < until:
            file.write(blob)
            os.fdatasync(file.fileno())
            samples.append((time.perf_counter() - began) * 1000)
    return samples


def main() -> None:
    options = common.parse(common.parser(__doc__, seconds=2.0, runs=3))
    blob = encode_spans([common.model_call_span(at) for at in range(SPANS)])
    acks: list[list[float]] = []
    syncs: list[list[float]] = []
    with common.workspace(options.dir) as directory, common.broker(directory / "log") as broker:

        async def one() -> list[float]:
            return await ack_ms(broker.address, blob, options.seconds)

        for _ in range(options.runs):
            acks.append(common.run_async(one))
            syncs.append(fsync_ms(directory, blob, options.seconds / 4))
        summary: dict[str, Any] = {"bench": "latency", "machine": common.machine(directory)}
    every = [sample for run in acks for sample in run]
    p50s = [common.percentile(run, 50) for run in acks]
    p99s = [common.percentile(run, 99) for run in acks]
    p50 = common.percentile(every, 50)
    summary |= {
        "n": len(every),
        "runs": options.runs,
        "spans": SPANS,
        "bytes": len(blob),
        "ack_ms_p50": p50,
        "ack_ms_p50_spread": common.spread(p50s, 2),
        "ack_ms_p99": common.percentile(every, 99),
        "ack_ms_p99_spread": common.spread(p99s, 2),
        "fsync_ms_p50": common.percentile([sample for run in syncs for sample in run], 50),
        "ack_ms_p50_floor": ACK_MS_P50_FLOOR,
        "ok": p50 <= ACK_MS_P50_FLOOR,
    }
    common.finish(summary, options.json)


if __name__ == "__main__":
    main()
