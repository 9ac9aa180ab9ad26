"""How many tokens a second does the embedded engine sample, beside vLLM on the same CPU and `model.generate`?

Measures, on one machine in one run and in turns: tokens/s at 1, 16 and 64 concurrent requests through the embedded
engine and through vLLM, each as `lightning-bus serve` starts it, over the same HTTP route (/inference/v1/generate) and
from the same client; through Engine.generate in this process, without HTTP; and through `model.generate`, one request
at a time. The same random Llamas and the same prompts for all: 20 to 120 ids, half of them sharing a beginning, 32 to 64
tokens each, sampled at temperature 1. Every engine computes with one thread and may use all cores besides; only one of
them works at a time.

    make vllm
    python -m bench.engine --json          about ten minutes; the last line is one JSON object
    python -m bench.engine --sizes 3M      one shape only
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench import common
from lightning_bus import ConfigError
from trainer.config import ServeSection
from trainer.serving.engine import Engine
from trainer.serving.sampling import SamplingParams
from trainer.serving.vllm import find_vllm, vllm_launch

VOCABULARY = 1024
CONTEXT_TOKENS = 512
CONCURRENCIES = (1, 16, 64)
SIZES = {"1M": (128, 4), "3M": (192, 6), "8M": (320, 6)}  # name: width, layers
THREADS = 1  # of each engine's computing; the trainer wants the other core
START_LIMIT_S = 300.0

FLOOR_TOKENS_PER_S = 1500  # at 64 concurrent requests, on the shape of 3M
FLOOR_RATIO_VLLM = 1.0  # at any concurrency, under 10M parameters
FLOOR_RATIO_16 = 3.0  # 16 at once through Engine.generate, against model.generate one by one

Job = tuple[list[int], int]  # prompt ids, tokens wanted


def main() -> None:
    parser = common.parser(__doc__, seconds=0.0, runs=3)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    options = common.parse(parser)
    torch.set_num_threads(THREADS)
    with common.workspace(options.dir) as directory:
        results = {size: measure(size, directory, options.runs) for size in options.sizes}
        host = common.machine(directory)
    judged = results.get("3M", results[options.sizes[0]])
    least = min((ratio for result in results.values() for ratio in result.get("ratio_vllm", {}).values()), default=None)
    summary = {
        "bench": "engine",
        "machine": host,
        "torch": torch.__version__,
        "threads": THREADS,
        "n": options.runs,
        "tokens_per_s_64": judged["tokens_per_s"]["embedded"]["64"],
        "tokens_per_s_64_floor": FLOOR_TOKENS_PER_S,
        "ratio_vllm_least": least,
        "ratio_vllm_floor": FLOOR_RATIO_VLLM,
        "ratio_16": judged["ratio_16"],
        "ratio_16_floor": FLOOR_RATIO_16,
        "ok": judged["tokens_per_s"]["embedded"]["64"] >= FLOOR_TOKENS_PER_S
        and judged["ratio_16"] >= FLOOR_RATIO_16
        and (least is None or least >= FLOOR_RATIO_VLLM),
        "sizes": results,
    }
    common.finish(summary, options.json)


def measure(size: str, workspace: Path, runs: int) -> dict[str, Any]:
    directory = workspace / size
    model, tokenizer = build(directory, *SIZES[size])
    with ExitStack() as stack:
        said: dict[str, Any] = {}
        urls = {"embedded": stack.enter_context(serving(embedded_command(directory)))}
        try:
            urls["vllm"] = stack.enter_context(serving(vllm_command(directory)))
        except ConfigError as exc:
            said["vllm_left_out"] = str(exc)
            print(f"{size}: vLLM is left out. {exc}", file=sys.stderr)
        engine = stack.enter_context(Engine(model, tokenizer, torch_threads=THREADS, seed=0))
        samples: dict[str, dict[str, list[float]]] = {name: {} for name in (*urls, "in_process", "generate")}
        for run in range(-1, runs):  # the first only warms up: compilers, caches, the processor's clock
            if run == 0:
                samples = {name: {} for name in samples}
            samples["generate"].setdefault("1", []).append(through_generate(model, requests(8, seed=run)))
            for concurrency in CONCURRENCIES:
                jobs = requests(max(8, 4 * concurrency), seed=1000 * concurrency + run)
                turns = {name: http_rate(url, concurrency, jobs) for name, url in urls.items()}
                turns["in_process"] = in_process_rate(engine, concurrency, jobs)
                for name in sorted(turns, reverse=bool(run % 2)):
                    samples[name].setdefault(str(concurrency), []).append(asyncio.run(turns[name]()))
    if "vllm" in urls:
        said["ratio_vllm"] = _ratios(samples["embedded"], samples["vllm"])
    said["ratio_16"] = _ratio(samples["in_process"]["16"], samples["generate"]["1"])
    medians = {name: {at: round(statistics.median(v)) for at, v in by.items()} for name, by in samples.items()}
    print(f"{size}: {medians} tokens/s; against vLLM {said.get('ratio_vllm')}", file=sys.stderr)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_per_s": medians,
        "spread": {name: {at: common.spread(v) for at, v in by.items()} for name, by in samples.items()},
        **said,
    }


def build(directory: Path, width: int, layers: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Write a model directory that all engines load, and return what is in it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    names = {str(at): at for at in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(names, unk_token="0")), eos_token="0")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model, tokenizer


def requests(count: int, seed: int) -> list[Job]:
    rng = random.Random(seed)
    common_ids = [rng.randrange(1, VOCABULARY) for _ in range(60)]
    made: list[Job] = []
    for at in range(count):
        own = [rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(20, 60))]
        made.append(((common_ids if at % 2 else []) + own, rng.randrange(32, 65)))
    return made


# -- the engines ------------------------------------------------------------------------------------------------------

Command = tuple[list[str], dict[str, str], str]  # argv, environment, URL
Rate = Callable[[], Coroutine[Any, Any, float]]


def embedded_command(directory: Path) -> Command:
    bind = f"127.0.0.1:{common.free_port()}"
    argv = [sys.executable, "-m", "lightning_bus.cli", "serve", str(directory), "--bind", bind]
    return argv, {**os.environ, "OMP_NUM_THREADS": str(THREADS)}, f"http://{bind}"


def vllm_command(directory: Path) -> Command:
    """Raises ConfigError when vLLM is not installed."""
    bind = f"127.0.0.1:{common.free_port()}"
    section = ServeSection(
        engine="vllm", bind=bind, context_tokens=CONTEXT_TOKENS, torch_threads=THREADS, tool_parser=""
    )
    launch = vllm_launch(section, directory, name="policy", installed=find_vllm(section))
    return launch.argv, launch.environment, launch.url


@contextmanager
def serving(command: Command) -> Generator[str]:
    """Run an engine until it is no longer needed; its URL, once it has answered a request."""
    argv, environment, url = command
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(argv, env=environment, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        body = {"token_ids": [1, 2], "sampling_params": {"max_tokens": 2}}
        until_s = time.monotonic() + START_LIMIT_S
        while True:
            with suppress(httpx.TransportError):
                httpx.post(f"{url}/inference/v1/generate", json=body, timeout=START_LIMIT_S).raise_for_status()
                break
            if process.poll() is not None or time.monotonic() > until_s:
                raise SystemExit(f"{' '.join(argv)} did not serve")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(common.STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def http_rate(url: str, concurrency: int, jobs: list[Job]) -> Rate:
    """Tokens per second with `concurrency` callers that each send their next request when the last is answered."""

    async def rate() -> float:
        async with httpx.AsyncClient(timeout=START_LIMIT_S) as client:

            async def one(prompt: list[int], wanted: int) -> int:
                params = {"max_tokens": wanted, "ignore_eos": True, "logprobs": 0}
                body = {"token_ids": prompt, "sampling_params": params}
                response = await client.post(f"{url}/inference/v1/generate", json=body)
                return len(response.raise_for_status().json()["choices"][0]["token_ids"])

            return await _rate(one, concurrency, jobs)

    return rate


def in_process_rate(engine: Engine, concurrency: int, jobs: list[Job]) -> Rate:
    async def one(prompt: list[int], wanted: int) -> int:
        return len((await engine.generate(prompt, SamplingParams(max_tokens=wanted, ignore_eos=True))).token_ids)

    async def rate() -> float:
        return await _rate(one, concurrency, jobs)

    return rate


async def _rate(one: Callable[[list[int], int], Coroutine[Any, Any, int]], concurrency: int, jobs: list[Job]) -> float:
    remaining = iter(jobs)

    async def caller() -> int:
        return sum([await one(prompt, wanted) for prompt, wanted in remaining])

    began = time.perf_counter()
    counts = await asyncio.gather(*(caller() for _ in range(concurrency)))
    return sum(counts) / (time.perf_counter() - began)


@torch.inference_mode()
def through_generate(model: LlamaForCausalLM, jobs: list[Job]) -> float:
    tokens = 0
    began = time.perf_counter()
    for prompt, wanted in jobs:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            min_new_tokens=wanted,
            max_new_tokens=wanted,
        )
        tokens += out.shape[1] - len(prompt)
    return tokens / (time.perf_counter() - began)


def _ratios(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> dict[str, float]:
    return {at: _ratio(ours[at], theirs[at]) for at in ours}


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of paired runs."""
    return round(statistics.median(one / other for one, other in zip(ours, theirs, strict=True)), 2)


if __name__ == "__main__":
    main()
