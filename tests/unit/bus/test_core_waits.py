"""WAIT and WATCH: who is told what, when, and how often."""

from __future__ import annotations

import pytest

from lightning_bus import messages as m
from lightning_bus.broker import core, waits
from lightning_bus.lifecycle import Status
from lightning_bus.resources import Resource
from tests.core_harness import LEASE_S, Desk


@pytest.fixture
def desk() -> Desk:
    return Desk()


def told(sends: list[core.Send], peer: str = "c", request: int = 7) -> list[m.Ended]:
    return [send.body for send in sends if send[:2] == (peer, request) and isinstance(send.body, m.Ended)]


def ids(ended: m.Body) -> list[str]:
    assert isinstance(ended, m.Ended), ended
    return [end.rollout_id for end in ended.ended]


# -- rollouts


def test_what_has_ended_is_told_at_once_and_the_rest_as_it_ends(desk: Desk) -> None:
    desk.submit("r-1", "r-2", "r-3")
    desk.beat("w", 3)
    desk.say("w", m.Done("r-1", 1, 0.5))
    answer = desk.say("c", m.Wait(["r-1", "r-2", "r-3", "r-2"], 60_000))
    assert answer == m.Ended([m.End("r-1", Status.SUCCEEDED, 1, 0.5)], open=2)
    desk.say("w", m.Fail("r-2", 1, "boom", retryable=False))
    assert told(desk.last.sends) == [m.Ended([m.End("r-2", Status.FAILED, 1, None, "boom")], open=1)]
    desk.say("t", m.Cancel(["r-3"]))
    assert told(desk.last.sends) == [m.Ended([m.End("r-3", Status.CANCELLED, 1)], open=0)]
    assert len(desk.state.waits) == 0


def test_one_decision_is_told_in_one_message(desk: Desk) -> None:
    desk.submit(*(f"r-{i}" for i in range(50)))
    desk.say("c", m.Wait([f"r-{i}" for i in range(50)], 60_000))
    desk.say("t", m.Cancel([f"r-{i}" for i in range(50)]))
    (ended,) = told(desk.last.sends)
    assert (len(ended.ended), ended.open) == (50, 0)


def test_what_time_ends_is_told_too(desk: Desk) -> None:
    desk.submit("r-1", max_attempts=1)
    desk.beat("w", 1)
    desk.say("c", m.Wait(["r-1"], 60_000))
    desk.tick(LEASE_S)
    assert ids(told(desk.last.sends)[0]) == ["r-1"]


def test_an_attempt_that_is_tried_again_is_no_end(desk: Desk) -> None:
    desk.leased()
    desk.say("c", m.Wait(["r-1"], 60_000))
    desk.say("w", m.Fail("r-1", 1, "boom"))
    assert told(desk.last.sends) == []


def test_everybody_who_waits_is_told(desk: Desk) -> None:
    desk.submit("r-1")
    desk.say("c", m.Wait(["r-1"], 60_000), request=1)
    desk.say("c", m.Wait(["r-1"], 60_000), request=2)
    desk.say("d", m.Wait(["r-1"], 60_000), request=1)
    desk.say("t", m.Cancel(["r-1"]))
    assert [send[:2] for send in desk.last.sends[1:]] == [("c", 1), ("c", 2), ("d", 1)]


def test_a_wait_that_is_sent_again_takes_the_place_of_the_former(desk: Desk) -> None:
    desk.submit("r-1", "r-2")
    desk.say("c", m.Wait(["r-1", "r-2"], 60_000))
    desk.say("t", m.Cancel(["r-1"]))  # this push is lost
    answer = desk.say("c", m.Wait(["r-1", "r-2"], 60_000))
    assert (ids(answer), len(desk.state.waits)) == (["r-1"], 1)
    desk.say("c", m.Wait(["r-1"], 60_000))
    assert len(desk.state.waits) == 0
    desk.say("t", m.Cancel(["r-2"]))
    assert told(desk.last.sends) == []


@pytest.mark.parametrize(("wait_ms", "lasts_s"), [(1_000, 1.0), (10_000_000, 60.0)])
def test_a_wait_ends_by_itself(desk: Desk, wait_ms: int, lasts_s: float) -> None:
    desk.submit("r-1")
    desk.say("c", m.Wait(["r-1"], wait_ms))
    desk.tick(lasts_s - 0.1)
    assert len(desk.state.waits) == 1
    desk.tick(0.2)
    assert len(desk.state.waits) == 0
    desk.say("t", m.Cancel(["r-1"]))
    assert told(desk.last.sends) == []


def test_without_time_to_wait_it_is_a_question(desk: Desk) -> None:
    desk.submit("r-1")
    assert desk.say("c", m.Wait(["r-1"])) == m.Ended([], open=1)
    assert len(desk.state.waits) == 0


def test_an_unknown_rollout_is_not_waited_for(desk: Desk) -> None:
    desk.submit("r-1")
    assert desk.refused("c", m.Wait(["r-1", "r-9"], 1000)).code == "NotFound"
    assert len(desk.state.waits) == 0


def test_waits_are_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "WAITED_IDS_MAX", 3)
    desk.submit("r-1", "r-2", "r-3", "r-4")
    desk.say("c", m.Wait(["r-1", "r-2"], 1000))
    error = desk.refused("d", m.Wait(["r-1", "r-2"], 1000))
    assert (error.code, error.retry_after_s) == ("BusyError", 1.0)
    desk.say("c", m.Wait(["r-1", "r-2", "r-3"], 1000))  # what it had counts for it
    desk.tick(2.0)
    desk.say("d", m.Wait(["r-1", "r-2"], 1000))
    too_many = [f"r-{i}" for i in range(waits.WAIT_IDS_MAX + 1)]
    assert desk.refused("c", m.Wait(too_many, 1000)).code == "CallError"


def test_what_does_not_fit_one_message_comes_in_several(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "ENDED_BYTES_MAX", 10_000)
    desk.submit("r-1", "r-2", "r-3", max_attempts=1)
    desk.beat("w", 3)
    for rollout_id in ("r-1", "r-2", "r-3"):
        desk.say("w", m.Fail(rollout_id, 1, "x" * 2000))
    desk.say("c", m.Wait(["r-1", "r-2", "r-3"], 1000))
    bodies = told(desk.last.sends)
    assert [(ids(body), body.open) for body in bodies] == [(["r-1", "r-2"], 1), (["r-3"], 0)]
    assert bodies[0].ended[0].error.startswith("x" * waits.ERROR_CHARS_MAX)
    assert "all 2000 characters" in bodies[0].ended[0].error


# -- resources


def test_a_newer_version_is_answered_at_once(desk: Desk) -> None:
    desk.say("t", m.Put(Resource("p", 3, b"three")))
    assert desk.say("c", m.Watch("p", 2, 1000)) == m.ResourceIs(Resource("p", 3, b"three"))
    assert desk.say("c", m.Watch("p", 3)) == m.ResourceIs(None)


def test_a_watch_is_answered_when_its_version_is_published(desk: Desk) -> None:
    assert desk.ask("c", m.Watch("p", -1, 1000)) == []
    assert desk.ask("d", m.Watch("p", 1, 1000)) == []
    assert desk.ask("d", m.Watch("q", -1, 1000), request=8) == []
    sends = desk.ask("t", m.Put(Resource("p", 1, b"one")))
    assert sends[1:] == [core.Send("c", 7, m.ResourceIs(Resource("p", 1, b"one")))]
    assert len(desk.state.watches) == 2


def test_a_watch_in_vain_is_answered_with_nothing(desk: Desk) -> None:
    assert desk.ask("c", m.Watch("p", -1, 1000)) == []
    desk.tick(0.9)
    assert desk.last.sends == []
    desk.tick(0.2)
    assert desk.last.sends == [core.Send("c", 7, m.ResourceIs(None))]
    assert len(desk.state.watches) == 0


def test_an_older_version_wakes_nobody(desk: Desk) -> None:
    desk.say("t", m.Put(Resource("p", 5, b"five")))
    desk.ask("c", m.Watch("p", 5, 1000))
    assert len(desk.ask("t", m.Put(Resource("p", 4, b"four")))) == 1


def test_watches_are_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "WATCHES_MAX", 1)
    desk.ask("c", m.Watch("p", -1, 1000))
    desk.ask("c", m.Watch("p", -1, 1000))  # sent again: the same one
    assert desk.refused("d", m.Watch("p", -1, 1000)).code == "BusyError"
