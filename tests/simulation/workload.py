"""What a history's users are up to: drawn from its seed. Few habits at a time find more than all at once."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import msgspec

from lightning_bus import messages as m

Retention = Literal["", "read", "age", "bytes"]


@dataclass(slots=True)
class Plan:
    """One rollout that the trainer wants. With a key its id is made up each time it is submitted."""

    name: str
    submission: m.Submission

    def submission_now(self, chance: random.Random) -> m.Submission:
        if not self.submission.key:
            return self.submission
        return msgspec.structs.replace(self.submission, rollout_id=f"{self.name}.{chance.randrange(1000)}")


@dataclass(slots=True)
class Workload:
    """Who is there, and what they do."""

    plans: list[Plan]
    slots: list[int]  # of each worker
    task_bytes_max: int = 0  # of the workers
    runtimes: float = 0.5  # how many of the workers are the real runtime rather than bare leases
    hands_back: bool = False  # workers nack and release
    gateway: bool = True
    reader: bool = True
    waiters: int = 0
    watcher: bool = False
    replays: int = 0  # how many dead letters the operator replays; it purges as many
    drains: bool = False
    keys: bool = False  # everybody has a role, and may do what it allows
    pipelines: bool = False  # batches are small, so that several are under way
    retention: Retention = ""


def draw_workload(chance: random.Random) -> Workload:
    """Roll the dice."""

    def some(probability: float) -> bool:
        return chance.random() < probability

    priorities = [0] if some(0.5) else [-2, 0, 0, 1, 5]
    delays = [0.0] if some(0.6) else [0.0, 0.0, 0.7, 3.0, 12.0]
    timeouts = [0.0] if some(0.6) else [0.0, 0.5, 2.0, 6.0]
    leases = [0.0] if some(0.6) else [0.0, 0.0, 1.5, 9.0]
    limits = [0] if some(0.6) else [0, 1, 2, 7]
    keyed = 0.0 if some(0.5) else 0.5
    plans: list[Plan] = []
    for index in range(40 if some(0.03) else chance.randint(3, 12)):
        name = f"{chance.choice('abc')}-{index}"
        submission = m.Submission(
            name, msgspec.msgpack.encode(name), group=name[:1], max_attempts=chance.choice(limits),
            priority=chance.choice(priorities), timeout_s=chance.choice(timeouts), lease_s=chance.choice(leases),
            delay_s=chance.choice(delays), key=f"key of {name}" if some(keyed) else "",
        )  # fmt: skip
        plans.append(Plan(name, submission))
    work = Workload(plans, [chance.randint(1, 3) for _ in range(chance.randint(1, 3))])
    work.runtimes = chance.choice([0.0, 0.5, 1.0])
    work.hands_back = some(0.4)
    work.gateway, work.reader = some(0.85), some(0.6)
    work.waiters = chance.choice([0, 0, 1, 2])
    work.watcher = some(0.3)
    work.replays = chance.choice([0, 0, 3])
    work.drains = some(0.15)
    work.pipelines = some(0.6)
    work.keys = some(0.5)
    if some(0.15):
        work.task_bytes_max = chance.choice([1, 12])
    if work.reader and some(0.3):
        work.retention = chance.choice(["read", "age", "bytes"])
    return work
