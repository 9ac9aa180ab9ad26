"""How many spans a second become durable, and how does that compare with the disk and with other stores?

Two producer processes, spans of 3.6 KB (30 attributes, 300 token ids, 300 log-probs) in chunks of 1, 20 and 100,
encoded beforehand so that each store is asked the same question: take these bytes and answer when they are on disk.
Ratios are paired: each run measures everything in turns, and the ratio is the median over runs. A peer that is not
installed is null.

limit_ratio           ÷ append + fdatasync of the same bytes in 1 MiB groups, in this process
redis_ratio           ÷ Redis Streams, appendfsync always (`redis-server` on PATH)
nats_ratio            ÷ NATS JetStream, file storage, sync always (`nats-server` on PATH, or in NATS_SERVER)
nats_py_ratio         ÷ the same through its own client, as a Python program has it (where nats-py is installed)
agentlightning_ratio  ÷ Agent Lightning 0.3.0's store (memory: it has no disk) over its client's add_many_spans, by the
                        interpreter in AGENTLIGHTNING_PYTHON; that call sends span by span, so chunks make no difference
curve_ratio           encrypted ÷ plain; null as long as the bus has no CURVE

Redis and NATS are driven by bare sockets and a window of the same number of bytes as ours, which is faster than their
Python clients are. Headline figures are of chunks of 100; `batches` has all.

    python -m bench.spans --json          about a minute; the last line is one JSON object
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
import numpy as np

from bench import common
from lightning_bus import Client
from lightning_bus.spans import LOGPROBS, WEIGHT_VERSIONS, encode_spans

PRODUCERS = 2
BATCHES = (1, 20, 100)
HEADLINE = 100
WINDOW_BYTES = 16 << 20  # unacknowledged, a producer: one batch of the client on its way and one to follow
WINDOW_CHUNKS_MAX = 1024
WARMUP_S = 0.3
CONNECT_LIMIT_S = 10.0
FLOORS = {"limit_ratio": 0.6, "redis_ratio": 2.5, "nats_ratio": 1.3, "agentlightning_ratio": 100.0}
STREAM = "spans"


def main() -> None:
    made = common.parser(__doc__, seconds=1.0, runs=3)
    made.add_argument("--without", nargs="*", default=[], choices=["redis", "nats", "nats_py", "agentlightning"])
    made.add_argument("--produce", nargs=3, metavar=("WHERE", "ADDRESS", "BATCH"), help=argparse.SUPPRESS)
    options = common.parse(made)
    if options.produce:
        where, address, batch = options.produce
        PRODUCE[where](address, int(batch), options.seconds)
        return
    stores = {name: store for name, store in STORES.items() if name not in options.without}
    rates: dict[str, list[float]] = {}
    facts: dict[str, list[float]] = {"broker_cores": [], "broker_anonymous_mb": [], "agentlightning": []}
    with common.workspace(options.dir) as directory:
        for _ in range(options.runs):
            for batch in BATCHES:  # the disk's speed changes within seconds: what is compared stands side by side
                raw = common.raw_bytes_per_s(directory, options.seconds / 2) / span_bytes()
                rates.setdefault(f"raw.{batch}", []).append(raw)
                for name, measure in stores.items():
                    found = measure(directory / name, batch, options.seconds, facts)
                    if found is not None:
                        rates.setdefault(f"{name}.{batch}", []).append(found)
                    shutil.rmtree(directory / name, ignore_errors=True)
        summary: dict[str, Any] = {"bench": "spans", "machine": common.machine(directory)}
    headline = _ratios(rates, HEADLINE)
    summary |= {
        "n": options.runs,
        "seconds": options.seconds,
        "producers": PRODUCERS,
        "span_bytes": round(span_bytes()),
        "batch": HEADLINE,
        "spans_per_s": common.median(rates[f"bus.{HEADLINE}"]),
        "spans_per_s_spread": common.spread(rates[f"bus.{HEADLINE}"]),
        "raw_spans_per_s": common.median(rates[f"raw.{HEADLINE}"]),
        "raw_spans_per_s_spread": common.spread(rates[f"raw.{HEADLINE}"]),
        **headline,
        "curve_ratio": None,
        "broker_cores": common.median(facts["broker_cores"], 2),
        "broker_anonymous_mb": common.median(facts["broker_anonymous_mb"]),
        "batches": {
            str(batch): {
                **{
                    f"{name}_spans_per_s": common.median(rates[f"{name}.{batch}"])
                    for name in stores
                    if f"{name}.{batch}" in rates
                },
                **_ratios(rates, batch),
            }
            for batch in BATCHES
        },
        "floors": FLOORS,
        "missed": [name for name, floor in FLOORS.items() if headline[name] is not None and headline[name] < floor],
    }
    summary["ok"] = not summary["missed"]
    common.finish(summary, options.json)


def span_bytes() -> float:
    """Bytes of one span, in a chunk."""
    return len(chunk(100)) / 100


def chunk(spans: int) -> bytes:
    return encode_spans([common.model_call_span(at) for at in range(spans)])


def window(blob: bytes) -> int:
    """How many chunks a producer keeps unacknowledged."""
    return max(2, min(WINDOW_CHUNKS_MAX, WINDOW_BYTES // len(blob)))


def _ratios(rates: dict[str, list[float]], batch: int) -> dict[str, Any]:
    """Our rate over everybody else's, run by run; null for who was not there."""
    ours = rates[f"bus.{batch}"]
    others = {
        "limit": rates[f"raw.{batch}"],
        "redis": rates.get(f"redis.{batch}"),
        "nats": rates.get(f"nats.{batch}"),
        "nats_py": rates.get(f"nats_py.{batch}"),
        "agentlightning": rates.get(f"agentlightning.{batch}"),
    }
    result: dict[str, Any] = {}
    for name, theirs in others.items():
        # A peer that got nothing done in the time, on a disk that stalled, has no ratio in that run.
        ratios = [a / b for a, b in zip(ours, theirs, strict=False) if b] if theirs else None
        result[f"{name}_ratio"] = common.median(ratios, 2) if ratios else None
        result[f"{name}_ratio_spread"] = common.spread(ratios, 2) if ratios else None
    return result


# -- the stores: (directory, batch, seconds, facts) → spans per second, or None where one is not installed --------------


def _produce(where: str, address: str, batch: int, seconds: float) -> float:
    arguments = ("--seconds", seconds, "--produce", where, address, batch)
    return sum(found["per_s"] for found in common.run_crew([common.member("spans", *arguments)] * PRODUCERS))


def bus(directory: Path, batch: int, seconds: float, facts: dict[str, list[float]]) -> float | None:
    with common.broker(directory / "log") as broker:
        before_s, began = broker.cpu_s(), time.perf_counter()
        rate = _produce("bus", broker.address, batch, seconds)
        if batch == HEADLINE:
            facts["broker_cores"].append((broker.cpu_s() - before_s) / (time.perf_counter() - began))
            facts["broker_anonymous_mb"].append(broker.anonymous_mb())
        return rate


def redis(directory: Path, batch: int, seconds: float, _: dict[str, list[float]]) -> float | None:
    server = shutil.which("redis-server")
    if server is None:
        return None
    directory.mkdir(parents=True)
    port = common.free_port()
    settings = {
        "port": port, "bind": "127.0.0.1", "dir": directory, "save": "", "appendonly": "yes", "appendfsync": "always",
        "auto-aof-rewrite-percentage": 0, "loglevel": "warning",
    }  # fmt: skip
    flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    with common.running([server, *flags]):
        _connect(port).close()
        return _produce("redis", str(port), batch, seconds)


def nats(
    directory: Path, batch: int, seconds: float, _: dict[str, list[float]], *, producer: str = "nats"
) -> float | None:
    server = os.environ.get("NATS_SERVER") or shutil.which("nats-server")
    if server is None:
        return None
    directory.mkdir(parents=True)
    port = common.free_port()
    configuration = directory / "nats.conf"
    configuration.write_text(
        f'listen: "127.0.0.1:{port}"\nmax_payload: 8MB\n'
        f'jetstream {{ store_dir: "{directory}", sync_interval: always, max_file_store: 64GB }}\n'
    )
    with common.running([server, "-c", str(configuration), "-l", str(directory / "nats.log")]):
        with _connect(port) as connection:
            stream = {"name": STREAM, "subjects": [STREAM], "storage": "file", "num_replicas": 1, "discard": "new"}
            reader = connection.makefile("rb")
            connection.sendall(_nats_hello())
            connection.sendall(_nats_publish(f"$JS.API.STREAM.CREATE.{STREAM}", json.dumps(stream).encode()))
            _nats_answer(reader, connection)
        return _produce(producer, str(port), batch, seconds)


def nats_py(directory: Path, batch: int, seconds: float, facts: dict[str, list[float]]) -> float | None:
    if not find_spec("nats") or batch != HEADLINE:
        return None
    return nats(directory, batch, seconds, facts, producer="nats_py")


def agentlightning(_: Path, batch: int, seconds: float, facts: dict[str, list[float]]) -> float | None:
    python = os.environ.get("AGENTLIGHTNING_PYTHON")
    if not python or batch != HEADLINE or facts["agentlightning"]:
        return None
    facts["agentlightning"].append(1.0)  # once is enough for a factor of hundreds, and it takes long to start
    server = Path(python).parent / "agl"
    port = common.free_port()
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would look for prices on the Internet, three times
    with common.running([str(server), "store", "--host", "127.0.0.1", "--port", str(port), "--backend", "memory"]):
        _connect(port, limit_s=60.0).close()
        arguments = (f"http://127.0.0.1:{port}", str(max(3.0, seconds)), str(WARMUP_S), str(PRODUCERS * 8))
        command = [python, "-W", "ignore", "-c", AGENTLIGHTNING_DRIVER, *arguments]
        done = subprocess.run(command, input=_plain_attributes(), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python} could not drive Agent Lightning's store; see above, or --without agentlightning")
    return json.loads(done.stdout.splitlines()[-1])["per_s"]


STORES: dict[str, Callable[[Path, int, float, dict[str, list[float]]], float | None]] = {
    "bus": bus,
    "redis": redis,
    "nats": nats,
    "nats_py": nats_py,
    "agentlightning": agentlightning,
}


# -- the producers, each in a process of its own ------------------------------------------------------------------------


def produce_bus(address: str, batch: int, seconds: float) -> None:
    blob = chunk(batch)
    meter = common.Meter(WARMUP_S, seconds)

    async def run() -> None:
        async with Client(address, role="bench") as client:

            async def caller() -> None:
                going = True
                while going:
                    await client.append_blob("", 0, blob, batch)
                    going = meter.add(batch)

            await common.say_ready_async()
            meter.start()
            async with anyio.create_task_group() as tasks:
                for _ in range(window(blob)):
                    tasks.start_soon(caller)

    common.run_async(run)
    common.report({"per_s": meter.per_s})


def produce_redis(port: str, batch: int, seconds: float) -> None:
    blob = chunk(batch)
    command = b"*5\r\n$4\r\nXADD\r\n$5\r\nspans\r\n$1\r\n*\r\n$1\r\nd\r\n$%d\r\n%s\r\n" % (len(blob), blob)

    def answer(reader: Any, _: socket.socket) -> None:
        line = reader.readline()
        if not line.startswith(b"$"):
            raise SystemExit(f"redis-server answered {line!r}")
        reader.readline()

    with _connect(int(port)) as connection:
        _pump(connection, command, answer, blob, batch, seconds)


def produce_nats(port: str, batch: int, seconds: float) -> None:
    blob = chunk(batch)
    with _connect(int(port)) as connection:
        connection.sendall(_nats_hello())
        _pump(connection, _nats_publish(STREAM, blob), _nats_answer, blob, batch, seconds)


def produce_nats_py(port: str, batch: int, seconds: float) -> None:
    import nats as client  # an optional peer

    blob = chunk(batch)
    meter = common.Meter(WARMUP_S, seconds)

    async def run() -> None:
        connection = await client.connect(f"nats://127.0.0.1:{port}")
        stream = connection.jetstream(timeout=60.0)

        async def caller() -> None:
            going = True
            while going:
                await stream.publish(STREAM, blob)
                going = meter.add(batch)

        await common.say_ready_async()
        meter.start()
        async with anyio.create_task_group() as tasks:
            for _ in range(window(blob)):
                tasks.start_soon(caller)
        await connection.close()

    common.run_async(run)
    common.report({"per_s": meter.per_s})


PRODUCE = {"bus": produce_bus, "redis": produce_redis, "nats": produce_nats, "nats_py": produce_nats_py}

# Runs in its own interpreter, which has neither this package nor ours. Attributes come on stdin, token ids as lists.
AGENTLIGHTNING_DRIVER = """
import asyncio, json, secrets, sys, time
from agentlightning import LightningStoreClient, Span
from agentlightning.types import OtelResource, TraceStatus

address, seconds, warmup_s, callers = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
attributes = json.load(sys.stdin)
counted = 0

def span(rollout, sequence):
    return Span(
        rollout_id=rollout.rollout_id, attempt_id=rollout.attempt.attempt_id, sequence_id=sequence,
        trace_id=secrets.token_hex(16), span_id=secrets.token_hex(8), parent_id=None, name="chat",
        status=TraceStatus(status_code="OK"), attributes=attributes, events=[], links=[], start_time=1.0, end_time=2.0,
        context=None, parent=None, resource=OtelResource(attributes={}, schema_url=""),
    )

async def caller(store, began):
    global counted
    rollout = await store.start_rollout(input={})
    sequence = 0
    while time.perf_counter() - began < warmup_s + seconds:
        spans = [span(rollout, sequence + at) for at in range(4)]
        sequence += 4
        await store.add_many_spans(spans)
        if warmup_s <= time.perf_counter() - began < warmup_s + seconds:
            counted += len(spans)

async def main():
    store = LightningStoreClient(address)
    began = time.perf_counter()
    await asyncio.gather(*(caller(store, began) for _ in range(callers)))
    await store.close()
    print(json.dumps({"per_s": counted / seconds}))

asyncio.run(main())
"""


def _plain_attributes() -> str:
    """The reference span's attributes in JSON, which has no bytes: token ids and log-probs as lists."""
    plain = dict(common.model_call_span().attributes)
    for name, value in plain.items():
        if isinstance(value, bytes):
            plain[name] = np.frombuffer(value, "<f4" if name == LOGPROBS else "<u4").tolist()
    plain[WEIGHT_VERSIONS] = json.dumps(plain[WEIGHT_VERSIONS])  # its attributes hold no lists of lists
    return json.dumps(plain)


def _pump(
    connection: socket.socket,
    command: bytes,
    answer: Callable[[Any, socket.socket], None],
    blob: bytes,
    batch: int,
    seconds: float,
) -> None:
    """Keep a window of commands unanswered until the time is over, then take the answers that are due."""
    reader = connection.makefile("rb")
    meter = common.Meter(WARMUP_S, seconds)
    common.say_ready()
    meter.start()
    due = window(blob)
    for _ in range(due):
        connection.sendall(command)
    going = True
    while due:
        answer(reader, connection)
        due -= 1
        going = meter.add(batch) and going
        if going:
            connection.sendall(command)
            due += 1
    common.report({"per_s": meter.per_s})


def _connect(port: int, *, limit_s: float = CONNECT_LIMIT_S) -> socket.socket:
    """Connect to a server that may still be starting."""
    until = time.perf_counter() + limit_s
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port))
        except OSError:
            if time.perf_counter() > until:
                raise
            time.sleep(0.02)
        else:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection


def _nats_hello() -> bytes:
    inbox = f"_INBOX.{os.getpid()}"
    return b'CONNECT {"verbose":false,"pedantic":false,"headers":false}\r\nSUB %s 1\r\n' % inbox.encode()


def _nats_publish(subject: str, payload: bytes) -> bytes:
    return b"PUB %s _INBOX.%d %d\r\n%s\r\n" % (subject.encode(), os.getpid(), len(payload), payload)


def _nats_answer(reader: Any, connection: socket.socket) -> None:
    """Read the next answer from JetStream, keeping the connection alive meanwhile."""
    while line := reader.readline():
        if line.startswith(b"MSG "):
            payload = reader.read(int(line.split()[-1]) + 2)
            if b'"error"' in payload:
                raise SystemExit(f"nats-server answered {payload.decode(errors='replace')}")
            return
        if line.startswith(b"PING"):
            connection.sendall(b"PONG\r\n")
        elif line.startswith(b"-ERR"):
            raise SystemExit(f"nats-server answered {line!r}")
    raise SystemExit("nats-server closed the connection")


if __name__ == "__main__":
    main()
