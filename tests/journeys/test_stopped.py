"""A run that is stopped or cut off goes on where it was, and nothing of it stays behind meanwhile."""

from __future__ import annotations

import signal

import pytest

from tests.journeys.ring import Ring, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def test_a_run_stopped_by_ctrl_c_goes_on_and_ends(ring: Ring) -> None:
    ring.table["train"]["rl"]["steps_max"] = 8
    ring.start()
    ring.wait_step(2)
    ring.signal(signal.SIGINT)
    assert ring.wait() == 130
    assert not ring.pids()
    assert "Traceback" not in ring.said()
    steps_before = len(ring.metrics("rl"))
    assert steps_before < 8
    assert not (ring.run_dir / "summary.json").exists()
    ring.start("runs/mini")
    assert ring.wait() == 0, ring.said()
    ring.assert_complete(steps=8)


@pytest.mark.crash
def test_a_run_whose_supervisor_was_killed_leaves_nothing_behind_and_goes_on(ring: Ring) -> None:
    ring.table["train"]["rl"]["steps_max"] = 6
    ring.start()
    ring.wait_step(1)
    assert {"broker", "gateway", "serve", "worker", "train"} == {stage for stage in STAGES if ring.pids(stage)}
    ring.signal(signal.SIGKILL)
    ring.wait()
    wait_until(lambda: not ring.pids(), "the daemons to end", limit_s=30.0)
    ring.start("runs/mini")
    assert ring.wait() == 0, ring.said()
    ring.assert_complete(steps=6)


STAGES = ("broker", "gateway", "serve", "worker", "train")
