"""Waiting for rollouts to end: told by the broker, never polled, for one or for many thousands.

The broker answers a WAIT with what has ended already and then pushes the rest as it ends. A push can be lost, and a
broker that restarts forgets who waits; so what is still open is asked about again every RENEW_S. That costs latency,
never an end that nobody hears of, and each end is told once, whatever was sent twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterable
from contextlib import ExitStack, contextmanager

import anyio

from lightning_bus import messages as m
from lightning_bus import wire
from lightning_bus.client.session import Session
from lightning_bus.errors import BrokenError, BusyError, LightningBusError

RENEW_S = 5.0
KEEP_S = 3 * RENEW_S  # how long the broker remembers a WAIT that is not renewed
IDS_MAX = 20_000  # in one WAIT; more go in several


class Ends:
    """The ends of some rollouts, as the broker tells them."""

    def __init__(self, session: Session, rollout_ids: Iterable[str], limit_s: float | None) -> None:
        self._session = session
        self._open = dict.fromkeys(rollout_ids)
        self._limit_s = float("inf") if limit_s is None else limit_s
        self._told: deque[m.End] = deque()
        self._error: LightningBusError | None = None
        self._changed = anyio.Event()
        self._heard_s = 0.0

    async def stream(self) -> AsyncGenerator[m.End]:
        """Yield each end once, as it is told, until all have ended. See Client.ended for what is raised."""
        self._heard_s = anyio.current_time()
        over_s = self._heard_s + self._limit_s
        while self._open:
            with self._asked():
                renew_s = min(anyio.current_time() + min(RENEW_S, self._session.limit_s), over_s)
                while self._open and anyio.current_time() < renew_s:
                    self._changed = anyio.Event()
                    with anyio.move_on_at(renew_s):
                        await self._changed.wait()
                    if self._error is not None:
                        renew_s = min(renew_s, anyio.current_time() + self._retry_after_s())
                    while self._told:
                        yield self._told.popleft()
            if self._open:
                self._check_limits(over_s)

    @contextmanager
    def _asked(self) -> Generator[None]:
        """Have the broker tell us of all that are open."""
        rollout_ids = list(self._open)
        with ExitStack() as requests:
            for first in range(0, len(rollout_ids), IDS_MAX):
                wait = m.Wait(rollout_ids[first : first + IDS_MAX], int(KEEP_S * 1000))
                requests.enter_context(self._session.subscribe(wait, self._on_message, self._on_error))
            yield

    def _on_message(self, message: wire.Message) -> None:
        self._heard_s = anyio.current_time()
        if not isinstance(message.body, m.Ended):
            return
        for end in message.body.ended:
            if end.rollout_id in self._open:
                del self._open[end.rollout_id]
                self._told.append(end)
        if self._told:
            self._changed.set()

    def _on_error(self, error: LightningBusError) -> None:
        self._error = error
        self._changed.set()

    def _retry_after_s(self) -> float:
        error, self._error = self._error, None
        if isinstance(error, BusyError):
            return error.retry_after_s
        assert error is not None
        raise error

    def _check_limits(self, over_s: float) -> None:
        now_s = anyio.current_time()
        if now_s >= over_s:
            raise BrokenError(
                f"{len(self._open)} of the rollouts had not ended after {self._limit_s:g} s, {next(iter(self._open))} "
                "among them. Wait longer, or see what they wait for with: lightning-bus status"
            )
        if now_s >= self._heard_s + self._session.limit_s:
            raise BrokenError(
                f"the broker at {self._session.address} did not answer WAIT within {self._session.limit_s:g} s. "
                "Is it running? Start it with: lightning-bus broker"
            )
