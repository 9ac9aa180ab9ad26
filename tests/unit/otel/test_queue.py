"""The queue between an agent's threads and the bus, against a sink that can be made slow or deaf."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread
import msgspec
import pytest

from lightning_bus.errors import BrokenError, BusyError, CallError, FencedError, LightningBusError, MessageTooLarge
from lightning_bus.otel.queue import SpanQueue
from lightning_bus.spans import Span, decode_spans, encode_spans
from tests.bus_fixtures import span

pytestmark = pytest.mark.anyio


class SlowSink:
    """Keeps chunks, once `open` is set."""

    def __init__(self, *, limit: int = 1 << 30, error: LightningBusError | None = None) -> None:
        self.open = anyio.Event()
        self.chunks: list[tuple[str, int, list[Span]]] = []
        self.limit = limit
        self.error = error

    async def append_blob(self, rollout_id: str, attempt: int, blob: bytes, count: int) -> None:
        await self.open.wait()
        if self.error is not None:
            raise self.error
        if len(blob) > self.limit:
            raise MessageTooLarge(f"{len(blob)} bytes")
        spans = decode_spans(blob)
        assert len(spans) == count
        assert blob == encode_spans(spans)
        self.chunks.append((rollout_id, attempt, spans))

    @property
    def spans(self) -> list[Span]:
        return [span for _, _, spans in self.chunks for span in spans]


@asynccontextmanager
async def running(queue: SpanQueue, sink: SlowSink, *, open_: bool = True) -> AsyncGenerator[None]:
    if open_:
        sink.open.set()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(queue.run, sink)
        yield
        tasks.cancel_scope.cancel()


async def test_spans_travel_together_and_in_order() -> None:
    queue, sink = SpanQueue(), SlowSink()
    given = [span(rollout_id=f"r-{at % 3}", attempt=1) for at in range(3000)]
    for one in given:
        queue.put(one)
    async with running(queue, sink):
        await queue.wait_flushed()
    assert len(sink.chunks) == 3
    assert (queue.kept, queue.lost) == (3000, 0)
    for number in range(3):
        assert [each for each in sink.spans if each.rollout_id == f"r-{number}"] == given[number::3]


async def test_an_agent_is_not_held_up_while_there_is_room() -> None:
    queue, sink = SpanQueue(), SlowSink()
    async with running(queue, sink, open_=False):
        for _ in range(1000):
            queue.put(span(rollout_id="r-1", attempt=1))
        with pytest.raises(BrokenError, match=r"1000 span\(s\) were not durable after 0 s"):
            await queue.wait_flushed(("r-1", 1), limit_s=0)
        sink.open.set()
        await queue.wait_flushed(("r-1", 1))
    assert len(sink.spans) == 1000


async def test_a_full_queue_makes_the_agent_wait_for_room() -> None:
    sink, queue = SlowSink(), SpanQueue(bytes_max=1000, wait_s=30)
    waits = threading.Event()

    def agent() -> None:
        while queue._bytes + 300 < 1000:
            queue.put(span(rollout_id="r-1", attempt=1, text="x" * 300))
        waits.set()
        queue.put(span(rollout_id="r-1", attempt=1, text="x" * 500))

    async with running(queue, sink, open_=False), anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, agent)
        await anyio.to_thread.run_sync(waits.wait)
        sink.open.set()
    assert sink.spans


async def test_a_full_queue_says_so_in_the_end() -> None:
    queue = SpanQueue(bytes_max=1000, wait_s=0)
    queue.put(span(text="x" * 900))
    with pytest.raises(BusyError, match="the limit is 1000, and there was no room for"):
        queue.put(span(text="x" * 900))
    large = SpanQueue(bytes_max=10, wait_s=0)
    large.put(span())  # alone, whatever its size: it could never be put otherwise


async def test_the_exporters_own_loop_is_not_made_to_wait_for_itself() -> None:
    queue, sink = SpanQueue(bytes_max=500), SlowSink()
    async with running(queue, sink, open_=False):
        await asyncio.sleep(0)
        queue.put(span(text="x" * 400))
        with pytest.raises(BusyError, match="within 0 s"):
            queue.put(span(text="x" * 400))
        with pytest.raises(CallError, match="wait_flushed"):
            queue.flush()


async def test_what_the_bus_refuses_is_counted_and_told_to_its_own_attempt(caplog: pytest.LogCaptureFixture) -> None:
    queue, sink = SpanQueue(), SlowSink(error=FencedError("the attempt is over"))
    queue.put(span(rollout_id="r-1", attempt=1))
    queue.put(span(rollout_id="r-1", attempt=1))
    async with running(queue, sink):
        await queue.wait_flushed(("r-2", 1))
        with pytest.raises(FencedError, match="the attempt is over"):
            await queue.wait_flushed(("r-1", 1))
        sink.error = None
        queue.put(span(rollout_id="r-1", attempt=2))
        await queue.wait_flushed()
    assert (queue.kept, queue.lost) == (1, 2)
    assert [record.getMessage() for record in caplog.records] == [
        "rollout r-1 attempt 1: 2 span(s) were not recorded: the attempt is over"
    ]


async def test_a_batch_that_is_too_large_is_cut_and_only_what_is_too_large_alone_is_lost() -> None:
    queue, sink = SpanQueue(), SlowSink(limit=1000)
    for at in range(20):
        queue.put(span(f"s{at}", rollout_id="r-1", attempt=1, text="x" * (5000 if at == 7 else 100)))
    async with running(queue, sink):
        with pytest.raises(MessageTooLarge, match=r"1 span\(s\) are larger"):
            await queue.wait_flushed()
    assert [each.name for each in sink.spans] == [f"s{at}" for at in range(20) if at != 7]
    assert (queue.kept, queue.lost) == (19, 1)


async def test_what_is_put_cannot_be_changed_afterwards() -> None:
    queue, sink = SpanQueue(), SlowSink()
    attributes = {"a": 1}
    queue.put(msgspec.structs.replace(span(), attributes=attributes))
    attributes["a"] = 2
    async with running(queue, sink):
        await queue.wait_flushed()
    assert sink.spans[0].attributes == {"a": 1}


async def test_text_that_cannot_be_encoded_does_not_fail_the_agent() -> None:
    queue, sink = SpanQueue(), SlowSink()
    queue.put(span("na\ud800me", text="\udfff", number=2**70))
    async with running(queue, sink):
        await queue.wait_flushed()
    assert sink.spans[0].name == "na?me"
    assert sink.spans[0].attributes == {"text": "?", "number": str(2**70)}


async def test_flush_wakes_threads_and_tasks() -> None:
    queue, sink = SpanQueue(), SlowSink()
    for number in range(50):
        queue.put(span(rollout_id=f"r-{number}", attempt=1))
    async with running(queue, sink, open_=False), anyio.create_task_group() as tasks:
        for number in range(50):
            tasks.start_soon(queue.wait_flushed, (f"r-{number}", 1))
        tasks.start_soon(anyio.to_thread.run_sync, queue.flush)
        sink.open.set()
    assert queue.kept == 50
