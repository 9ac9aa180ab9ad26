"""One worker process: lease, run the agent, report; many attempts at a time.

    lease ──► agent ──► done(reward, spans)
                 ├────► fail(error, spans)      it raised, or took too long
                 ├────► nack(delay_s)           it raised Nack: not now
                 ├────► release                 we were told to stop, and our patience is over
                 └────► nothing                 the lease was lost: the result is not ours to report

What always holds: an attempt is reported at most once, and only while its lease is ours. A worker that is told to
stop takes no more tasks, lets what runs finish for grace_s, and hands the rest back at once: nobody has to wait for
leases to expire, and what was handed back counts as no attempt.
"""

from __future__ import annotations

import logging
import math
import os
import traceback
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import anyio
import msgspec

from lightning_bus import (
    REWARD,
    REWARD_NAME,
    REWARD_SPAN_NAME,
    AgentError,
    BrokenError,
    CallError,
    Client,
    FencedError,
    Span,
    Task,
    root_of_attempt,
    wall_ns,
)
from lightning_bus.otel import Attempt, SpanQueue, carry_into_threads, entered, send_traceparent
from workers.agent import Agent
from workers.config import WorkerSection
from workers.context import RolloutContext, model_url
from workers.outcomes import Nack, said_by

ROOT_SPAN_NAME = "rollout"
ERROR_CHARS_MAX = 20_000  # of a traceback; its end says what went wrong, so the beginning goes
EARLY_S_MAX = 1.0  # before the broker ends an attempt that has a timeout_s, we do, and can say why

_log = logging.getLogger("workers")


class LeasesLike(Protocol):
    """What a worker needs of `lightning_bus.Leases`."""

    def __aiter__(self) -> LeasesLike: ...
    async def __anext__(self) -> Task: ...
    async def done(self, task: Task, reward: float | None, spans: Sequence[Span] = ()) -> None: ...
    async def fail(self, task: Task, error: str, *, retryable: bool = True, spans: Sequence[Span] = ()) -> None: ...
    async def nack(self, task: Task, delay_s: float, reason: str = "") -> None: ...
    async def release(self, task: Task) -> None: ...
    def on_lost(self, task: Task, callback: Any) -> None: ...
    def stop(self) -> None: ...


class Bus(Protocol):
    """What a worker needs of `lightning_bus.Client`."""

    def lease(self, slots: int, *, task_bytes_max: int = 0) -> AbstractAsyncContextManager[LeasesLike]: ...
    async def append_blob(self, rollout_id: str, attempt: int, blob: bytes, count: int) -> None: ...


@dataclass(slots=True)
class Counts:
    """How the attempts of this worker ended."""

    done: int = 0
    failed: int = 0
    put_off: int = 0  # the agent raised Nack
    released: int = 0  # handed back, because the worker was told to stop
    lost: int = 0  # given to another worker, or cancelled, while we were at it


async def serve_worker(agent: Agent, section: WorkerSection, *, bus_address: str, gateway_url: str) -> Counts:
    """Run attempts until cancelled, then end them in order (see `run_worker`) and return how they ended."""
    stop = anyio.Event()
    counts = Counts()

    async def stop_when_cancelled() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            stop.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stop_when_cancelled)
        connected = False
        # The last results need the bus, so the client outlives the cancellation; but nobody waits for a bus that
        # is not there yet.
        with anyio.CancelScope(shield=True) as shielded:
            async with anyio.create_task_group() as inner:

                async def give_up() -> None:
                    await stop.wait()
                    if not connected:
                        shielded.cancel()

                inner.start_soon(give_up)
                async with Client(bus_address, role="worker") as bus:
                    connected = True
                    await run_worker(bus, agent, section, gateway_url=gateway_url, stop=stop, counts=counts)
                inner.cancel_scope.cancel()
        tasks.cancel_scope.cancel()
    return counts


async def run_worker(
    bus: Bus, agent: Agent, section: WorkerSection, *, gateway_url: str, stop: anyio.Event, counts: Counts | None = None
) -> Counts:
    """Run attempts until `stop` is set, then let the running ones finish for grace_s and hand the rest back."""
    carry_into_threads()
    send_traceparent()
    counts = counts or Counts()
    asked = bus.lease(section.concurrency, task_bytes_max=section.task_bytes_max)
    async with asked as leases, anyio.create_task_group() as watching:
        running = anyio.CancelScope()

        async def drain() -> None:
            await stop.wait()
            leases.stop()
            await anyio.sleep(section.grace_s)
            running.cancel()

        spans = SpanQueue()
        watching.start_soon(drain)
        watching.start_soon(spans.run, bus)
        with running:
            async with anyio.create_task_group() as attempts:
                async for task in leases:
                    attempt = _Attempt(agent, section, leases, spans, task, gateway_url, counts, running)
                    attempts.start_soon(attempt.carry_out)
        watching.cancel_scope.cancel()
    return counts


@dataclass(slots=True)
class _Attempt:
    """One attempt in our hands."""

    agent: Agent
    section: WorkerSection
    leases: LeasesLike
    spans: SpanQueue  # what agents emit
    task: Task
    gateway_url: str
    counts: Counts
    running: anyio.CancelScope  # cancelled when the worker's grace is over
    returned: bool = False  # the reward, rather than emitted: that one has its span already

    async def carry_out(self) -> None:
        """Run the agent and report what came of it."""
        start_ns = wall_ns()
        lost = anyio.CancelScope()
        self.leases.on_lost(self.task, lost.cancel)
        reward: float | None = None
        error, retryable = "", True
        try:
            with lost:
                reward = await self._run_agent()
        except AgentError as exc:
            error, retryable = str(exc), False
        except (Exception, SystemExit, KeyboardInterrupt) as exc:
            said = said_by(exc)
            if isinstance(said, Nack):
                await self._put_off(said)
                return
            error, retryable = traceback.format_exc(), said is None
        except anyio.get_cancelled_exc_class():
            if self.running.cancel_called:
                await self._hand_back()
                raise
            if anyio.current_effective_deadline() == -math.inf:
                raise  # everything around us is being torn down
            error = traceback.format_exc()  # the agent cancelled itself, which must not reach its neighbours
        if lost.cancelled_caught:
            self._note_lost("was given to another worker or cancelled")
        else:
            await self._tell_result(start_ns, reward, error, retryable=retryable)

    async def _run_agent(self) -> float | None:
        task, section = self.task, self.section
        try:
            payload: Any = msgspec.msgpack.decode(task.task)
        except msgspec.DecodeError as exc:
            raise AgentError(
                f"rollout {task.rollout_id}: the task is not MessagePack ({exc}); submit it as such."
            ) from exc
        url = model_url(self.gateway_url, task.rollout_id, task.attempt)
        rollout = RolloutContext(task.rollout_id, task.attempt, f"{url}/v1", task.token, task.group, task.labels)
        attempt = Attempt(task.rollout_id, task.attempt, self.spans, address=self.gateway_url, token=task.token)
        alone = _environment(url, task.token, attempt.environment()) if section.concurrency == 1 else nullcontext()
        with entered(attempt), alone:
            with anyio.move_on_after(self._limit_s) as limit:
                reward = await self.agent.run(payload, rollout)
                self.returned = reward is not None
                return reward if self.returned else attempt.reward
        assert limit.cancelled_caught
        way_out = (
            "raise [worker] attempt_limit_s"
            if self._limit_s == section.attempt_limit_s
            else f"submit it with more than timeout_s={task.timeout_s:g}"
        )
        raise TimeoutError(
            f"agent {self.agent.name} did not return within {self._limit_s:g} s. Make it faster, or {way_out}."
        )

    @property
    def _limit_s(self) -> float:
        """How long the agent may take. The broker counts an attempt's timeout_s too, from a moment before us."""
        timeout_s = self.task.timeout_s
        if not timeout_s:
            return self.section.attempt_limit_s
        return min(self.section.attempt_limit_s, timeout_s - min(EARLY_S_MAX, timeout_s / 10))

    async def _tell_result(self, start_ns: int, reward: float | None, error: str, *, retryable: bool) -> None:
        task, counts = self.task, self.counts
        if not await self._report(self._emitted):
            return
        error = error[-ERROR_CHARS_MAX:]
        spans = attempt_spans(task, start_ns, wall_ns(), reward if self.returned else None, error)
        if not error:
            reported = await self._report(lambda: self.leases.done(task, reward, spans))
            counts.done += reported
            return
        _log.warning("%s attempt %d failed: %s", task.rollout_id, task.attempt, error.strip().splitlines()[-1])
        reported = await self._report(lambda: self.leases.fail(task, error, retryable=retryable, spans=spans))
        counts.failed += reported

    async def _emitted(self) -> None:
        """Return when what the agent emitted is durable: once the attempt is over, nothing more of it is taken."""
        try:
            await self.spans.wait_flushed((self.task.rollout_id, self.task.attempt))
        except CallError:
            pass  # a span no message carries: told in the log, and no reason to lose the rest

    async def _put_off(self, nack: Nack) -> None:
        task, reason = self.task, str(nack)
        if not await self._report(self._emitted):
            return
        _log.info("%s attempt %d put off for %g s: %s", task.rollout_id, task.attempt, nack.delay_s, reason)
        reported = await self._report(lambda: self.leases.nack(task, nack.delay_s, reason))
        self.counts.put_off += reported

    async def _hand_back(self) -> None:
        _log.info("%s attempt %d handed back: the worker was told to stop", self.task.rollout_id, self.task.attempt)
        reported = await self._report(lambda: self.leases.release(self.task))
        self.counts.released += reported

    async def _report(self, report: Callable[[], Awaitable[None]]) -> bool:
        """Tell the broker how the attempt ended; True when it took it. Shielded: an outcome is worth a moment.

        Never add the answer to a count in one statement with the await: the count is read before it, and those of
        attempts that end meanwhile would be lost.
        """
        try:
            with anyio.CancelScope(shield=True):
                await report()
                return True
        except FencedError as exc:
            self._note_lost(str(exc))
        except BrokenError as exc:
            # The lease runs out and the rollout is tried again: the promise is kept without us.
            self._note_lost(f"could not be reported: {exc}")
        return False

    def _note_lost(self, why: str) -> None:
        self.counts.lost += 1
        _log.info("%s attempt %d: %s", self.task.rollout_id, self.task.attempt, why)


def attempt_spans(task: Task, start_ns: int, end_ns: int, reward: float | None, error: str) -> list[Span]:
    """Return the root span of an attempt, which the gateway's model calls hang from, and the reward's own span."""
    trace_id, root_id = root_of_attempt(task.rollout_id, task.attempt)
    root = Span(
        span_id=root_id, trace_id=trace_id, parent_id=None, name=ROOT_SPAN_NAME, start_ns=start_ns,
        end_ns=max(start_ns, end_ns), rollout_id=task.rollout_id, attempt=task.attempt,
        sequence=1, error=error,
    )  # fmt: skip
    if reward is None:
        return [root]
    given = msgspec.structs.replace(
        root, span_id=os.urandom(8), parent_id=root_id, name=REWARD_SPAN_NAME, start_ns=root.end_ns,
        attributes={REWARD: reward, REWARD_NAME: "return value"}, sequence=0,
    )  # fmt: skip
    return [given, root]


@contextmanager
def _environment(url: str, key: str, tracing: dict[str, str]) -> Generator[None]:
    """Point SDKs that are configured by the environment at this attempt, and processes that the agent starts.

    The environment belongs to the process, so this holds only where one attempt runs at a time.
    """
    ours = {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": key, "ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": key}
    ours |= tracing
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
