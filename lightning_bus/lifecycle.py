"""The life of a rollout, as a table.

    QUEUED ──lease──► LEASED ──succeed──► SUCCEEDED
      │  ▲               │ ├────fail────► FAILED
      │  └──requeue──────┘ └───cancel───► CANCELLED
      │     nack, release
      └──cancel──► CANCELLED

Two rules hold everywhere. Terminal is final: no event leads out of SUCCEEDED, FAILED or CANCELLED. And an event
belongs to an attempt: whoever does not hold the newest attempt is told so and changes nothing. A move that is not
in the table is not a special case but an error: `IllegalMove`.
"""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """Where a rollout stands."""

    QUEUED = "queued"
    LEASED = "leased"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in TERMINAL


class Event(StrEnum):
    """What can happen to a rollout after it was submitted."""

    LEASE = "lease"  # a worker takes it: attempt n + 1 begins
    REQUEUE = "requeue"  # its lease ran out or its agent failed in a way that may pass
    NACK = "nack"  # its worker said: not now
    RELEASE = "release"  # its worker hands it back as if it had not begun
    SUCCEED = "succeed"  # the agent returned
    FAIL = "fail"  # no attempt is left, or the failure is final
    CANCEL = "cancel"  # nobody wants it any more


TERMINAL = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELLED})

MOVES: dict[tuple[Status, Event], Status] = {
    (Status.QUEUED, Event.LEASE): Status.LEASED,
    (Status.QUEUED, Event.CANCEL): Status.CANCELLED,
    (Status.LEASED, Event.REQUEUE): Status.QUEUED,
    (Status.LEASED, Event.NACK): Status.QUEUED,
    (Status.LEASED, Event.RELEASE): Status.QUEUED,
    (Status.LEASED, Event.SUCCEED): Status.SUCCEEDED,
    (Status.LEASED, Event.FAIL): Status.FAILED,
    (Status.LEASED, Event.CANCEL): Status.CANCELLED,
}


class IllegalMove(ValueError):
    """The event cannot happen in that status."""


def next_status(status: Status, event: Event) -> Status:
    """Return where `event` leads from `status`. Raises IllegalMove when the table has no such move."""
    try:
        return MOVES[status, event]
    except KeyError:
        raise IllegalMove(f"a rollout that is {status.value} cannot {event.value}") from None
