"""The broker is killed in the middle of a run and stays away for half a minute: that is latency, and nothing else.

Agents go on calling through a real gateway and tracing through the exporter, in a real worker; the broker is a process
of its own, and the engine is a stub. Afterwards the log is compared, span by span, with what the agents did.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import httpx
import msgspec
import openai
import pytest

from lightning_bus import BusyError, Client, Span, Status, Submission, decode_spans
from lightning_bus import spans as s
from lightning_bus.config import GatewaySection
from lightning_bus.gateway.daemon import serve_gateway
from lightning_bus.http import bind_tcp, http_server
from lightning_bus.log.reader import LogReader
from lightning_bus.otel import SpanExporter, Tracer
from lightning_bus.otel import names as n
from lightning_bus.records import Kind, Record
from tests.bus_fixtures import SECRET, BrokerProcess
from tests.gateway_fixtures import Engine
from workers.agent import agent_of
from workers.config import WorkerSection
from workers.context import RolloutContext
from workers.runtime import run_worker

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.crash, pytest.mark.timeout(300)]

AWAY_S = 30.0
CALLERS, CALLS = 8, 40
MESSAGES = 500
LIMITS_S = {"floods": 1.0, "hurries": 2.0, "is_told": 4.0, "is_stopped": 29.0}  # after which each of these is told
LEASE_S = 30.0  # a machine that stands still for a while loses no attempt
SOON_S = 20.0  # beyond a time limit, on such a machine


@asynccontextmanager
async def gateway(address: str, upstream: str, **limits: float) -> AsyncGenerator[str]:
    url: list[str] = []
    up = anyio.Event()

    def started(at: str) -> None:
        url.append(at)
        up.set()

    section = GatewaySection(bind="127.0.0.1:0", upstreams=[upstream], **limits)  # type: ignore[arg-type]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(functools.partial(serve_gateway, section, bus_address=address, secret=SECRET, started=started))
        await up.wait()
        yield url[0]
        tasks.cancel_scope.cancel()


class Agents:
    """What the agents of this run do, by the kind of their task, and what they saw."""

    def __init__(self, bus_address: str, hasty_url: str) -> None:
        self.answered: list[str] = []  # what was asked, of the answers that agents have seen
        self.midway, self.away = anyio.Event(), anyio.Event()
        self.heard_out = anyio.Event()  # all who have little patience were told, and who traces was not held up
        self.told: dict[str, str] = {}  # what an agent with little patience was told
        self.waited_s: dict[str, float] = {}  # and after how long
        self.taken = 0  # spans that the full exporter took
        self._hasty_url = hasty_url
        self.exporter = SpanExporter(bus_address)
        self.small = SpanExporter(bus_address, bytes_max=4_000, wait_s=1.0)
        self._http = httpx.AsyncClient(timeout=90.0, trust_env=False)

    async def run(self, task: str, rollout: RolloutContext) -> float:
        act: Callable[[RolloutContext], Awaitable[None]] = getattr(self, task)
        await act(rollout)
        return 1.0

    async def calls(self, rollout: RolloutContext) -> None:
        """Call the model again and again, streamed and not, and never notice anything."""
        model = self._client(rollout)
        for number in range(CALLS):
            question = f"{rollout.rollout_id} {number}"
            await self._ask(model, question, stream=number % 2 == 0)
            self.answered.append(question)
            if len(self.answered) == CALLERS * CALLS // 4:
                self.midway.set()

    async def emits(self, rollout: RolloutContext) -> None:
        """Trace while nobody listens: that takes no time, and only the end waits."""
        tracer = Tracer(self.exporter)
        async with tracer.trace_context("emits", rollout_id=rollout.rollout_id, attempt_id=rollout.attempt):
            for number in range(MESSAGES // 2):
                tracer.emit_message(str(number))
            await self.away.wait()
            began_s = anyio.current_time()
            for number in range(MESSAGES // 2, MESSAGES):
                tracer.emit_message(str(number))
            self._waited("emits", began_s)

    async def emits_from_afar(self, rollout: RolloutContext) -> None:
        """Trace by way of a gateway that gives up early, so that the same spans are sent again and again."""
        exporter = SpanExporter(self._hasty_url, token=rollout.api_key)
        tracer = Tracer(exporter)
        async with tracer.trace_context("emits", rollout_id=rollout.rollout_id, attempt_id=rollout.attempt):
            for number in range(MESSAGES):
                if number == MESSAGES // 2:
                    await self.away.wait()
                tracer.emit_message(str(number))
        await anyio.to_thread.run_sync(exporter.close)

    async def floods(self, rollout: RolloutContext) -> None:
        """Trace more than the exporter may keep: it says so, and loses nothing that it took."""
        tracer = Tracer(self.small)

        def flood() -> None:
            for number in range(1_000):
                tracer.emit_message(str(number))
                self.taken += 1

        async with tracer.trace_context("floods", rollout_id=rollout.rollout_id, attempt_id=rollout.attempt):
            await self.away.wait()
            began_s = anyio.current_time()
            with pytest.raises(BusyError, match="Is the broker up") as caught:
                await anyio.to_thread.run_sync(flood)
            self._told("floods", caught.value, began_s)
            await anyio.to_thread.run_sync(self.small.flush)  # room for the span of the context itself

    async def hurries(self, rollout: RolloutContext) -> None:
        """Give up after two seconds, as its client can."""
        await self.away.wait()
        began_s = anyio.current_time()
        with pytest.raises(openai.APITimeoutError) as caught:
            await self._ask(self._client(rollout).with_options(timeout=2.0, max_retries=0), "hurries")
        self._told("hurries", caught.value, began_s)

    async def is_told(self, rollout: RolloutContext) -> None:
        """Be told by a gateway that waits for four seconds only."""
        await self.away.wait()
        base_url = rollout.base_url.replace(rollout.base_url.partition("/rollout/")[0], self._hasty_url)
        began_s = anyio.current_time()
        with pytest.raises(openai.InternalServerError) as caught:
            await self._ask(self._client(rollout).with_options(base_url=base_url, max_retries=0), "is told")
        self._told("is_told", caught.value, began_s)

    async def is_stopped(self, rollout: RolloutContext) -> None:
        """Have a time limit, and wait for longer."""
        began_s = anyio.current_time()
        try:
            await self.away.wait()
            await self._ask(self._client(rollout), "is stopped")
        finally:
            self._waited("is_stopped", began_s)

    async def aclose(self) -> None:
        await self._http.aclose()
        for exporter in (self.exporter, self.small):
            await anyio.to_thread.run_sync(exporter.close)

    def _client(self, rollout: RolloutContext) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=rollout.base_url, api_key=rollout.api_key, http_client=self._http, timeout=90
        )

    async def _ask(self, model: openai.AsyncOpenAI, said: str, *, stream: bool = False) -> None:
        if stream:
            chunks = await model.chat.completions.create(
                model="policy", messages=[{"role": "user", "content": said}], stream=True
            )
            assert [chunk async for chunk in chunks][-1].choices[0].finish_reason == "stop"
        else:
            await model.chat.completions.create(model="policy", messages=[{"role": "user", "content": said}])

    def _told(self, who: str, exc: Exception, began_s: float) -> None:
        self.told[who] = str(exc)
        self._waited(who, began_s)

    def _waited(self, who: str, began_s: float) -> None:
        self.waited_s[who] = anyio.current_time() - began_s
        if len(self.waited_s) == 1 + len(LIMITS_S):
            self.heard_out.set()


async def test_a_broker_that_is_away_for_half_a_minute_costs_time_and_nothing_else(tmp_path: Path) -> None:
    engine = Engine()
    listener = bind_tcp("127.0.0.1:0", "engine")
    upstream = f"http://127.0.0.1:{listener.getsockname()[1]}"
    tasks_of = {f"r-{number}": "calls" for number in range(CALLERS)} | {
        kind: kind for kind in ("emits", "emits_from_afar", "floods", "hurries", "is_told", "is_stopped")
    }
    timeouts_s = {"is_stopped": 30.0}
    with BrokerProcess(tmp_path / "log", lease_s=LEASE_S) as process:
        async with (
            http_server(engine.app(), listener),
            Client(process.address) as bus,
            gateway(process.address, upstream) as url,
            gateway(process.address, upstream, admission_wait_s=4.0) as hasty_url,
        ):
            agents = Agents(process.address, hasty_url)
            submissions = [
                Submission(each, msgspec.msgpack.encode(task), max_attempts=1, timeout_s=timeouts_s.get(each, 0.0))
                for each, task in tasks_of.items()
            ]
            await bus.submit(submissions)
            stop = anyio.Event()

            async def take_away() -> None:
                await agents.midway.wait()
                process.kill()  # blocking: however long it takes, no agent goes on meanwhile
                assert len(agents.answered) < CALLERS * CALLS
                agents.away.set()
                await anyio.sleep(AWAY_S)
                # Were somebody held up until the broker is back, we would wait for ever.
                await agents.heard_out.wait()
                with LogReader(tmp_path / "log") as reader:  # nobody acts on what is not in the log
                    assert set(agents.answered) <= set(map(question_in, calls_in(reader.records())))
                await anyio.to_thread.run_sync(process.start)
                await bus.wait(list(tasks_of), limit_s=120.0)
                stop.set()

            async with anyio.create_task_group() as group:
                group.start_soon(take_away)
                counts = await run_worker(
                    bus, agent_of(agents.run), WorkerSection(concurrency=20), gateway_url=url, stop=stop
                )
            await agents.aclose()
            ends = {one.submission.rollout_id: one for one in await bus.query()}
            log = await spans_of(bus)

    assert {each: (end.status, end.attempt) for each, end in ends.items()} == {
        each: (Status.FAILED if each == "is_stopped" else Status.SUCCEEDED, 1) for each in tasks_of
    }
    # The worker says so a second before the broker would. On a machine on which it took us as long until the broker was
    # away, that may be too late.
    too_late = "took longer than timeout_s=30" in ends["is_stopped"].error
    assert too_late or "did not return within 29 s" in ends["is_stopped"].error
    assert counts.done == len(tasks_of) - 1 and counts.lost <= too_late

    # No span stands there twice, and each call that an agent saw the end of stands there once.
    assert max(Counter(span.span_id for span in log).values()) == 1
    recorded = Counter(question_in(span) for span in log if s.REQUEST_BODY in span.attributes)
    wanted = [f"r-{caller} {number}" for caller in range(CALLERS) for number in range(CALLS)]
    answered = {question: count for question, count in recorded.items() if question.startswith("r-")}
    assert answered == dict.fromkeys(wanted, 1)
    # The engine was asked no second time, and what no agent saw the end of is recorded once or, the attempt over, not.
    asked = Counter(body["messages"][0]["content"] for body in engine.requests)
    assert set(wanted) <= asked.keys() <= {*wanted, "hurries", "is told", "is stopped"}
    assert max(asked.values()) == 1
    assert not recorded - asked
    # What the exporters took is there, each once.
    for who, count in (("emits", MESSAGES), ("emits_from_afar", MESSAGES), ("floods", agents.taken)):
        messages = [span.attributes[n.MESSAGE_BODY] for span in log if _is_message(span, who)]
        assert sorted(messages, key=int) == [str(number) for number in range(count)]

    # Nobody was held up for longer than its limit, all of them while the broker was away, and everybody was told why.
    for who, limit_s in LIMITS_S.items():
        assert limit_s - 0.1 < agents.waited_s[who] < limit_s + SOON_S, (who, agents.waited_s)
    assert agents.told["hurries"] == "Request timed out."
    assert "Is it running" in agents.told["is_told"]


def _is_message(span: Span, rollout_id: str) -> bool:
    return span.rollout_id == rollout_id and n.MESSAGE_BODY in span.attributes


def question_in(span: Span) -> str:
    """Return what a recorded call asked."""
    return msgspec.json.decode(span.attributes[s.REQUEST_BODY])["messages"][0]["content"]


def calls_in(records: Iterable[Record]) -> list[Span]:
    return [span for span in spans_in(records) if s.REQUEST_BODY in span.attributes]


def spans_in(records: Iterable[Record]) -> list[Span]:
    return [one for record in records if record.kind is Kind.SPANS for one in decode_spans(record.body)]


async def spans_of(bus: Client) -> list[Span]:
    """Return every span of the log."""
    found: list[Span] = []
    offset, end = 0, 1
    while offset < end:
        records, offset, end = await bus.fetch(offset, bytes_max=8 << 20)
        found += spans_in(records)
    return found
