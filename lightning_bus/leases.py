"""Who holds which attempt until when.

A lease is kept by heartbeats that name it and ends when they stop. Time is an argument: the table never reads a
clock, and all its times are the broker's monotonic seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Lease:
    """One attempt in the hands of one worker."""

    rollout_id: str
    attempt: int
    worker: str
    granted_s: float
    expires_s: float


@dataclass(slots=True)
class WorkerStanding:
    """A worker session as its last heartbeat described it."""

    slots: int
    seen_s: float


@dataclass(slots=True)
class LeaseTable:
    """All leases, by rollout and by worker. At most one lease a rollout."""

    lease_s: float
    leases: dict[str, Lease] = field(default_factory=dict[str, Lease])
    workers: dict[str, WorkerStanding] = field(default_factory=dict[str, WorkerStanding])
    held_by: dict[str, set[str]] = field(default_factory=dict[str, set[str]])

    def grant(self, rollout_id: str, attempt: int, worker: str, now_s: float) -> Lease:
        assert rollout_id not in self.leases
        lease = Lease(rollout_id, attempt, worker, now_s, now_s + self.lease_s)
        self.leases[rollout_id] = lease
        self.held_by.setdefault(worker, set()).add(rollout_id)
        return lease

    def end(self, rollout_id: str) -> None:
        """Forget the lease of a rollout, if there is one."""
        lease = self.leases.pop(rollout_id, None)
        if lease is not None:
            held = self.held_by[lease.worker]
            held.discard(rollout_id)
            if not held:
                del self.held_by[lease.worker]

    def holds(self, worker: str, rollout_id: str, attempt: int) -> Lease | None:
        """Return the lease if exactly this worker holds exactly this attempt."""
        lease = self.leases.get(rollout_id)
        if lease is None or lease.attempt != attempt or lease.worker != worker:
            return None
        return lease

    def beat(self, worker: str, slots: int, now_s: float) -> None:
        """Note that the worker is alive and how many attempts it can hold."""
        self.workers[worker] = WorkerStanding(slots, now_s)

    def free_slots(self, worker: str) -> int:
        standing = self.workers.get(worker)
        return 0 if standing is None else max(0, standing.slots - len(self.held_by.get(worker, ())))

    def of_worker(self, worker: str) -> list[Lease]:
        """What the worker holds, in an order that does not change from process to process: a history must replay."""
        return [self.leases[rollout_id] for rollout_id in sorted(self.held_by.get(worker, ()))]

    def expired(self, now_s: float) -> list[Lease]:
        """Leases whose time is over, oldest first."""
        return sorted(
            (lease for lease in self.leases.values() if lease.expires_s <= now_s), key=lambda lease: lease.expires_s
        )

    def forget_silent_workers(self, now_s: float) -> list[str]:
        """Drop workers not heard of for a whole lease; their leases end by themselves."""
        silent = [name for name, standing in self.workers.items() if standing.seen_s + self.lease_s <= now_s]
        for name in silent:
            del self.workers[name]
        return silent
