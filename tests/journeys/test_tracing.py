"""Tracing from end to end: agents as users write them, a real broker, a real gateway, and what then stands in the log."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec
import openai
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lightning_bus import Client, Span, Status, Submission, decode_spans, reward_of, root_of_attempt
from lightning_bus.adapters import transitions_of
from lightning_bus.config import GatewaySection
from lightning_bus.gateway.daemon import serve_gateway
from lightning_bus.http import bind_tcp, http_server
from lightning_bus.otel import OtelTracer, Tracer, emit_message, emit_reward, environment, operation, tree
from lightning_bus.otel import names as n
from lightning_bus.records import Kind
from tests.bus_fixtures import SECRET, broker
from workers.agent import agent_of
from workers.config import WorkerSection
from workers.runtime import Counts, run_worker

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_S = 300.0  # on a busy machine

QUICK_START = """
import asyncio
import sys

from lightning_bus.otel import LightningClient, OtelTracer


async def main(server_url, rollout_id):
    client = LightningClient(server_url=server_url, rollout_id=rollout_id)
    tracer = OtelTracer(enable_otel=True)
    async with tracer.trace_context(
        name="quick start", store=client.store, rollout_id=client.rollout_id, attempt_id=client.attempt_id
    ):
        tracer.emit_reward(reward=1.0)


asyncio.run(main(*sys.argv[1:]))
"""

STOCK_SDK = """
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(compression=Compression.Gzip, timeout=200)))
tracer = provider.get_tracer("my.agent")
for step in range(700):
    with tracer.start_as_current_span(f"step {step}") as span:
        span.set_attribute("agentlightning.message.body", f"hello {step}")
        with tracer.start_as_current_span("tool", kind=trace.SpanKind.CLIENT):
            pass
provider.shutdown()
"""


@dataclass
class Stage:
    """A broker, a gateway, and a client of the broker."""

    bus: Client
    address: str
    url: str

    async def run(self, agent: Callable[..., Any], rollouts: int = 1, **section: Any) -> Counts:
        """Have a worker run the agent on this many rollouts."""
        ids = [f"r-{number}" for number in range(rollouts)]
        await self.bus.submit([Submission(each, msgspec.msgpack.encode(each), max_attempts=1) for each in ids])
        stop = anyio.Event()
        async with anyio.create_task_group() as tasks:

            async def stop_when_ended() -> None:
                await self.bus.wait(ids, limit_s=LIMIT_S)
                stop.set()

            tasks.start_soon(stop_when_ended)
            return await run_worker(
                self.bus, agent_of(agent), WorkerSection(**section), gateway_url=self.url, stop=stop
            )

    async def spans(self) -> list[Span]:
        found: list[Span] = []
        offset, end = 0, 1
        while offset < end:
            records, offset, end = await self.bus.fetch(offset, bytes_max=8 << 20)
            found += [one for record in records if record.kind is Kind.SPANS for one in decode_spans(record.body)]
        return found


async def chat(request: Request) -> Response:
    """Answer as an engine does: the same to the same question."""
    asked = await request.json()
    ids = [len(asked["messages"]), 7, 8]
    content = [{"token": "t", "logprob": -0.5, "bytes": None, "top_logprobs": []} for _ in ids]
    choice = {
        "index": 0, "message": {"role": "assistant", "content": "4"}, "finish_reason": "stop", "token_ids": ids,
        "logprobs": {"content": content}, "weight_versions": [{"version": "3", "start": 0, "end": 3}],
    }  # fmt: skip
    return JSONResponse(
        {
            "id": "c", "object": "chat.completion", "created": 1, "model": asked["model"], "choices": [choice],
            "prompt_token_ids": [1, 2, len(asked["messages"])],
            "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
        }
    )  # fmt: skip


async def health(request: Request) -> Response:
    return Response()


ENGINE = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/health", health)])


@asynccontextmanager
async def stage(tmp_path: Path) -> AsyncGenerator[Stage]:
    url: list[str] = []
    up = anyio.Event()

    def started(at: str) -> None:
        url.append(at)
        up.set()

    listener = bind_tcp("127.0.0.1:0", "engine")
    engine = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with (
        http_server(ENGINE, listener),
        broker(tmp_path / "log") as address,
        Client(address) as bus,
        anyio.create_task_group() as tasks,
    ):
        section = GatewaySection(bind="127.0.0.1:0", upstreams=[engine])
        tasks.start_soon(functools.partial(serve_gateway, section, bus_address=address, secret=SECRET, started=started))
        await up.wait()
        yield Stage(bus, address, url[0])
        tasks.cancel_scope.cancel()


async def test_an_agent_in_a_worker_emits_without_a_word_about_where(tmp_path: Path) -> None:
    @operation
    async def search(query: str) -> str:
        return await anyio.to_thread.run_sync(look_up, query)

    def look_up(query: str) -> str:
        thread = threading.Thread(target=emit_message, args=(f"looking for {query}",))
        thread.start()
        thread.join()
        return query.upper()

    async def agent(task: str) -> None:
        assert await search(task) == task.upper()
        emit_reward(float(task[2:]))

    async with stage(tmp_path) as on:
        counts = await on.run(agent, 40, concurrency=20)
        assert counts.done == 40
        by_rollout: dict[str, list[Span]] = {}
        for span in await on.spans():
            by_rollout.setdefault(span.rollout_id, []).append(span)
        for rollout in await on.bus.query():
            number = float(rollout.submission.rollout_id[2:])
            assert (rollout.status, rollout.reward) == (Status.SUCCEEDED, number)  # it returned None, and emitted one
            (top,) = tree(by_rollout[rollout.submission.rollout_id])
            assert (top.span.name, top.span.span_id) == (
                "rollout",
                root_of_attempt(rollout.submission.rollout_id, 1)[1],
            )
            found, rewarded = top.children
            assert found.span.name == "search"
            (message,) = found.children
            assert message.span.attributes[n.MESSAGE_BODY] == f"looking for {rollout.submission.rollout_id}"
            assert reward_of(rewarded.span) == number


async def test_an_agents_subprocess_finds_its_rollout_among_many(tmp_path: Path) -> None:
    code = "import sys; from lightning_bus.otel import emit_message; emit_message(sys.argv[1])"

    async def agent(task: str) -> float:
        await anyio.run_process(
            [sys.executable, "-c", code, task], env={**os.environ, **environment()}, cwd=ROOT, stderr=None
        )
        return 1.0

    async with stage(tmp_path) as on:
        assert (await on.run(agent, 3, concurrency=3)).done == 3
        told = {
            span.rollout_id: span.attributes[n.MESSAGE_BODY]
            for span in await on.spans()
            if span.name == n.MESSAGE_SPAN_NAME
        }
        assert told == {f"r-{number}": f"r-{number}" for number in range(3)}


async def test_a_worker_of_one_attempt_at_a_time_tells_it_by_the_environment(tmp_path: Path) -> None:
    def agent() -> float:
        subprocess.run([sys.executable, "-c", STOCK_SDK], check=True, cwd=ROOT)
        return 1.0

    async with stage(tmp_path) as on:
        assert (await on.run(agent, concurrency=1)).done == 1
        spans = await on.spans()
        (root,) = tree(spans)
        steps = [child for child in root.children if child.span.name.startswith("step")]
        assert [step.span.name for step in steps] == [f"step {number}" for number in range(700)]
        for number, step in enumerate(steps):
            (tool,) = step.children
            assert (tool.span.name, tool.span.attributes[n.KIND], tool.span.attributes[n.SCOPE]) == (
                "tool",
                "client",
                "my.agent",
            )
            assert step.span.attributes[n.MESSAGE_BODY] == f"hello {number}"
        assert "LIGHTNING_BUS_TOKEN" not in os.environ


@pytest.mark.parametrize("through_gateway", [False, True])
async def test_the_quick_start_of_the_field_runs_with_only_its_imports_changed(
    tmp_path: Path, through_gateway: bool
) -> None:
    async with stage(tmp_path) as on:
        await on.bus.submit([Submission("r-1", b"")])
        async with on.bus.lease(1) as leases:
            task = await anext(aiter(leases))
            # A token is what a worker's environment brings; a broker without keys asks for none.
            told = {
                "LIGHTNING_BUS_ROLLOUT": "r-1",
                "LIGHTNING_BUS_ATTEMPT": "1",
                "LIGHTNING_BUS_TOKEN": task.token,
                "LIGHTNING_BUS_ADDRESS": on.url,
            }
            command = [sys.executable, "-c", QUICK_START, on.url if through_gateway else on.address, "r-1"]
            await anyio.run_process(
                command, env={**os.environ, **(told if through_gateway else {})}, cwd=ROOT, stderr=None
            )
            rewarded, outer = await on.spans()
            assert (outer.name, outer.parent_id) == ("quick start", root_of_attempt("r-1", 1)[1])
            assert (reward_of(rewarded), rewarded.parent_id) == (1.0, outer.span_id)
            await leases.done(task, 1.0)


async def test_opentelemetry_in_a_worker_keeps_concurrent_rollouts_apart(tmp_path: Path) -> None:
    tracer = OtelTracer(instrument=False)

    async def agent(task: str) -> float:
        async with tracer.trace_context(f"solve {task}") as otel:
            with otel.start_as_current_span(f"framework {task}"):
                await anyio.lowlevel.checkpoint()
                emit_message(task)
        return 1.0

    async with stage(tmp_path) as on:
        assert (await on.run(agent, 50, concurrency=50)).done == 50
        spans = await on.spans()
    names = {span.span_id: span.name for span in spans}
    told = [span for span in spans if span.name == n.MESSAGE_SPAN_NAME]
    assert len(told) == 50
    for span in told:
        assert span.attributes[n.MESSAGE_BODY] == span.rollout_id
        assert names[span.parent_id or b""] == f"framework {span.rollout_id}"


async def test_both_paths_give_equal_transitions_and_calls_hang_from_what_made_them(tmp_path: Path) -> None:
    tracers = {"r-0": Tracer(), "r-1": OtelTracer(instrument=False)}

    @operation
    async def ask(client: Any, messages: list[Any]) -> str:
        answer = await client.chat.completions.create(model="policy", messages=messages)
        return answer.choices[0].message.content

    async def agent(task: str, base_url: str, api_key: str) -> None:
        async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
            async with tracers[task].trace_context("solve") as tracer:
                messages = [{"role": "user", "content": "2 + 2?"}]
                for _ in range(2):
                    with tracer.start_as_current_span("turn"):
                        messages.append({"role": "assistant", "content": await ask(client, messages)})
                emit_reward(0.5)

    async with stage(tmp_path) as on:
        assert (await on.run(agent, 2, concurrency=2)).done == 2
        spans = await on.spans()
        rewards = [rollout.reward for rollout in await on.bus.query()]
    light, otel = ([span for span in spans if span.rollout_id == each] for each in tracers)
    rows = [transitions_of(each[0].rollout_id, 1, "g", each).rows for each in (light, otel)]
    assert [len(each) for each in rows] == [2, 2]
    for mine, theirs in zip(*rows, strict=True):
        assert mine.token_ids.tolist() == theirs.token_ids.tolist()
        assert mine.logprobs.tolist() == theirs.logprobs.tolist()
        assert mine.trained.tolist() == theirs.trained.tolist()
    assert rewards == [0.5, 0.5]
    for each in (light, otel):
        assert names_of(tree(each)) == [
            ("rollout", [("solve", [("turn", [("ask", ["chat policy"])]), ("turn", [("ask", ["chat policy"])]), "lightning.reward"])])
        ]  # fmt: skip


def names_of(nodes: list[Any]) -> list[Any]:
    return [(node.span.name, names_of(node.children)) if node.children else node.span.name for node in nodes]
