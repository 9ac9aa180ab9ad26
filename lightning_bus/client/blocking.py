"""The client for synchronous code: the same methods, run in an event loop on a thread of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from anyio.from_thread import BlockingPortal, start_blocking_portal

from lightning_bus import messages as m
from lightning_bus.client.face import FOLLOW_BYTES_MAX, FOLLOW_WAIT_S, LIMIT_S, Client
from lightning_bus.errors import ClosedError
from lightning_bus.records import Record
from lightning_bus.resources import Resource
from lightning_bus.spans import Span


class BlockingClient:
    """`Client`, one blocking call at a time. Use it inside `with`."""

    def __init__(self, address: str, *, role: str = "client", limit_s: float = LIMIT_S) -> None:
        self._client = Client(address, role=role, limit_s=limit_s)
        self._portal: BlockingPortal | None = None

    def __enter__(self) -> BlockingClient:
        self._portal_context = start_blocking_portal()
        self._portal = self._portal_context.__enter__()
        self._client_context = self._portal.wrap_async_context_manager(self._client)
        try:
            self._client_context.__enter__()
        except BaseException:
            self._portal_context.__exit__(None, None, None)
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

    def submit(self, rollouts: Sequence[m.Submission]) -> int:
        return self._call(self._client.submit, rollouts)

    def cancel(self, rollout_ids: Sequence[str]) -> int:
        return self._call(self._client.cancel, rollout_ids)

    def query(self, rollout_ids: Sequence[str] = (), limit: int = 1000) -> list[m.Rollout]:
        return self._call(self._client.query, rollout_ids, limit)

    def status(self) -> m.StatusIs:
        return self._call(self._client.status)

    def append(self, rollout_id: str, attempt: int, spans: Sequence[Span]) -> None:
        self._call(self._client.append, rollout_id, attempt, spans)

    def fetch(self, offset: int, *, bytes_max: int = 1 << 20, wait_s: float = 0.0) -> tuple[list[Record], int, int]:
        async def call() -> tuple[list[Record], int, int]:
            return await self._client.fetch(offset, bytes_max=bytes_max, wait_s=wait_s)

        return self._call(call)

    def follow(self, offset: int = 0, *, wait_s: float = FOLLOW_WAIT_S) -> Iterator[Record]:
        while True:
            records, offset, _ = self.fetch(offset, bytes_max=FOLLOW_BYTES_MAX, wait_s=wait_s)
            yield from records

    def cursor(self, name: str, offset: int | None = None) -> int:
        return self._call(self._client.cursor, name, offset)

    def put(self, resource: Resource) -> None:
        self._call(self._client.put, resource)

    def get(self, name: str, version: int | None = None) -> Resource | None:
        return self._call(self._client.get, name, version)

    def _call(self, method: Callable[..., Any], *args: Any) -> Any:
        if self._portal is None:
            raise ClosedError(f"the client of {self._client.address} is closed; use it inside `with`")
        return self._portal.call(method, *args)
