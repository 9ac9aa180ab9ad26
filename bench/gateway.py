"""What does the gateway cost a model call, and how many calls a second does it carry?

A stub engine answers at once, so that everything measured is on the way. One call at a time: milliseconds added over
calling the engine directly, with the span durable (`added_ms`) and with a bus that acknowledges at once
(`added_ms_unrecorded`). Many at a time: requests a second at 32 and 256 concurrent calls, streamed and not. LiteLLM's
proxy (in `.bench/litellm`) and Agent Lightning's 1.0 gateway (`--agl URL`, started by hand before the stub's
`--engine-port`, as it needs another Python) stand before the same stub; null where they are not there.

    python -m bench.gateway --json          about a minute; the last line is one JSON object

Engine, gateways, broker and the driver are processes of their own; the driver speaks HTTP over bare sockets. The stub
gives ids and log-probs of 64 tokens to who asks for them, as the gateway does and LiteLLM does not.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench import common
from lightning_bus import tokens
from lightning_bus.config import GatewaySection
from lightning_bus.gateway.app import build_app
from lightning_bus.http import serve_http
from lightning_bus.spans import Span

TOKENS = 64
CHUNKS = 16  # of a streamed answer, 4 tokens each
SECRET = b"b" * tokens.SECRET_BYTES
CHAT = "/v1/chat/completions"
ADDED_MS_FLOOR, ADDED_MS_UNRECORDED_FLOOR = 4.0, 2.0
LITELLM_RATIO_FLOOR, AGL_RATIO_FLOOR = 10.0, 3.0
CONCURRENCIES = (32, 256)
LITELLM = common.PEERS / "litellm" / "bin" / "litellm"
START_LIMIT_S = 60.0


# -- the engine -------------------------------------------------------------------------------------------------------


def answers() -> dict[tuple[bool, bool], bytes]:
    """Return the stub's answers, ready to be sent: (streamed, with ids and log-probs) → HTTP."""

    def tokens_of(start: int, end: int) -> dict[str, Any]:
        content = [{"token": " token", "logprob": -0.5, "bytes": [32], "top_logprobs": []} for _ in range(start, end)]
        return {"token_ids": list(range(start, end)), "logprobs": {"content": content}}

    head = {"id": "chatcmpl-1", "created": 1, "model": "policy"}
    usage = {"prompt_tokens": 40, "completion_tokens": TOKENS, "total_tokens": 40 + TOKENS}
    made: dict[tuple[bool, bool], bytes] = {}
    for full in (False, True):
        ids: dict[str, Any] = {"prompt_token_ids": list(range(40))} if full else {}
        versions = {"weight_versions": [{"version": "7", "start": 0, "end": TOKENS}]} if full else {}
        message = {"role": "assistant", "content": " token" * TOKENS}
        choice = {"index": 0, "message": message, "finish_reason": "stop", **(tokens_of(0, TOKENS) if full else {})}
        whole = {**head, "object": "chat.completion", **ids, "choices": [{**choice, **versions}], "usage": usage}
        body = json.dumps(whole).encode()
        made[False, full] = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
            len(body), body,
        )  # fmt: skip
        chunk = {**head, "object": "chat.completion.chunk"}
        events: list[dict[str, Any]] = [{**chunk, **ids, "choices": [_delta({"role": "assistant", "content": ""})]}]
        each = TOKENS // CHUNKS
        for at in range(0, TOKENS, each):
            part = tokens_of(at, at + each) if full else {}
            events.append({**chunk, "choices": [{**_delta({"content": " token" * each}), **part}]})
        events.append({**chunk, "choices": [{**_delta({}), "finish_reason": "stop", **versions}]})
        events.append({**chunk, "choices": [], "usage": usage})
        lines = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events] + [b"data: [DONE]\n\n"]
        pieces = b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in lines)
        made[True, full] = (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n"
        )  # fmt: skip
    return made


def _delta(delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": None}


class StubEngine(asyncio.Protocol):
    """Answers whatever it is asked at once, with the same."""

    answers = answers()

    def connection_made(self, transport: Any) -> None:  # an asyncio.Transport, or uvloop's
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, found, rest = self.received.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if not found or len(rest) < int(length or 0):
            return
        self.received = b""
        packed = rest.replace(b" ", b"")
        self.transport.write(self.answers[b'"stream":true' in packed, b'"return_token_ids":true' in packed])


async def run_engine(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(StubEngine, "127.0.0.1", port)
    await server.serve_forever()


# -- the gateways -----------------------------------------------------------------------------------------------------


class NoBus:
    """A bus that acknowledges at once and keeps nothing."""

    async def append(self, rollout_id: str, attempt: int, spans: Sequence[Span]) -> None:
        return None

    async def status(self) -> object:
        return None


async def run_unrecorded(port: int, engine: str) -> None:
    section = GatewaySection(bind=f"127.0.0.1:{port}", upstreams=[engine], calls_per_attempt_max=100_000)
    await serve_http(build_app(NoBus(), section=section, secret=SECRET), section.bind, key="gateway.bind")


@contextmanager
def gateway(directory: Path, engine: str) -> Generator[int]:
    """Run a broker and a gateway as users do; yields the gateway's port."""
    secret = directory / "secret"
    secret.write_bytes(SECRET)
    port = common.free_port()
    with common.broker(directory / "log") as broker:
        command = [sys.executable, "-m", "lightning_bus.cli", "gateway", "--bind", f"127.0.0.1:{port}"]
        command += ["--upstream", engine, "--bus", broker.address, "--secret", str(secret)]
        with common.running(command) as process:
            common.connect(port, limit_s=START_LIMIT_S, process=process).close()
            yield port


@contextmanager
def own(role: str, *arguments: object) -> Generator[int]:
    """Run one of this module's servers; yields its port."""
    port = common.free_port()
    with common.running(common.member("gateway", role, port, *arguments)) as process:
        common.connect(port, limit_s=START_LIMIT_S, process=process).close()
        yield port


@contextmanager
def litellm(directory: Path, engine: str) -> Generator[int]:
    port = common.free_port()
    config = directory / "litellm.yaml"
    config.write_text(
        "model_list:\n- model_name: policy\n  litellm_params:\n    model: openai/policy\n"
        f"    api_base: {engine}/v1\n    api_key: none\n"
    )
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would look for prices on the Internet
    os.environ["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"  # no keys: that is to its advantage
    with common.running([str(LITELLM), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]) as process:
        common.connect(port, limit_s=START_LIMIT_S, process=process).close()
        yield port


# -- the driver -------------------------------------------------------------------------------------------------------


async def drive(port: int, path: str, streamed: bool, concurrency: int, seconds: float) -> None:
    """Call again and again over `concurrency` connections; report how long each call took."""
    message = {"role": "user", "content": "How many are 2 and 2? " * 4}
    body = json.dumps({"model": "policy", "messages": [message], "stream": streamed}, separators=(",", ":")).encode()
    key = tokens.mint(SECRET, tokens.Claims("", 0))
    request = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body
    meter = common.Meter(min(0.5, seconds / 4), seconds)
    took_ms: list[float] = []

    async def caller() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await call(reader, writer)
        connected.release()
        await go.wait()
        going = True
        while going:
            began = time.perf_counter()
            await call(reader, writer)
            took_ms.append((time.perf_counter() - began) * 1000)
            going = meter.add(1)
        writer.close()

    async def call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise SystemExit(f"{path} answered {head.decode()} {(await reader.read(2000)).decode()}")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if length:
            await reader.readexactly(int(length))
        else:
            await reader.readuntil(b"\r\n0\r\n\r\n")

    go, connected = asyncio.Event(), asyncio.Semaphore(0)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(caller())
        for _ in range(concurrency):
            await connected.acquire()
        await common.say_ready_async()
        meter.start()
        go.set()
    common.report({"per_s": meter.per_s, "took_ms": took_ms[len(took_ms) // 10 :]})


def driven(port: int, path: str, seconds: float, *, concurrency: int = 1, streamed: bool = False) -> dict[str, Any]:
    [result] = common.run_crew([common.member("gateway", "drive", port, path, int(streamed), concurrency, seconds)])
    return result


# -- all of it --------------------------------------------------------------------------------------------------------


def main() -> None:
    made = common.parser(__doc__, seconds=2.0, runs=3)
    made.add_argument("--engine-port", type=int, default=0, help="of the stub engine; default: a free one")
    made.add_argument("--agl", help="URL of Agent Lightning's gateway, running before the stub engine")
    options = common.parse(made)
    one: dict[str, list[list[float]]] = {}  # target → milliseconds of each call of each run
    many: dict[str, list[float]] = {}  # target, concurrency and way → requests a second of each run
    with common.workspace(options.dir) as directory, ExitStack() as stack:
        port = options.engine_port or common.free_port()
        engine_process = stack.enter_context(common.running(common.member("gateway", "engine", port)))
        common.connect(port, process=engine_process).close()
        engine = f"http://127.0.0.1:{port}"
        targets = {
            "direct": (port, CHAT),
            "gateway": (stack.enter_context(gateway(directory, engine)), CHAT),
            "unrecorded": (stack.enter_context(own("unrecorded", engine)), CHAT),
        }
        if LITELLM.exists():
            targets["litellm"] = stack.enter_context(litellm(directory, engine)), CHAT
        if options.agl:
            targets["agl"] = int(options.agl.rpartition(":")[2].partition("/")[0]), CHAT
        for run in range(options.runs):
            turn = list(targets.items())[:: -1 if run % 2 else 1]
            for name, (at, path) in turn:
                one.setdefault(name, []).append(driven(at, path, options.seconds)["took_ms"])
            for name, (at, path) in turn:
                for concurrency in CONCURRENCIES:
                    for streamed in (False, True):
                        if name in ("gateway", "unrecorded") or (concurrency == 32 and not streamed):
                            way = f"{name}_{concurrency}" + ("_streamed" if streamed else "")
                            result = driven(at, path, options.seconds, concurrency=concurrency, streamed=streamed)
                            many.setdefault(way, []).append(result["per_s"])
        summary: dict[str, Any] = {"bench": "gateway", "machine": common.machine(directory)}

    def added(name: str, percent: float) -> list[float]:
        pairs = zip(one[name], one["direct"], strict=True)
        return [common.percentile(mine, percent) - common.percentile(direct, percent) for mine, direct in pairs]

    def ratio(peer: str) -> list[float] | None:
        rates = many.get(f"{peer}_32")
        return None if rates is None else [us / them for us, them in zip(many["gateway_32"], rates, strict=True)]

    ratios = {"litellm_ratio": ratio("litellm"), "agl_gateway_ratio": ratio("agl")}
    p50, p50_unrecorded = common.median(added("gateway", 50), 2), common.median(added("unrecorded", 50), 2)
    summary |= {
        "n": sum(len(run) for run in one["gateway"]),
        "runs": options.runs,
        "added_ms_p50": p50,
        "added_ms_p50_spread": common.spread(added("gateway", 50), 2),
        "added_ms_p99": common.median(added("gateway", 99), 2),
        "added_ms_unrecorded_p50": p50_unrecorded,
        "added_ms_unrecorded_p99": common.median(added("unrecorded", 99), 2),
        "direct_ms_p50": common.median([common.percentile(run, 50) for run in one["direct"]], 2),
        "requests_per_s": {way: common.median(rates) for way, rates in many.items()},
        "requests_per_s_spread": {way: common.spread(rates) for way, rates in many.items()},
        **{name: None if found is None else common.median(found, 2) for name, found in ratios.items()},
        **{f"{name}_spread": None if found is None else common.spread(found, 2) for name, found in ratios.items()},
        "litellm_added_ms_p50": common.median(added("litellm", 50), 2) if "litellm" in one else None,
        "added_ms_p50_floor": ADDED_MS_FLOOR,
        "added_ms_unrecorded_p50_floor": ADDED_MS_UNRECORDED_FLOOR,
        "litellm_ratio_floor": LITELLM_RATIO_FLOOR,
        "agl_gateway_ratio_floor": AGL_RATIO_FLOOR,
        "ok": p50 <= ADDED_MS_FLOOR
        and p50_unrecorded <= ADDED_MS_UNRECORDED_FLOOR
        and all(found is None or common.median(found, 2) >= floor for found, floor in zip(
            ratios.values(), (LITELLM_RATIO_FLOOR, AGL_RATIO_FLOOR), strict=True
        )),
    }  # fmt: skip
    common.finish(summary, options.json)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["engine", port]:
            common.run_async(lambda: run_engine(int(port)))
        case ["unrecorded", port, engine]:
            common.run_async(lambda: run_unrecorded(int(port), engine))
        case ["drive", port, path, streamed, concurrency, seconds]:
            common.run_async(
                lambda: drive(int(port), path, streamed == "1", int(concurrency), float(seconds)),
            )
        case _:
            main()
