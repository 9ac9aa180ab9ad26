"""How many spans a second become durable, and how does that compare with the disk and with other stores?

Two producer processes, spans of 3.6 KB (30 attributes, 300 token ids, 300 log-probs) in chunks of 1, 20 and 100,
encoded beforehand so that each store is asked the same question: take these bytes and answer when they are on disk.
Ratios are paired: each run measures everything in turns, us twice, every second run in the opposite order, and the
ratio is the median over runs. A peer that is not installed is null.

limit_ratio           ÷ append + fdatasync of the same bytes in 1 MiB groups, in this process, just before and after
redis_ratio           ÷ Redis Streams, appendfsync always, through redis-py's pipelines
redis_bare_ratio      ÷ the same by bare sockets
nats_ratio            ÷ NATS JetStream, file storage, sync always, through nats-py
nats_bare_ratio       ÷ the same by bare sockets
agentlightning_ratio  ÷ Agent Lightning 0.3.0's store (memory: it has no disk) over its client's add_many_spans, which
                        sends span by span, so chunks make no difference
curve_ratio           the same with keys, so encrypted, ÷ plain

Headline figures are of chunks of 100; `…_20` are of chunks of 20; `batches` has all. `python -m bench.install`
installs the peers.

    python -m bench.spans --json          about three minutes; the last line is one JSON object
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import anyio

from bench import common, peers
from lightning_bus import Client
from lightning_bus.keys import create_key

PRODUCERS = 2
BATCHES = (1, 20, 100)
FLOORS = {"limit_ratio": 0.6, "redis_ratio": 2.5, "nats_ratio": 1.3, "agentlightning_ratio": 100.0}
PEERS = ("curve", "redis", "redis_bare", "nats", "nats_bare", "agentlightning")
TURNS = ("bus", "curve", "redis", "redis_bare", "bus", "nats", "nats_bare", "agentlightning")  # of a run


def main() -> None:
    made = common.parser(__doc__, seconds=1.0, runs=3)
    made.add_argument("--without", nargs="*", default=[], choices=PEERS)
    made.add_argument(
        "--batches", nargs="*", type=int, default=BATCHES, help="spans a chunk; the last one is the headline"
    )
    made.add_argument("--produce", nargs=3, metavar=("WHERE", "ADDRESS", "BATCH"), help=argparse.SUPPRESS)
    made.add_argument("--key", type=Path, help=argparse.SUPPRESS)
    options = common.parse(made)
    if options.produce:
        where, address, batch = options.produce
        if where == "bus":
            produce(address, int(batch), options.seconds, options.key)
        else:
            peers.PRODUCE[where](address, int(batch), options.seconds)
        return
    bench = Bench(options.seconds, options.batches[-1])
    # The disk's speed changes within seconds: what is compared stands side by side, and ours stands there twice.
    turns = [name for name in TURNS if name not in options.without]
    rates: dict[str, list[float]] = {}
    with common.workspace(options.dir) as directory:
        for run in range(options.runs):
            for batch in options.batches:
                for name in turns if run % 2 == 0 else reversed(turns):
                    for what, rate in bench.measure(name, directory / "store", batch).items():
                        rates.setdefault(f"{what}.{batch}", []).append(rate)
                    shutil.rmtree(directory / "store", ignore_errors=True)
        summary: dict[str, Any] = {"bench": "spans", "machine": common.machine(directory)}
    batches = {str(batch): _figures(rates, batch) for batch in options.batches}
    last = batches[str(options.batches[-1])]
    summary |= {
        "n": options.runs,
        "seconds": options.seconds,
        "producers": PRODUCERS,
        "span_bytes": len(peers.chunk(100)) // 100,
        "batch": options.batches[-1],
        "spans_per_s": last["bus_spans_per_s"],
        **last,
        "spans_per_s_20": batches["20"]["bus_spans_per_s"] if "20" in batches else None,
        "limit_ratio_20": batches["20"]["limit_ratio"] if "20" in batches else None,
        "broker_cores": common.median(bench.facts["broker_cores"], 2),
        "broker_anonymous_mb": common.median(bench.facts["broker_anonymous_mb"]),
        "batches": batches,
        "floors": FLOORS,
        "missed": [name for name, floor in FLOORS.items() if last[name] is not None and last[name] < floor],
    }
    summary["ok"] = not summary["missed"]
    common.finish(summary, options.json)


class Bench:
    """Measures one store at a time; what was noticed on the way is in `facts`."""

    def __init__(self, seconds: float, headline: int) -> None:
        self.seconds = seconds
        self.headline = headline  # spans a chunk
        self.facts: dict[str, list[float]] = {"broker_cores": [], "broker_anonymous_mb": []}
        self._agentlightning: float | None = None

    def measure(self, name: str, store: Path, batch: int) -> dict[str, float]:
        """Return spans per second by what was measured; nothing where a peer is not installed."""

        def drive(producer: str, address: str) -> float:
            return self._drive(producer, address, batch)

        if name == "bus":
            store.mkdir(parents=True)
            before = common.raw_bytes_per_s(store, self.seconds / 2)
            rate = self._bus(store, batch)
            after = common.raw_bytes_per_s(store, self.seconds / 2)
            return {"bus": rate, "raw": (before + after) / 2 / len(peers.chunk(100)) * 100}
        rate = None
        if name == "curve":
            rate = self._curve(store, batch)
        elif name.startswith("redis"):
            rate = peers.redis(store, name, drive)
        elif name.startswith("nats"):
            rate = peers.nats(store, name, drive)
        elif batch == self.headline:
            # Once is enough for a factor of hundreds, and it takes long to start.
            self._agentlightning = self._agentlightning or peers.agentlightning(self.seconds, PRODUCERS * 8)
            rate = self._agentlightning
        return {} if rate is None else {name: rate}

    def _bus(self, store: Path, batch: int) -> float:
        with common.broker(store / "log") as broker:
            before_s, began = broker.cpu_s(), time.perf_counter()
            rate = self._drive("bus", broker.address, batch)
            if batch == self.headline:
                self.facts["broker_cores"].append((broker.cpu_s() - before_s) / (time.perf_counter() - began))
                self.facts["broker_anonymous_mb"].append(broker.anonymous_mb())
            return rate

    def _curve(self, store: Path, batch: int) -> float:
        keys = store / "keys"
        key = create_key(keys, "bench", "gateway")
        with common.broker(store / "log", keys=str(keys)) as broker:
            return self._drive("bus", broker.address, batch, "--key", key)

    def _drive(self, producer: str, address: str, batch: int, *more: object) -> float:
        arguments = ("--seconds", self.seconds, *more, "--produce", producer, address, batch)
        return sum(found["per_s"] for found in common.run_crew([common.member("spans", *arguments)] * PRODUCERS))


def produce(address: str, batch: int, seconds: float, key: Path | None) -> None:
    """One producer of ours: a window of callers, each appending a chunk when its last one is durable."""
    blob = peers.chunk(batch)
    meter = common.Meter(peers.WARMUP_S, seconds)

    async def run() -> None:
        async with Client(address, role="bench", key=key) as client:

            async def caller() -> None:
                going = True
                while going:
                    await client.append_blob("", 0, blob, batch)
                    going = meter.add(batch)

            await common.say_ready_async()
            meter.start()
            async with anyio.create_task_group() as tasks:
                for _ in range(peers.window(blob)):
                    tasks.start_soon(caller)

    common.run_async(run)
    common.report({"per_s": meter.per_s})


def _figures(rates: dict[str, list[float]], batch: int) -> dict[str, Any]:
    """Everybody's rate, and ours over each, run by run; null for who was not there."""
    ours = rates[f"bus.{batch}"]
    result: dict[str, Any] = {}
    for name in ("bus", "raw", *PEERS):
        theirs = rates.get(f"{name}.{batch}")
        result[f"{name}_spans_per_s"] = common.median(theirs) if theirs else None
        result[f"{name}_spans_per_s_spread"] = common.spread(theirs) if theirs else None
    of_run = [(first + second) / 2 for first, second in zip(ours[::2], ours[1::2], strict=True)]
    for name in ("raw", *PEERS):
        theirs = rates.get(f"{name}.{batch}", [])
        # A peer that got nothing done in the time, on a disk that stalled, has no ratio in that run.
        ratios = [a / b for a, b in zip(ours if name == "raw" else of_run, theirs, strict=False) if b]
        if name == "curve":
            ratios = [1 / ratio for ratio in ratios if ratio]
        name = "limit" if name == "raw" else name
        result[f"{name}_ratio"] = common.median(ratios, 2) if ratios else None
        result[f"{name}_ratio_spread"] = common.spread(ratios, 2) if ratios else None
    return result


if __name__ == "__main__":
    main()
