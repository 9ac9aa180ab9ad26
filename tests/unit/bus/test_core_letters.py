"""Dead letters, looking through rollouts, and what retention lets the broker forget."""

from __future__ import annotations

import pytest

from lightning_bus import messages as m
from lightning_bus.broker import core
from lightning_bus.lifecycle import Status
from lightning_bus.log.codec import decode_event
from lightning_bus.records import Kind, Table
from tests.core_harness import Desk


@pytest.fixture
def desk() -> Desk:
    return Desk()


def fail(desk: Desk, *ids: str) -> None:
    """Submit these and let them fail."""
    desk.submit(*ids)
    desk.beat("w", len(ids))
    for rollout_id in ids:
        assert desk.say("w", m.Fail(rollout_id, 1, "boom", retryable=False)) == m.Accepted(1)
    desk.beat("w", 0)


def found(desk: Desk, **query: object) -> list[str]:
    answer = desk.say("t", m.Query(**query))  # pyright: ignore[reportArgumentType]
    assert isinstance(answer, m.Rollouts), answer
    return [rollout.submission.rollout_id for rollout in answer.rollouts]


def events(desk: Desk, rollout_id: str) -> list[tuple[str, str, int]]:
    records = [r for r in desk.log.records if r.kind is Kind.ROLLOUT and r.rollout_id == rollout_id]
    return [(decode_event(r).what, decode_event(r).status, r.attempt) for r in records]


# -- looking


def test_rollouts_are_found_by_status_and_page_by_page(desk: Desk) -> None:
    fail(desk, "r-5", "r-1")
    desk.submit("r-4", "r-2", "r-3")
    assert found(desk) == ["r-5", "r-1", "r-4", "r-2", "r-3"]
    assert found(desk, status="queued") == ["r-4", "r-2", "r-3"]
    assert found(desk, status="queued", after="r-4", limit=1) == ["r-2"]
    assert found(desk, dead=True) == ["r-5", "r-1"]
    assert found(desk, dead=True, after="r-5") == ["r-1"]
    assert found(desk, rollout_ids=["r-3", "r-1"], dead=True) == ["r-1"]
    desk.restart()
    assert found(desk, after="r-1") == ["r-4", "r-2", "r-3"]
    assert found(desk, dead=True) == ["r-5", "r-1"]


def test_a_question_about_nothing_is_refused(desk: Desk) -> None:
    assert desk.refused("t", m.Query(status="done")).code == "CallError"
    assert desk.refused("t", m.Query(after="r-9")).code == "NotFound"


# -- replaying and purging


def test_a_replay_is_a_new_rollout_and_the_old_one_tells_which(desk: Desk) -> None:
    fail(desk, "r-1")
    assert desk.say("t", m.Replay(["r-1"])) == m.Accepted(1, ["r-1.r1"])
    again, old = desk.rollout("r-1.r1"), desk.rollout("r-1")
    assert (again.status, again.attempt, again.submission.task) == (Status.QUEUED, 0, b"task of r-1")
    assert again.submission.labels == {"replay_of": "r-1"}
    assert (old.status, old.replayed_as, old.submission.task) == (Status.FAILED, "r-1.r1", b"")
    assert events(desk, "r-1")[-2:] == [("fail", "failed", 1), ("replay", "failed", 1)]
    assert found(desk, dead=True) == []


@pytest.mark.parametrize("restarted", [False, True], ids=["live", "restarted"])
def test_replaying_again_changes_nothing(desk: Desk, restarted: bool) -> None:
    fail(desk, "r-1", "r-2")
    desk.say("t", m.Replay(["r-1"]))
    if restarted:
        desk.restart()
    assert desk.say("t", m.Replay(["r-1"])) == m.Accepted(0, ["r-1.r1"])
    assert not desk.last.writes
    assert desk.say("t", m.Replay(["r-2", "r-1", "r-2"])) == m.Accepted(1, ["r-2.r1", "r-1.r1", "r-2.r1"])


def test_a_replay_may_be_replayed(desk: Desk) -> None:
    fail(desk, "r-1")
    desk.say("t", m.Replay(["r-1"]))
    desk.beat("w", 1)
    desk.say("w", m.Fail("r-1.r1", 1, "boom", retryable=False))
    assert desk.say("t", m.Replay(["r-1.r1"])) == m.Accepted(1, ["r-1.r1.r1"])


def test_a_replay_takes_an_id_that_is_free_and_fits(desk: Desk) -> None:
    long_a, long_b = "x" * 199 + "a", "x" * 199 + "b"
    desk.submit("r-1.r1")
    fail(desk, "r-1", long_a, long_b)
    answer = desk.say("t", m.Replay(["r-1", long_a, long_b]))
    assert answer == m.Accepted(3, ["r-1.r2", "x" * 197 + ".r1", "x" * 197 + ".r2"])


def test_a_key_stays_with_the_rollout_it_was_given_to(desk: Desk) -> None:
    submission = m.Submission("r-1", b"task", key="k", delay_s=0.5)
    desk.say("t", m.Submit([submission]))
    desk.beat("w", 1)
    desk.tick(1.0)
    desk.say("w", m.Fail("r-1", 1, "boom", retryable=False))
    desk.say("t", m.Replay(["r-1"]))
    assert desk.rollout("r-1.r1").submission.key == ""
    assert desk.say("t", m.Submit([submission])) == m.Accepted(0, ["r-1"])


@pytest.mark.parametrize("restarted", [False, True], ids=["live", "restarted"])
def test_a_purged_letter_is_gone_from_the_list_and_its_task_with_it(desk: Desk, restarted: bool) -> None:
    fail(desk, "r-1", "r-2")
    assert desk.say("t", m.Purge(["r-1"])) == m.Accepted(1)
    if restarted:
        desk.restart()
    assert desk.say("t", m.Purge(["r-1"])) == m.Accepted(0)
    assert not desk.last.writes
    assert found(desk, dead=True) == ["r-2"]
    assert (desk.rollout("r-1").purged, desk.rollout("r-1").submission.task) == (True, b"")
    assert events(desk, "r-1")[-1] == ("purge", "failed", 1)
    assert desk.refused("t", m.Replay(["r-1"])).code == "CallError"


def test_only_a_dead_letter_is_replayed_or_purged(desk: Desk) -> None:
    fail(desk, "r-1", "r-2")
    desk.submit("r-3")
    desk.say("t", m.Replay(["r-1"]))
    for body in (m.Replay(["r-2", "r-3"]), m.Purge(["r-2", "r-3"]), m.Purge(["r-2", "r-1"])):
        assert desk.refused("t", body).code == "CallError"
    for body in (m.Replay(["r-2", "r-9"]), m.Purge(["r-9"])):
        assert desk.refused("t", body).code == "NotFound"
    assert found(desk, dead=True) == ["r-2"]
    status = desk.say("t", m.StatusQuery())
    assert isinstance(status, m.StatusIs)
    assert status.dead == 1


def test_a_full_queue_takes_no_replays() -> None:
    desk = Desk(queued_max=1)
    fail(desk, "r-1")
    desk.submit("r-2")
    assert desk.refused("t", m.Replay(["r-1"])).code == "BusyError"


# -- forgetting


def test_what_ended_before_the_log_begins_is_forgotten(desk: Desk) -> None:
    fail(desk, "r-1")
    desk.say("t", m.Submit([m.Submission("r-2", b"", key="k")]))
    desk.beat("w", 1)
    desk.say("w", m.Done("r-2", 1))
    desk.submit("r-3")
    desk.say("t", m.Commit("c", 2))
    end_offset = desk.rollout("r-2").ended_offset
    assert desk.log.records[end_offset].rollout_id == "r-2"
    desk.forget(end_offset)
    assert list(desk.state.rollouts) == ["r-2", "r-3"]
    desk.forget(end_offset + 1)
    assert list(desk.state.rollouts) == list(desk.state.line) == ["r-3"]
    assert not (desk.state.keys or desk.state.dead)
    assert [list(desk.log.tables[t]) for t in (Table.ROLLOUTS, Table.STANDINGS)] == [[b"r-3"], [b"r-3"]]
    assert desk.say("t", m.Commit("c")) == m.CursorAt("c", 2)
    status = desk.say("t", m.StatusQuery())
    assert isinstance(status, m.StatusIs)
    assert (status.first_offset, status.dead, sum(status.rollouts.values())) == (end_offset + 1, 0, 1)
    desk.restart()
    assert list(desk.state.rollouts) == ["r-3"]


def test_a_forgotten_id_may_be_submitted_again(desk: Desk) -> None:
    fail(desk, "r-1", "r-2")
    desk.forget(desk.state.next_offset)
    desk.say("t", m.Submit([m.Submission("r-1", b"another task")]))
    desk.beat("w", 1)
    assert desk.tasks[-1][1].task == b"another task"


def test_forgetting_goes_on_where_it_stopped(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "FORGET_MAX", 2)
    fail(desk, "r-1", "r-2", "r-3")
    for left in (1, 0, 0):
        desk.forget(desk.state.next_offset)
        assert len(desk.state.rollouts) == left
    assert not desk.last.writes
