"""A run that trains an adapter: what its checkpoints, pushes, records, restarted replicas and exports hold."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from lightning_bus import POLICY_WEIGHTS, CallError, Client, Conflict, RunFile, RunSection, WeightVersion
from tests.bus_fixtures import broker
from tests.unit.trainer.engine_stub import EngineStub, client_of
from tests.unit.trainer.serving_fixtures import build_model, build_tokenizer
from tests.unit.trainer.test_serving_current import engine, said  # noqa: F401 - a fixture, found by its name
from tests.unit.trainer.test_session import learn
from trainer import registry
from trainer.config import PolicySection, ServeSection, TrainSection
from trainer.optimize import checkpoint
from trainer.optimize.optimizer import Optimizer
from trainer.policy.lora import adapter_weights, add_adapter, load_adapter, merged_weights
from trainer.policy.model import load_policy, named_weights, save_policy
from trainer.rollback import export, export_adapter, roll_back
from trainer.serving.current import ServedAdapter, Weights
from trainer.serving.remote import RemoteEngine
from trainer.session import Session

pytestmark = pytest.mark.anyio

VLLM = ServeSection(engine="vllm", lora_rank_max=8)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def run_of(directory: Path, serve: ServeSection, **policy: object) -> RunFile:
    sections = {
        "run": RunSection(name="r", directory=str(directory)),
        "policy": PolicySection(model="unused", lora_rank=2, **policy),
        "serve": serve,
        "train": TrainSection(tasks="unused", held_out="unused"),
    }
    save_policy(build_model(), build_tokenizer(), directory / "r" / "policy")
    return RunFile(directory / "run.toml", sections)


@asynccontextmanager
async def a_life(run: RunFile, stub: EngineStub, address: str) -> AsyncIterator[Session]:
    async with Client(address, role="trainer") as bus, client_of(stub) as http:
        yield Session(run, bus, http, [stub.url])


def kept() -> EngineStub:
    """A vLLM whose keeper has given it the first adapter."""
    stub = EngineStub()
    stub.adapters.add("policy")
    return stub


async def known(bus: Client, number: int) -> WeightVersion:
    resource = await bus.get(POLICY_WEIGHTS, number)
    assert resource is not None
    return msgspec.msgpack.decode(resource.body, type=WeightVersion)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
async def test_an_engine_that_takes_whole_models_gets_base_and_adapter_in_one(
    tmp_path: Path, compute_dtype: str
) -> None:
    stub = EngineStub()
    run = run_of(tmp_path, ServeSection(transfer_directory=str(tmp_path / "shm")), compute_dtype=compute_dtype)
    async with broker(tmp_path / "log") as address:
        async with a_life(run, stub, address) as session:
            await session.publish()
            optimizer = Optimizer(session.model, lr=1e-2)
            for _ in range(2):
                learn(session, optimizer)
                await session.publish()
            pushed = {name: tensor.clone() for name, tensor in session._served_weights().items()}
            learnt = {name: tensor.clone() for name, tensor in adapter_weights(session.model).items()}
            versions = [await known(session.bus, number) for number in range(3)]
            assert session.fleet.current == 1 and stub.label == "2"
            exported = dict(named_weights(load_policy(session.export())))
            for name, tensor in merged_weights(session.model).items():
                assert torch.equal(exported[name], tensor.float())
        # Somebody who has only the record puts together, to the bit, what was pushed.
        for version in versions:
            found = registry.tensors_of(version, run.directory)
            assert found.keys() == pushed.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in pushed.items())
        replica = build_model(5)
        assert await Weights(address, run.directory).load_into(replica) == "2"
        assert all(torch.equal(tensor, pushed[name]) for name, tensor in named_weights(replica))
        export(run, versions[2], tmp_path / "export")
        assert all(
            torch.equal(tensor, pushed[name]) for name, tensor in named_weights(load_policy(tmp_path / "export"))
        )
        export_adapter(run, versions[2], tmp_path / "alone")
        model = add_adapter(build_model(), 2)
        load_adapter(model, tmp_path / "alone")
        assert all(torch.equal(tensor, learnt[name]) for name, tensor in adapter_weights(model).items())
        with pytest.raises(CallError, match="version 0 cannot be written as an adapter: .* was trained without one"):
            export_adapter(run, versions[0], tmp_path / "base")
        async with a_life(run, stub, address) as session:
            session.resume()
            assert all(torch.equal(tensor, learnt[name]) for name, tensor in adapter_weights(session.model).items())
    held = load_file(Path(versions[2].path))
    assert all(".lora_" in name for name in held if name.startswith("model/"))


async def test_vllm_gets_the_adapter_alone_under_the_name_that_agents_call(tmp_path: Path) -> None:
    stub = kept()
    async with broker(tmp_path / "log") as address, a_life(run_of(tmp_path, VLLM), stub, address) as session:
        await session.publish()
        learn(session, Optimizer(session.model, lr=1e-2))
        await session.publish()
        directory = Path(stub.updates[-1]["lora_path"])
        written = load_file(directory / "adapter_model.safetensors")
        expected = adapter_weights(session.model)
    steps = ["pause", "v1/load_lora_adapter", "update_weight_version", "resume"]
    # The first push proves beside it that what the replica holds did not change.
    assert [route for route in stub.calls if route in steps] == steps * 2
    assert not {"start_weight_update", "update_weights"} & set(stub.calls)
    assert [update["lora_name"] for update in stub.updates] == ["policy"] * 2
    assert stub.label == directory.name == "1"
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())


async def test_a_vllm_that_was_restarted_is_given_the_newest_adapter_and_no_other_weights(
    tmp_path: Path,
    engine: RemoteEngine,  # noqa: F811
) -> None:
    run = run_of(tmp_path, VLLM)
    async with broker(tmp_path / "log") as address, a_life(run, kept(), address) as session:
        weights = Weights(address, run.directory, adapter=ServedAdapter("policy", 2))
        await session.publish()
        assert await weights.bring(engine, VLLM) == "0"
        learn(session, Optimizer(session.model, lr=1e-2))
        await session.publish()
        config, tensors = registry.adapter_of(await known(session.bus, 1), run.directory)
        assert (config["r"], config["lora_alpha"]) == (2, 4)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in adapter_weights(session.model).items())
        assert await weights.bring(engine, VLLM) == "1"
    load, label = "/v1/load_lora_adapter", "/update_weight_version"
    # A fresh replica answers to the adapter's name from the first: with one that adds nothing.
    assert said(engine, tmp_path) == [(load, ""), (label, "0"), (load, ""), (load, ""), (label, "1")]


async def test_a_rollback_to_the_base_itself_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run = run_of(tmp_path, VLLM)
    async with broker(tmp_path / "log") as address, a_life(run, kept(), address) as session:
        await session.publish()
        for _ in range(2):
            learn(session, Optimizer(session.model, lr=1e-2))
            await session.publish()
        published = {number: await known(session.bus, number) for number in range(3)}
    before = checkpoint.latest(run.directory / "checkpoints")
    said_by_log = registry.Registry(published)
    with pytest.raises(Conflict, match="version 0 is the base that this run trains an adapter on"):
        roll_back(run.directory, said_by_log, 0)
    assert checkpoint.latest(run.directory / "checkpoints") == before
    roll_back(run.directory, said_by_log, 1)
    first, third = (load_file(checkpoint.path_of(run.directory / "checkpoints", number)) for number in (1, 3))
    assert all(torch.equal(first[name], third[name]) for name in first if name.startswith("model/"))
