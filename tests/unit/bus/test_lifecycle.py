"""The table of a rollout's life."""

from __future__ import annotations

import itertools

import pytest

from lightning_bus.lifecycle import MOVES, TERMINAL, Event, IllegalMove, Status, next_status


def test_terminal_is_final() -> None:
    assert {status for status in Status if status.terminal} == TERMINAL
    for status, event in itertools.product(TERMINAL, Event):
        with pytest.raises(IllegalMove, match=f"{status.value} cannot {event.value}"):
            next_status(status, event)


def test_every_move_is_in_the_table_or_an_error() -> None:
    for status, event in itertools.product(Status, Event):
        if (status, event) in MOVES:
            assert next_status(status, event) is MOVES[status, event]
        else:
            with pytest.raises(IllegalMove):
                next_status(status, event)


def test_every_status_can_be_reached_and_every_life_can_end() -> None:
    reached = {Status.QUEUED}
    for _ in Status:
        reached |= {target for (source, _), target in MOVES.items() if source in reached}
    assert reached == set(Status)
    assert all(any(source is status for source, _ in MOVES) for status in set(Status) - TERMINAL)


def test_only_a_lease_can_succeed() -> None:
    assert [source for (source, event) in MOVES if event is Event.SUCCEED] == [Status.LEASED]
