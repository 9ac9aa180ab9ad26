"""The client for synchronous code: the same methods, run in an event loop on a thread of their own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import anyio
from anyio import EndOfStream, WouldBlock
from anyio.from_thread import BlockingPortal, start_blocking_portal
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from lightning_bus import messages as m
from lightning_bus.client.face import FOLLOW_WAIT_S, LIMIT_S, Client, Submitted
from lightning_bus.errors import ClosedError
from lightning_bus.records import Record
from lightning_bus.resources import Resource
from lightning_bus.spans import Span

T = TypeVar("T")
AHEAD = 1000  # items that an iterator may be ahead of who takes them


class BlockingClient:
    """`Client`, one blocking call at a time. Use it inside `with`."""

    def __init__(
        self, address: str, *, role: str = "client", key: Path | None = None, token: str = "", log: Path | None = None,
        limit_s: float = LIMIT_S,
    ) -> None:  # fmt: skip
        self._client = Client(address, role=role, key=key, token=token, log=log, limit_s=limit_s)
        self._portal: BlockingPortal | None = None

    def __enter__(self) -> BlockingClient:
        self._portal_context: AbstractContextManager[BlockingPortal] = start_blocking_portal()
        self._portal = self._portal_context.__enter__()
        self._client_context = self._portal.wrap_async_context_manager(self._client)
        try:
            self._client_context.__enter__()
        except BaseException:
            self._portal_context.__exit__(None, None, None)
            self._portal = None
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client_context.__exit__(None, None, None)
        self._portal_context.__exit__(None, None, None)
        self._portal = None

    @property
    def session(self) -> str:
        return self._client.session

    # -- rollouts

    def submit(self, rollouts: Sequence[m.Submission]) -> Submitted:
        return self._call(self._client.submit, rollouts)

    def wait(
        self, rollout_ids: Sequence[str], *, limit_s: float | None = None, on_end: Callable[[m.End], None] | None = None
    ) -> list[m.End]:
        ends: dict[str, m.End] = {}
        for end in self.ended(rollout_ids, limit_s=limit_s):
            ends[end.rollout_id] = end
            if on_end is not None:
                on_end(end)
        return [ends[rollout_id] for rollout_id in rollout_ids]

    def ended(self, rollout_ids: Sequence[str], *, limit_s: float | None = None) -> Iterator[m.End]:
        return self._iterate(lambda: self._client.ended(rollout_ids, limit_s=limit_s))

    def cancel(self, rollout_ids: Sequence[str]) -> int:
        return self._call(self._client.cancel, rollout_ids)

    def query(
        self, rollout_ids: Sequence[str] = (), limit: int = 1000, *, status: str = "", dead: bool = False,
        after: str = "",
    ) -> list[m.Rollout]:  # fmt: skip
        return self._call(self._client.query, rollout_ids, limit, status=status, dead=dead, after=after)

    def rollouts(self, *, status: str = "", dead: bool = False) -> Iterator[m.Rollout]:
        return self._iterate(lambda: self._client.rollouts(status=status, dead=dead))

    def status(self) -> m.StatusIs:
        return self._call(self._client.status)

    # -- operating

    def dead(self) -> Iterator[m.Rollout]:
        return self._iterate(self._client.dead)

    def replay(self, rollout_ids: Sequence[str]) -> list[str]:
        return self._call(self._client.replay, rollout_ids)

    def purge(self, rollout_ids: Sequence[str]) -> int:
        return self._call(self._client.purge, rollout_ids)

    def drain(self) -> None:
        self._call(self._client.drain)

    def resume(self) -> None:
        self._call(self._client.resume)

    # -- spans and the log

    def append(self, rollout_id: str, attempt: int, spans: Sequence[Span]) -> None:
        self._call(self._client.append, rollout_id, attempt, spans)

    def append_blob(self, rollout_id: str, attempt: int, blob: bytes, count: int) -> None:
        self._call(self._client.append_blob, rollout_id, attempt, blob, count)

    def fetch(self, offset: int, *, bytes_max: int = 1 << 20, wait_s: float = 0.0) -> tuple[list[Record], int, int]:
        return self._call(self._client.fetch, offset, bytes_max=bytes_max, wait_s=wait_s)

    def follow(self, offset: int = 0, *, wait_s: float = FOLLOW_WAIT_S) -> Iterator[Record]:
        return self._iterate(lambda: self._client.follow(offset, wait_s=wait_s))

    def cursor(self, name: str, offset: int | None = None) -> int:
        return self._call(self._client.cursor, name, offset)

    # -- resources

    def put(self, resource: Resource) -> None:
        self._call(self._client.put, resource)

    def get(self, name: str, version: int | None = None) -> Resource | None:
        return self._call(self._client.get, name, version)

    def watch(self, name: str, above: int = -1, *, wait_s: float = FOLLOW_WAIT_S) -> Iterator[Resource]:
        return self._iterate(lambda: self._client.watch(name, above, wait_s=wait_s))

    # -- how it is done

    def _call(self, method: Callable[..., Any], *args: Any, **how: Any) -> Any:
        if self._portal is None:
            raise ClosedError(f"the client of {self._client.address} is closed; use it inside `with`")
        return self._portal.call(lambda: method(*args, **how))

    def _iterate(self, stream: Callable[[], AsyncGenerator[T]]) -> Generator[T]:
        """Yield what an asynchronous iterator yields: it runs ahead a little, and what is there is taken at once."""

        async def run_ahead(send: MemoryObjectSendStream[T]) -> None:
            async with send, aclosing(stream()) as items:
                async for item in items:
                    await send.send(item)

        async def take(receive: MemoryObjectReceiveStream[T]) -> list[T]:
            taken: list[T] = []
            try:
                taken.append(await receive.receive())
                while True:
                    taken.append(receive.receive_nowait())
            except (EndOfStream, WouldBlock):
                return taken

        send, receive = self._call(anyio.create_memory_object_stream, AHEAD)
        assert self._portal is not None
        running = self._portal.start_task_soon(run_ahead, send)
        try:
            while taken := self._call(take, receive):
                yield from taken
            running.result()
        finally:
            running.cancel()
            receive.close()
