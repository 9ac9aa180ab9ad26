"""A run's versions: durable before they are published, published before they are pushed, and never twice."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from lightning_bus import POLICY_WEIGHTS, BrokenError, Client, Kind, RunFile, RunSection, StorageError, WeightVersion
from tests.bus_fixtures import broker
from tests.reference.rows import make_row, make_rows
from tests.unit.trainer.engine_stub import EngineStub, client_of
from tests.unit.trainer.serving_fixtures import build_model, build_tokenizer
from trainer import session as module
from trainer.config import PolicySection, ServeSection, TrainSection
from trainer.data.batch import pack_rows
from trainer.optimize import checkpoint
from trainer.optimize.losses import cispo
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.step import train_step
from trainer.policy.model import load_policy, named_weights, save_policy
from trainer.session import Session, trained_record

pytestmark = pytest.mark.anyio


@pytest.fixture
def run(tmp_path: Path) -> RunFile:
    sections = {
        "run": RunSection(name="r", directory=str(tmp_path)),
        "policy": PolicySection(model="unused"),
        "serve": ServeSection(transfer_directory=str(tmp_path / "shm")),
        "train": TrainSection(tasks="unused", held_out="unused"),
    }
    save_policy(build_model(), build_tokenizer(), tmp_path / "r" / "policy")
    return RunFile(tmp_path / "run.toml", sections)


@asynccontextmanager
async def a_life(run: RunFile, engine: EngineStub, address: str) -> AsyncIterator[Session]:
    async with (
        Client(address, role="trainer") as bus,
        client_of(engine) as http,
    ):
        yield Session(run, bus, http, [engine.url])


def learn(session: Session, optimizer: Optimizer) -> None:
    """One optimiser step, as the algorithms do it, up to the checkpoint."""
    rows = make_rows(session.progress.step, [9, 14])
    packs = pack_rows(rows, [1.0, -1.0], token_budget=64)
    train_step(session.model, optimizer, packs, cispo())
    progress = session.progress
    progress.phase, progress.step = "rl", progress.step + 1
    progress.parent, progress.version = progress.version, progress.version + 1
    progress.trained = trained_record(rows)
    progress.line = session.note("rl", reward_mean=0.5, dropped={"stale": 1})
    session.checkpoint(optimizer)


async def known(bus: Client, number: int) -> WeightVersion | None:
    resource = await bus.get(POLICY_WEIGHTS, number)
    return None if resource is None else msgspec.msgpack.decode(resource.body, type=WeightVersion)


async def test_a_version_is_on_disk_then_on_the_bus_then_pushed(run: RunFile, tmp_path: Path) -> None:
    engine = EngineStub()
    seen: list[tuple[str, int, bool]] = []
    async with broker(tmp_path / "log") as address, a_life(run, engine, address) as session:

        async def look(route: str) -> None:
            if route == "start_weight_update":
                path = checkpoint.latest(session.checkpoints)
                seen.append(
                    (
                        "" if path is None else path.stem,
                        session.progress.version,
                        await known(session.bus, 1) is not None,
                    )
                )

        engine.on_call = look
        learn(session, Optimizer(session.model, lr=1e-2))
        assert await known(session.bus, 1) is None
        await session.publish()
        told = await known(session.bus, 1)
    assert seen == [("step-00000001", 1, True)]
    assert engine.calls == ["start_weight_update", "update_weights", "pause", "finish_weight_update", "resume"]
    assert told is not None
    assert (told.parent, told.phase, told.step, told.metrics["reward_mean"]) == (0, "rl", 1, 0.5)
    assert [(one.rollout_id, one.attempt) for one in told.trained] == [("r-0", 1), ("r-1", 1)]
    assert told.checksum.startswith("crc32c:") and told.created_ns > 0
    line = session.progress.line
    assert line["push_s"] > line["push_copy_s"] > 0 and line["standstill_ms"] > 0 and line["replicas_current"] == 1


async def test_publishing_again_pushes_again_and_says_nothing_new(run: RunFile, tmp_path: Path) -> None:
    engine = EngineStub()
    async with broker(tmp_path / "log") as address, a_life(run, engine, address) as session:
        await session.publish()
        await session.publish()
        records, _, _ = await session.bus.fetch(0)
    assert [record.kind for record in records] == [Kind.RESOURCE]
    assert engine.calls.count("finish_weight_update") == 2


async def test_a_trainer_that_dies_between_checkpoint_and_publish_publishes_the_same_bytes(
    run: RunFile, tmp_path: Path
) -> None:
    engine = EngineStub()
    async with broker(tmp_path / "log") as address:
        async with a_life(run, engine, address) as session:
            await session.publish()
            learn(session, Optimizer(session.model, lr=1e-2))
            learnt = {name: tensor.clone() for name, tensor in named_weights(session.model)}
            progress = session.progress
        async with a_life(run, engine, address) as session:
            session.resume()
            assert msgspec.json.encode(session.progress) == msgspec.json.encode(progress)
            await session.publish()
            told = await known(session.bus, 1)
            assert told is not None
            assert msgspec.json.encode(told.trained) == msgspec.json.encode(trained_record(make_rows(0, [9, 14])))
        for name, tensor in named_weights(session.model):
            assert torch.equal(tensor, learnt[name])


async def test_a_resumed_run_learns_on_bit_for_bit(run: RunFile, tmp_path: Path) -> None:
    engine = EngineStub()
    async with broker(tmp_path / "log") as address:
        async with a_life(run, engine, address) as session:
            optimizer = Optimizer(session.model, lr=1e-2)
            learn(session, optimizer)
            learn(session, optimizer)
            unbroken = {name: tensor.clone() for name, tensor in named_weights(session.model)}
        (session.checkpoints / "step-00000002.safetensors").unlink()
        async with a_life(run, engine, address) as session:
            session.resume()
            optimizer = Optimizer(session.model, lr=1e-2)
            session.restore_optimizer(optimizer)
            learn(session, optimizer)
    assert all(torch.equal(tensor, unbroken[name]) for name, tensor in named_weights(session.model))


async def test_an_engine_that_stays_away_is_told(run: RunFile, tmp_path: Path, monkeypatch: Any) -> None:
    engine = EngineStub()
    engine.on_call = lambda route: 500
    monkeypatch.setattr(module, "ENGINE_LIMIT_S", -59.0)
    async with broker(tmp_path / "log") as address, a_life(run, engine, address) as session:
        with pytest.raises(
            BrokenError, match=r"no engine took weight version 0 within 1 s: http://engine: .*answered 500"
        ):
            await session.publish()


async def test_weights_that_are_not_finite_stop_the_run_before_anybody_hears_of_them(
    run: RunFile, tmp_path: Path
) -> None:
    engine = EngineStub()
    async with broker(tmp_path / "log") as address, a_life(run, engine, address) as session:
        with torch.no_grad():
            next(session.model.parameters())[0] = torch.nan
        with pytest.raises(BrokenError, match="weight version 0 cannot be served: .* holds NaN or infinity"):
            await session.publish()
        assert await known(session.bus, 0) is None
    assert engine.calls == []


async def test_shared_memory_that_is_full_stops_the_run_and_says_where(
    run: RunFile, tmp_path: Path, monkeypatch: Any
) -> None:
    engine = EngineStub()

    def full(descriptor: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    async with broker(tmp_path / "log") as address, a_life(run, engine, address) as session:
        with pytest.raises(StorageError, match=r"cannot write .*shm: .*No space left.* Free space there"):
            await session.publish()
    assert (engine.calls, engine.label, engine.paused) == ([], "0", False)


async def test_a_disk_that_refuses_a_checkpoint_stops_the_run_and_says_where(run: RunFile, tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address, a_life(run, EngineStub(), address) as session:
        session.checkpoints.write_text("not a directory")
        with pytest.raises(StorageError, match="cannot write .*checkpoints: .*Free space"):
            session.checkpoint(Optimizer(session.model, lr=1e-2))


async def test_what_is_exported_loads_and_closing_leaves_no_shared_memory(run: RunFile, tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address, a_life(run, EngineStub(), address) as session:
        await session.publish()
        assert len(list((tmp_path / "shm").iterdir())) == 1
        exported = dict(named_weights(load_policy(session.export())))
        assert all(torch.equal(tensor, exported[name]) for name, tensor in named_weights(session.model))
        session.close()
        assert list((tmp_path / "shm").iterdir()) == []


async def test_the_record_of_what_was_trained_has_one_entry_an_attempt() -> None:
    generator = np.random.default_rng(0)
    rows = [make_row(generator, 5, rollout_id=name) for name in ("r-2", "r-1", "r-2")]
    assert trained_record(rows) == [("r-1", 1, [bytes(8)]), ("r-2", 1, [bytes(8), bytes(8)])]


async def test_runs_of_the_same_name_in_two_places_do_not_share_weight_files(run: RunFile, tmp_path: Path) -> None:
    for place in ("a", "b"):
        shutil.copytree(tmp_path / "r", tmp_path / place / "checkout" / "runs" / "r")
    async with broker(tmp_path / "log") as address:
        for place in ("a", "b"):
            section = RunSection(name="r", directory=str(tmp_path / place / "checkout" / "runs"))
            async with a_life(RunFile(run.path, {**run.sections, "run": section}), EngineStub(), address) as session:
                await session.publish()
    assert len(list((tmp_path / "shm").iterdir())) == 2
