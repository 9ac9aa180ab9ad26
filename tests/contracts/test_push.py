"""Pushes that go wrong, and what is left afterwards: the embedded engine and vLLM with our plugin, as real processes.

What this file leaves unwatched: engines that are killed while a push is under way, which tests/journeys has.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import torch

from tests.engines import (
    PATIENCE_S,
    ServedEngine,
    build_parrot,
    check_logprobs,
    generate_body,
    load,
    own_logprobs,
    reference_logprobs_TV,
    serve_embedded,
    serve_vllm,
    spans,
)
from tests.unit.trainer.test_serving_weights import Damage, change_a_shape, flip_a_bit, lose_a_name, overwrite, remove
from trainer.policy.lora import write_adapter
from trainer.policy.model import named_weights
from trainer.serving.adapters import push_adapter
from trainer.serving.errors import WeightsRefusedError, WeightUpdateError
from trainer.serving.fleet import Fleet
from trainer.serving.proof import CONTINUATION, differences, evidence
from trainer.serving.push import FileOffer, FileTransfer, PushTimes, Target, push
from trainer.serving.remote import RemoteEngine
from trainer.serving.slots import WeightDirectory, WeightSlots

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(1800)]
PROMPT = list(range(5, 21))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_parrot(tmp_path_factory.mktemp("parrot"))


@pytest.fixture(scope="module", params=["embedded", pytest.param("vllm", marks=pytest.mark.vllm)])
def served(
    request: pytest.FixtureRequest, directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedEngine]:
    start = {"embedded": serve_embedded, "vllm": partial(serve_vllm, lora_rank_max=8)}[request.param]
    with start(directory, tmp_path_factory.mktemp("log") / "engine.log") as running:
        yield running


@pytest.fixture
async def engine(served: ServedEngine) -> AsyncIterator[RemoteEngine]:
    async with httpx.AsyncClient() as client:
        yield RemoteEngine(client, served.url, limit_s=PATIENCE_S)


@pytest.fixture
def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in named_weights(load(directory)[1])}


def changed(weights: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    return {name: tensor * factor if "norm" in name else tensor for name, tensor in weights.items()}


async def expected(directory: Path, weights: dict[str, torch.Tensor]) -> float:
    """The log-prob of the likeliest next token, by a plain forward pass."""
    model = load(directory)[1]
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        return float(model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1).max())


async def answered(engine: RemoteEngine) -> float:
    [(_, logprob)] = await engine.sample(PROMPT, 1, salt=os.urandom(4).hex())
    return logprob


async def test_the_first_push_of_what_is_served_changes_nothing_and_a_second_one_does(
    engine: RemoteEngine, directory: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    before = await evidence(engine)
    fleet = Fleet([engine], FileTransfer(WeightSlots(tmp_path, "run")))
    for version, factor in (("0", 1.0), ("1", 1.25), ("2", 0.8)):
        await fleet.prepare(changed(weights, factor), version)
        assert (await fleet.push()).current == 1
        assert await engine.label() == version
        assert bool(await differences(engine, before)) == (factor != 1.0)
        assert await answered(engine) == pytest.approx(await expected(directory, changed(weights, factor)), abs=1e-4)
    fleet.close()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lose_a_name, "missing|does not hold what was announced"),
        (change_a_shape, "shape|float32"),
        (flip_a_bit, "has checksum"),
        (overwrite, "is stamped"),
        (remove, "cannot be read"),
    ],
)
async def test_a_refused_push_leaves_the_old_weights_serving_and_the_door_open(
    engine: RemoteEngine, weights: dict[str, torch.Tensor], tmp_path: Path, damage: Damage, reason: str
) -> None:
    store = WeightDirectory(tmp_path, "run")
    label, before = await engine.label(), await evidence(engine)
    good = store.write(weights, "8").with_checksum()
    result = (await push(FileOffer(store, damage(good, weights)), [Target(engine)]))[engine.url]
    assert isinstance(result, WeightsRefusedError) and result.served
    with pytest.raises(WeightsRefusedError, match=reason):
        raise result
    assert (await engine.label(), await engine.is_paused(), await differences(engine, before)) == (label, False, [])
    again = FileTransfer(store).offer(weights, "9")
    assert isinstance((await push(again, [Target(engine)]))[engine.url], PushTimes)


@pytest.mark.parametrize("died_after", ["start", "update", "pause"])
async def test_a_trainer_that_died_in_a_push_does_not_lock_the_next_one_out(
    engine: RemoteEngine, directory: Path, weights: dict[str, torch.Tensor], tmp_path: Path, died_after: str
) -> None:
    label, before = await engine.label(), await evidence(engine)
    left = FileTransfer(WeightSlots(tmp_path, "left")).offer(changed(weights, 3.0), "66")
    await engine.start()
    if died_after != "start":
        await engine.update(left.update_info(Target(engine)))
    if died_after == "pause":
        await engine.pause()
    else:
        assert (await engine.label(), await differences(engine, before)) == (label, [])
    offer = FileTransfer(WeightSlots(tmp_path, "run")).offer(changed(weights, 1.5), "10")
    assert isinstance((await push(offer, [Target(engine)]))[engine.url], PushTimes)
    assert (await engine.label(), await engine.is_paused()) == ("10", False)
    assert await answered(engine) == pytest.approx(await expected(directory, changed(weights, 1.5)), abs=1e-4)


async def test_only_the_layers_that_changed_are_loaded(
    engine: RemoteEngine, directory: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    transfer = FileTransfer(WeightSlots(tmp_path, "run"))
    frozen = {name for name in weights if "layers.1." not in name}
    await push(transfer.offer(weights, "20", frozen=frozen), [Target(engine)])
    for version, factor in (("21", 1.25), ("22", 0.8)):
        now = {name: tensor if name in frozen else tensor * factor for name, tensor in weights.items()}
        offer = transfer.offer(now, version, frozen=frozen)
        target = Target(engine, base=str(int(version) - 1))
        assert set(offer.update_info(target)["names"]) == weights.keys() - frozen
        assert isinstance((await push(offer, [target]))[engine.url], PushTimes)
        assert await answered(engine) == pytest.approx(await expected(directory, now), abs=1e-4)
    refused = (await push(offer, [Target(engine, base="20")]))[engine.url]
    assert isinstance(refused, WeightsRefusedError)


async def test_an_adapter_is_pushed_in_place_of_the_one_before(
    engine: RemoteEngine, served: ServedEngine, directory: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    if served.kind == "embedded":  # it serves whole models: an adapter is refused, and it goes on
        with pytest.raises(WeightsRefusedError, match="404"):
            await push_adapter(engine, "policy-lora", tmp_path, "41")
        assert not await engine.is_paused() and await engine.health()
        return
    await push(FileTransfer(WeightSlots(tmp_path, "run")).offer(weights, "40"), [Target(engine)])
    for version, seed in (("41", 0), ("42", 1)):
        merged = write_random_adapter(tmp_path / version, weights, seed)
        times = await push_adapter(engine, "policy-lora", tmp_path / version, version)
        assert times.standstill_ms > 0 and await engine.label() == version
        sampling = {"max_tokens": 1, "temperature": 0, "logprobs": 0}
        text = {"model": "policy-lora", "prompt": PROMPT, "cache_salt": version, **sampling}
        ids = {"model": "policy-lora", "token_ids": PROMPT, "cache_salt": version, "sampling_params": sampling}
        async with httpx.AsyncClient(timeout=PATIENCE_S, base_url=served.url) as client:
            completed = (await client.post("/v1/completions", json=text)).json()["choices"][0]
            generated = (await client.post("/inference/v1/generate", json=ids)).json()["choices"][0]
        found = [completed["logprobs"]["token_logprobs"][0], generated["logprobs"]["content"][0]["logprob"]]
        assert found == pytest.approx([await expected(directory, merged)] * 2, abs=1e-3)
        assert [span["version"] for span in generated["weight_versions"]] == [version]
    assert await answered(engine) == pytest.approx(await expected(directory, weights), abs=1e-4)
    # No checksum covers an adapter, so that another one is in its place shows in what it says.
    assert await engine.adapters() == ["policy-lora"]
    second = await evidence(engine)
    await push_adapter(engine, "policy-lora", tmp_path / "42", "42")
    assert await differences(engine, second) == []
    await push_adapter(engine, "policy-lora", tmp_path / "41", "41")
    assert await differences(engine, second) == [CONTINUATION]


async def test_an_answer_under_way_is_one_adapters_from_end_to_end(
    engine: RemoteEngine, served: ServedEngine, directory: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    if served.kind == "embedded":
        return  # it has no adapters, see above
    await push(FileTransfer(WeightSlots(tmp_path, "run")).offer(weights, "50"), [Target(engine)])
    model = load(directory)[1]
    model.load_state_dict(write_random_adapter(tmp_path / "51", weights, 0), strict=False)
    write_random_adapter(tmp_path / "52", weights, 1)
    await push_adapter(engine, "policy-lora", tmp_path / "51", "51")
    body = {**generate_body(PROMPT, max_tokens=400), "model": "policy-lora", "cache_salt": "51", "stream": True}
    parts: list[dict[str, Any]] = []
    async with (
        httpx.AsyncClient(timeout=PATIENCE_S) as client,
        anyio.create_task_group() as pushing,
        client.stream("POST", f"{served.url}/inference/v1/generate", json=body) as response,
    ):
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                if not parts:
                    pushing.start_soon(push_adapter, engine, "policy-lora", tmp_path / "52", "52")
                parts += json.loads(line.removeprefix("data: "))["choices"]
    assert await engine.label() == "52"
    token_ids: list[int] = [token for part in parts for token in part["token_ids"]]
    assert len(token_ids) == 400
    assert spans(parts[-1]) == [("51", 0, 400)]
    logprobs = [logprob for part in parts for logprob in own_logprobs(part)]
    check_logprobs(reference_logprobs_TV([(model, token_ids)], PROMPT, 1.0), token_ids, logprobs, near=1e-3)


def write_random_adapter(adapter: Path, weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Write an adapter of one matrix, and return the whole model's weights with it."""
    name = "model.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(4, 192, generator=generator), torch.randn(192, 4, generator=generator)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    prefix = f"base_model.model.{name}"
    write_adapter(adapter, config, {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up})
    return {**weights, f"{name}.weight": weights[f"{name}.weight"] + 8 / 4 * up @ down}


async def test_a_file_that_changes_before_it_is_loaded_makes_the_replica_unfit(
    engine: RemoteEngine, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    slots = WeightSlots(tmp_path, "run")
    offer = FileTransfer(slots).offer(weights, "30")

    class Careless(FileOffer):
        async def carry(self, updates):  # type: ignore[no-untyped-def]
            failures = await super().carry(updates)
            slots.give_back(self.file, engine.url)
            for version in ("31", "32"):
                slots.write(weights, version)
            return failures

    result = (await push(Careless(slots, replace(offer.file)), [Target(engine)]))[engine.url]
    assert isinstance(result, WeightUpdateError) and not result.served
    assert (await engine.label(), await engine.is_paused()) == ("unfit", True)
    # Its keeper would end it now. Nothing had been overwritten yet, so this one can be opened again for other tests.
    await engine.resume()
    await engine.set_label("30")
