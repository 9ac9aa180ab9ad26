"""The disk under the broker: what is on it stays, and everything else may be lost.

A transaction takes time, and at its end it is on disk whole or not at all, as LMDB's are. Harm: it raises, having
landed or not (an error tells nothing about that), or it is slow. A log opened by a process that was killed writes
nothing more. What the log holds is kept by `log.memory`, which passes the same contract tests as the real one; its
segments are small, so that some histories drop old ones.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import anyio

from lightning_bus.broker.core import Snapshot
from lightning_bus.errors import StorageError
from lightning_bus.log.memory import MemoryDisk, MemoryLog
from lightning_bus.log.retention import SegmentInfo
from lightning_bus.records import Record, Write

SEGMENT_BYTES = 2500  # about a dozen records


class Killed(Exception):
    """The process that did this is dead."""


@dataclass(slots=True)
class DiskHealth:
    """How bad the disk is. The default is a good one."""

    commit_s: float = 0.002  # mean
    refuse: float = 0.0  # probability that a transaction raises
    slow: float = 0.0  # that it takes slow_s
    slow_s: float = 6.0


class Disk:
    """What is durable, whatever happens to the process that wrote it."""

    def __init__(
        self, chance: random.Random, health: DiskHealth, committed: Callable[[Sequence[Write]], None],
        dropping: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.health = health
        self.log = MemoryLog(MemoryDisk(), segment_bytes=SEGMENT_BYTES)
        self.transactions = 0
        self.fingerprint = 0  # of every transaction
        self.healed = anyio.Event()
        self._chance = chance
        self._committed = committed
        self._dropping = dropping

    def write(self, writes: Sequence[Write]) -> None:
        """One transaction. Refuses what the real log refuses: gaps, and keys that are too long."""
        self.log.commit(writes)
        self.transactions += 1
        for write in writes:
            told = write.body if isinstance(write, Record) else write.key
            self.fingerprint = zlib.crc32(told, self.fingerprint)
        self._committed(writes)

    def heal(self) -> None:
        """It is a good disk from now on; what hung in it is over."""
        self.health = DiskHealth()
        self.healed.set()

    def drop_before(self, offset: int) -> int:
        """Retention. Small enough to be atomic; a crash in the midst of it is for tests/crash/power_loss."""
        before = self.log.first_offset
        first_offset = self.log.drop_before(offset)
        if first_offset != before:
            self._dropping(first_offset)
        return first_offset


class OpenLog:
    """The log in the hands of one broker process: `log.base.Log`, but for a commit that is awaited."""

    def __init__(self, disk: Disk) -> None:
        self.dead = False
        self._disk = disk

    async def commit(self, writes: Sequence[Write]) -> None:
        """Make all writes durable in one transaction. Raises StorageError: then they are, or not."""
        disk = self._disk
        chance, health = disk._chance, disk.health  # pyright: ignore[reportPrivateUsage]
        await anyio.sleep(chance.expovariate(1.0 / health.commit_s))
        if health.slow and chance.random() < health.slow:
            with anyio.move_on_after(health.slow_s):
                await disk.healed.wait()
        refused = health.refuse and chance.random() < health.refuse
        if self.dead:
            raise Killed
        if not refused or chance.random() < 0.5:
            disk.write(writes)
        if refused:
            raise StorageError("the simulated disk refused a transaction")

    @property
    def first_offset(self) -> int:
        return self._disk.log.first_offset

    @property
    def end_offset(self) -> int:
        return self._disk.log.end_offset

    def load(self) -> Snapshot:
        return self._disk.log.load()

    def read(self, offset: int, bytes_max: int) -> tuple[list[bytes], int]:
        return self._disk.log.read(offset, bytes_max)

    def segments(self) -> list[SegmentInfo]:
        return self._disk.log.segments()

    def drop_before(self, offset: int) -> int:
        return self.first_offset if self.dead else self._disk.drop_before(offset)

    def close(self) -> None:
        self.dead = True


class DiskReader:
    """The log as `log.verify` reads it."""

    def __init__(self, disk: Disk) -> None:
        self._log = disk.log

    @property
    def first_offset(self) -> int:
        return self._log.first_offset

    @property
    def end_offset(self) -> int:
        return self._log.end_offset

    def values(self, offset: int = 0) -> Iterator[bytes]:
        offset = max(offset, self.first_offset)
        while offset < self.end_offset:
            values, _ = self._log.read(offset, 1 << 20)
            yield from values
            offset += len(values)
