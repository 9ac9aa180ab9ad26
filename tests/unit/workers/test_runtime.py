"""A worker process before a stub bus: what it reports, what it drops, how it ends."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest

from lightning_bus import REWARD_SPAN_NAME, BrokenError, FencedError, Span, Task, reward_of, root_of_attempt
from workers import Nack, NonRetryable
from workers.agent import agent_of
from workers.config import WorkerSection
from workers.context import RolloutContext
from workers.runtime import Counts, run_worker

pytestmark = pytest.mark.anyio
LIMIT_S = 60.0


def task(rollout_id: str = "r-1", payload: Any = None) -> Task:
    return Task(rollout_id, 1, msgspec.msgpack.encode(payload), f"token-{rollout_id}", 10.0, "g", {"phase": "rl"})


@dataclass
class Leases:
    """A stub of the broker's side: hands out tasks, keeps reports, and stops the worker after the last one."""

    tasks: list[Task]
    stop_worker: anyio.Event = field(default_factory=anyio.Event)
    error: Exception | None = None  # what reports are answered with
    reports: dict[str, tuple[str, Any, list[Span]]] = field(default_factory=dict[str, tuple[str, Any, list[Span]]])
    lost: dict[str, Callable[[], None]] = field(default_factory=dict[str, Callable[[], None]])
    slots: int = 0
    task_bytes_max: int = 0
    expected: int = 0
    _ended: anyio.Event = field(default_factory=anyio.Event)

    @asynccontextmanager
    async def lease(self, slots: int, *, task_bytes_max: int = 0) -> AsyncGenerator[Leases]:
        self.slots, self.task_bytes_max = slots, task_bytes_max
        self.expected = len(self.tasks)
        yield self

    def __aiter__(self) -> Leases:
        return self

    async def __anext__(self) -> Task:
        if not self.tasks:
            await self._ended.wait()
            raise StopAsyncIteration
        return self.tasks.pop(0)

    async def done(self, task: Task, reward: float | None, spans: Sequence[Span] = ()) -> None:
        self._report(task, "done", reward, spans)

    async def fail(self, task: Task, error: str, *, retryable: bool = True, spans: Sequence[Span] = ()) -> None:
        self._report(task, "again" if retryable else "final", error, spans)

    async def nack(self, task: Task, delay_s: float, reason: str = "") -> None:
        self._report(task, "put off", (delay_s, reason), ())

    async def release(self, task: Task) -> None:
        self._report(task, "released", None, ())

    def on_lost(self, task: Task, callback: Callable[[], None]) -> None:
        self.lost[task.rollout_id] = callback

    def stop(self) -> None:
        self._ended.set()

    def lose(self, rollout_id: str) -> None:
        """Say that the attempt was given to another worker."""
        self.lost[rollout_id]()
        self._one_less()

    def _report(self, task: Task, what: str, value: Any, spans: Sequence[Span]) -> None:
        self._one_less()
        if self.error is not None:
            raise self.error
        assert task.rollout_id not in self.reports
        self.reports[task.rollout_id] = (what, value, list(spans))

    def _one_less(self) -> None:
        self.expected -= 1
        if self.expected == 0:
            self.stop_worker.set()


async def run(leases: Leases, function: Callable[..., Any], **section: Any) -> Counts:
    worker = WorkerSection(**section)
    with anyio.fail_after(LIMIT_S):
        return await run_worker(
            leases, agent_of(function, "tests:agent"), worker, gateway_url="http://gateway:1", stop=leases.stop_worker
        )


async def test_a_reward_is_reported_with_the_spans_of_the_attempt() -> None:
    def agent(task: Any, base_url: str, api_key: str, rollout: RolloutContext) -> float:
        assert task == {"q": "2 + 2?"}
        assert base_url == rollout.base_url == "http://gateway:1/rollout/r-1/attempt/1/v1"
        assert api_key == rollout.api_key == "token-r-1"
        assert (rollout.group, rollout.labels, rollout.attempt) == ("g", {"phase": "rl"}, 1)
        return 0.5

    leases = Leases([task(payload={"q": "2 + 2?"})])
    counts = await run(leases, agent, concurrency=3)

    assert (counts.done, counts.failed, counts.lost, leases.slots) == (1, 0, 0, 3)
    what, reward, [given, root] = leases.reports["r-1"]
    assert (what, reward) == ("done", 0.5)
    assert (root.name, root.trace_id, root.span_id, root.error) == ("rollout", *root_of_attempt("r-1", 1), "")
    assert root.start_ns <= root.end_ns and reward_of(root) is None  # one reward is one span
    assert (given.name, given.parent_id, reward_of(given)) == (REWARD_SPAN_NAME, root.span_id, 0.5)
    assert {(span.rollout_id, span.attempt) for span in (given, root)} == {("r-1", 1)}


async def test_no_reward_is_not_a_reward_of_zero() -> None:
    leases = Leases([task()])
    await run(leases, lambda: None)
    what, reward, spans = leases.reports["r-1"]
    assert (what, reward, [span.name for span in spans]) == ("done", None, ["rollout"])


async def test_an_agent_that_raises_is_tried_again_and_its_traceback_is_kept() -> None:
    async def agent() -> float:
        raise LookupError("no such thing")

    leases = Leases([task()])
    counts = await run(leases, agent)
    what, error, [root] = leases.reports["r-1"]
    assert what == "again" and counts.failed == 1
    assert error.startswith("Traceback") and "in agent" in error and "LookupError: no such thing" in error
    assert root.error == error


async def test_junk_as_a_reward_is_a_final_failure() -> None:
    leases = Leases([task()])
    await run(leases, lambda: {"reward": 1})
    what, error, _ = leases.reports["r-1"]
    assert what == "final" and "agent tests:agent returned {'reward': 1} of type dict" in error


async def test_a_task_that_is_not_messagepack_is_a_final_failure() -> None:
    leases = Leases([msgspec.structs.replace(task(), task=b"\xc1")])
    await run(leases, lambda: 1.0)
    assert leases.reports["r-1"][0] == "final" and "is not MessagePack" in leases.reports["r-1"][1]


async def test_an_agent_that_takes_too_long_is_tried_again() -> None:
    leases = Leases([task("slow"), task("hangs")])
    hangs = threading.Event()

    async def waits() -> None:
        await anyio.sleep_forever()

    def agent(rollout: RolloutContext) -> Any:
        return waits() if rollout.rollout_id == "slow" else hangs.wait()

    await run(leases, agent, attempt_limit_s=0.05)
    hangs.set()
    for rollout_id in ("slow", "hangs"):
        what, error, _ = leases.reports[rollout_id]
        assert what == "again" and "did not return within 0.05 s" in error and "attempt_limit_s" in error


async def test_an_agent_is_ended_a_moment_before_the_attempts_own_timeout() -> None:
    leases = Leases([msgspec.structs.replace(task(), timeout_s=0.1)])
    await run(leases, anyio.sleep_forever, attempt_limit_s=300.0)
    what, error, _ = leases.reports["r-1"]
    assert what == "again" and "did not return within 0.09 s" in error and "timeout_s=0.1" in error


async def test_an_agent_that_cannot_now_is_put_off() -> None:
    async def agent(rollout: RolloutContext) -> None:
        if rollout.rollout_id == "in a group":
            async with anyio.create_task_group():
                raise Nack(0.0, "rate limited")
        raise Nack(30.0)

    leases = Leases([task("plain"), task("in a group")])
    counts = await run(leases, agent)
    assert {name: report[:2] for name, report in leases.reports.items()} == {
        "plain": ("put off", (30.0, "the agent asked to be tried again in 30 s")),
        "in a group": ("put off", (0.0, "rate limited")),
    }
    assert (counts.put_off, counts.failed) == (2, 0)


@pytest.mark.parametrize("delay_s", [-1.0, float("nan"), float("inf")])
def test_a_delay_that_nobody_can_wait_is_refused(delay_s: float) -> None:
    with pytest.raises(ValueError, match="a number of seconds from 0 on"):
        Nack(delay_s)


async def test_what_no_other_attempt_would_mend_is_a_final_failure_with_its_traceback() -> None:
    def agent() -> None:
        raise NonRetryable("no such table: cities")

    leases = Leases([task()])
    await run(leases, agent)
    what, error, _ = leases.reports["r-1"]
    assert what == "final" and "in agent" in error and "NonRetryable: no such table: cities" in error


async def test_the_tasks_in_hand_are_bounded_in_bytes() -> None:
    leases = Leases([task()])
    await run(leases, lambda: None, task_bytes_max=1000)
    assert leases.task_bytes_max == 1000


async def test_an_agents_own_timeout_is_not_taken_for_ours() -> None:
    async def agent() -> None:
        with anyio.fail_after(0):
            await anyio.sleep_forever()

    leases = Leases([task()])
    await run(leases, agent)
    assert leases.reports["r-1"][0] == "again" and "attempt_limit_s" not in leases.reports["r-1"][1]


async def test_a_lost_lease_cancels_an_async_agent_and_drops_a_sync_ones_result() -> None:
    cancelled: list[str] = []
    goes_on = threading.Event()
    leases = Leases([task("async"), task("sync"), task("stays")])

    async def waits() -> None:
        try:
            await anyio.sleep_forever()
        except asyncio.CancelledError:
            cancelled.append("async")
            raise

    async def agent(rollout: RolloutContext) -> float:
        if rollout.rollout_id == "async":
            await waits()
        if rollout.rollout_id == "sync":
            return await agent_of(lambda: goes_on.wait()).run(None, rollout) or 0.0
        await anyio.wait_all_tasks_blocked()
        leases.lose("async")
        leases.lose("sync")
        return 1.0

    counts = await run(leases, agent)
    goes_on.set()
    assert list(leases.reports) == ["stays"] and cancelled == ["async"]
    assert (counts.done, counts.lost) == (1, 2)


@pytest.mark.parametrize("error", [FencedError("given to another worker"), BrokenError("no answer within 60 s")])
async def test_a_result_that_nobody_takes_does_not_end_the_worker(error: Exception) -> None:
    leases = Leases([task("r-1"), task("r-2")], error=error)
    counts = await run(leases, lambda: 1.0)
    assert (counts.done, counts.lost) == (0, 2)


async def test_an_agent_that_cancels_itself_fails_alone() -> None:
    async def agent(rollout: RolloutContext) -> float:
        if rollout.rollout_id == "cancels":
            raise asyncio.CancelledError
        await anyio.wait_all_tasks_blocked()
        return 1.0

    leases = Leases([task("cancels"), task("r-2")])
    await run(leases, agent)
    assert {name: report[0] for name, report in leases.reports.items()} == {"cancels": "again", "r-2": "done"}


async def test_an_agent_that_exits_fails_alone() -> None:
    async def leaves() -> None:
        raise SystemExit(3)

    leases = Leases([task()])
    await run(leases, leaves)
    assert leases.reports["r-1"][0] == "again" and "SystemExit: 3" in leases.reports["r-1"][1]


async def test_a_worker_that_is_told_to_stop_finishes_what_is_nearly_done_and_gives_the_rest_back() -> None:
    leases = Leases([task("quick"), task("slow")])

    async def agent(rollout: RolloutContext) -> float:
        if rollout.rollout_id == "slow":
            await anyio.sleep_forever()
        await anyio.wait_all_tasks_blocked()
        leases.stop_worker.set()
        await anyio.lowlevel.checkpoint()
        return 1.0

    counts = await run(leases, agent, grace_s=0.5)
    assert leases.reports["quick"][:2] == ("done", 1.0)
    assert leases.reports["slow"][0] == "released"
    assert (counts.done, counts.failed, counts.released) == (1, 0, 1)


async def test_the_environment_names_the_attempt_only_when_one_runs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "the user's own")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    seen: list[tuple[str | None, ...]] = []
    names = ("OPENAI_BASE_URL", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY")

    def agent() -> None:
        seen.append(tuple(os.environ.get(name) for name in names))

    for concurrency in (1, 2):
        await run(Leases([task()]), agent, concurrency=concurrency)
    url = "http://gateway:1/rollout/r-1/attempt/1"
    assert seen[0] == (f"{url}/v1", "token-r-1", url, "token-r-1")
    assert seen[1][:2] == (None, "the user's own")
    assert os.environ["OPENAI_API_KEY"] == "the user's own" and "OPENAI_BASE_URL" not in os.environ
