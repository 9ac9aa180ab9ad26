"""All replicas of a run: one is enough to go on, and every other is brought to the newest version."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch

from lightning_bus import BrokenError
from tests.unit.trainer.engine_stub import EngineStub, client_of, engine_of
from trainer.config import ServeSection
from trainer.serving import fleet as module
from trainer.serving.errors import WeightsRefusedError
from trainer.serving.fleet import Fleet, FleetTimes, build_transfer
from trainer.serving.push import FileTransfer
from trainer.serving.slots import WeightSlots

pytestmark = pytest.mark.anyio
TENSORS = {"layers.0.w": torch.ones(3), "norm": torch.ones(2)}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.001)
    monkeypatch.setattr(module, "LOOK_MAX_S", 0.001)
    monkeypatch.setattr(module, "GRACE_S", 0.01)


@asynccontextmanager
async def fleet_of(directory: Path, *stubs: EngineStub, limit_s: float = 5.0) -> AsyncIterator[Fleet]:
    """A fleet with its background running."""
    async with client_of(*stubs) as client, anyio.create_task_group() as tasks:
        engines = [engine_of(client, stub) for stub in stubs]
        fleet = Fleet(engines, FileTransfer(WeightSlots(directory, "run")), limit_s=limit_s)
        tasks.start_soon(fleet.run)
        await anyio.lowlevel.checkpoint()
        yield fleet
        tasks.cancel_scope.cancel()


async def push(
    fleet: Fleet, tensors: dict[str, torch.Tensor], version: str, frozen: Collection[str] = ()
) -> FleetTimes:
    await fleet.prepare(tensors, version, frozen=frozen)
    return await fleet.push()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await anyio.lowlevel.checkpoint()


async def test_every_replica_serves_the_version_when_all_are_well(tmp_path: Path) -> None:
    stubs = [EngineStub(f"http://engine-{at}") for at in range(3)]
    async with fleet_of(tmp_path, *stubs) as fleet:
        for version in ("0", "1", "2"):
            times = await push(fleet, TENSORS, version)
            assert (times.current, times.replicas) == (3, 3)
            assert 0 < times.standstill_ms <= times.seconds * 1e3 and times.copy_s < times.seconds
            assert [(stub.label, stub.paused) for stub in stubs] == [(version, False)] * 3
    assert [len(stub.updates) for stub in stubs] == [3] * 3
    assert [bool(info["checksum"]) for info in stubs[0].updates] == [True, False, False]


async def test_one_good_replica_is_enough_and_the_others_are_caught_up(tmp_path: Path) -> None:
    good, away = EngineStub("http://good"), EngineStub("http://away")
    away.on_call = lambda route: 503
    async with fleet_of(tmp_path, good, away) as fleet:
        assert (await push(fleet, TENSORS, "1")).current == 1
        assert (await push(fleet, TENSORS, "2")).current == 1
        away.label = "default"  # it is back, and its keeper has not brought it current yet
        away.on_call = lambda route: None
        for _ in range(50):
            await anyio.lowlevel.checkpoint()
        assert away.updates == []
        away.label = "1"
        await until(lambda: fleet.current == 2)
    assert (good.label, away.label) == ("2", "2")
    assert [info["version"] for info in away.updates] == ["2"]


async def test_a_slow_replica_does_not_hold_training_up_and_gets_the_newest_in_the_end(tmp_path: Path) -> None:
    quick, slow = EngineStub("http://quick"), EngineStub("http://slow")
    wake = anyio.Event()

    async def wait() -> None:
        await wake.wait()

    slow.on_call = lambda route: wait() if route == "update_weights" else None
    async with fleet_of(tmp_path, quick, slow) as fleet:
        for version in ("1", "2", "3"):
            assert (await push(fleet, TENSORS, version)).current == 1
        assert slow.updates == []
        slow.on_call = lambda route: None
        await fleet.settle(0.0)
        assert fleet.current == 1
        wake.set()
        await fleet.settle()
        assert fleet.current == 2
    assert (quick.label, slow.label, slow.paused) == ("3", "3", False)


async def test_a_replica_that_broke_is_pushed_to_again_only_when_its_keeper_says_so(tmp_path: Path) -> None:
    good, broken = EngineStub("http://good"), EngineStub("http://broken")
    broken.on_call = lambda route: 500 if route == "finish_weight_update" else None
    async with fleet_of(tmp_path, good, broken) as fleet:
        assert (await push(fleet, TENSORS, "1")).current == 1
        assert (broken.label, broken.paused) == ("unfit", True)
        started = broken.calls.count("start_weight_update")
        broken.on_call = lambda route: None
        for _ in range(50):
            await anyio.lowlevel.checkpoint()
        assert broken.calls.count("start_weight_update") == started
        broken.label, broken.paused, broken.update_open = "1", False, False  # restarted, and brought current
        await until(lambda: fleet.current == 2)
    assert (broken.label, broken.paused) == ("1", False)


async def test_without_a_background_the_push_itself_waits_for_who_comes_back(tmp_path: Path) -> None:
    stub = EngineStub()
    answers = iter([503, 503, None])
    stub.on_call = lambda route: next(answers, None) if route == "health" else None
    async with client_of(stub) as client:
        fleet = Fleet([engine_of(client, stub)], FileTransfer(WeightSlots(tmp_path, "run")))
        assert (await push(fleet, TENSORS, "5")).current == 1
        fleet.close()
    assert stub.label == "5" and os.listdir(tmp_path) == []


@pytest.mark.parametrize("background", [True, False])
async def test_no_replica_within_the_limit_stops_the_run_and_says_why(tmp_path: Path, background: bool) -> None:
    stubs = [EngineStub("http://a", label="default"), EngineStub("http://b")]
    stubs[1].on_call = lambda route: 503
    message = (
        r"no engine took weight version 4 within .* s: http://a: its weights are called 'default', so it is not "
        r"current yet; http://b: .*answered 503"
    )
    for limit_s in (0.05, 1.0, 10.0):  # on a machine that stands still, nobody may have looked at them within the first
        async with client_of(*stubs) as client, anyio.create_task_group() as tasks:
            fleet = Fleet(
                [engine_of(client, stub) for stub in stubs], FileTransfer(WeightSlots(tmp_path, "run")), limit_s=limit_s
            )
            if background:
                tasks.start_soon(fleet.run)
                await anyio.lowlevel.checkpoint()
            with pytest.raises(BrokenError, match=f"within {limit_s:g} s") as caught:
                await push(fleet, TENSORS, "4")
            tasks.cancel_scope.cancel()
        fleet.close()
        if re.search(message, str(caught.value)):
            return
    pytest.fail(str(caught.value))


async def test_weights_that_every_replica_refuses_stop_the_run_at_once(tmp_path: Path) -> None:
    stub = EngineStub()
    stub.on_call = lambda route: 500 if route == "update_weights" else None
    async with fleet_of(tmp_path, stub) as fleet:
        with pytest.raises(WeightsRefusedError, match="no replica takes the weights: http://engine: .*told to fail"):
            await push(fleet, TENSORS, "1")
        assert (stub.label, stub.paused, stub.calls.count("update_weights")) == ("0", False, 2)
        stub.on_call = lambda route: None
        assert (await push(fleet, TENSORS, "2")).current == 1


async def test_weights_that_are_not_finite_reach_nobody(tmp_path: Path) -> None:
    stub = EngineStub()
    async with fleet_of(tmp_path, stub) as fleet:
        with pytest.raises(WeightsRefusedError, match="norm holds NaN"):
            await push(fleet, {"norm": torch.full((2,), torch.nan)}, "1")
    assert stub.calls == []


async def test_the_first_push_of_what_is_served_already_must_change_nothing(tmp_path: Path) -> None:
    stub = EngineStub(label="0")

    def garble(route: str) -> None:
        if route == "finish_weight_update":
            stub.checksums = {"w": "another"}

    stub.on_call = garble
    async with fleet_of(tmp_path, stub) as fleet:
        with pytest.raises(
            BrokenError, match="served version 0 from disk, and something else after .*: w. It does not"
        ):
            await push(fleet, TENSORS, "0")
    assert stub.label == "unfit"


async def test_frozen_layers_are_left_out_for_who_has_them(tmp_path: Path) -> None:
    stub = EngineStub()
    frozen = {"norm"}
    async with fleet_of(tmp_path, stub) as fleet:
        for version in ("1", "2", "3"):
            await push(fleet, TENSORS, version, frozen=frozen)
        sent: list[tuple[str, list[Any]]] = [(info["base"], info["names"]) for info in stub.updates]
        assert sent == [("", list(TENSORS)), ("1", ["layers.0.w"]), ("2", ["layers.0.w"])]
        refusals = iter([500])  # the engine was restarted meanwhile and holds another base
        stub.on_call = lambda route: next(refusals, None) if route == "update_weights" else None
        await push(fleet, TENSORS, "4", frozen=frozen)
    assert (stub.updates[-1]["base"], stub.updates[-1]["names"]) == ("", list(TENSORS))


def test_the_transfer_is_what_the_run_says(tmp_path: Path) -> None:
    shm = build_transfer(ServeSection(dtype="bfloat16", transfer_directory=str(tmp_path / "shm")), tmp_path, "run")
    assert isinstance(shm, FileTransfer)
    offer = shm.offer(TENSORS, "1")
    assert offer.file.path.parent == tmp_path / "shm" and set(offer.file.dtype_names) == {"bfloat16"}
    file = build_transfer(ServeSection(transfer="file"), tmp_path, "run")
    assert isinstance(file, FileTransfer)
    assert file.offer(TENSORS, "1").file.path.parent == tmp_path / "weights"
