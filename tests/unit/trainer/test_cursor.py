"""The trainer's named cursor: retention drops what it has trained on, and nothing that it would need again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from lightning_bus import CallError, Record, RetiredError
from lightning_bus import messages as m
from lightning_bus.adapters import Cursor
from lightning_bus.log.codec import decode_record
from lightning_bus.messages import Op
from tests.unit.bus.test_housekeeping import Kept
from trainer.data.stream import TRAIN, RolloutStream, submission

pytestmark = pytest.mark.anyio

NAME = "trainer/policy"


class Bus:
    """A broker without its loop, and the two things that a stream asks of it here."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    async def cursor(self, name: str, offset: int | None = None) -> int:
        self.kept.handle(Op.COMMIT, m.Commit(name, offset))
        self.kept.commit()
        known = self.kept.state.cursors.get(name, 0)
        if offset is not None and known != offset:
            raise CallError(f"cursor {name} is at {known}: it cannot move to {offset}")  # as the broker answered
        return known

    async def follow(self, offset: int) -> AsyncIterator[Record]:
        while offset < self.kept.log.end_offset:
            blobs, _ = self.kept.log.read(offset, 1 << 30)
            for blob in blobs:
                yield decode_record(blob)
            offset += len(blobs)
        await anyio.sleep_forever()


def begun(tmp_path: Path) -> Kept:
    """Two groups of two are submitted, the first is done and one of the second."""
    kept = Kept(tmp_path / "log")
    kept.handle(Op.HELLO, m.Hello("p", nonce=b"n"))
    for group in "ab":
        kept.handle(Op.SUBMIT, m.Submit([submission(f"{group}-{n}", n, TRAIN, group=group) for n in range(2)]))
        kept.commit()
        kept.handle(Op.HEARTBEAT, m.Heartbeat(2))
        kept.commit()
        for n in range(2 if group == "a" else 1):
            for part in range(3):
                seq = 1 + 3 * (n + 2 * (group == "b")) + part
                kept.handle(Op.APPEND, m.Append([m.Part("", 0, 1)]), [b"\x90" + b" " * (1 << 19)], seq=seq)
                kept.commit()
            kept.handle(Op.DONE, m.Done(f"{group}-{n}", 1, 1.0))
            kept.commit()
    return kept


async def a_life(kept: Kept, state: Any, groups: int) -> tuple[list[str], Any]:
    """Take groups, and say on the bus that they are trained on. Returns their names and what a checkpoint keeps."""
    stream = RolloutStream(Bus(kept), 2, msgspec.convert(state, Cursor), 5.0, cursor_name=NAME)  # type: ignore[arg-type]
    async with anyio.create_task_group() as background:
        await stream.commit(state)
        background.start_soon(stream.run)
        taken = await stream.next_groups(groups)
        state = stream.saved_state()
        await stream.commit(state)
        background.cancel_scope.cancel()
    return [group.name for group in taken], state


async def test_a_segment_that_was_trained_on_goes_and_one_that_is_needed_stays(tmp_path: Path) -> None:
    kept = begun(tmp_path)
    ends = [segment.end_offset for segment in kept.log.segments()]
    assert len(ends) > 2
    await a_life(kept, {"offset": 0}, 0)
    for _ in range(2):
        await kept.retention.drop()
    assert kept.log.first_offset == 0, "nothing is trained on yet, and the trainer will want it all"
    names, state = await a_life(kept, {"offset": 0}, 1)
    assert names == ["a"]
    assert kept.state.cursors[NAME] == state["offset"] > 0
    for _ in range(2):
        await kept.retention.drop()
    # Group b is half done: its submission and all after it stay, and so what a trainer that dies now would read again.
    assert 0 < kept.log.first_offset <= state["offset"]
    with pytest.raises(RetiredError):
        kept.log.read(0, 1)
    kept.handle(Op.DONE, m.Done("b-1", 1, 0.0))
    kept.commit()
    assert (await a_life(kept, state, 1))[0] == ["b"]
    kept.log.close()


async def test_a_cursor_never_goes_back_to_an_older_checkpoint(tmp_path: Path) -> None:
    kept = begun(tmp_path)
    _, state = await a_life(kept, {"offset": 0}, 1)
    at = kept.state.cursors[NAME]
    for older in ({"offset": 0}, {"offset": 1}, state):
        stream = RolloutStream(Bus(kept), 2, Cursor(), 5.0, cursor_name=NAME)  # type: ignore[arg-type]
        await stream.commit(older)
        assert kept.state.cursors[NAME] == at
    await RolloutStream(Bus(kept), 2, Cursor(), 5.0).commit(state)  # type: ignore[arg-type]
    assert list(kept.state.cursors) == [NAME]
    kept.log.close()
