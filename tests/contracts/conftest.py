"""The engines that the contract suites talk to: each is started once a session, when the first test asks for it."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import torch

from tests.engines import PATIENCE_S, Door, ServedEngine, Weights, build_parrot, load, serve_embedded, serve_vllm
from trainer.serving.push import FileTransfer
from trainer.serving.slots import WeightSlots


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    tokenizer, parrot = load(build_parrot(tmp_path_factory.mktemp("parrot")))
    other = copy.deepcopy(parrot)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.2 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    return Weights(tokenizer, parrot, other)


@pytest.fixture(scope="session", params=["embedded", pytest.param("vllm", marks=[pytest.mark.slow, pytest.mark.vllm])])
def engine(
    request: pytest.FixtureRequest, weights: Weights, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedEngine]:
    directory = Path(weights.parrot.name_or_path)
    start = {"embedded": serve_embedded, "vllm": serve_vllm}[request.param]
    with start(directory, tmp_path_factory.mktemp("log") / "engine.log") as running:
        yield running


@pytest.fixture
async def door(engine: ServedEngine, weights: Weights, tmp_path: Path) -> AsyncIterator[Door]:
    transfer = FileTransfer(WeightSlots(tmp_path, "contract"))
    limits = httpx.Limits(max_connections=200)
    # Closed after each answer: see RemoteEngine.
    headers = {"Connection": "close"}
    async with httpx.AsyncClient(base_url=engine.url, timeout=PATIENCE_S, limits=limits, headers=headers) as client:
        opened = Door(engine, client, weights, transfer)
        label = await opened.control.label()
        yield opened
        # Whatever a test left behind is put right for the next one: the engine goes on, and serves the parrot.
        await opened.control.resume()
        if await opened.control.label() != label:
            await opened.push(weights.parrot)
    transfer.close()
