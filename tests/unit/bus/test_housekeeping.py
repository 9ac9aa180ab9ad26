"""What a broker does now and then, on a real log: what is dropped, what a cursor keeps, and what is forgotten with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_bus import messages as m
from lightning_bus.broker import core
from lightning_bus.broker.housekeeping import Retention
from lightning_bus.config import BrokerSection
from lightning_bus.errors import RetiredError
from lightning_bus.log.store import LogWriter
from lightning_bus.messages import Op
from tests.bus_fixtures import SECRET

pytestmark = pytest.mark.anyio

SECTION = BrokerSection(drop_read=True, segment_bytes=1 << 20)
BLOB = b"x" * (1 << 19)


class Kept:
    """A broker's state and its log, without the loop: what is decided is written when `commit` says so."""

    def __init__(self, path: Path) -> None:
        self.log = LogWriter(path, map_bytes_max=SECTION.map_bytes_max, segment_bytes=SECTION.segment_bytes)
        self.state = core.restore(self.log.load(), secret=SECRET, lease_s=10.0, max_attempts=5, now_s=0.0)
        self.undecided: list[core.Effects] = []
        self.retention = Retention(self.state, self.log, SECTION, self.undecided.append, self._mark)

    def handle(self, op: Op, body: m.Body, blobs: list[bytes] | None = None, *, seq: int = 0) -> None:
        header = m.Header(1, op, 1, "p", 1, seq)
        self.undecided.append(core.handle(self.state, "p", header, body, blobs or [], now_s=0.0, wall_ns=1))

    def commit(self) -> None:
        for effects in self.undecided:
            self.log.commit(effects.writes)
        self.undecided.clear()

    def fill(self, count: int) -> None:
        self.handle(Op.HELLO, m.Hello("p", nonce=b"n"))
        for seq in range(1, count + 1):
            self.handle(Op.APPEND, m.Append([m.Part("", 0, 1)]), [BLOB], seq=seq)
            self.commit()

    def _mark(self) -> Callable[[], bool]:
        return lambda: not self.undecided


async def test_what_every_cursor_has_passed_is_dropped_and_a_reader_that_comes_too_late_is_told(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "log")
    kept.fill(8)
    kept.handle(Op.COMMIT, m.Commit("reader", 8))
    kept.commit()
    await kept.retention.drop()
    await kept.retention.drop()
    assert kept.log.first_offset > 0
    with pytest.raises(RetiredError, match="the log begins at"):
        kept.log.read(0, 1)
    kept.log.close()


async def test_a_cursor_that_has_moved_in_memory_only_drops_nothing(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "log")
    kept.fill(8)
    kept.handle(Op.COMMIT, m.Commit("reader", 8))
    await kept.retention.drop()
    await kept.retention.drop()
    assert kept.log.first_offset == 0
    kept.log.close()


async def test_a_cursor_that_was_made_since_is_respected(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "log")
    kept.fill(8)
    kept.handle(Op.COMMIT, m.Commit("reader", 8))
    kept.commit()
    await kept.retention.drop()
    kept.handle(Op.COMMIT, m.Commit("slow", 1))
    kept.commit()
    await kept.retention.drop()
    assert kept.log.first_offset <= 1
    kept.log.close()


async def test_rollouts_whose_end_was_dropped_are_forgotten_on_disk_too(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "log")
    kept.handle(Op.SUBMIT, m.Submit([m.Submission("r-1", b""), m.Submission("r-2", b"")]))
    kept.handle(Op.CANCEL, m.Cancel(["r-1"]))
    kept.commit()
    kept.fill(8)
    kept.handle(Op.COMMIT, m.Commit("reader", 11))
    kept.commit()
    await kept.retention.drop()
    await kept.retention.drop()
    kept.commit()
    assert list(kept.state.rollouts) == ["r-2"]
    kept.log.close()
    again = Kept(tmp_path / "log")
    assert list(again.state.rollouts) == ["r-2"]
    again.log.close()
