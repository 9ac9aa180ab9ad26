"""The broker's decisions about work, one by one: submitting, leasing, ending. Here `t` submits, `w` and `v` work."""

from __future__ import annotations

import msgspec
import pytest

from lightning_bus import messages as m
from lightning_bus.broker import moves
from lightning_bus.lifecycle import Status
from lightning_bus.records import Kind, Put, Record, Table
from lightning_bus.tokens import check
from tests.core_harness import LEASE_S, SECRET, Desk, accepted


@pytest.fixture
def desk() -> Desk:
    return Desk()


# -- submitting


def test_submitting_again_changes_nothing(desk: Desk) -> None:
    submit = m.Submit([m.Submission("r-1", b"task"), m.Submission("r-2", b"task")])
    assert accepted(desk.say("t", submit)) == 2
    assert accepted(desk.say("t", submit)) == 0
    assert not desk.last.writes
    assert len(desk.log.records) == 2


def test_a_submission_named_twice_in_one_message_counts_once(desk: Desk) -> None:
    assert accepted(desk.say("t", m.Submit([m.Submission("r-1", b"task")] * 2))) == 1
    assert desk.events() == ["submit"]


def test_the_same_id_with_another_task_is_a_conflict(desk: Desk) -> None:
    desk.submit("r-1")
    error = desk.refused("t", m.Submit([m.Submission("r-2", b"x"), m.Submission("r-1", b"other")]))
    assert error.code == "Conflict"
    assert "r-1" in error.message
    assert "r-2" not in desk.state.rollouts  # a refused message changes nothing, its good half included


def test_two_tasks_under_one_id_in_one_message_are_a_conflict(desk: Desk) -> None:
    error = desk.refused("t", m.Submit([m.Submission("r-1", b"one"), m.Submission("r-1", b"two")]))
    assert error.code == "Conflict"


@pytest.mark.parametrize("rollout_id", ["", "a b", "a/b", "ä", "x" * 201, "a\0b", "a\n"])
def test_a_rollout_id_must_fit_into_a_url_and_a_key(desk: Desk, rollout_id: str) -> None:
    assert desk.refused("t", m.Submit([m.Submission(rollout_id, b"")])).code == "CallError"


def test_a_submission_that_could_not_travel_on_is_refused(desk: Desk) -> None:
    error = desk.refused("t", m.Submit([m.Submission("r-1", b"x" * m.SUBMISSION_BYTES_MAX)]))
    assert error.code == "MessageTooLarge"
    assert str(m.SUBMISSION_BYTES_MAX) in error.message


def test_the_largest_submission_reaches_a_worker(desk: Desk) -> None:
    overrides = {"stop": "x" * (m.SUBMISSION_BYTES_MAX - 100)}
    assert accepted(desk.say("t", m.Submit([m.Submission("r-1", b"", overrides=overrides)]))) == 1
    desk.beat("w", 1)  # Desk encodes every answer and every task
    assert len(desk.tasks) == 1


# -- leasing


def test_rollouts_are_leased_in_the_order_of_submission(desk: Desk) -> None:
    desk.submit("r-3", "r-1", "r-2")
    desk.beat("w", 3)
    assert [task.rollout_id for _, task in desk.tasks] == ["r-3", "r-1", "r-2"]


def test_a_worker_is_sent_no_more_than_it_has_slots_for(desk: Desk) -> None:
    desk.submit("r-1", "r-2", "r-3")
    desk.beat("w", 2)
    assert [task.rollout_id for _, task in desk.tasks] == ["r-1", "r-2"]
    desk.beat("w", 2, ("r-1", 1), ("r-2", 1))
    assert len(desk.tasks) == 2


def test_workers_take_turns(desk: Desk) -> None:
    desk.beat("w", 2)
    desk.beat("v", 2)
    desk.submit("r-1", "r-2", "r-3", "r-4")
    assert [worker for worker, _ in desk.tasks] == ["w", "v", "w", "v"]


def test_the_attempt_number_is_written_with_the_task_that_carries_it(desk: Desk) -> None:
    desk.submit("r-1")
    desk.beat("w", 1)
    (task,) = [send.body for send in desk.last.sends if isinstance(send.body, m.Task)]
    (state,) = [w for w in desk.last.writes if isinstance(w, Put)]
    assert state.table is Table.STANDINGS
    assert msgspec.msgpack.decode(state.value, type=m.Standing).attempt == task.attempt == 1


def test_a_task_carries_a_token_for_its_attempt_only(desk: Desk) -> None:
    submission = m.Submission(
        "r-1", b"task", group="g", model="policy", overrides={"temperature": 1}, labels={"a": "b"}
    )
    desk.say("t", m.Submit([submission]))
    desk.beat("w", 1)
    task = desk.tasks[0][1]
    assert (task.task, task.group, task.labels, task.lease_s) == (b"task", "g", {"a": "b"}, LEASE_S)
    claims = check(SECRET, task.token)
    assert (claims.rollout_id, claims.attempt, claims.model, claims.overrides) == (
        "r-1",
        1,
        "policy",
        {"temperature": 1},
    )


def test_heartbeats_keep_a_lease(desk: Desk) -> None:
    desk.leased()
    for _ in range(5):
        assert desk.tick(LEASE_S * 0.9) == []
        assert desk.beat("w", 1, ("r-1", 1)) == []
    assert desk.rollout().attempt == 1


def test_silence_ends_a_lease_and_the_next_attempt_goes_to_another(desk: Desk) -> None:
    desk.leased()
    assert desk.tick(LEASE_S * 0.9) == []
    desk.beat("v", 1)
    ((worker, task),) = desk.tick(LEASE_S * 0.1)
    assert (worker, task.rollout_id, task.attempt) == ("v", "r-1", 2)
    assert desk.events() == ["submit", "lease", "requeue", "lease"]


def test_a_heartbeat_that_does_not_name_a_lease_does_not_keep_it(desk: Desk) -> None:
    desk.leased()
    for _ in range(4):
        desk.beat("w", 0)
        desk.tick(LEASE_S * 0.25)
    assert desk.rollout().status is Status.QUEUED


def test_a_silent_worker_gets_no_tasks(desk: Desk) -> None:
    desk.beat("w", 1)
    desk.tick(LEASE_S)
    desk.submit("r-1")
    assert desk.tasks == []


def test_a_lost_task_is_sent_again_to_its_holder_only(desk: Desk) -> None:
    desk.leased()
    desk.now_s += LEASE_S * 0.2
    desk.beat("w", 1)  # too early: the task may still be on its way
    desk.beat("v", 1)
    assert len(desk.tasks) == 1
    desk.now_s += LEASE_S * 0.2
    desk.beat("v", 1)
    desk.beat("w", 1)
    assert [(worker, task.attempt) for worker, task in desk.tasks] == [("w", 1), ("w", 1)]
    assert not desk.last.writes  # the same attempt, so nothing new to write


def test_max_attempts_of_silence_end_in_failure(desk: Desk) -> None:
    desk.submit("r-1", max_attempts=2)
    for _ in range(2):
        desk.beat("w", 1)
        desk.tick(LEASE_S)
    rollout = desk.rollout()
    assert (rollout.status, rollout.attempt) == (Status.FAILED, 2)
    assert "silent for 10 s" in rollout.error


# -- ending


def test_done_ends_a_rollout_with_its_last_spans_in_one_transaction(desk: Desk) -> None:
    desk.leased()
    assert accepted(desk.say("w", m.Done("r-1", 1, 0.5), [b"spans"], count=3)) == 1
    records = [write for write in desk.last.writes if isinstance(write, Record)]
    assert [record.kind for record in records] == [Kind.SPANS, Kind.ROLLOUT]
    assert (records[0].body, records[0].span_count, records[0].attempt) == (b"spans", 3, 1)
    rollout = desk.rollout()
    assert (rollout.status, rollout.reward) == (Status.SUCCEEDED, 0.5)


def test_a_result_carries_one_chunk_of_last_spans(desk: Desk) -> None:
    desk.leased()
    assert desk.refused("w", m.Done("r-1", 1), [b"one", b"two"], count=1).code == "RemoteProtocolError"


def test_done_sent_again_is_accepted_and_recorded_once(desk: Desk) -> None:
    desk.leased()
    desk.say("w", m.Done("r-1", 1, 0.5), [b"spans"], count=1)
    assert accepted(desk.say("w", m.Done("r-1", 1, 0.5), [b"spans"], count=1)) == 0
    assert not desk.last.writes
    assert desk.bodies() == [b"spans"]


def test_a_done_frees_the_slot_for_the_next_task(desk: Desk) -> None:
    desk.submit("r-1", "r-2")
    desk.beat("w", 1)
    desk.say("w", m.Done("r-1", 1))
    assert [task.rollout_id for _, task in desk.tasks] == ["r-1", "r-2"]


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_that_is_not_finite_is_refused(desk: Desk, reward: float) -> None:
    desk.leased()
    assert desk.refused("w", m.Done("r-1", 1, reward), [b"spans"], count=1).code == "CallError"
    assert accepted(desk.say("w", m.Done("r-1", 1, None))) == 1


LATE = [m.Done("r-1", 1, 1.0), m.Fail("r-1", 1, "boom"), m.Fail("r-1", 1, "boom", retryable=False)]


@pytest.mark.parametrize("late", LATE, ids=["done", "fail", "final fail"])
@pytest.mark.parametrize("taken", [True, False], ids=["leased again", "still queued"])
def test_what_comes_after_the_lease_is_fenced_and_not_recorded(desk: Desk, late: m.Body, taken: bool) -> None:
    desk.leased()
    desk.tick(LEASE_S)
    if taken:
        desk.beat("v", 1)
    error = desk.refused("w", late, [b"spans"], count=1)
    assert error.code == "FencedError"
    assert "r-1 attempt 1" in error.message
    assert desk.state.fenced == 1
    if taken:
        assert accepted(desk.say("v", m.Done("r-1", 2, 1.0))) == 1


@pytest.mark.parametrize("late", LATE, ids=["done", "fail", "final fail"])
def test_what_comes_after_the_last_lease_is_fenced_too(desk: Desk, late: m.Body) -> None:
    desk.submit("r-1", max_attempts=1)
    desk.beat("w", 1)
    desk.tick(LEASE_S)
    assert desk.refused("w", late, [b"spans"], count=1).code == "FencedError"


def test_another_worker_cannot_end_an_attempt(desk: Desk) -> None:
    desk.leased()
    assert desk.refused("v", m.Done("r-1", 1)).code == "FencedError"


def test_a_result_for_an_unknown_rollout_is_refused(desk: Desk) -> None:
    assert desk.refused("w", m.Done("r-9", 1)).code == "NotFound"
    assert desk.refused("w", m.Cancel(["r-9"])).code == "NotFound"


def test_a_retryable_failure_waits_longer_each_time(desk: Desk) -> None:
    desk.submit("r-1", max_attempts=9)
    waits: list[float] = []
    for attempt in range(1, 9):
        desk.beat("w", 1)
        assert desk.tasks[-1][1].attempt == attempt
        assert accepted(desk.say("w", m.Fail("r-1", attempt, "boom"))) == 1
        waits.append((desk.state.delayed.at_s("r-1") or 0.0) - desk.now_s)
        desk.tick(waits[-1] * 0.99)
        desk.beat("w", 1)
        assert desk.rollout().status is Status.QUEUED  # not before its time
        desk.tick(waits[-1] * 0.02)
    usual = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert all(0.75 <= wait / wait_usual <= 1.25 for wait, wait_usual in zip(waits, usual, strict=True))


def test_thousands_of_attempts_do_not_overflow_the_wait(desk: Desk) -> None:
    desk.submit("r-1", max_attempts=5000)
    desk.state.rollouts["r-1"].attempt = 4000
    desk.beat("w", 1)
    assert accepted(desk.say("w", m.Fail("r-1", 4001, "boom"))) == 1


def test_a_failure_that_is_final_is_not_tried_again(desk: Desk) -> None:
    desk.leased()
    desk.say("w", m.Fail("r-1", 1, "no such agent", retryable=False), [b"spans"], count=1)
    rollout = desk.rollout()
    assert (rollout.status, rollout.error, rollout.reward) == (Status.FAILED, "no such agent", None)
    assert desk.bodies() == [b"spans"]


def test_a_failure_sent_again_is_accepted_once(desk: Desk) -> None:
    desk.leased()
    assert accepted(desk.say("w", m.Fail("r-1", 1, "boom"), [b"spans"], count=1)) == 1
    assert accepted(desk.say("w", m.Fail("r-1", 1, "boom"), [b"spans"], count=1)) == 0
    assert desk.bodies() == [b"spans"]


def test_attempts_run_out(desk: Desk) -> None:
    desk.submit("r-1")
    for attempt in range(1, 4):
        desk.tick(60)
        desk.beat("w", 1)
        desk.say("w", m.Fail("r-1", attempt, f"boom {attempt}"))
    rollout = desk.rollout()
    assert (rollout.status, rollout.attempt, rollout.error) == (Status.FAILED, 3, "boom 3")


def test_a_long_traceback_loses_its_middle_and_says_so(desk: Desk) -> None:
    desk.leased()
    desk.say("w", m.Fail("r-1", 1, "a" * 20_000 + "z" * 20_000))
    error = desk.rollout().error
    assert error.startswith("a" * 8192 + "\n")
    assert error.endswith("\n" + "z" * 8192)
    assert f"{40_000 - moves.ERROR_CHARS_MAX} characters cut" in error


def test_the_loser_learns_of_a_cancel_at_its_next_heartbeat(desk: Desk) -> None:
    desk.leased("r-1")
    desk.submit("r-2")
    assert accepted(desk.say("t", m.Cancel(["r-1", "r-2"]))) == 2
    assert accepted(desk.say("t", m.Cancel(["r-1", "r-2"]))) == 0
    assert desk.beat("w", 1, ("r-1", 1)) == [("r-1", 1)]
    assert desk.refused("w", m.Done("r-1", 1)).code == "FencedError"
    assert desk.tick(60) == []
    assert [desk.rollout(i).status for i in ("r-1", "r-2")] == [Status.CANCELLED] * 2


# -- after a restart


def test_a_restarted_broker_gives_holders_a_whole_lease_to_come_back(desk: Desk) -> None:
    desk.leased()
    desk.now_s += LEASE_S * 0.9
    desk.restart()
    assert desk.tick(LEASE_S * 0.9) == []
    assert desk.beat("w", 1, ("r-1", 1)) == []
    assert accepted(desk.say("w", m.Done("r-1", 1, 1.0))) == 1


def test_a_result_sent_again_after_a_restart_is_accepted_once(desk: Desk) -> None:
    desk.leased()
    desk.say("w", m.Done("r-1", 1, 1.0), [b"spans"], count=1)
    desk.restart()
    assert accepted(desk.say("w", m.Done("r-1", 1, 1.0), [b"spans"], count=1)) == 0
    assert desk.bodies() == [b"spans"]


def test_the_line_keeps_its_order_through_a_restart(desk: Desk) -> None:
    desk.submit("r-2", "r-1")
    desk.restart()
    desk.submit("r-0")
    desk.beat("w", 3)
    assert [task.rollout_id for _, task in desk.tasks] == ["r-2", "r-1", "r-0"]
