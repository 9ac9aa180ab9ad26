"""The disk under the broker: what is on it stays, and everything else may be lost.

A transaction takes time, and at its end it is on disk whole or not at all, as LMDB's are. Harm: it raises, having
landed or not (an error tells nothing about that), or it is slow. A log opened by a process that was killed writes
nothing more. Every value goes through the real encoder, and what is read comes from the encoded bytes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import anyio
import msgspec

from lightning_bus import messages as m
from lightning_bus.broker.core import Snapshot
from lightning_bus.errors import StorageError
from lightning_bus.log.codec import encode_record
from lightning_bus.records import ProducerMark, Record, Table, Write
from lightning_bus.resources import Resource

KEY_BYTES_MAX = 511  # LMDB's


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

    def __init__(self, chance: random.Random, health: DiskHealth, committed: Callable[[Sequence[Write]], None]) -> None:
        self.health = health
        self.values: list[bytes] = []  # the log, encoded; the offset is the index
        self.tables: dict[Table, dict[bytes, bytes]] = {table: {} for table in Table}
        self.transactions = 0
        self._chance = chance
        self._committed = committed

    def write(self, writes: Sequence[Write]) -> None:
        """One transaction. Refuses what the real log refuses: gaps, and keys that are too long."""
        for write in writes:
            if isinstance(write, Record):
                assert write.offset == len(self.values), f"offset {write.offset} after {len(self.values)} records"
                self.values.append(encode_record(write))
            else:
                assert 0 < len(write.key) <= KEY_BYTES_MAX
                self.tables[write.table][write.key] = write.value
        self.transactions += 1
        self._committed(writes)

    def snapshot(self) -> Snapshot:
        """What a broker finds that opens the log now. Tables are read in the order of their keys."""
        decode, tables = msgspec.msgpack.decode, self.tables
        return Snapshot(
            next_offset=len(self.values),
            rollouts=[decode(value, type=m.Rollout) for _, value in sorted(tables[Table.ROLLOUTS].items())],
            producers={k.decode(): decode(v, type=ProducerMark) for k, v in sorted(tables[Table.PRODUCERS].items())},
            cursors={k.decode(): decode(v, type=int) for k, v in sorted(tables[Table.CURSORS].items())},
            resources=[decode(value, type=Resource) for _, value in sorted(tables[Table.RESOURCES].items())],
        )


class OpenLog:
    """The log in the hands of one broker process: `log.store.LogWriter`, here."""

    def __init__(self, disk: Disk) -> None:
        self.dead = False
        self._disk = disk

    async def commit(self, writes: Sequence[Write]) -> None:
        """Make all writes durable in one transaction. Raises StorageError: then they are, or not."""
        disk = self._disk
        chance, health = disk._chance, disk.health  # pyright: ignore[reportPrivateUsage]
        slow = health.slow and chance.random() < health.slow
        await anyio.sleep(health.slow_s if slow else chance.expovariate(1.0 / health.commit_s))
        refused = health.refuse and chance.random() < health.refuse
        if self.dead:
            raise Killed
        if not refused or chance.random() < 0.5:
            disk.write(writes)
        if refused:
            raise StorageError("the simulated disk refused a transaction")

    def load(self) -> Snapshot:
        return self._disk.snapshot()

    def read(self, offset: int, bytes_max: int) -> tuple[list[bytes], int]:
        values: list[bytes] = []
        size = 0
        for value in self._disk.values[offset:]:
            size += len(value)
            if values and size > bytes_max:
                break
            values.append(value)
        return values, len(self._disk.values)

    def close(self) -> None:
        self.dead = True


class DiskReader:
    """The log as `log.verify` reads it."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    @property
    def end_offset(self) -> int:
        return len(self._disk.values)

    def values(self, offset: int = 0) -> Iterator[bytes]:
        return iter(self._disk.values[offset:])
