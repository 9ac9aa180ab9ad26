"""The weight file, the push over HTTP, and everything that must not happen to weights that serve."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from tests.unit.trainer.serving_fixtures import build_model, build_tokenizer, reference_logprobs
from trainer.serving.app import build_app
from trainer.serving.engine import Engine
from trainer.serving.errors import WeightsRefusedError, WeightUpdateError
from trainer.serving.sampling import SamplingParams
from trainer.serving.weights import (
    WeightFile,
    WeightPush,
    WeightSlots,
    checksums,
    describe_weights,
    read_weights,
    served_tensors,
    shm_directory,
    write_weights,
)

pytestmark = pytest.mark.anyio
Damage = Callable[[WeightFile, dict[str, torch.Tensor]], WeightFile]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def served() -> AsyncIterator[tuple[Engine, httpx.AsyncClient]]:
    with Engine(build_model(0), build_tokenizer(), torch_threads=1) as engine:
        transport = httpx.ASGITransport(build_app(engine, model_name="policy"))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            yield engine, client


def test_tied_weights_travel_once_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = served_tensors(build_model(3))
    assert "lm_head.weight" not in tensors
    assert "model.embed_tokens.weight" in tensors
    file = write_weights(tensors, tmp_path / "w.safetensors")
    back = read_weights(file, served_tensors(build_model(4)))
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert file.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    tied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    with pytest.raises(ValueError, match="one tensor"):
        write_weights(tied, tmp_path / "tied.safetensors")


def test_slots_take_turns_so_the_file_being_read_is_never_written(tmp_path: Path) -> None:
    slots = WeightSlots(tmp_path, "run")
    tensors = {"w": torch.ones(3)}
    first, second, third = (slots.write(tensors).path for _ in range(3))
    assert first == third != second
    slots.unlink()
    assert list(tmp_path.iterdir()) == []
    assert shm_directory().is_dir()


async def test_a_push_changes_weights_version_and_answers(
    served: tuple[Engine, httpx.AsyncClient], tmp_path: Path
) -> None:
    engine, client = served
    new = build_model(1)
    push = WeightPush(client, "http://engine")
    await push.wait_healthy(5.0)
    assert await push.current_version() == "0"
    times = await push.push(write_weights(served_tensors(new), tmp_path / "w.safetensors"), "step-1")
    assert 0 < times.standstill_ms <= times.seconds * 1e3
    assert await push.current_version() == "step-1"
    assert not engine.is_paused
    completion = await engine.generate([1, 2], SamplingParams(max_tokens=8, ignore_eos=True))
    assert completion.logprobs == pytest.approx(reference_logprobs(new, [1, 2], completion.token_ids), abs=1e-5)
    found = (await client.post("/weight_checker", json={"action": "checksum"})).json()["checksums"]
    assert found == checksums(served_tensors(new))
    compared = await client.post("/weight_checker", json={"action": "compare", "baseline": {**found, "x": "0"}})
    assert compared.json() == {"match": False, "mismatches": ["x"]}


def lose_a_name(file: WeightFile, tensors: dict[str, torch.Tensor]) -> WeightFile:
    return replace(file, names=file.names[1:], shapes=file.shapes[1:], dtype_names=file.dtype_names[1:])


def change_a_shape(file: WeightFile, tensors: dict[str, torch.Tensor]) -> WeightFile:
    return write_weights({**tensors, "model.norm.weight": torch.ones(63)}, file.path)


def change_a_dtype(file: WeightFile, tensors: dict[str, torch.Tensor]) -> WeightFile:
    return write_weights({name: tensor.bfloat16() for name, tensor in tensors.items()}, file.path)


def poison(file: WeightFile, tensors: dict[str, torch.Tensor]) -> WeightFile:
    return write_weights({**tensors, "model.norm.weight": torch.full((64,), torch.nan)}, file.path)


def overwrite(file: WeightFile, tensors: dict[str, torch.Tensor]) -> WeightFile:
    write_weights({**tensors, "model.norm.weight": torch.zeros(64)}, file.path)
    return file


def truncate(file: WeightFile, tensors: dict[str, torch.Tensor]) -> WeightFile:
    file.path.write_bytes(file.path.read_bytes()[:-100])
    return file


def remove(file: WeightFile, tensors: dict[str, torch.Tensor]) -> WeightFile:
    file.path.unlink()
    return file


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lose_a_name, "missing"),
        (change_a_shape, r"model.norm.weight is float32 \[63\], served is float32 \[64\]"),
        (change_a_dtype, "is bfloat16"),
        (poison, "NaN or infinity"),
        (overwrite, "checksum"),
        (truncate, "cannot be read"),
        (remove, "cannot be read"),
    ],
)
async def test_a_bad_update_is_refused_and_the_old_weights_keep_serving(
    served: tuple[Engine, httpx.AsyncClient], tmp_path: Path, damage: Damage, reason: str
) -> None:
    engine, client = served
    before = await engine.weight_checksums()
    tensors = served_tensors(build_model(1))
    good = write_weights(tensors, tmp_path / "w.safetensors")
    with pytest.raises(WeightsRefusedError, match=reason) as refused:
        await WeightPush(client, "http://engine").push(damage(good, tensors), "step-1")
    assert refused.value.served
    assert (await engine.weight_checksums(), engine.version, engine.is_paused) == (before, "0", False)
    again = write_weights(tensors, tmp_path / "again.safetensors")
    await WeightPush(client, "http://engine").push(again, "step-2")
    assert engine.version == "step-2"


async def test_steps_out_of_order_answer_500_and_change_nothing(
    served: tuple[Engine, httpx.AsyncClient], tmp_path: Path
) -> None:
    engine, client = served
    file = write_weights(served_tensors(build_model(1)), tmp_path / "w.safetensors")
    update = {"update_info": file.update_info()}
    assert (await client.post("/update_weights", json=update)).status_code == 500
    assert (await client.post("/finish_weight_update", json={})).status_code == 500
    assert (await client.post("/start_weight_update")).json() == {"message": "Weight update started"}
    twice = await client.post("/start_weight_update")
    assert twice.status_code == 500
    assert "already open" in twice.json()["error"]["message"]
    assert (await client.post("/finish_weight_update", json={"weight_version": "x"})).status_code == 500
    assert engine.version == "0"


async def test_a_failed_push_still_resumes_the_server() -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.path)
        if request.url.path == "/update_weights":
            return httpx.Response(500, json={"error": "disk full"})
        return httpx.Response(200, json={})

    file = WeightFile(Path("/nowhere"), [], [], [], "crc32:0", 0)
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        with pytest.raises(WeightUpdateError, match="disk full") as failed:
            await WeightPush(client, "http://engine").push(file, "v1")
    assert failed.value.served is False
    assert seen == ["/pause", "/start_weight_update", "/update_weights", "/resume"]


async def test_a_push_whose_trainer_died_midway_does_not_lock_the_next_one_out(
    served: tuple[Engine, httpx.AsyncClient], tmp_path: Path
) -> None:
    engine, client = served
    file = write_weights(served_tensors(build_model(5)), tmp_path / "w.safetensors")
    for route in ("/pause?mode=keep&clear_cache=false", "/start_weight_update"):  # …and then it was killed
        assert (await client.post(route)).status_code == 200
    push = WeightPush(client, "http://engine")
    with pytest.raises(WeightUpdateError) as failed:
        await push.push(file, "8")
    assert failed.value.served
    await push.push(file, "8")
    assert engine.version == "8" and not engine.is_paused


async def test_a_server_that_never_becomes_healthy_is_named_with_its_reason() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(503, text="loading"))
    async with httpx.AsyncClient(transport=transport) as client:
        with pytest.raises(TimeoutError, match="answered 503: loading"):
            await WeightPush(client, "http://engine").wait_healthy(0.05)


async def test_the_newest_weights_can_be_loaded_at_start_up(
    served: tuple[Engine, httpx.AsyncClient], tmp_path: Path
) -> None:
    engine, client = served
    file = write_weights(served_tensors(build_model(2)), tmp_path / "w.safetensors")
    described = describe_weights(file.path, file.checksum)
    assert json.dumps(described.update_info()) == json.dumps(file.update_info())
    with pytest.raises(WeightsRefusedError, match="announced was crc32:0"):
        engine.load_weights(describe_weights(file.path, "crc32:0"), "step-8")
    engine.load_weights(described, "step-9")
    assert (await client.get("/weight_info")).json() == {"weight_version": "step-9"}
    assert await engine.weight_checksums() == checksums(served_tensors(build_model(2)))
