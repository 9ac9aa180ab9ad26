"""The engine against an obvious reference: one plain forward pass over prompt and response."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.unit.trainer.serving_fixtures import (
    build_model,
    build_tokenizer,
    reference_logprobs,
    stand_still_after,
    until,
)
from trainer.serving.engine import Engine
from trainer.serving.errors import BadRequestError, EngineFailedError, QueueFullError
from trainer.serving.request import Completion, Delta
from trainer.serving.sampling import SamplingParams
from trainer.serving.slots import write_weights
from trainer.serving.weights import served_tensors

pytestmark = pytest.mark.anyio
TOLERANCE = 3e-5  # who shares a batch depends on threads, and with it in which order float32 adds


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def model() -> LlamaForCausalLM:
    return build_model()


@pytest.fixture
def engine(model: LlamaForCausalLM) -> Iterator[Engine]:
    with Engine(model, build_tokenizer(), seed=7, rows_max=8, retained_max=4, torch_threads=1) as running:
        yield running


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of mixed length; every third continues one common beginning, as agents' prompts do."""
    rng = random.Random(seed)
    common = [rng.randrange(256) for _ in range(70)]
    lengths = [rng.choice([1, 3, 17, 40, 130]) for _ in range(count)]
    return [(common if at % 3 == 0 else []) + [rng.randrange(256) for _ in range(n)] for at, n in enumerate(lengths)]


def worst(model: LlamaForCausalLM, prompt: list[int], completion: Completion, temperature: float) -> float:
    reference = reference_logprobs(model, prompt, completion.token_ids, temperature)
    return max(abs(a - b) for a, b in zip(reference, completion.logprobs, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
async def test_logprobs_equal_a_reference_forward_while_rows_join_and_leave(
    engine: Engine, model: LlamaForCausalLM, temperature: float
) -> None:
    lengths = [1, 5, 23, 60]

    async def one(at: int, prompt: list[int]) -> float:
        params = SamplingParams(temperature=temperature, max_tokens=lengths[at % 4], ignore_eos=True)
        completion = await engine.generate(prompt, params)
        assert len(completion.token_ids) == lengths[at % 4]
        return worst(model, prompt, completion, temperature)

    # 30 requests of different lengths through 8 rows: the batch changes at almost every step.
    differences = await asyncio.gather(*(one(at, prompt) for at, prompt in enumerate(prompts(30))))
    assert max(differences) < TOLERANCE
    assert engine.statistics().prefix_tokens_reused > 0


async def test_batched_tokens_equal_one_at_a_time_tokens(engine: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24)
    together = await asyncio.gather(*(engine.generate(prompt, params) for prompt in prompts(12)))
    alone = [await engine.generate(prompt, params, cache_salt=str(at)) for at, prompt in enumerate(prompts(12))]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


async def test_a_seed_gives_the_same_tokens_in_any_company(engine: Engine) -> None:
    seeded = SamplingParams(seed=11, max_tokens=20)
    alone = await engine.generate([1, 2, 3], seeded)
    crowd = [engine.generate(prompt, SamplingParams(max_tokens=30)) for prompt in prompts(10)]
    accompanied, *_ = await asyncio.gather(engine.generate([1, 2, 3], seeded), *crowd)
    assert accompanied.token_ids == alone.token_ids


async def test_the_end_token_is_part_of_the_ids_with_its_logprob(engine: Engine, model: LlamaForCausalLM) -> None:
    completions = await asyncio.gather(
        *(engine.generate([5, 6], SamplingParams(temperature=1.5, max_tokens=400)) for _ in range(8))
    )
    ended = [c for c in completions if c.finish_reason == "stop"]
    assert ended
    for completion in ended:
        assert completion.token_ids[-1] == 257
        assert 257 not in completion.token_ids[:-1]
        assert worst(model, [5, 6], completion, 1.5) < TOLERANCE


async def test_truncated_sampling_stays_inside_the_kept_set_and_renormalises(engine: Engine) -> None:
    params = SamplingParams(top_k=2, max_tokens=30, ignore_eos=True, top_logprobs=3)
    completion = await engine.generate([9, 8, 7], params)
    for logprob, top in zip(completion.logprobs, completion.top_logprobs, strict=True):
        kept = [value for _, value in top[:2]]
        assert logprob in kept
        assert sum(torch.tensor(kept).exp().tolist()) == pytest.approx(1.0, abs=1e-5)
        assert top[2][1] == -torch.inf
    nearly_greedy = await engine.generate([9, 8, 7], SamplingParams(top_p=1e-6, max_tokens=10))
    greedy = await engine.generate([9, 8, 7], SamplingParams(temperature=0.0, max_tokens=10))
    assert nearly_greedy.token_ids == greedy.token_ids


async def test_sampled_frequencies_follow_the_model(engine: Engine, model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        expected = model(torch.tensor([[4, 2]])).logits[0, -1].softmax(-1)
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    completions = await asyncio.gather(*(engine.generate([4, 2], params) for _ in range(800)))
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=264) / 800
    assert (counts - expected).abs().max() < 0.06  # over 3 standard deviations of the likeliest token


async def test_a_stop_string_ends_the_text_and_keeps_the_ids(engine: Engine) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    free = await engine.generate([65, 66], greedy)
    text = build_tokenizer().decode(free.token_ids)
    stop = next(letter for letter in text[3:] if letter.isascii() and letter.isprintable())
    stopped = await engine.generate(
        [65, 66], SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, stop=(stop,))
    )
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert build_tokenizer().decode(stopped.token_ids).endswith(stop)
    assert len(stopped.token_ids) < 40


async def test_a_weight_swap_in_flight_splits_the_versions_and_each_part_keeps_its_weights(
    engine: Engine, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    old, new = build_model(0), build_model(1)
    file = write_weights(served_tensors(new), tmp_path / "w.safetensors", "step-1")
    prompt = [3, 1, 4, 1, 5]
    stand_still_after(engine, 20)
    stream = engine.stream(prompt, SamplingParams(max_tokens=60, ignore_eos=True))
    completion = await swapped_at(engine, stream, 20, file)

    first, second = completion.weight_versions
    assert (first.version, first.start, second.version, second.end) == ("0", 0, "step-1", 60)
    assert first.end == second.start == 20
    cut = first.end
    before = reference_logprobs(old, prompt, completion.token_ids[:cut])
    assert completion.logprobs[:cut] == pytest.approx(before, abs=TOLERANCE)
    # Keys and values of the first part stay: the second part is the new weights over the old ones' cache.
    mixed = mixed_logprobs(old, new, prompt + completion.token_ids, len(prompt) + cut - 1)
    assert completion.logprobs[cut:] == pytest.approx(mixed[-(60 - cut) :], abs=TOLERANCE)

    # A later request owes nothing to the old weights, although its prompt was computed under them.
    after = await engine.generate(prompt + completion.token_ids, SamplingParams(max_tokens=5))
    assert after.weight_versions[0].version == "step-1"
    assert worst(new, prompt + completion.token_ids, after, 1.0) < TOLERANCE


async def swapped_at(
    engine: Engine, stream: AsyncIterator[Delta | Completion], tokens: int, file: object
) -> Completion:
    seen = 0
    async for item in stream:
        if isinstance(item, Completion):
            return item
        seen += 1
        if seen == tokens:
            await until(lambda: engine.is_paused)
            engine.start_weight_update()
            await engine.update_weights(file)  # type: ignore[arg-type]
            await engine.finish_weight_update("step-1")
            await engine.resume()
    raise AssertionError("the stream ended without a completion")


@torch.no_grad()
def mixed_logprobs(old: LlamaForCausalLM, new: LlamaForCausalLM, ids: list[int], cut: int) -> list[float]:
    """Log-probs of ids[cut+1:] by `new`, which sees ids[:cut] through the keys and values that `old` made of them."""
    cache = old(torch.tensor([ids[:cut]]), use_cache=True).past_key_values
    logits = new(torch.tensor([ids[cut:-1]]), past_key_values=cache).logits[0]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[cut + 1 :])[:, None]).squeeze(-1).tolist()


async def test_pause_and_resume_lose_no_request(engine: Engine, model: LlamaForCausalLM) -> None:
    running = [
        asyncio.ensure_future(engine.generate(prompt, SamplingParams(max_tokens=30, ignore_eos=True)))
        for prompt in prompts(20)
    ]
    for _ in range(10):
        await asyncio.sleep(0)
        await engine.pause("keep")
        steps = engine.statistics().steps
        assert engine.is_paused
        await engine.weight_checksums()  # a command passes through the engine's thread, a step does not
        assert engine.statistics().steps == steps
        await engine.resume()
    completions = await asyncio.gather(*running)
    for prompt, completion in zip(prompts(20), completions, strict=True):
        assert len(completion.token_ids) == 30
        assert worst(model, prompt, completion, 1.0) < TOLERANCE


async def test_pause_wait_finishes_what_runs_and_pause_abort_gives_it_back(engine: Engine) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    stream = engine.stream([1], params)
    await anext(stream)
    await engine.pause("wait")
    waiting = asyncio.ensure_future(engine.generate([2], params))
    items = [item async for item in stream]
    assert isinstance(items[-1], Completion)
    assert len(items[-1].token_ids) == 40
    assert not waiting.done()
    await engine.pause("abort")
    assert (await waiting).finish_reason == "abort"
    await engine.resume()
    assert len((await engine.generate([3], params)).token_ids) == 40


async def test_cancelling_frees_the_slot(engine: Engine) -> None:
    endless = [
        asyncio.ensure_future(engine.generate([at], SamplingParams(max_tokens=500, ignore_eos=True))) for at in range(8)
    ]
    stream = engine.stream([9], SamplingParams(max_tokens=3, ignore_eos=True))
    await asyncio.sleep(0)
    for task in endless[:4]:
        task.cancel()
    assert [item async for item in stream]  # all eight rows were taken; it ran because four were given back
    for task in endless[4:]:
        task.cancel()
    await asyncio.gather(*endless, return_exceptions=True)
    await engine.weight_checksums()
    assert engine.statistics().running == 0


async def test_a_full_queue_refuses_with_a_time_to_come_back(model: LlamaForCausalLM) -> None:
    with Engine(model, build_tokenizer(), waiting_max=2) as engine:
        await engine.pause("keep")
        params = SamplingParams(max_tokens=2)
        queued = [asyncio.ensure_future(engine.generate([1], params)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="waiting_max=2") as refused:
            await engine.generate([1], params)
        assert refused.value.retry_after_s == 1
        await engine.resume()
        assert len(await asyncio.gather(*queued)) == 2


async def test_a_failing_step_loses_its_requests_and_the_engine_goes_on(
    engine: Engine, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> object:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", broken)
        for healthy_after in (True, True, False):
            with pytest.raises(EngineFailedError, match="out of memory"):
                await engine.generate([1, 2], SamplingParams(max_tokens=3))
            assert engine.healthy is healthy_after
    completion = await engine.generate([1, 2], SamplingParams(max_tokens=3, ignore_eos=True))
    assert worst(model, [1, 2], completion, 1.0) < TOLERANCE
    assert engine.healthy


async def test_what_does_not_fit_is_refused_with_the_limit(engine: Engine) -> None:
    with pytest.raises(BadRequestError, match="maximum context length is 512"):
        await engine.generate([1] * 500, SamplingParams(max_tokens=13))
    with pytest.raises(BadRequestError, match="run from 0 to 263"):
        await engine.generate([264], SamplingParams())
    with pytest.raises(BadRequestError, match="no tokens"):
        await engine.generate([], SamplingParams())
    with pytest.raises(BadRequestError, match="temperature is -1"):
        SamplingParams(temperature=-1)
    full = await engine.generate([1] * 500, SamplingParams(ignore_eos=True))
    assert (len(full.token_ids), full.finish_reason) == (12, "length")


async def test_closing_ends_what_is_in_flight_with_an_error(model: LlamaForCausalLM) -> None:
    engine = Engine(model, build_tokenizer())
    stand_still_after(engine, 1)
    stream = engine.stream([1], SamplingParams(max_tokens=400, ignore_eos=True))
    await anext(stream)
    await asyncio.to_thread(engine.close)
    with pytest.raises(EngineFailedError, match="closed"):
        async for _ in stream:
            pass
    with pytest.raises(EngineFailedError, match="closed"):
        await engine.generate([1], SamplingParams())


def test_a_window_the_cache_cannot_hold_is_refused() -> None:
    model = build_model()
    model.config.sliding_window = 64
    with pytest.raises(ValueError, match="sliding_window=64"):
        Engine(model, build_tokenizer())
