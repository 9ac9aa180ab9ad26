"""What a run has published can be listed, found and pinned, from the bus and from its log."""

from __future__ import annotations

from pathlib import Path

import anyio
import msgspec
import pytest
import torch

from lightning_bus import POLICY_PINS, POLICY_WEIGHTS, Client, Conflict, NotFound, Resource, WeightVersion
from tests.bus_fixtures import BrokerProcess, broker
from tests.unit.trainer.serving_fixtures import build_model, build_tokenizer
from trainer.optimize import checkpoint
from trainer.optimize.optimizer import Optimizer
from trainer.policy.model import named_weights, save_policy
from trainer.registry import (
    PAGE,
    files_to_keep,
    find_file,
    get,
    newest,
    pin,
    pinned,
    read_bus,
    read_log,
    tensors_of,
    unpin,
    versions,
)
from trainer.serving.weights import weights_checksum

pytestmark = pytest.mark.anyio


def version(number: int, path: str = "", **fields: object) -> WeightVersion:
    known = {"parent": number - 1 if number else None, "phase": "rl", "step": number, "checksum": "c"}
    return WeightVersion(version=number, path=path, **{**known, **fields})  # pyright: ignore[reportArgumentType]


async def put(bus: Client, *published: WeightVersion) -> None:
    async with anyio.create_task_group() as tasks:
        for one in published:
            tasks.start_soon(bus.put, Resource(POLICY_WEIGHTS, one.version, msgspec.msgpack.encode(one)))


async def test_versions_come_oldest_first_however_many_and_past_numbers_that_were_never_published(
    tmp_path: Path,
) -> None:
    async with broker(tmp_path / "log") as address, Client(address) as bus:
        assert await newest(bus) is None
        assert await versions(bus) == []
        await put(bus, *(version(number) for number in range(PAGE + 3) if number != 7))
        assert [one.version for one in await versions(bus)] == [n for n in range(PAGE + 3) if n != 7]
        assert [one.version for one in await versions(bus, last=3)] == [PAGE, PAGE + 1, PAGE + 2]
        latest = await newest(bus)
        assert latest is not None
        assert latest == await get(bus, PAGE + 2)


async def test_a_version_that_was_never_published_is_told_apart(tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address, Client(address) as bus:
        with pytest.raises(NotFound, match="no weight version 3: none is published yet"):
            await get(bus, 3)
        await put(bus, version(0), version(1))
        for number in (2, -1):
            with pytest.raises(NotFound, match=f"no weight version {number}: there are versions up to 1"):
                await get(bus, number)
        with pytest.raises(NotFound, match="no weight version 9"):
            await pin(bus, 9)
        assert await pinned(bus) == frozenset()


async def test_pins_are_a_history_of_lists_and_pinning_again_adds_nothing(tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address, Client(address) as bus:
        await put(bus, *(version(number) for number in range(3)))
        assert [await pin(bus, 2), await pin(bus, 0), await pin(bus, 2)] == [True, True, False]
        assert await pinned(bus) == {0, 2}
        assert [await unpin(bus, 2), await unpin(bus, 2)] == [True, False]
        assert await pinned(bus) == {0}
        history = [await bus.get(POLICY_PINS, number) for number in range(4)]
        told = [msgspec.msgpack.decode(one.body)["versions"] for one in history if one is not None]
        assert told == [[2], [0, 2], [0]]


async def test_pins_that_are_set_at_once_are_all_kept(tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address, Client(address) as one, Client(address) as other:
        await put(one, *(version(number) for number in range(8)))
        async with anyio.create_task_group() as tasks:
            for number in range(8):
                tasks.start_soon(pin, one if number % 2 else other, number)
        assert await pinned(one) == set(range(8))


async def test_a_version_whose_file_is_gone_cannot_be_pinned(tmp_path: Path) -> None:
    async with broker(tmp_path / "log") as address, Client(address) as bus:
        await put(bus, version(0, path=str(tmp_path / "checkpoints" / "step-00000001.safetensors")))
        with pytest.raises(Conflict, match="version 0 cannot be kept: .*step-00000001.safetensors is gone"):
            await pin(bus, 0, tmp_path)
        assert await pinned(bus) == frozenset()


async def test_retention_leaves_what_is_pinned_and_what_is_newest(tmp_path: Path) -> None:
    model = build_model()
    paths = [
        checkpoint.save(tmp_path / "checkpoints", number, model, Optimizer(model, lr=1e-2), {"version": number})
        for number in range(1, 7)
    ]
    async with broker(tmp_path / "log") as address, Client(address) as bus:
        # The newest version is three checkpoints back: steps without anything to learn from make no version.
        await put(bus, *(version(number, path=str(paths[number - 1])) for number in range(1, 4)))
        await pin(bus, 1, tmp_path)
        checkpoint.drop_old(tmp_path / "checkpoints", 2, await files_to_keep(bus, tmp_path))
        assert sorted((tmp_path / "checkpoints").iterdir()) == [paths[0], paths[2], *paths[4:]]
        await unpin(bus, 1)
        checkpoint.drop_old(tmp_path / "checkpoints", 2, await files_to_keep(bus, tmp_path))
        assert sorted((tmp_path / "checkpoints").iterdir()) == [paths[2], *paths[4:]]


async def test_the_log_of_a_run_tells_what_its_bus_told(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path / "log") as process:
        async with Client(process.address) as bus:
            await put(bus, *(version(number) for number in range(5)))
            await pin(bus, 1)
            told = await read_bus(bus)
            assert read_log(tmp_path) == told
            assert list((await read_bus(bus, last=2)).versions) == [1, 3, 4]
            await unpin(bus, 1)
    told = read_log(tmp_path)
    assert (list(told.versions), told.pins) == ([0, 1, 2, 3, 4], frozenset())
    assert told.newest == told.get(4)
    with pytest.raises(NotFound, match="no weight version 5"):
        told.get(5)


async def test_the_weights_of_a_version_come_from_its_checkpoint_or_its_model_directory(tmp_path: Path) -> None:
    first, second = build_model(0), build_model(1)
    save_policy(first, build_tokenizer(), tmp_path / "policy")
    path = checkpoint.save(tmp_path / "checkpoints", 1, second, Optimizer(second, lr=1e-2), {"version": 1})
    for model, one in (
        (first, version(0, path=str(tmp_path / "policy"))),
        (second, version(1, path=str(path))),
        (second, version(1, path="/elsewhere/checkpoints/step-00000001.safetensors")),  # the run was moved
    ):
        found, expected = tensors_of(one, tmp_path), dict(named_weights(model))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


async def test_a_model_directory_that_was_changed_since_is_refused(tmp_path: Path) -> None:
    model = build_model(0)
    checksum = weights_checksum(dict(named_weights(model)))
    save_policy(model, build_tokenizer(), tmp_path / "policy")
    one = version(0, path=str(tmp_path / "policy"), checksum=checksum)
    assert tensors_of(one).keys() == dict(named_weights(model)).keys()
    save_policy(build_model(1), build_tokenizer(), tmp_path / "policy")
    with pytest.raises(ValueError, match=f"version 0 was published with {checksum}: it was changed"):
        tensors_of(one)


async def test_a_file_of_another_version_or_none_is_refused(tmp_path: Path) -> None:
    model = build_model()
    path = checkpoint.save(tmp_path / "checkpoints", 1, model, Optimizer(model, lr=1e-2), {"version": 1})
    with pytest.raises(ValueError, match="holds version 1, not 2"):
        tensors_of(version(2, path=str(path)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        tensors_of(version(1, path=str(path)))
    path.unlink()
    with pytest.raises(NotFound, match="weights of version 1 are gone: .*Pin versions that are to stay"):
        tensors_of(version(1, path=str(path)), tmp_path)
    assert find_file(version(1)) is None
