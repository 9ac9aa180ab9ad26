"""The stores that `bench.spans` compares with: how each is run, and how it is driven.

Redis and NATS are measured twice. Through the Python client that a user would take (redis-py with hiredis, its
pipelines; nats-py, many publications at once), because our figure includes our Python client too; and by bare
sockets, which is as hard as they can be driven from here. What always holds: the same bytes, the same number of
producers, the same window of unacknowledged bytes, and an answer only when the bytes are on disk.

A server function returns spans per second over all producers, or None where the peer is not installed. A `produce_*`
function is one producer, in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np

from bench import common
from lightning_bus.spans import LOGPROBS, WEIGHT_VERSIONS, encode_spans

WINDOW_BYTES = 16 << 20  # unacknowledged, a producer
WINDOW_CHUNKS_MAX = 1024
WARMUP_S = 0.3
AGENTLIGHTNING_S_MIN = 3.0
STREAM = "spans"
Drive = Callable[[str, str], float]  # (producer, address) → spans per second of all producers

# -- the servers ------------------------------------------------------------------------------------------------------


def redis(directory: Path, producer: str, drive: Drive) -> float | None:
    """Redis Streams, appendfsync always; producer is "redis" (redis-py) or "redis_bare"."""
    server = shutil.which("redis-server")
    if server is None or (producer == "redis" and common.peer_module("redis") is None):
        return None
    directory.mkdir(parents=True)
    port = common.free_port()
    settings = {
        "port": port, "bind": "127.0.0.1", "dir": directory, "save": "", "appendonly": "yes", "appendfsync": "always",
        "auto-aof-rewrite-percentage": 0, "loglevel": "warning",
    }  # fmt: skip
    flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    with common.running([server, *flags]):
        common.connect(port).close()
        return drive(producer, str(port))


def nats(directory: Path, producer: str, drive: Drive) -> float | None:
    """NATS JetStream, file storage, sync always; producer is "nats" (nats-py) or "nats_bare"."""
    server = common.nats_server()
    if server is None or (producer == "nats" and common.peer_module("nats") is None):
        return None
    directory.mkdir(parents=True)
    port = common.free_port()
    configuration = directory / "nats.conf"
    configuration.write_text(
        f'listen: "127.0.0.1:{port}"\nmax_payload: 8MB\n'
        f'jetstream {{ store_dir: "{directory}", sync_interval: always, max_file_store: 64GB }}\n'
    )
    with common.running([server, "-c", str(configuration), "-l", str(directory / "nats.log")]):
        with common.connect(port) as connection:
            stream = {"name": STREAM, "subjects": [STREAM], "storage": "file", "num_replicas": 1, "discard": "new"}
            reader = connection.makefile("rb")
            connection.sendall(_nats_hello())
            connection.sendall(_nats_publish(f"$JS.API.STREAM.CREATE.{STREAM}", json.dumps(stream).encode()))
            _nats_answer(reader, connection)
        return drive(producer, str(port))


def agentlightning(seconds: float, callers: int) -> float | None:
    """Agent Lightning 0.3.0's store in memory (it has none on disk), over its client's add_many_spans."""
    python = common.agentlightning_python()
    if python is None:
        return None
    port = common.free_port()
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would look for prices on the Internet, three times
    server = [str(Path(python).parent / "agl"), "store", "--host", "127.0.0.1", "--port", str(port)]
    with common.running([*server, "--backend", "memory"]):
        common.connect(port, limit_s=60.0).close()
        arguments = (f"http://127.0.0.1:{port}", str(max(AGENTLIGHTNING_S_MIN, seconds)), str(WARMUP_S), str(callers))
        command = [python, "-W", "ignore", "-c", AGENTLIGHTNING_DRIVER, *arguments]
        done = subprocess.run(command, input=_plain_attributes(), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python} could not drive Agent Lightning's store; see above, or --without agentlightning")
    return json.loads(done.stdout.splitlines()[-1])["per_s"]


# -- the producers ----------------------------------------------------------------------------------------------------


def chunk(spans: int) -> bytes:
    """Return the bytes that everybody is asked to keep: so many reference spans, encoded."""
    return encode_spans([common.model_call_span(at) for at in range(spans)])


def window(blob: bytes) -> int:
    """How many chunks a producer keeps unacknowledged."""
    return max(2, min(WINDOW_CHUNKS_MAX, WINDOW_BYTES // len(blob)))


def produce_redis(port: str, batch: int, seconds: float) -> None:
    """redis-py: a pipeline of a window of XADDs, again and again. It has no call that overlaps two of them."""
    client = common.peer_module("redis").Redis(port=int(port))
    blob = chunk(batch)
    meter = common.Meter(WARMUP_S, seconds)
    common.say_ready()
    meter.start()
    going = True
    while going:
        pipeline = client.pipeline(transaction=False)
        for _ in range(window(blob)):
            pipeline.xadd(STREAM, {"d": blob})
        going = meter.add(batch * len(pipeline.execute()))
    client.close()
    common.report({"per_s": meter.per_s})


def produce_redis_bare(port: str, batch: int, seconds: float) -> None:
    blob = chunk(batch)
    command = b"*5\r\n$4\r\nXADD\r\n$5\r\nspans\r\n$1\r\n*\r\n$1\r\nd\r\n$%d\r\n%s\r\n" % (len(blob), blob)

    def answer(reader: Any, _: socket.socket) -> None:
        line = reader.readline()
        if not line.startswith(b"$"):
            raise SystemExit(f"redis-server answered {line!r}")
        reader.readline()

    with common.connect(int(port)) as connection:
        _pump(connection, command, answer, blob, batch, seconds)


def produce_nats_bare(port: str, batch: int, seconds: float) -> None:
    blob = chunk(batch)
    with common.connect(int(port)) as connection:
        connection.sendall(_nats_hello())
        _pump(connection, _nats_publish(STREAM, blob), _nats_answer, blob, batch, seconds)


def produce_nats(port: str, batch: int, seconds: float) -> None:
    """nats-py: a window of publications at a time, each awaiting its own acknowledgement."""
    client = common.peer_module("nats")
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


PRODUCE: dict[str, Callable[[str, int, float], None]] = {
    "redis": produce_redis,
    "redis_bare": produce_redis_bare,
    "nats": produce_nats,
    "nats_bare": produce_nats_bare,
}

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
