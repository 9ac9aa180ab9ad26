"""Who holds what until when; the clock is a number."""

from __future__ import annotations

import pytest

from lightning_bus.leases import LeaseTable


@pytest.fixture
def table() -> LeaseTable:
    return LeaseTable(10.0)


def test_a_lease_ends_exactly_when_its_time_is_over(table: LeaseTable) -> None:
    lease = table.grant("r-1", 1, "w", 100.0)
    assert table.expired(109.999) == []
    assert table.expired(110.0) == [lease]


def test_the_oldest_lease_expires_first(table: LeaseTable) -> None:
    for number, now_s in ((3, 102.0), (1, 100.0), (2, 101.0)):
        table.grant(f"r-{number}", 1, "w", now_s)
    assert [lease.rollout_id for lease in table.expired(200.0)] == ["r-1", "r-2", "r-3"]


def test_a_rollout_has_at_most_one_lease(table: LeaseTable) -> None:
    table.grant("r-1", 1, "w", 0.0)
    with pytest.raises(AssertionError):
        table.grant("r-1", 2, "v", 0.0)


def test_only_the_holder_of_the_attempt_holds_it(table: LeaseTable) -> None:
    lease = table.grant("r-1", 2, "w", 0.0)
    assert table.holds("w", "r-1", 2) is lease
    assert table.holds("v", "r-1", 2) is None
    assert table.holds("w", "r-1", 1) is None
    assert table.holds("w", "r-2", 2) is None
    table.end("r-1")
    table.end("r-1")
    assert table.holds("w", "r-1", 2) is None


def test_slots_are_what_the_last_heartbeat_said_less_what_is_held(table: LeaseTable) -> None:
    assert table.free_slots("w") == 0
    table.beat("w", 2, 0.0)
    table.grant("r-1", 1, "w", 0.0)
    assert table.free_slots("w") == 1
    table.beat("w", 0, 1.0)
    assert table.free_slots("w") == 0
    assert [lease.rollout_id for lease in table.of_worker("w")] == ["r-1"]


def test_a_silent_worker_is_forgotten_and_its_leases_end_by_themselves(table: LeaseTable) -> None:
    table.beat("w", 1, 0.0)
    table.beat("v", 1, 5.0)
    table.grant("r-1", 1, "w", 4.0)
    assert table.forget_silent_workers(10.0) == ["w"]
    assert table.forget_silent_workers(10.0) == []
    assert [lease.rollout_id for lease in table.expired(14.0)] == ["r-1"]
    table.end("r-1")
    table.beat("w", 1, 20.0)
    assert table.free_slots("w") == 1


def test_a_lease_may_be_shorter_than_the_table_s_own_and_a_beat_makes_it_as_long_again(table: LeaseTable) -> None:
    long, short = table.grant("r-1", 1, "w", 0.0), table.grant("r-2", 1, "w", 0.0, lease_s=1.0)
    assert table.expired(1.0) == [short]
    short.expires_s = 1.0 + short.lease_s
    assert table.expired(1.9) == []
    assert table.expired(2.0) == [short]
    table.end("r-2")
    assert table.expired(9.9) == []
    assert table.expired(10.0) == [long]


def test_beats_do_not_prolong_an_attempt_beyond_its_timeout(table: LeaseTable) -> None:
    lease = table.grant("r-1", 1, "w", 0.0, timeout_s=15.0)
    lease.expires_s = 100.0
    assert table.expired(14.9) == []
    assert table.expired(15.0) == [lease]


def test_a_lease_that_was_found_over_is_found_again_until_it_is_ended(table: LeaseTable) -> None:
    lease = table.grant("r-1", 1, "w", 0.0)
    assert table.expired(10.0) == [lease]
    assert table.expired(10.0) == [lease]
    table.end("r-1")
    assert table.expired(10.0) == []


def test_workers_with_room_take_turns(table: LeaseTable) -> None:
    table.beat("w", 2, 0.0)
    table.beat("v", 1, 0.0)
    assert list(table.open) == ["w", "v"]
    table.grant("r-1", 1, "w", 0.0)
    assert list(table.open) == ["v", "w"]
    table.grant("r-2", 1, "v", 0.0)
    assert list(table.open) == ["w"]
    table.end("r-2")
    assert list(table.open) == ["w", "v"]
    table.beat("w", 1, 1.0)
    table.forget_worker("v")
    assert list(table.open) == []


def test_room_is_what_tasks_may_weigh_less_what_they_weigh(table: LeaseTable) -> None:
    table.beat("w", 9, 0.0, task_bytes_max=100)
    assert table.has_room("w", 1000)  # to one who holds nothing any task may go
    table.grant("r-1", 1, "w", 0.0, task_bytes=60)
    assert table.has_room("w", 40)
    assert not table.has_room("w", 41)
    table.end("r-1")
    assert table.has_room("w", 1000)
    assert not table.held_bytes


def test_workers_that_left_leave_nothing_behind(table: LeaseTable) -> None:
    for number in range(100):
        table.beat(f"w-{number}", 1, 0.0)
        table.grant(f"r-{number}", 1, f"w-{number}", 0.0)
    table.forget_silent_workers(10.0)
    for number in range(100):
        table.end(f"r-{number}")
    assert not table.workers
    assert not table.leases
    assert not table.held_by
    assert not table.held_bytes
    assert not table.open
