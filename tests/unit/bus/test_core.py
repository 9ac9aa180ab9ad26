"""The broker's decisions about what it keeps and says: appending, resources, cursors, answers."""

from __future__ import annotations

import pytest

from lightning_bus import messages as m
from lightning_bus.lifecycle import Status
from lightning_bus.resources import Resource
from tests.core_harness import Desk, accepted


@pytest.fixture
def desk() -> Desk:
    return Desk()


# -- appending


def test_a_batch_sent_twice_is_appended_once(desk: Desk) -> None:
    epoch = desk.hello("g").epoch
    first = desk.append("g", epoch, 1, ("", 0, b"one"))
    again = desk.append("g", epoch, 1, ("", 0, b"one"))
    assert isinstance(first, m.Acked)
    assert isinstance(again, m.Acked)
    assert (first.duplicate, again.duplicate) == (False, True)
    assert not desk.last.writes
    assert desk.bodies() == [b"one"]


def test_a_resend_gets_the_verdict_of_the_first(desk: Desk) -> None:
    epoch = desk.hello("g").epoch
    desk.leased()
    first = desk.append("g", epoch, 1, ("r-1", 1, b"kept"), ("r-1", 2, b"no such attempt"), ("r-9", 1, b"unknown"))
    assert isinstance(first, m.Acked)
    assert first.fenced == [1, 2]
    desk.restart()
    again = desk.append("g", epoch, 1, ("r-1", 1, b"kept"), ("r-1", 2, b"no such attempt"), ("r-9", 1, b"unknown"))
    assert isinstance(again, m.Acked)
    assert (again.fenced, again.duplicate) == ([1, 2], True)
    assert desk.bodies() == [b"kept"]


def test_spans_of_an_attempt_that_is_over_are_fenced(desk: Desk) -> None:
    epoch = desk.hello("g").epoch
    desk.leased()
    desk.say("w", m.Done("r-1", 1))
    answer = desk.append("g", epoch, 1, ("r-1", 1, b"late"))
    assert isinstance(answer, m.Acked)
    assert answer.fenced == [0]
    assert b"late" not in desk.bodies()


@pytest.mark.parametrize("seq", [0, 1, 2])
def test_a_batch_that_no_window_holds_is_refused_and_the_turn_is_named(desk: Desk, seq: int) -> None:
    epoch = desk.hello("g").epoch
    for number in range(1, 3 + m.APPEND_BATCHES_MAX):
        desk.append("g", epoch, number, ("", 0, b"x"))
    error = desk.refused("g", m.Append([m.Part("", 0, 1)]), [b"y"], epoch=epoch, seq=seq)
    assert error.code == "RemoteProtocolError"
    assert "comes" in error.message


def test_the_successor_of_a_producer_fences_it(desk: Desk) -> None:
    old = desk.hello("g", nonce=b"first").epoch
    desk.append("g", old, 1, ("", 0, b"one"))
    new = desk.hello("g", nonce=b"second")
    assert (new.epoch, new.seq_last) == (old + 1, 0)
    assert desk.refused("g", m.Append([m.Part("", 0, 1)]), [b"zombie"], epoch=old, seq=2).code == "FencedError"
    assert desk.refused("g", m.Hello("test", old)).code == "FencedError"
    desk.append("g", new.epoch, 1, ("", 0, b"two"))
    assert desk.bodies() == [b"one", b"two"]


def test_a_hello_that_is_sent_again_does_not_fence_its_sender(desk: Desk) -> None:
    first = desk.hello("g", nonce=b"n")
    assert desk.hello("g", nonce=b"n") == first
    desk.append("g", first.epoch, 1, ("", 0, b"one"))
    assert desk.hello("g", nonce=b"n").epoch == first.epoch
    assert not desk.last.writes


def test_a_producer_that_comes_back_learns_where_it_was(desk: Desk) -> None:
    epoch = desk.hello("g").epoch
    desk.append("g", epoch, 1, ("", 0, b"one"))
    desk.restart()
    welcome = desk.hello("g", epoch=epoch)
    assert (welcome.epoch, welcome.seq_last) == (epoch, 1)


def test_appending_before_hello_is_refused(desk: Desk) -> None:
    assert desk.refused("g", m.Append([m.Part("", 0, 1)]), [b"x"], epoch=1, seq=1).code == "RemoteProtocolError"


def test_parts_and_blobs_must_match(desk: Desk) -> None:
    epoch = desk.hello("g").epoch
    assert desk.refused("g", m.Append([m.Part("", 0, 1)]), [], epoch=epoch, seq=1).code == "RemoteProtocolError"


def test_a_record_that_no_reader_could_fetch_is_refused(desk: Desk) -> None:
    epoch = desk.hello("g").epoch
    blob = b"x" * (m.BLOB_BYTES_MAX + 1)
    assert desk.refused("g", m.Append([m.Part("", 0, 1)]), [blob], epoch=epoch, seq=1).code == "MessageTooLarge"
    assert desk.refused("g", m.Put(Resource("p", 1, blob))).code == "MessageTooLarge"
    desk.leased()
    assert desk.refused("w", m.Done("r-1", 1), [blob]).code == "MessageTooLarge"
    assert desk.refused("w", m.Fail("r-1", 1, "boom"), [blob]).code == "MessageTooLarge"


# -- resources and cursors


def test_a_published_version_never_changes(desk: Desk) -> None:
    assert accepted(desk.say("t", m.Put(Resource("p", 1, b"one")))) == 1
    assert accepted(desk.say("t", m.Put(Resource("p", 1, b"one")))) == 0
    assert desk.refused("t", m.Put(Resource("p", 1, b"two"))).code == "Conflict"
    assert desk.say("t", m.Get("p", 1)) == m.ResourceIs(Resource("p", 1, b"one"))


def test_the_newest_version_is_the_default(desk: Desk) -> None:
    for version in (10, 9, 2):
        desk.say("t", m.Put(Resource("p", version, b"%d" % version)))
    assert desk.say("t", m.Get("p")) == m.ResourceIs(Resource("p", 10, b"10"))
    assert desk.say("t", m.Get("p", 3)) == m.ResourceIs(None)
    assert desk.say("t", m.Get("q")) == m.ResourceIs(None)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 401])
def test_names_that_no_key_could_hold_are_refused(desk: Desk, name: str) -> None:
    assert desk.refused("t", m.Put(Resource(name, 1, b""))).code == "CallError"
    assert desk.refused("t", m.Commit(name, None)).code == "CallError"
    assert desk.refused(name, m.StatusQuery()).code == "CallError"


def test_a_version_below_zero_is_refused(desk: Desk) -> None:
    assert desk.refused("t", m.Put(Resource("p", -1, b""))).code == "CallError"


def test_a_cursor_never_goes_back_and_never_leaves_the_log(desk: Desk) -> None:
    desk.submit("r-1", "r-2", "r-3")
    assert desk.say("t", m.Commit("c")) == m.CursorAt("c", 0)
    assert desk.say("t", m.Commit("c", 2)) == m.CursorAt("c", 2)
    assert desk.say("t", m.Commit("c", 2)) == m.CursorAt("c", 2)
    assert not desk.last.writes
    assert desk.refused("t", m.Commit("c", 1)).code == "CallError"
    assert desk.refused("t", m.Commit("c", 4)).code == "CallError"
    desk.restart()
    assert desk.say("t", m.Commit("c")) == m.CursorAt("c", 2)


# -- talking


def test_nobody_speaks_for_another(desk: Desk) -> None:
    answer = desk.say("w", m.StatusQuery(), as_="v")
    assert isinstance(answer, m.Error)
    assert answer.code == "RemoteProtocolError"


def test_answers_are_not_questions(desk: Desk) -> None:
    assert desk.refused("w", m.Accepted(1)).code == "RemoteProtocolError"


def test_status_counts_what_is_there(desk: Desk) -> None:
    desk.submit("r-1", "r-2", "r-3", "r-4")
    desk.beat("w", 2)
    desk.beat("v", 1)
    desk.say("w", m.Done("r-1", 1))
    status = desk.say("t", m.StatusQuery())
    assert isinstance(status, m.StatusIs)
    assert status.rollouts == {"queued": 0, "leased": 3, "succeeded": 1, "failed": 0, "cancelled": 0}
    assert (status.workers, status.slots, status.held) == (2, 3, 3)
    assert status.next_offset == len(desk.log.records)


def test_an_answer_does_not_show_what_was_decided_after_it(desk: Desk) -> None:
    desk.leased()
    answer = desk.rollout()
    desk.say("w", m.Done("r-1", 1, 1.0))  # decided, but perhaps not yet durable when the answer above is sent
    assert answer.status is Status.LEASED


def test_a_query_returns_what_it_knows_up_to_its_limit(desk: Desk) -> None:
    desk.submit("r-1", "r-2", "r-3")
    every = desk.say("t", m.Query())
    some = desk.say("t", m.Query(["r-3", "r-9", "r-1"]))
    first = desk.say("t", m.Query(limit=2))
    assert [[r.submission.rollout_id for r in answer.rollouts] for answer in (every, some, first)] == [  # pyright: ignore
        ["r-1", "r-2", "r-3"], ["r-3", "r-1"], ["r-1", "r-2"],
    ]  # fmt: skip
