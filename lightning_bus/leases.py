"""Who holds which attempt until when, and who has room for more.

A lease is kept by heartbeats that name it and ends when they stop, or when the attempt has taken longer than it may.
Time is an argument: the table never reads a clock, and all its times are the broker's monotonic seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(slots=True)
class Lease:
    """One attempt in the hands of one worker."""

    rollout_id: str
    attempt: int
    worker: str
    granted_s: float
    expires_s: float
    lease_s: float  # silence that ends it
    ends_s: float  # the attempt may not take longer, beats or none; inf: it may
    task_bytes: int

    @property
    def due_s(self) -> float:
        return min(self.expires_s, self.ends_s)


@dataclass(slots=True)
class WorkerStanding:
    """A worker session as its last heartbeat described it."""

    slots: int
    seen_s: float
    task_bytes_max: int = 0  # 0: no limit


@dataclass(slots=True)
class LeaseTable:
    """All leases, by rollout and by worker. At most one lease a rollout."""

    lease_s: float
    leases: dict[str, Lease] = field(default_factory=dict[str, Lease])
    workers: dict[str, WorkerStanding] = field(default_factory=dict[str, WorkerStanding])
    held_by: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    held_bytes: dict[str, int] = field(default_factory=dict[str, int])  # by worker, of tasks
    open: dict[str, None] = field(default_factory=dict[str, None])  # workers with a free slot, in turn
    _next_due_s: float = math.inf  # no lease is due before

    def grant(
        self, rollout_id: str, attempt: int, worker: str, now_s: float, *, lease_s: float = 0.0, timeout_s: float = 0.0,
        task_bytes: int = 0,
    ) -> Lease:  # fmt: skip
        """Note who holds the attempt from now on. 0 stands for the table's own lease_s, and for no timeout."""
        assert rollout_id not in self.leases
        lease_s = lease_s or self.lease_s
        ends_s = now_s + timeout_s if timeout_s else math.inf
        lease = Lease(rollout_id, attempt, worker, now_s, now_s + lease_s, lease_s, ends_s, task_bytes)
        self.leases[rollout_id] = lease
        held = self.held_by.get(worker)
        if held is None:
            held = self.held_by[worker] = set()
        held.add(rollout_id)
        self.held_bytes[worker] = self.held_bytes.get(worker, 0) + task_bytes
        # Not below the truth, so that the scan in `expired` may be left out until then.
        self._next_due_s = min(self._next_due_s, lease.expires_s, ends_s)
        if worker in self.open:
            del self.open[worker]
            standing = self.workers[worker]
            if standing.slots > len(held):
                self.open[worker] = None  # behind the others: they take turns
        return lease

    def end(self, rollout_id: str) -> None:
        """Forget the lease of a rollout, if there is one."""
        lease = self.leases.pop(rollout_id, None)
        if lease is None:
            return
        worker = lease.worker
        held = self.held_by[worker]
        held.discard(rollout_id)
        if held:
            self.held_bytes[worker] -= lease.task_bytes
        else:
            del self.held_by[worker], self.held_bytes[worker]
        if worker not in self.open:
            standing = self.workers.get(worker)
            if standing is not None and standing.slots > len(held):
                self.open[worker] = None

    def holds(self, worker: str, rollout_id: str, attempt: int) -> Lease | None:
        """Return the lease if exactly this worker holds exactly this attempt."""
        lease = self.leases.get(rollout_id)
        if lease is None or lease.attempt != attempt or lease.worker != worker:
            return None
        return lease

    def beat(self, worker: str, slots: int, now_s: float, task_bytes_max: int = 0) -> None:
        """Note that the worker is alive and how much it can hold."""
        self.workers[worker] = WorkerStanding(slots, now_s, task_bytes_max)
        if slots <= len(self.held_by.get(worker, ())):
            self.open.pop(worker, None)
        elif worker not in self.open:
            self.open[worker] = None

    def free_slots(self, worker: str) -> int:
        standing = self.workers.get(worker)
        return 0 if standing is None else max(0, standing.slots - len(self.held_by.get(worker, ())))

    def has_room(self, worker: str, task_bytes: int) -> bool:
        """True when the task fits into the worker's credit. To one who holds nothing any task may go, or a task
        larger than every worker's credit would wait for ever."""
        bytes_max = self.workers[worker].task_bytes_max
        if not bytes_max:
            return True
        held_bytes = self.held_bytes.get(worker)
        return held_bytes is None or held_bytes + task_bytes <= bytes_max

    def of_worker(self, worker: str) -> list[Lease]:
        """What the worker holds, in an order that does not change from process to process: a history must replay."""
        return [self.leases[rollout_id] for rollout_id in sorted(self.held_by.get(worker, ()))]

    def expired(self, now_s: float) -> list[Lease]:
        """Leases whose time is over, oldest first."""
        if now_s < self._next_due_s:
            return []
        over = sorted((lease for lease in self.leases.values() if lease.due_s <= now_s), key=lambda lease: lease.due_s)
        # What is over and is not ended by the caller is found again by the next call.
        self._next_due_s = min((lease.due_s for lease in self.leases.values()), default=math.inf)
        return over

    def forget_silent_workers(self, now_s: float) -> list[str]:
        """Drop workers not heard of for a whole lease; their leases end by themselves."""
        silent = [name for name, standing in self.workers.items() if standing.seen_s + self.lease_s <= now_s]
        for name in silent:
            self.forget_worker(name)
        return silent

    def forget_worker(self, worker: str) -> None:
        """Lease nothing more to the worker until it beats again."""
        self.workers.pop(worker, None)
        self.open.pop(worker, None)
