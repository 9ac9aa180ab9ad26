"""The clients that agents use, unchanged, against a gateway before the embedded engine: Python's and JavaScript's.

The engine samples from random weights, so what it says is noise; a scripted model beside it calls tools. Recording is
judged by the log's own reader: every call can be trained on, but for those of the script, which no weights produced.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from lightning_bus import spans as s
from lightning_bus import tokens
from lightning_bus.config import GatewaySection
from lightning_bus.gateway.app import build_app
from lightning_bus.spans import model_call
from tests.gateway_fixtures import SECRET, Bus, World, serving
from tests.gateway_fixtures import Engine as NoEngine
from tests.unit.trainer.serving_fixtures import build_model, build_tokenizer
from trainer.serving import app as serving_app
from trainer.serving.engine import Engine

ROOT = Path(__file__).resolve().parents[2]
NODE = ROOT / ".bench" / "node"  # what git ignores and `make clean` removes
NPM_LIMIT_S = 120.0
NODE_LIMIT_S = 300.0
SCHEMA = {"type": "object", "properties": {"expression": {"type": "string"}}}
ARGUMENTS = {"expression": "2+2"}
ASKED: Any = [{"role": "user", "content": "2+2?"}]
CHAT_TOOL: Any = {"type": "function", "function": {"name": "calculate", "parameters": SCHEMA}}


def teacher(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    if not tools or messages[-1]["role"] == "tool":
        return {"content": "It is 4."}
    function = {"name": "calculate", "arguments": json.dumps(ARGUMENTS)}
    return {"content": "", "tool_calls": [{"type": "function", "function": function}]}


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with Engine(build_model(), build_tokenizer(), seed=1, torch_threads=1) as running:
        app = serving_app.build_app(running, model_name="policy", scripted={"teacher": teacher})
        with serving(app) as url:
            yield url


@pytest.fixture
def world(engine: str) -> Iterator[World]:
    bus = Bus()
    section = GatewaySection(upstreams=[engine])
    with ExitStack() as stack:
        url = stack.enter_context(serving(build_app(bus, section=section, secret=SECRET)))
        opened = World(NoEngine(), bus, url, engine)
        stack.push(opened.closing)
        yield opened


def assert_recorded(world: World, sampled: int, scripted: int) -> None:
    """Check that the log has so many calls of the policy, each exact, and so many of the script."""
    calls = [model_call(span) for span in world.bus.spans]
    policy = [
        (call, span) for call, span in zip(calls, world.bus.spans, strict=True) if call.attributes.model == "policy"
    ]
    assert (len(policy), len(calls) - len(policy)) == (sampled, scripted)
    assert [call.untrainable for call in calls] == [""] * len(calls)
    for call, span in policy:
        assert len(call.response_ids_R) == span.attributes[s.OUTPUT_TOKENS]
        assert call.weight_versions == [("0", 0, len(call.response_ids_R))]


def test_the_openai_client_chats_streams_and_calls_tools(world: World) -> None:
    client = world.client()
    completion = client.chat.completions.create(model="policy", messages=ASKED, max_tokens=8, n=2)
    assert completion.usage is not None and len(completion.choices) == 2
    chunks = list(client.chat.completions.create(model="policy", messages=ASKED, max_tokens=8, stream=True))
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "2+2?"}, {"type": "text", "text": "Quick."}]}]
    client.chat.completions.create(model="policy", messages=parts, max_tokens=8)

    called = client.chat.completions.create(model="teacher", messages=ASKED, tools=[CHAT_TOOL])
    [call] = called.choices[0].message.tool_calls or []
    assert json.loads(call.to_dict()["function"]["arguments"]) == ARGUMENTS  # type: ignore[index]
    history: Any = [
        *ASKED,
        called.choices[0].message.to_dict(),
        {"role": "tool", "tool_call_id": call.id, "content": "4"},
    ]
    answered = client.chat.completions.create(model="teacher", messages=history, tools=[CHAT_TOOL])
    assert answered.choices[0].message.content == "It is 4."
    assert_recorded(world, sampled=4, scripted=2)


def test_the_openai_client_speaks_completions_and_responses(world: World) -> None:
    client = world.client()
    completion = client.completions.create(model="policy", prompt="2+2=", max_tokens=8)
    assert completion.choices[0].finish_reason in ("stop", "length")
    pieces = list(client.completions.create(model="policy", prompt="2+2=", max_tokens=8, n=2, stream=True))
    assert len([piece for piece in pieces if piece.choices[0].finish_reason in ("stop", "length")]) == 2
    with client.responses.stream(model="policy", input="2+2?", max_output_tokens=8) as stream:
        final = list(stream)[-1].type
    assert final in ("response.completed", "response.incomplete")
    tool: Any = {"type": "function", "name": "calculate", "parameters": SCHEMA, "strict": False}
    called = client.responses.create(model="teacher", input="2+2?", tools=[tool])
    [call] = called.output
    output: Any = {"type": "function_call_output", "call_id": call.to_dict()["call_id"], "output": "4"}
    history: Any = [{"role": "user", "content": "2+2?"}, call.to_dict(), output]
    assert client.responses.create(model="teacher", input=history, tools=[tool]).output_text == "It is 4."
    assert_recorded(world, sampled=4, scripted=2)


def test_the_anthropic_client_chats_streams_and_calls_tools(world: World) -> None:
    client = world.anthropic()
    message = client.messages.create(model="policy", max_tokens=8, messages=ASKED)
    assert message.stop_reason in ("end_turn", "max_tokens") and message.usage.output_tokens in range(1, 9)
    with client.messages.stream(model="policy", max_tokens=8, messages=ASKED) as stream:
        assert stream.get_final_message().usage.output_tokens in range(1, 9)
    counted = client.messages.count_tokens(model="policy", messages=ASKED).input_tokens
    assert counted == message.usage.input_tokens

    tool: Any = {"name": "calculate", "input_schema": SCHEMA}
    with client.messages.stream(model="teacher", max_tokens=64, messages=ASKED, tools=[tool]) as stream:
        called = stream.get_final_message()
    [use] = called.content
    assert isinstance(use, anthropic.types.ToolUseBlock) and use.input == ARGUMENTS
    result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": "4"}
    history: Any = [*ASKED, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    answered = client.messages.create(model="teacher", max_tokens=64, messages=history, tools=[tool])
    assert [block.to_dict() for block in answered.content] == [{"type": "text", "text": "It is 4."}]
    assert_recorded(world, sampled=2, scripted=2)


def test_what_the_embedded_engine_refuses_both_clients_understand(world: World) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        world.client().chat.completions.create(model="gpt-9", messages=ASKED)
    with pytest.raises(anthropic.NotFoundError, match="does not exist here"):
        world.anthropic().messages.create(model="claude-9", max_tokens=8, messages=ASKED)
    assert [span.attributes[s.UNTRAINABLE] for span in world.bus.spans] == ["no answer"] * 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_javascript_client_chats_streams_and_calls_tools(world: World) -> None:
    node = shutil.which("node")
    modules = _node_modules()
    if node is None or modules is None:
        pytest.skip("node, or the npm package openai, is not here")
    claims = tokens.Claims("r-1", 2)
    base_url = f"{world.url}/rollout/r-1/attempt/2/v1"
    script = Path(__file__).with_name("gateway_client.cjs")
    done = subprocess.run(
        [node, str(script), base_url, tokens.mint(SECRET, claims)],
        env={**os.environ, "NODE_PATH": str(modules)}, capture_output=True, text=True, timeout=NODE_LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["chat"] in range(1, 9)
    assert len(said["finish"]) == 1 and said["finish"][0] in ("stop", "length")
    assert json.loads(said["call"]["arguments"]) == json.loads(said["streamedCall"]) == ARGUMENTS
    assert (said["response"], said["models"]) == ("It is 4.", ["policy", "teacher"])
    assert said["refused"] == [401, "invalid_api_key"]
    assert_recorded(world, sampled=2, scripted=3)


def _node_modules() -> Path | None:
    """Return a node_modules that has the openai package, fetched once; None where there is no npm or no network."""
    modules = NODE / "node_modules"
    npm = shutil.which("npm")
    if not (modules / "openai").exists() and npm is not None:
        NODE.mkdir(parents=True, exist_ok=True)
        # Beside it first: an install that is cut short leaves half a package.
        with tempfile.TemporaryDirectory(dir=NODE) as draft:
            argv = [npm, "install", "--no-save", "--no-audit", "--no-fund", "--prefix", draft, "openai"]
            # Without pipes, which a child of npm that outlives it would hold open for ever.
            try:
                subprocess.run(
                    argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=NPM_LIMIT_S, check=True
                )
                os.replace(Path(draft) / "node_modules", modules)
            except (subprocess.SubprocessError, OSError):
                return None
    return modules if (modules / "openai").exists() else None
