"""The exporter against a real broker and a real gateway: in the background, at the end, in children, through restarts."""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from lightning_bus import Client, Submission, Task, decode_spans
from lightning_bus.config import GatewaySection
from lightning_bus.errors import AccessDenied, BrokenError, ClosedError, ConfigError, FencedError
from lightning_bus.gateway.daemon import serve_gateway
from lightning_bus.otel import emit
from lightning_bus.otel import names as n
from lightning_bus.otel.compat import LightningClient
from lightning_bus.otel.context import environment
from lightning_bus.otel.exporter import SpanExporter
from lightning_bus.otel.sdk import OtelTracer
from lightning_bus.otel.tracer import Tracer
from lightning_bus.records import Kind
from lightning_bus.spans import REWARD, Span
from tests.bus_fixtures import NOWHERE, PATIENCE_S, SECRET, BrokerProcess, broker, span

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).resolve().parent.parent.parent.parent


@asynccontextmanager
async def leased(bus: Client, rollout_id: str = "r-1") -> AsyncGenerator[Task]:
    """An attempt that is running."""
    await bus.submit([Submission(rollout_id, b"")])
    async with bus.lease(1) as leases:
        with anyio.fail_after(PATIENCE_S):
            task = await anext(aiter(leases))
        yield task


async def recorded(bus: Client) -> list[Span]:
    records, _, _ = await bus.fetch(0, bytes_max=64 << 20)
    return [one for record in records if record.kind is Kind.SPANS for one in decode_spans(record.body)]


@asynccontextmanager
async def gateway(address: str) -> AsyncGenerator[str]:
    url: list[str] = []
    up = anyio.Event()

    def started(at: str) -> None:
        url.append(at)
        up.set()

    async with anyio.create_task_group() as tasks:
        section = GatewaySection(bind="127.0.0.1:0", upstreams=["http://127.0.0.1:9"])
        tasks.start_soon(functools.partial(serve_gateway, section, bus_address=address, secret=SECRET, started=started))
        await up.wait()
        yield url[0]
        tasks.cancel_scope.cancel()


async def test_leaving_a_trace_context_means_that_its_spans_are_durable(tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address, Client(address) as bus, leased(bus):
        exporter = SpanExporter(address)
        for tracer in (Tracer(exporter), OtelTracer(store=exporter, instrument=False)):
            async with tracer.trace_context("solve", rollout_id="r-1"):
                emit.emit_reward(1.0)
        assert [one.name for one in await recorded(bus)] == ["lightning.reward", "solve"] * 2
        await anyio.to_thread.run_sync(exporter.close)
        with pytest.raises(ClosedError, match="was closed before span 'late' ended"):
            exporter.put(span("late"))


async def test_a_gateway_takes_them_for_an_agent_that_has_a_token(tmp_path: Path) -> None:
    async with (
        broker(tmp_path / "log") as address,
        Client(address) as bus,
        leased(bus) as task,
        gateway(address) as url,
    ):
        async with LightningClient(url, "r-1", token=task.token) as client:
            async with Tracer().trace_context("solve", store=client.store, rollout_id="r-1"):
                emit.emit_message("hello")
        assert [one.name for one in await recorded(bus)] == ["lightning.message", "solve"]
        async with LightningClient(url, "r-2", token=task.token) as client:
            with pytest.raises(AccessDenied, match="the token is for rollout r-1 attempt 1"):
                async with Tracer().trace_context("solve", store=client.store, rollout_id="r-2"):
                    pass


async def test_an_attempt_that_is_over_is_told_once_to_who_leaves_it(tmp_path: Path) -> None:
    async with (
        broker(tmp_path / "log") as address,
        Client(address) as bus,
        leased(bus) as task,
        gateway(address) as url,
    ):
        for store in (SpanExporter(address), SpanExporter(url, token=task.token)):
            context = Tracer().trace_context("solve", store=store, rollout_id="r-1", attempt_id=1)
            await context.__aenter__()
            await bus.cancel(["r-1"])
            with pytest.raises(FencedError, match="r-1 attempt 1 is over"):
                await context.__aexit__(None, None, None)
            with pytest.raises(ValueError, match="the agent's own"):
                async with Tracer().trace_context("solve", store=store, rollout_id="r-1", attempt_id=1):
                    raise ValueError("the agent's own error is the one that goes on")
            await anyio.to_thread.run_sync(store.close)
        assert not await recorded(bus)


async def test_a_broker_that_restarts_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path / "log") as process:
        async with Client(process.address, limit_s=PATIENCE_S) as bus, leased(bus):
            with SpanExporter(process.address) as exporter:
                tracer = Tracer(exporter)
                async with tracer.trace_context("before", rollout_id="r-1"):
                    pass
                process.kill()
                with tracer.trace_context("meanwhile", rollout_id="r-1"):
                    for number in range(500):
                        emit.emit_message(f"{number}")
                    await anyio.to_thread.run_sync(process.start)
            spans = await recorded(bus)
    told = [one.attributes[n.MESSAGE_BODY] for one in spans if one.name == n.MESSAGE_SPAN_NAME]
    assert told == [f"{number}" for number in range(500)]
    assert len(spans) == 502


def test_no_broker_at_all_is_an_error_within_the_limit() -> None:
    exporter = SpanExporter(NOWHERE, limit_s=0.2)
    with pytest.raises(BrokenError, match="did not answer"):
        with Tracer(exporter).trace_context("solve", rollout_id="r-1"):
            pass
    assert exporter.lost == 1
    gateway_ = SpanExporter("http://127.0.0.1:9", limit_s=0.2)
    with pytest.raises(BrokenError, match="took no spans within"):
        with Tracer(gateway_).trace_context("solve", rollout_id="r-1"):
            pass
    exporter.close()
    gateway_.close()


def test_an_address_says_how() -> None:
    with pytest.raises(ConfigError, match="is no address"):
        SpanExporter("127.0.0.1:4750")
    with pytest.raises(ConfigError, match="LIGHTNING_BUS_ADDRESS"):
        LightningClient()


CHILD = """
import os, threading
from lightning_bus.otel.emit import emit_reward, operation

@operation
def child_work():
    thread = threading.Thread(target=emit_reward, args=(0.5, "from a child"))
    thread.start()
    thread.join()

child_work()
"""


@pytest.mark.parametrize("through_gateway", [False, True])
async def test_a_subprocess_emits_under_its_parents_span_and_flushes_when_it_ends(
    tmp_path: Path, through_gateway: bool
) -> None:
    async with (
        broker(tmp_path / "log") as address,
        Client(address) as bus,
        leased(bus) as task,
        gateway(address) as url,
    ):
        async with LightningClient(url if through_gateway else address, "r-1", token=task.token) as client:
            async with Tracer(client.store).trace_context("solve", rollout_id="r-1"):
                env = {**os.environ, **environment()}
                child = await anyio.run_process(
                    [sys.executable, "-c", CHILD], env=env, cwd=ROOT, stderr=subprocess.STDOUT
                )
        assert child.stdout == b""
        spans = {one.name: one for one in await recorded(bus)}
        assert spans["child_work"].parent_id == spans["solve"].span_id
        assert spans["lightning.reward"].parent_id == spans["child_work"].span_id
        assert spans["lightning.reward"].attributes[REWARD] == 0.5
        assert {one.trace_id for one in spans.values()} == {spans["solve"].trace_id}


def _emit_in_child(number: int) -> None:
    emit.emit_message(f"child {number}")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
async def test_a_forked_process_sends_its_own_spans_and_none_of_its_parents(tmp_path: Path) -> None:
    script = """
import multiprocessing
from lightning_bus.otel import emit
from lightning_bus.otel.exporter import SpanExporter
from lightning_bus.otel.tracer import Tracer
from tests.unit.otel.test_exporter import _emit_in_child

exporter = SpanExporter(ADDRESS)
with Tracer(exporter).trace_context("solve", rollout_id="r-1"):
    emit.emit_message("parent")
    children = [multiprocessing.get_context("fork").Process(target=_emit_in_child, args=(number,)) for number in range(3)]
    for child in children: child.start()
    for child in children: child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
"""
    async with broker(tmp_path / "log") as address, Client(address) as bus, leased(bus):
        script = script.replace("ADDRESS", repr(address))
        await anyio.run_process([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, stderr=None)
        spans = await recorded(bus)
    told = sorted(one.attributes.get(n.MESSAGE_BODY, one.name) for one in spans)
    assert told == ["child 0", "child 1", "child 2", "parent", "solve"]
    solve = next(one for one in spans if one.name == "solve")
    assert {one.parent_id for one in spans if one is not solve} == {solve.span_id}
