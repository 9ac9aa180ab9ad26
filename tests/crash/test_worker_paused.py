"""A worker that is stopped for longer than its lease, and wakes up believing that no time has passed.

Real processes: SIGSTOP freezes all of it, heartbeats included, and SIGCONT lets it go on in the middle of a line.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from lightning_bus import Client, Submission, decode_spans
from lightning_bus.log.reader import LogReader
from lightning_bus.records import Kind
from tests.crash.broker_lives import BrokerLives
from tests.crash.callers import HELD, calling
from tests.crash.history import History

pytestmark = [pytest.mark.crash, pytest.mark.anyio]


async def test_what_a_worker_says_after_its_lease_is_fenced_and_kept_out(tmp_path: Path) -> None:
    history = History()
    ids = [f"r-{number}" for number in range(HELD)]
    with BrokerLives(tmp_path / "log", lease_s=0.5) as lives:
        async with calling(lives.address, history.on_event) as callers:
            async with Client(lives.address, role="trainer") as bus:
                await bus.submit([Submission(rollout_id, b"task", max_attempts=100) for rollout_id in ids])
            history.submitted.extend(ids)
            paused = await callers.add("hold", "paused")
            await history.wait_until(lambda: len(history.held) == HELD)
            paused.send_signal(signal.SIGSTOP)
            await callers.add("work", "other")
            await history.wait_until(lambda: len(history.done) == HELD)
            assert not history.late
            paused.send_signal(signal.SIGCONT)
            await callers.finish("paused")
            await callers.finish("other")
        lives.kill()

    assert sorted(history.late) == sorted(
        (what, rollout_id, attempt, "FencedError")
        for rollout_id, attempt in history.held.items()
        for what in ("append", "done")
    )
    assert all(history.done[rollout_id] > history.held[rollout_id] for rollout_id in ids)
    history.check(tmp_path / "log")
    with LogReader(tmp_path / "log") as reader:
        spans = [s for record in reader.records() if record.kind is Kind.SPANS for s in decode_spans(record.body)]
        rewards = [rollout.reward for rollout in reader.rollouts()]
    assert {s.name for s in spans} == history.in_attempt
    assert rewards == [1.0] * HELD, "the late DONEs said 0.0"
