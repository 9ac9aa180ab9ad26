"""A fresh replica holds the newest published weights before it is called by a number, and a pinned one its own."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator
from pathlib import Path

import anyio
import httpx
import pytest
import torch

from lightning_bus import BrokenError, Client, NotFound, WeightVersion
from tests import fake_vllm
from tests.bus_fixtures import NOWHERE, BrokerProcess, broker
from tests.journeys.ring import free_ports
from tests.unit.trainer.serving_fixtures import build_model, build_tokenizer
from tests.unit.trainer.test_registry import put, version
from trainer.config import ServeSection
from trainer.optimize import checkpoint
from trainer.optimize.optimizer import Optimizer
from trainer.policy.model import named_weights, save_policy
from trainer.serving import current
from trainer.serving.current import Weights
from trainer.serving.engine import Engine
from trainer.serving.errors import WeightsRefusedError
from trainer.serving.remote import RemoteEngine
from trainer.serving.serve import UNFIT, watch_engine

pytestmark = pytest.mark.anyio

SECTION = ServeSection(engine="vllm")


def saved(run: Path, number: int) -> WeightVersion:
    """Version `number` of a run, whose weights are those of seed `number`."""
    model = build_model(number)
    if number == 0:
        save_policy(model, build_tokenizer(), run / "policy")
        return version(0, path=str(run / "policy"))
    path = checkpoint.save(run / "checkpoints", number, model, Optimizer(model, lr=1.0), {"version": number})
    return version(number, path=str(path))


def holds(model: torch.nn.Module, number: int) -> bool:
    expected = dict(named_weights(build_model(number)))
    return all(torch.equal(tensor, expected[name]) for name, tensor in named_weights(model))


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncGenerator[RemoteEngine]:
    """The control routes of a vLLM that has just started."""
    install = str(fake_vllm.install(tmp_path))
    async with httpx.AsyncClient(trust_env=False) as http:
        while True:
            (port,) = free_ports(1)
            argv = [install, "-m", "vllm", "--port", str(port)]
            process = await anyio.open_process(argv, stdin=None, stdout=None, stderr=None)
            remote = RemoteEngine(http, f"http://127.0.0.1:{port}")
            while process.returncode is None and not await remote.health():  # noqa: ASYNC110 - another process
                await anyio.sleep(0.01)
            if process.returncode is None:
                break  # else another process had taken the port meanwhile
        yield remote
    process.kill()
    await process.wait()
    fake_vllm.kill(tmp_path, port)


def said(engine: RemoteEngine, tmp_path: Path) -> list[tuple[str, str]]:
    """The routes that the engine was asked for, and the version in each."""
    lines = [line for line in fake_vllm.asked(tmp_path, int(engine.url.rpartition(":")[2])) if "route" in line]
    return [(line["route"], _version(line["body"])) for line in lines]


def _version(body: dict[str, object]) -> str:
    inner = body.get("update_info", body)
    assert isinstance(inner, dict)
    return str(inner.get("version") or inner.get("new_version") or "")


async def test_a_replica_of_a_run_that_has_published_nothing_serves_the_first_weights(
    tmp_path: Path, engine: RemoteEngine
) -> None:
    async with broker(tmp_path / "log") as address:
        assert await Weights(address, tmp_path).bring(engine, SECTION) == "0"
    assert said(engine, tmp_path) == [("/update_weight_version", "0")]


async def test_a_replica_that_joins_late_gets_the_newest_weights_before_its_number(
    tmp_path: Path, engine: RemoteEngine
) -> None:
    async with broker(tmp_path / "log") as address, Client(address) as bus:
        await put(bus, *(saved(tmp_path, number) for number in range(3)))
        assert await Weights(address, tmp_path).bring(engine, SECTION) == "2"
    assert said(engine, tmp_path) == [
        ("/start_weight_update", ""),
        ("/update_weights", "2"),
        ("/finish_weight_update", ""),
        ("/update_weight_version", "2"),
    ]
    assert not list(current.shm_directory().glob(f"lightning-bus-start-{engine.url.rpartition(':')[2]}-*"))


async def test_what_is_published_while_a_replica_is_brought_current_reaches_it_too(
    tmp_path: Path, engine: RemoteEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with broker(tmp_path / "log") as address, Client(address) as bus:
        await put(bus, saved(tmp_path, 0), saved(tmp_path, 1))
        finish = engine.finish

        @functools.wraps(finish)
        async def publish_meanwhile(label: str) -> None:
            await put(bus, saved(tmp_path, 2))
            monkeypatch.setattr(engine, "finish", finish)
            await finish(label)

        monkeypatch.setattr(engine, "finish", publish_meanwhile)
        assert await Weights(address, tmp_path).bring(engine, SECTION) == "2"
    told = said(engine, tmp_path)
    assert [number for route, number in told if route == "/update_weights"] == ["1", "2"]
    assert [number for route, number in told if route == "/update_weight_version"] == ["2"]


async def test_a_pinned_version_is_served_whatever_is_published(tmp_path: Path, engine: RemoteEngine) -> None:
    with BrokerProcess(tmp_path / "log") as process:
        async with Client(process.address) as bus:
            await put(bus, *(saved(tmp_path, number) for number in range(3)))
        assert await Weights(process.address, tmp_path, pinned=1).bring(engine, SECTION) == "1"
    model = build_model(9)
    assert await Weights(None, tmp_path, pinned=1).load_into(model) == "1"  # of a run that is over: from its log
    assert holds(model, 1)
    with pytest.raises(NotFound, match="no weight version 7"):
        await Weights(None, tmp_path, pinned=7).load_into(model)


async def test_the_embedded_engine_begins_with_the_newest_weights(tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address, Client(address) as bus:
        model = build_model(0)
        assert await Weights(address, tmp_path).load_into(model) == "0"
        await put(bus, *(saved(tmp_path, number) for number in range(3)))
        assert await Weights(address, tmp_path).load_into(model) == "2"
    assert holds(model, 2)


async def test_a_newest_version_that_cannot_be_read_here_is_left_to_the_trainer(
    tmp_path: Path, engine: RemoteEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async with broker(tmp_path / "log") as address, Client(address) as bus:
        await put(bus, saved(tmp_path, 0), version(1, path="/another/machine/step-00000001.safetensors"))
        assert await Weights(address, tmp_path).bring(engine, SECTION) == "behind" == await engine.label()
        assert not await engine.ready() and not await engine.why_not_ours()
        with pytest.raises(NotFound, match="weights of version 1 are gone"):
            await Weights(address, tmp_path, pinned=1).bring(engine, SECTION)
    assert "version 1 cannot be read here, so the trainer has to push it" in caplog.text


async def test_weights_of_another_model_are_refused_by_the_embedded_engine(tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address, Client(address) as bus:
        await put(bus, saved(tmp_path, 1))
        with pytest.raises(WeightsRefusedError, match="version 1 .* is not of this model: .*layers.2"):
            await Weights(address, tmp_path).load_into(build_model(0, layers=3))


async def test_where_weights_travel_by_nccl_a_fresh_vllm_reads_a_directory(
    tmp_path: Path, engine: RemoteEngine
) -> None:
    async with broker(tmp_path / "log") as address, Client(address) as bus:
        await put(bus, saved(tmp_path, 0), saved(tmp_path, 1))
        assert await Weights(address, tmp_path).bring(engine, ServeSection(engine="vllm", transfer="nccl")) == "1"
    assert [route for route, _ in said(engine, tmp_path)] == ["/collective_rpc", "/update_weight_version"]


async def test_an_embedded_engine_that_a_dead_trainer_paused_goes_on_and_one_marked_unfit_ends() -> None:
    with Engine(build_model(), build_tokenizer(), torch_threads=1) as engine:
        await engine.pause("keep")
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch_engine, engine, 0.02)
                while engine.is_paused:  # noqa: ASYNC110 - another thread
                    await anyio.sleep(0.01)
                tasks.cancel_scope.cancel()
        await engine.set_version(UNFIT)
        with pytest.raises(BrokenError, match="marked unfit"):
            await watch_engine(engine, 0.02)


async def test_a_broker_that_is_away_is_no_reason_to_serve_old_weights(tmp_path: Path, engine: RemoteEngine) -> None:
    with pytest.raises(BrokenError):
        await Weights(NOWHERE, tmp_path, bus_limit_s=0.2).bring(engine, SECTION)
    assert said(engine, tmp_path) == []
