"""How many tokens a second does the embedded engine sample, and how much of that is continuous batching?

Measures, on one machine in one run: tokens/s through Engine.generate at 1, 16 and 64 concurrent requests, and through
`model.generate` one request at a time with its own cache, over the same random Llama and the same prompts. All
sampled at temperature 1; prompts of 20 to 120 ids, half of them sharing a beginning; 32 to 64 tokens each.

    python -m bench.engine --json          about a minute; the last line is one JSON object
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.serving.engine import Engine
from trainer.serving.sampling import SamplingParams

VOCABULARY = 1024
RATIO_16_FLOOR = 3.0
CONCURRENCIES = (1, 16, 64)
# name: width, layers
SIZES = {"1M": (128, 4), "3M": (192, 6)}


def build(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def requests(count: int, seed: int) -> list[tuple[list[int], int]]:
    """(prompt ids, tokens wanted)."""
    rng = random.Random(seed)
    common = [rng.randrange(1, VOCABULARY) for _ in range(60)]
    made: list[tuple[list[int], int]] = []
    for at in range(count):
        own = [rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(20, 60))]
        made.append(((common if at % 2 else []) + own, rng.randrange(32, 65)))
    return made


async def through_engine(engine: Engine, concurrency: int, jobs: list[tuple[list[int], int]]) -> float:
    """Tokens per second with `concurrency` callers that each send their next request when the last is answered."""
    remaining = iter(jobs)

    async def caller() -> int:
        tokens = 0
        for prompt, wanted in remaining:
            completion = await engine.generate(prompt, SamplingParams(max_tokens=wanted, ignore_eos=True))
            tokens += len(completion.token_ids)
        return tokens

    began = time.perf_counter()
    counts = await asyncio.gather(*(caller() for _ in range(concurrency)))
    return sum(counts) / (time.perf_counter() - began)


@torch.inference_mode()
def through_generate(model: LlamaForCausalLM, jobs: list[tuple[list[int], int]]) -> float:
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


def measure(size: str, runs: int, threads: int) -> dict[str, Any]:
    model = build(*SIZES[size])
    names = {str(at): at for at in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(names, unk_token="0")))
    samples: dict[str, list[float]] = {"generate": [], **{str(c): [] for c in CONCURRENCIES}}
    torch.set_num_threads(threads)
    with Engine(model, tokenizer, torch_threads=threads, seed=0) as engine:
        asyncio.run(through_engine(engine, 64, requests(64, seed=99)))  # warm-up
        through_generate(model, requests(2, seed=99))
        # Interleaved, so that a neighbour's load falls on all of them alike.
        for run in range(runs):
            samples["generate"].append(through_generate(model, requests(8, seed=run)))
            for concurrency in CONCURRENCIES:
                jobs = requests(max(8, 4 * concurrency), seed=1000 * concurrency + run)
                samples[str(concurrency)].append(asyncio.run(through_engine(engine, concurrency, jobs)))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    ratios = [many / one for many, one in zip(samples["16"], samples["generate"], strict=True)]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_per_s": {name: round(value) for name, value in medians.items()},
        "spread": {name: [round(min(values)), round(max(values))] for name, values in samples.items()},
        "ratio_16": round(statistics.median(ratios), 2),
        "ratio_16_spread": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    options = parser.parse_args()
    results = {size: measure(size, options.runs, options.threads) for size in options.sizes}
    first = results[options.sizes[0]]
    summary = {
        "bench": "engine",
        "machine": {"cpus": os.cpu_count(), "cpu": _cpu_model(), "python": platform.python_version()},
        "torch": torch.__version__,
        "threads": options.threads,
        "n": options.runs,
        **first,
        "ratio_16_floor": RATIO_16_FLOOR,
        "ok": first["ratio_16"] >= RATIO_16_FLOOR,
        "sizes": results,
    }
    for size, result in results.items():
        print(f"{size}: {result['tokens_per_s']} tokens/s, 16 at once are {result['ratio_16']} x generate")
    if options.json:
        print(json.dumps(summary))


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
