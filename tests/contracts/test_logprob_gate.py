"""The log-prob gate: what an engine says of the tokens it sampled, the trainer says of them, too.

At staleness 0 the ratio of a policy gradient must be 1 on every token, whatever temperature sampled it, whatever it is
packed with and whatever attention reads it. What is off here is off in every loss, and looks like a policy that moved.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lightning_bus.adapters import Row
from tests.engines import GENERATE, NEAR, Door, generate_body, own_logprobs
from tests.reference.rows import tiny_model
from tests.unit.trainer.serving_fixtures import build_tokenizer
from trainer.data.batch import pack_rows
from trainer.policy.attention import BACKENDS
from trainer.policy.logprob import token_scores
from trainer.policy.model import load_policy
from trainer.serving.engine import Engine
from trainer.serving.sampling import SamplingParams

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(1800)]

TEMPERATURES = [0.5, 1.0, 1.3]
TEXTS = ["2+2?", "Tom has 3 apples and buys 4 more.", "Tell me a story about all of them, and take your time."]
# flex has no backward pass here, but scores; torch warns that it is slow, and of torch itself.
ON_THIS_MACHINE = ["rows", "sdpa", "flex"]


def sampled_row(prompt: list[int], ids: list[int], logprobs: list[float], temperature: float, rollout_id: str) -> Row:
    """A row as the adapters make it from a recorded call."""
    fill = [0.0] * len(prompt)
    return Row(
        rollout_id=rollout_id,
        attempt=1,
        group="g",
        token_ids=np.array(prompt + ids, dtype=np.int32),
        trained=np.array([False] * len(prompt) + [True] * len(ids)),
        logprobs=np.array(fill + logprobs, dtype=np.float32),
        temperatures=np.array([1.0] * len(prompt) + [temperature] * len(ids), dtype=np.float32),
        version_oldest=0,
        version_newest=0,
        span_ids=(bytes(8),),
    )


def assert_the_trainer_agrees(model: PreTrainedModel, rows: list[Row], backends: list[str]) -> None:
    """The trainer's log-probs of packed rows of several temperatures are those that the rows recorded."""
    assert min(float(row.logprobs.min()) for row in rows) < -3  # tokens that could as well have been others
    packs = pack_rows(rows, np.ones(len(rows)), token_budget=400)
    assert 1 < len(packs) < len(rows)
    assert any(len(set(pack.temperatures_T[pack.trained_T].tolist())) > 1 for pack in packs)
    for backend in backends:
        model.set_attn_implementation(BACKENDS[backend])
        for pack in packs:
            with torch.no_grad():
                found = token_scores(model, pack, chunk_tokens=64).logprobs_K
            recorded = pack.logprobs_T[pack.trained_T]
            torch.testing.assert_close(
                found, recorded, rtol=1e-6, atol=NEAR, msg=lambda text, b=backend: f"{b}: {text}"
            )
            assert ((found - recorded).exp() - 1).abs().max() < 3 * NEAR


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
async def test_at_staleness_0_engine_and_trainer_agree_on_every_token(door: Door) -> None:
    rows: list[Row] = []
    for temperature in TEMPERATURES:
        for text in TEXTS:
            prompt: list[int] = door.weights.tokenizer.encode(text)
            answer = await door.post(GENERATE, generate_body(prompt, temperature=temperature, max_tokens=40, n=2))
            for choice in answer["choices"]:
                logprobs = own_logprobs(choice)
                rows.append(sampled_row(prompt, choice["token_ids"], logprobs, temperature, f"r-{len(rows)}"))
    assert_the_trainer_agrees(load_policy(Path(door.weights.parrot.name_or_path)), rows, ON_THIS_MACHINE)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
async def test_they_agree_for_other_families_too(family: str) -> None:
    """With biases, and with norms of queries and keys."""
    tokenizer, rows = build_tokenizer(), []
    with Engine(tiny_model(family, attention="sdpa", vocabulary=264), tokenizer, seed=3, torch_threads=1) as engine:
        for temperature in TEMPERATURES:
            for text in TEXTS:
                prompt = tokenizer.encode(text)
                params = SamplingParams(temperature=temperature, max_tokens=40, ignore_eos=True)
                made = await engine.generate(prompt, params)
                rows.append(sampled_row(prompt, made.token_ids, made.logprobs, temperature, f"r-{len(rows)}"))
    assert_the_trainer_agrees(tiny_model(family, vocabulary=264), rows, ["rows", "sdpa"])
