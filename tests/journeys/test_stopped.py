"""A run that is stopped or cut off goes on where it was, and nothing of it stays behind meanwhile."""

from __future__ import annotations

import signal

import pytest

from tests.journeys.ring import Ring, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STAGES = ("broker", "gateway", "serve", "worker", "train")


def test_a_run_stopped_by_ctrl_c_goes_on_and_ends(ring: Ring) -> None:
    ring.endless()
    ring.start()
    ring.wait_step(2)
    ring.signal(signal.SIGINT)
    assert ring.wait() == 130
    assert not ring.pids()
    assert "Traceback" not in ring.said()
    assert "go on with: lightning-bus up runs/mini" in ring.said()
    assert not (ring.run_dir / "summary.json").exists()
    ring.start("runs/mini")
    ring.wait_steps(2)
    ring.end()


@pytest.mark.crash
def test_a_run_whose_supervisor_was_killed_leaves_nothing_behind_and_goes_on(ring: Ring) -> None:
    ring.endless()
    ring.start()
    ring.wait_step(1)
    assert {stage for stage in STAGES if ring.pids(stage)} == set(STAGES)
    ring.signal(signal.SIGKILL)
    ring.wait()
    wait_until(lambda: not ring.pids(), "the daemons to end")
    ring.start("runs/mini")
    ring.wait_steps(2)
    ring.end()
