"""Roles: who may ask for what, and append to which attempt."""

from __future__ import annotations

import pytest

from lightning_bus import messages as m
from lightning_bus.broker import access
from lightning_bus.broker.access import ALLOWED, Role
from lightning_bus.errors import AccessDenied
from lightning_bus.lifecycle import Status
from lightning_bus.resources import Resource
from tests.core_harness import LEASE_S, Desk

REQUESTS: list[m.Body] = [
    m.Hello("x"), m.Submit([]), m.Heartbeat(1), m.Done("r-1", 1), m.Fail("r-1", 1, ""), m.Nack("r-1", 1),
    m.Release("r-1", 1), m.Cancel([]), m.Append([]), m.Fetch(0), m.Commit("c"), m.Put(Resource("p", 1, b"")),
    m.Get("p"), m.Watch("p"), m.StatusQuery(), m.Query(), m.Wait([]), m.Drain(), m.Replay([]), m.Purge([]),
]  # fmt: skip


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_every_request_has_a_role_that_may_make_it_and_one_that_may_not() -> None:
    for body in REQUESTS:
        may = [role for role in Role if type(body) in ALLOWED[role]]
        assert Role.ADMIN in may
        assert len(may) < len(Role) or isinstance(body, m.Hello | m.Get | m.Watch | m.StatusQuery | m.Append)


@pytest.mark.parametrize("body", REQUESTS, ids=lambda body: type(body).__name__)
def test_a_connection_without_keys_may_do_everything(body: m.Body) -> None:
    access.check("", body)


def test_a_refusal_names_role_operation_and_who_may() -> None:
    with pytest.raises(AccessDenied, match="role 'worker' may not ask for SUBMIT; these may: trainer, admin"):
        access.check("worker", m.Submit([]))
    with pytest.raises(AccessDenied, match="'visitor'"):
        access.check("visitor", m.StatusQuery())


def test_a_role_that_may_not_changes_nothing_and_is_counted(desk: Desk) -> None:
    desk.submit("r-1")
    desk.role = "worker"
    assert desk.refused("w", m.Cancel(["r-1"])).code == "AccessDenied"
    assert desk.refused("w", m.Done("r-9", 1)).code == "NotFound"
    status = desk.say("w", m.StatusQuery())
    assert isinstance(status, m.StatusIs)
    assert status.refused == {"AccessDenied": 1, "NotFound": 1}


def append(desk: Desk, peer: str, epoch: int, *parts: tuple[str, int], seq: int = 1) -> m.Body:
    return desk.append(peer, epoch, seq, *((rollout_id, attempt, b"spans") for rollout_id, attempt in parts))


def test_an_agent_appends_to_the_attempt_of_its_token_only(desk: Desk) -> None:
    desk.leased("r-1")
    desk.leased("r-2")
    token = desk.tasks[0][1].token
    desk.role = "agent"
    epoch = desk.hello("a", token=token).epoch
    assert isinstance(append(desk, "a", epoch, ("r-1", 1)), m.Acked)
    for part in (("r-2", 1), ("r-1", 2), ("", 0)):
        answer = append(desk, "a", epoch, ("r-1", 1), part, seq=2)
        assert isinstance(answer, m.Error)
        assert answer.code == "AccessDenied"
        assert not desk.last.writes  # its good half included
    desk.restart()  # the token is remembered: the agent does not say HELLO again
    assert isinstance(append(desk, "a", epoch, ("r-1", 1), seq=2), m.Acked)
    desk.role = ""
    desk.say("w", m.Done("r-1", 1))
    desk.role = "agent"
    late = append(desk, "a", epoch, ("r-1", 1), seq=3)
    assert isinstance(late, m.Acked)
    assert late.fenced == [0]  # its own, but late: that is no offence


def test_an_agent_without_a_token_appends_nothing(desk: Desk) -> None:
    desk.leased("r-1")
    desk.role = "agent"
    epoch = desk.hello("a").epoch
    for part in (("r-1", 1), ("", 0)):
        answer = append(desk, "a", epoch, part)
        assert isinstance(answer, m.Error)
        assert answer.code == "AccessDenied"


@pytest.mark.parametrize("token", ["nonsense", "a.b", "x" * 100])
def test_a_token_that_nobody_minted_is_refused(desk: Desk, token: str) -> None:
    assert desk.refused("a", m.Hello("agent", token=token)).code == "AccessDenied"


def test_a_worker_appends_to_what_it_holds_and_is_fenced_where_it_is_late(desk: Desk) -> None:
    desk.leased("r-1", "w")
    desk.leased("r-2", "v")
    desk.role = "worker"
    epoch = desk.hello("w").epoch
    assert isinstance(append(desk, "w", epoch, ("r-1", 1), ("", 0)), m.Acked)
    answer = append(desk, "w", epoch, ("r-2", 1), seq=2)
    assert isinstance(answer, m.Error)
    assert answer.code == "AccessDenied"
    desk.tick(LEASE_S)
    desk.beat("v", 2)
    assert desk.state.rollouts["r-1"].attempt == 2
    late = append(desk, "w", epoch, ("r-1", 1), seq=2)
    assert isinstance(late, m.Acked)
    assert late.fenced == [0]


def test_a_trainer_appends_what_belongs_to_no_rollout(desk: Desk) -> None:
    desk.leased("r-1")
    desk.role = "trainer"
    epoch = desk.hello("t").epoch
    assert isinstance(append(desk, "t", epoch, ("", 0)), m.Acked)
    answer = append(desk, "t", epoch, ("r-1", 1), seq=2)
    assert isinstance(answer, m.Error)
    assert "belongs to no rollout" in answer.message


@pytest.mark.parametrize("role", ["gateway", "admin"])
def test_the_gateway_appends_to_every_attempt(desk: Desk, role: str) -> None:
    desk.leased("r-1")
    desk.role = role
    assert isinstance(append(desk, "g", desk.hello("g").epoch, ("r-1", 1)), m.Acked)


# -- a key is revoked


def test_what_a_dropped_peer_holds_goes_to_others_at_once(desk: Desk) -> None:
    desk.leased("r-1", "w")
    desk.beat("v", 1)
    desk.drop_peer("w")
    worker, task = desk.tasks[-1]
    assert (worker, task.rollout_id, task.attempt) == ("v", "r-1", 2)
    assert "revoked" in desk.rollout().error
    desk.submit("r-2")
    assert desk.rollout("r-2").status is Status.QUEUED  # nothing more for w


def test_a_dropped_peer_is_told_nothing_more(desk: Desk) -> None:
    desk.submit("r-1")
    desk.say("c", m.Wait(["r-1"], 60_000))
    desk.ask("c", m.Watch("p", -1, 60_000))
    desk.drop_peer("c")
    desk.say("t", m.Cancel(["r-1"]))
    assert len(desk.last.sends) == 1
    assert len(desk.ask("t", m.Put(Resource("p", 1, b"")))) == 1


def test_the_last_attempt_of_a_dropped_peer_fails_the_rollout_and_says_so_to_those_who_wait(desk: Desk) -> None:
    desk.submit("r-1", max_attempts=1)
    desk.beat("w", 1)
    desk.say("c", m.Wait(["r-1"], 60_000))
    desk.drop_peer("w")
    (send,) = desk.last.sends
    assert (send.peer, isinstance(send.body, m.Ended)) == ("c", True)
    assert desk.rollout().status is Status.FAILED
