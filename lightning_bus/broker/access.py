"""Who may do what: the role that a key carries, against the operation asked for.

A connection without keys has the role "": loopback, ipc, or a network that is trusted. It may do everything. What a
role may append is decided where batches are taken (`producers`), for it depends on who holds which attempt.
"""

from __future__ import annotations

from enum import StrEnum

from lightning_bus import messages as m
from lightning_bus.errors import AccessDenied


class Role(StrEnum):
    """What a key is for."""

    WORKER = "worker"  # runs agents: leases, results, spans of what it holds
    AGENT = "agent"  # appends to the one attempt that its token names
    GATEWAY = "gateway"  # records model calls of every attempt
    TRAINER = "trainer"  # submits, reads, publishes
    ADMIN = "admin"  # everything


_ALL: frozenset[type[m.Body]] = frozenset({m.Hello, m.Get, m.Watch, m.StatusQuery})

ALLOWED: dict[Role, frozenset[type[m.Body]]] = {
    Role.WORKER: _ALL | {m.Heartbeat, m.Done, m.Fail, m.Nack, m.Release, m.Append},
    Role.AGENT: _ALL | {m.Append},
    Role.GATEWAY: _ALL | {m.Append},
    Role.TRAINER: _ALL
    | {m.Submit, m.Cancel, m.Wait, m.Query, m.Fetch, m.Commit, m.Put, m.Append, m.Replay},
    Role.ADMIN: frozenset(m.BODIES.values()),
}  # fmt: skip

_NAMES = {kind: op.name for op, kind in m.BODIES.items()}


def check(role: str, body: m.Body) -> None:
    """Raise AccessDenied unless the role may ask for this. It names the role, the operation and who may."""
    kind = type(body)
    if not role or kind in ALLOWED.get(role, ()):  # type: ignore[call-overload]
        return
    may = ", ".join(other for other, kinds in ALLOWED.items() if kind in kinds)
    raise AccessDenied(
        f"a key of role {role!r} may not ask for {_NAMES.get(kind, kind.__name__)}; these may: {may}. "
        "Use a key of one of those roles."
    )
