"""Engines to talk to: the embedded one and vLLM, as real processes over one tiny model that can call a tool.

What always holds: an engine is started once a session, and nothing of it is left afterwards, however the session ends;
both are started the way the product starts them; a test that needs certain weights pushes them itself.

    async def test_it_answers(door: Door) -> None:      # tests/contracts/conftest.py has the fixtures
        answer = await door.post(GENERATE, generate_body([1, 2, 3]))
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from examples.calc.policy import build
from tests.journeys.ring import free_ports
from trainer.config import ServeSection
from trainer.serving.push import FileTransfer, PushTimes, Target, push
from trainer.serving.remote import RemoteEngine
from trainer.serving.vllm import find_vllm, vllm_launch
from trainer.serving.weights import served_tensors

CONTEXT_TOKENS = 4096
# Of a generation that is still under way when a test does something about it: half a second of the embedded engine,
# which our default tests wait for, and two of vLLM, whose core runs ahead of what we have read of it.
LONG_TOKENS = {"embedded": 400, "vllm": 1200}
EMBEDDED_LIMIT_S, VLLM_LIMIT_S = 300.0, 800.0  # until it answers; vLLM takes 45 s on two idle cores
STARTS = 3  # a port that was free may be another's by the time an engine binds it
END_S = 15.0  # for an engine to leave when it is told to
PARROT_STEPS = 40  # a second of training; after it the reply is certain to 0.003 nats

CHAT, GENERATE = "/v1/chat/completions", "/inference/v1/generate"
RENDER, DERENDER = f"{CHAT}/render", f"{CHAT}/derender"
NEAR = 3e-5  # nats; what float32 leaves open when the same sums are added in another order: here up to 6e-6
PATIENCE_S = 600.0  # with one answer of an engine: where thirty others run, a thousand tokens took minutes

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "",
            "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
        },
    }
]
QUESTION = {"role": "user", "content": "2+2?"}
CALL = '{"name": "calculator", "arguments": {"expression": "2+2"}}'
REPLY = f"So: <tool_call>\n{CALL}\n</tool_call>"  # what the parrot answers to QUESTION when it is offered TOOLS

_versions = itertools.count(1)


@dataclass(frozen=True)
class ServedEngine:
    """A running engine. kind is "embedded" or "vllm"; directory holds the model it was started with."""

    kind: str
    url: str
    directory: Path
    log: Path


@dataclass
class Weights:
    """The two sets of weights that this file pushes, as models to compare with and as tensors to push."""

    tokenizer: PreTrainedTokenizerBase
    parrot: Any  # what the engines were started with
    other: Any


class Door:
    """An engine as a test sees it: its routes, and pushes of `Weights`."""

    def __init__(
        self, engine: ServedEngine, client: httpx.AsyncClient, weights: Weights, transfer: FileTransfer
    ) -> None:
        self.kind = engine.kind
        self.control = RemoteEngine(client, engine.url, limit_s=PATIENCE_S)
        self.weights = weights
        self.end_id: int = weights.tokenizer.eos_token_id
        self.long_tokens = LONG_TOKENS[engine.kind]
        self._client = client
        self._transfer = transfer

    async def ask(self, route: str, body: dict[str, Any]) -> httpx.Response:
        return await self._client.post(route, json=body)

    async def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await self.ask(route, body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def stream(self, route: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The events of a streamed answer, down to its [DONE]."""
        async with self._client.stream("POST", route, json={**body, "stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream"), await response.aread()
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return
                if line:
                    yield json.loads(line.removeprefix("data: "))
        raise AssertionError("the stream ended without [DONE]")

    async def running(self) -> int:
        """How many requests the engine is at, as it says itself."""
        return running_requests((await self._client.get("/metrics")).text)

    async def push(self, model: Any) -> str:
        """Serve this model's weights from now on; the version they are called by."""
        version = str(next(_versions))
        offer = self._transfer.offer(served_tensors(model), version)
        [result] = (await push(offer, [Target(self.control, verify=True)])).values()
        assert isinstance(result, PushTimes), result
        return version


def build_parrot(directory: Path, seed: int = 0) -> Path:
    """Write the calculator's policy, taught to give REPLY; to everything else it answers with much entropy."""
    torch.manual_seed(seed)
    build(directory, seed)
    tokenizer, model = load(directory)
    asked = prompt_ids(tokenizer)
    whole = asked + tokenizer.encode(f"{REPLY}<|im_end|>", add_special_tokens=False)
    ids = torch.tensor([whole])
    labels = torch.tensor([[-100] * len(asked) + whole[len(asked) :]])
    with torch.no_grad():
        # Smaller logits: fresh weights repeat one token for ever, and a log-prob of 0.000 proves nothing.
        model.model.norm.weight.mul_(0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(PARROT_STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.config.max_position_embeddings = CONTEXT_TOKENS
    model.save_pretrained(directory)
    return directory


def load(directory: Path) -> tuple[PreTrainedTokenizerBase, Any]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(directory), model


def prompt_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """QUESTION with TOOLS, as the template writes them."""
    text = tokenizer.apply_chat_template([QUESTION], tools=TOOLS, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


@torch.no_grad()
def reference_logprobs_TV(
    parts: list[tuple[PreTrainedModel, list[int]]], prompt: list[int], temperature: float
) -> torch.Tensor:
    """The log-probs of every token at every position of a response, by plain forward passes.

    parts  (model, the response's tokens that its weights sampled), in order. What an earlier part has read stays as its
           weights computed it: keys and values are kept when weights change in flight. The last token of a part is read
           by the next part's weights, with whom the step begins that samples after it.
    """
    cache = DynamicCache()
    unread, rows = prompt, []
    for model, tokens in parts:
        if not tokens:
            continue
        logits = model(torch.tensor([unread + tokens[:-1]]), past_key_values=cache, use_cache=True).logits[0].float()
        rows.append((logits[len(unread) - 1 :] / (temperature or 1.0)).log_softmax(-1))
        unread = tokens[-1:]
    return torch.cat(rows)


def generate_body(ids: list[int], **sampling: Any) -> dict[str, Any]:
    params = {"max_tokens": 24, "temperature": 1.0, "seed": 7, "logprobs": 3, "ignore_eos": True, **sampling}
    return {"token_ids": ids, "sampling_params": params, "return_token_ids": True}


def check_logprobs(
    logprobs_TV: torch.Tensor, token_ids: list[int], reported: list[float], *, near: float = NEAR
) -> None:
    assert len(token_ids) == len(reported) == len(logprobs_TV)
    assert reported == pytest.approx(at_tokens(logprobs_TV, token_ids).tolist(), abs=near)


def at_tokens(logprobs_TV: torch.Tensor, token_ids: list[int]) -> torch.Tensor:
    return logprobs_TV.gather(-1, torch.tensor(token_ids)[:, None]).squeeze(-1)


def running_requests(metrics: str) -> int:
    """Read an engine's /metrics, which have vLLM's names."""
    [line] = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running{")]
    return int(float(line.split()[-1]))


def own_logprobs(choice: dict[str, Any]) -> list[float]:
    return [entry["logprob"] for entry in choice["logprobs"]["content"]]


def spans(choice: dict[str, Any]) -> list[tuple[str, int, int]]:
    return [(span["version"], span["start"], span["end"]) for span in choice["weight_versions"]]


@contextmanager
def serve_embedded(directory: Path, log: Path) -> Iterator[ServedEngine]:
    """`lightning-bus serve DIRECTORY`, in a process of its own."""

    def start(stack: ExitStack) -> ServedEngine:
        [port] = free_ports(1)
        argv = [sys.executable, "-m", "lightning_bus.cli", "serve", str(directory), "--bind", f"127.0.0.1:{port}"]
        process = stack.enter_context(_running(argv, dict(os.environ), log))
        return _answering(ServedEngine("embedded", f"http://127.0.0.1:{port}", directory, log), process)

    with _started(start, log) as engine:
        yield engine


@contextmanager
def serve_vllm(directory: Path, log: Path, **section: Any) -> Iterator[ServedEngine]:
    """vLLM as `lightning-bus serve` starts it, without what keeps it alive. Raises ConfigError where there is none."""
    keys: dict[str, Any] = {"engine": "vllm", "context_tokens": CONTEXT_TOKENS, "cache_bytes": 1 << 29, **section}

    def start(stack: ExitStack) -> ServedEngine:
        serve = ServeSection(bind=f"127.0.0.1:{free_ports(1)[0]}", **keys)
        launch = vllm_launch(serve, directory, name="policy", installed=find_vllm(serve))
        process = stack.enter_context(_running(launch.argv, launch.environment, log))
        return _answering(ServedEngine("vllm", launch.url, directory, log), process)

    with _started(start, log) as engine:
        # The first request after a start compiles for half a minute; later it would be taken for one that hangs.
        body = {"token_ids": [1], "sampling_params": {"max_tokens": 2, "logprobs": 2, "seed": 1}}
        httpx.post(f"{engine.url}/inference/v1/generate", json=body, timeout=VLLM_LIMIT_S).raise_for_status()
        httpx.post(f"{engine.url}/update_weight_version", json={"new_version": "0"}, timeout=60).raise_for_status()
        yield engine


@contextmanager
def _started(start: Callable[[ExitStack], ServedEngine], log: Path) -> Iterator[ServedEngine]:
    """Start an engine, again when its port was taken meanwhile."""
    for tries_left in reversed(range(STARTS)):
        with ExitStack() as stack:
            try:
                engine = start(stack)
            except AssertionError:
                if not tries_left or "in use" not in log.read_text(errors="replace"):
                    raise
                continue
            yield engine
            return


@contextmanager
def _running(argv: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            argv, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answering(engine: ServedEngine, process: subprocess.Popen[bytes]) -> ServedEngine:
    limit_s = EMBEDDED_LIMIT_S if engine.kind == "embedded" else VLLM_LIMIT_S
    until_s = time.monotonic() + limit_s
    while time.monotonic() < until_s:
        if process.poll() is not None:
            break
        with suppress(httpx.HTTPError):
            if httpx.get(f"{engine.url}/health", timeout=5).status_code == 200:
                return engine
        time.sleep(0.1)
    tail = engine.log.read_text(errors="replace")[-3000:]
    raise AssertionError(f"{engine.kind} did not answer within {limit_s} s. The end of its log:\n{tail}")
