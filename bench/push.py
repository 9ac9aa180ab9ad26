"""How long do new weights take from the trainer to engines that generate, and what does generation lose?

Measures for each size × engine × transfer, with 16 requests under way: `seconds` from the trainer's tensors to the
engine answering under them (copy, check, load), `copy_ratio` (÷ one memcpy of the same bytes, measured beside it),
`standstill_ms` of generation, and `tokens_lost` (asked for, and not delivered). The engine is a process of its own;
each push is to weights that differ. The top-level figures are those of 135M over shm into vLLM.

    python -m bench.push --json [--sizes 1M 135M] [--pushes 5]     minutes; the last line is one JSON object
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.common import free_port, machine, running
from examples.calc.policy import build as build_calc
from trainer.policy.model import named_weights
from trainer.serving.push import FileTransfer, PushTimes, Target, push
from trainer.serving.remote import RemoteEngine
from trainer.serving.slots import WeightDirectory, WeightSlots, shm_directory

CHECKOUT = Path(__file__).resolve().parent.parent
REQUESTS = 16  # under way during each push
TOKENS = 64  # of each
START_LIMIT_S = 300.0
SETTLE_S = 0.3  # between pushes, so that requests are under way again
MEMORY_FACTOR = 9  # of the weights' bytes: trainer, two slots, engine with old, new and packed ones, head-room
# name: vocabulary, width, layers, heads, key-value heads, MLP width
SIZES = {
    "1M": (584, 192, 2, 6, 6, 512),
    "135M": (49_152, 576, 30, 9, 3, 1536),
    "1B": (49_152, 2048, 20, 16, 4, 5632),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table."""

    size: str
    engine: str
    transfer: str


def build(size: str, directory: Path) -> dict[str, torch.Tensor]:
    """Write a random model of this size, with the demo's tokenizer, and return its weights."""
    vocabulary, width, layers, heads, key_value_heads, mlp = SIZES[size]
    build_calc(directory, 0)  # for the tokenizer's files
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return dict(named_weights(model))


def memcpy_s(nbytes: int) -> float:
    """Seconds of one memcpy of that many bytes into memory that is there already; the median of five."""
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    took: list[float] = []
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


@contextmanager
def engine_process(engine: str, directory: Path) -> Iterator[str]:
    """Run one engine on the model and yield its base URL."""
    bind = f"127.0.0.1:{free_port()}"
    with running(
        [sys.executable, "-m", "lightning_bus.cli", "serve", str(directory), "--engine", engine, "--bind", bind]
    ):
        yield f"http://{bind}"


async def generate(client: httpx.AsyncClient, url: str, until: asyncio.Event, counts: dict[str, int]) -> None:
    """Ask for completions until told to stop; count the tokens asked for and those that came."""
    while not until.is_set():
        counts["asked"] += TOKENS
        body = {
            "token_ids": list(range(5, 37)),
            "sampling_params": {"temperature": 1.0, "max_tokens": TOKENS, "ignore_eos": True, "logprobs": 0},
        }
        # A connection of its own: one that idled through a push may be closed by the server as it is used again.
        headers = {"connection": "close"}
        answer = await client.post(url + "/inference/v1/generate", json=body, headers=headers, timeout=START_LIMIT_S)
        if answer.status_code == 200:
            counts["came"] += len(answer.json()["choices"][0]["token_ids"])


async def measure(case: Case, url: str, weights: dict[str, torch.Tensor], pushes: int, scratch: Path) -> dict[str, Any]:
    name = f"bench-push-{os.getpid()}"
    store = WeightSlots(shm_directory(), name) if case.transfer == "shm" else WeightDirectory(scratch, name)
    transfer = FileTransfer(store)
    nbytes = sum(tensor.nbytes for tensor in weights.values())
    counts = {"asked": 0, "came": 0}
    seconds: list[float] = []
    standstill_ms: list[float] = []
    copies: list[float] = []
    memcpys: list[float] = []
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as client:
        engine = RemoteEngine(client, url)
        stop = asyncio.Event()
        callers = [asyncio.create_task(generate(client, url, stop, counts)) for _ in range(REQUESTS)]
        try:
            for number in range(pushes + 2):  # the first two make the slots
                await asyncio.sleep(SETTLE_S)
                for tensor in weights.values():
                    tensor.add_(1e-4)
                memcpys.append(await asyncio.to_thread(memcpy_s, nbytes))
                began = time.perf_counter()
                offer = await asyncio.to_thread(transfer.offer, weights, str(number))
                copied = time.perf_counter()
                result = (await push(offer, [Target(engine)]))[engine.url]
                ended = time.perf_counter()
                if not isinstance(result, PushTimes):
                    raise result
                if number >= 2:
                    seconds.append(ended - began)
                    copies.append(copied - began)
                    standstill_ms.append(result.standstill_ms)
        finally:
            stop.set()
            await asyncio.gather(*callers)
            transfer.close()
    memcpy = statistics.median(memcpys)
    return {
        "size": case.size,
        "engine": case.engine,
        "transfer": case.transfer,
        "bytes": nbytes,
        "pushes": pushes,
        "memcpy_s": memcpy,
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "copy_s": statistics.median(copies),
        "copy_ratio": statistics.median(seconds) / memcpy,
        "standstill_ms": statistics.median(standstill_ms),
        "tokens_asked": counts["asked"],
        "tokens_lost": counts["asked"] - counts["came"],
    }


async def wait_healthy(url: str) -> None:
    async with httpx.AsyncClient() as client:
        engine = RemoteEngine(client, url)
        until_s = time.monotonic() + START_LIMIT_S
        while not await engine.health():
            if time.monotonic() > until_s:
                raise SystemExit(f"the engine at {url} did not answer within {START_LIMIT_S:g} s")
            await asyncio.sleep(0.5)


def run(sizes: list[str], engines: list[str], pushes: int) -> Iterator[dict[str, Any]]:
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="bench-push-") as scratch:
            directory = Path(scratch) / "model"
            directory.mkdir()
            with torch.inference_mode():
                weights = build(size, directory)
                needed = MEMORY_FACTOR * sum(tensor.nbytes for tensor in weights.values())
                free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
                if needed > free:
                    print(f"{size}: left out, {needed >> 30} GiB are needed and {free >> 30} free", file=sys.stderr)
                    continue
                for engine in engines:
                    with engine_process(engine, directory) as url:
                        asyncio.run(wait_healthy(url))
                        for transfer in ("shm", "file"):
                            case = Case(size, engine, transfer)
                            yield asyncio.run(measure(case, url, weights, pushes, Path(scratch)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--engines", nargs="+", choices=["embedded", "vllm"], default=["embedded", "vllm"])
    parser.add_argument("--pushes", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    engines = list(arguments.engines)
    if "vllm" in engines and not (CHECKOUT / ".venv-vllm/bin/python").exists():
        print("vLLM is left out: there is no .venv-vllm. Make it with: make vllm", file=sys.stderr)
        engines.remove("vllm")
    cases: list[dict[str, Any]] = []
    for case in run(arguments.sizes, engines, arguments.pushes):
        cases.append(case)
        print(
            f"{case['size']:>5} {case['engine']:>8} {case['transfer']:>4}: {case['seconds']:7.3f} s = {case['copy_ratio']:5.1f} "
            f"memcpys, copy {case['copy_s']:.3f} s, standstill {case['standstill_ms']:6.0f} ms, "
            f"{case['tokens_lost']} of {case['tokens_asked']} tokens lost",
            file=sys.stderr,
        )
    top = next(
        (c for c in cases if (c["size"], c["engine"], c["transfer"]) == ("135M", "vllm", "shm")),
        cases[-1] if cases else {},
    )
    keys = ("seconds", "copy_ratio", "standstill_ms", "tokens_lost")
    if arguments.json:
        print(json.dumps({**{key: top.get(key) for key in keys}, "cases": cases, "machine": machine(shm_directory())}))


if __name__ == "__main__":
    main()
