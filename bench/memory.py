"""How much memory does the broker hold beside its mapped log, while ten million spans pass through it?

Two producers append chunks as fast as they are acknowledged, for as many spans as asked. The broker keeps the newest
`--keep-gb` of the log in small segments and drops the rest, so that 36 GB of spans fit on a small disk. What is measured
is RssAnon of the broker's process: pages that are its own. Pages of the log are in the page cache, mapped from files,
and the system takes them back when it needs them.

    python -m bench.memory --json          about three minutes; the last line is one JSON object
"""

from __future__ import annotations

import argparse
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import anyio

from bench import common, peers
from lightning_bus import Client

PRODUCERS = 2
BATCH = 200  # spans a chunk
SEGMENT_BYTES = 512 << 20
DISK_FREE_BYTES_MIN = 4 << 30  # a producer stops before the disk is full, should the log not be cut
SAMPLE_S = 0.25
PEAK_MB_FLOOR = 300


def main() -> None:
    made = common.parser(__doc__, seconds=0.0, runs=1)
    made.add_argument("--spans", type=int, default=10_000_000)
    made.add_argument("--bytes", type=int, default=3600, help="of a span")
    made.add_argument("--keep-gb", type=float, default=4.0, help="of the log; 0 keeps all of it")
    made.add_argument("--produce", nargs=2, metavar=("ADDRESS", "DIRECTORY"), help=argparse.SUPPRESS)
    options = common.parse(made)
    if options.produce:
        address, directory = options.produce
        produce(address, Path(directory), options.spans, options.bytes)
        return
    spans = 100_000 if options.quick else options.spans
    with common.workspace(options.dir) as directory:
        section = {"segment_bytes": SEGMENT_BYTES, "retain_bytes": int(options.keep_gb * 1e9)}
        with common.broker(directory / "log", **section) as broker:
            arguments = (
                "--spans",
                spans // PRODUCERS,
                "--bytes",
                options.bytes,
                "--produce",
                broker.address,
                directory,
            )
            with Sampler(broker) as sampler:
                took_s = [found["s"] for found in common.run_crew([common.member("memory", *arguments)] * PRODUCERS)]
            end_mb = broker.anonymous_mb()
            log_gb = sum(path.stat().st_size for path in (directory / "log").rglob("*.mdb")) / 1e9
        summary: dict[str, Any] = {"bench": "memory", "machine": common.machine(directory)}
    peak_mb = max(sampler.samples_mb)
    common.finish(
        summary
        | {
            "n": len(sampler.samples_mb),
            "spans": spans,
            "span_bytes": options.bytes,
            "spans_per_s": round(spans / max(took_s)),
            "peak_mb": round(peak_mb),
            "end_mb": round(end_mb),
            # Flat is the claim: a leak of ten bytes a span would show here before it reached the floor.
            "first_half_peak_mb": round(max(sampler.samples_mb[: len(sampler.samples_mb) // 2 + 1])),
            "second_half_peak_mb": round(max(sampler.samples_mb[len(sampler.samples_mb) // 2 :])),
            "log_gb_at_end": round(log_gb, 2),
            "peak_mb_floor": PEAK_MB_FLOOR,
            "ok": peak_mb <= PEAK_MB_FLOOR,
        },
        options.json,
    )


class Sampler:
    """Looks at a broker's memory, in a thread, while the context is open."""

    def __init__(self, broker: common.Broker) -> None:
        self.samples_mb = [broker.anonymous_mb()]
        self._broker = broker
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.samples_mb.append(self._broker.anonymous_mb())


def produce(address: str, directory: Path, spans: int, span_bytes: int) -> None:
    """Append that many spans. The broker never looks into a body, so any bytes will do."""
    blob = os.urandom(span_bytes * BATCH)
    remaining = iter(range(0, spans, BATCH))
    took: dict[str, float] = {}

    async def run() -> None:
        async with Client(address, role="bench") as client:

            async def caller() -> None:
                for _ in remaining:
                    await client.append_blob("", 0, blob, BATCH)
                    if shutil.disk_usage(directory).free < DISK_FREE_BYTES_MIN:
                        raise SystemExit(f"less than {DISK_FREE_BYTES_MIN >> 30} GiB are free in {directory}")

            await common.say_ready_async()
            began = anyio.current_time()
            async with anyio.create_task_group() as tasks:
                for _ in range(peers.window(blob)):
                    tasks.start_soon(caller)
            took["s"] = anyio.current_time() - began

    common.run_async(run)
    common.report(took)


if __name__ == "__main__":
    main()
