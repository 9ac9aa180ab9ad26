"""The gateway by token ids before real engines: the embedded one, and vLLM.

Watched: the same conversation with tools is one row of training over either; ids and words are those of the chat route
at the same seed; an answer that a pause cuts off goes on. The bus is a stub; everything else is the product.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest

from lightning_bus import spans as s
from lightning_bus.adapters.transitions import transitions_of
from lightning_bus.config import GatewaySection
from lightning_bus.gateway.app import build_app
from lightning_bus.spans import model_call
from tests.engines import (
    LONG_TOKENS,
    PATIENCE_S,
    QUESTION,
    TOOLS,
    ServedEngine,
    build_parrot,
    running_requests,
    serve_embedded,
    serve_vllm,
)
from tests.gateway_fixtures import SECRET, Bus, Engine, World, serving

pytestmark = pytest.mark.timeout(1800)
CUT_TRIES = 40  # to meet a quick engine while it is at an answer; on an idle machine the first is


@pytest.fixture(scope="module", params=["embedded", pytest.param("vllm", marks=[pytest.mark.slow, pytest.mark.vllm])])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedEngine]:
    directory = tmp_path_factory.mktemp("gateway")
    build_parrot(directory / "parrot")
    serve = serve_embedded if request.param == "embedded" else serve_vllm
    with serve(directory / "parrot", directory / "engine.log") as served:
        yield served


@pytest.fixture
def world(engine: ServedEngine) -> Iterator[World]:
    with ExitStack() as stack:
        bus = Bus()
        section = GatewaySection(upstreams=[engine.url], admission_wait_s=PATIENCE_S, request_limit_s=PATIENCE_S)
        app = build_app(bus, section=section, secret=SECRET)
        opened = World(Engine(), bus, stack.enter_context(serving(app)), engine.url)
        stack.push(opened.closing)
        yield opened


@pytest.fixture
def long_tokens(engine: ServedEngine) -> int:
    """Of an answer long enough to be cut off."""
    return LONG_TOKENS[engine.kind]


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    """A client at hand: to make one takes longer than a quick engine's answer."""
    with httpx.Client(timeout=PATIENCE_S) as client:
        yield client


def say(client: openai.OpenAI, messages: list[Any], *, stream: bool = False, **more: Any) -> dict[str, Any]:
    """Ask, streamed or not, and return the message as an agent would append it to the conversation."""
    asked: dict[str, Any] = {"model": "policy", "messages": messages, "max_tokens": 48, "temperature": 1.0, **more}
    if not stream:
        answer = client.chat.completions.create(**asked).choices[0].message
        calls = [call.to_dict() for call in answer.tool_calls or []]
        return {"role": "assistant", "content": answer.content, **({"tool_calls": calls} if calls else {})}
    content, calls = "", dict[int, dict[str, Any]]()
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            for piece in choice.delta.tool_calls or []:
                call = calls.setdefault(piece.index, {"type": "function", "function": {"name": "", "arguments": ""}})
                call["id"] = piece.id or call.get("id")
                if piece.function:
                    call["function"]["name"] += piece.function.name or ""
                    call["function"]["arguments"] += piece.function.arguments or ""
    return {"role": "assistant", "content": content, **({"tool_calls": [*calls.values()]} if calls else {})}


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_with_tools_is_one_row(world: World, stream: bool) -> None:
    client = world.client()
    messages: list[Any] = [QUESTION]
    messages.append(say(client, messages, tools=TOOLS, temperature=0, stream=stream))
    [call] = messages[-1]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"expression": "2+2"}
    # An agent's own JSON library moves a space, and its framework forgets what it has no field for.
    call["function"]["arguments"] = '{"expression":"2+2"}'
    messages.append({"role": "tool", "tool_call_id": call["id"], "content": "4"})
    messages.append(say(client, messages, tools=TOOLS, stream=stream))
    messages.append({"role": "user", "content": "And 3+3?"})
    messages.append(say(client, messages, tools=TOOLS, stream=stream))

    assert [span.attributes[s.PROMPT_SOURCE] for span in world.bus.spans] == ["rendered", "continued", "continued"]
    found = transitions_of("r-1", 2, "g", world.bus.spans)
    assert not found.dropped
    [row] = found.rows
    calls = [model_call(span) for span in world.bus.spans]
    assert row.trained.sum() == sum(len(call.response_ids_R) for call in calls)
    assert all(call.weight_versions[-1][2] == len(call.response_ids_R) for call in calls)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("more", [{}, {"stop": ["e"]}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}])
def test_ids_and_words_are_those_of_the_chat_route(world: World, more: dict[str, Any], stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": "policy", "messages": [QUESTION], "max_tokens": 40, "seed": 11, "temperature": 1.0, "top_p": 1.0, **more,
    }  # fmt: skip
    direct = httpx.post(
        f"{world.engine_url}/v1/chat/completions",
        json={**asked, "logprobs": True, "return_token_ids": True},
        timeout=PATIENCE_S,
    ).json()
    client = world.client()
    texts: dict[int, str] = {}
    if stream:
        for chunk in client.chat.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    else:
        answer = client.chat.completions.create(**asked)
        texts = {choice.index: choice.message.content or "" for choice in answer.choices}
        if more.get("logprobs"):
            shown = answer.choices[0].to_dict()["logprobs"]
            assert tokens_of(shown) == tokens_of(direct["choices"][0]["logprobs"])
    calls = [model_call(span) for span in world.bus.spans]
    assert [call.untrainable for call in calls] == [""] * len(direct["choices"])
    for index, choice in enumerate(direct["choices"]):
        assert calls[index].prompt_ids_P.tolist() == direct["prompt_token_ids"]
        assert calls[index].response_ids_R.tolist() == choice["token_ids"]
        expected = [token["logprob"] for token in choice["logprobs"]["content"]]
        assert calls[index].logprobs_R.tolist() == pytest.approx(expected, abs=1e-5)
        assert texts[index] == (choice["message"]["content"] or "")
        assert world.bus.spans[index].attributes[s.FINISH_REASONS] == [choice["finish_reason"]]


def tokens_of(logprobs: Any) -> list[Any]:
    """Each position's token, its bytes, and the likeliest tokens."""
    return [
        (one["token"], one["bytes"], [(top["token"], top["bytes"]) for top in one["top_logprobs"]])
        for one in logprobs["content"]
    ]


def test_a_stream_that_a_pause_cuts_off_goes_on(world: World, http: httpx.Client, long_tokens: int) -> None:
    asked: dict[str, Any] = {"model": "policy", "messages": [QUESTION], "max_tokens": long_tokens, "temperature": 1.0}
    # A quick engine may have made all tokens before the pause is there. Each stream is whole; one must have been cut off.
    for _ in range(CUT_TRIES):
        world.bus.appended.clear()
        stream = world.client().chat.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        cut_off(world, http)
        for _ in stream:
            pass
        check_whole(world, long_tokens)
        if metric(world, http, "engine_retries_total"):
            return
    pytest.fail(f"none of {CUT_TRIES} streams was cut off")


def test_an_answer_that_a_pause_cuts_off_goes_on(world: World, http: httpx.Client, long_tokens: int) -> None:
    asked: dict[str, Any] = {"model": "policy", "messages": [QUESTION], "max_tokens": long_tokens, "temperature": 1.0}
    client = world.client()

    def ask() -> None:
        client.chat.completions.create(**asked, extra_body={"ignore_eos": True})

    # A quick engine may be done before the pause is there; it must not matter. One answer must have been cut off.
    for _ in range(CUT_TRIES):
        world.bus.appended.clear()
        asking = threading.Thread(target=ask)
        asking.start()
        while asking.is_alive() and not running_requests(http.get(f"{world.engine_url}/metrics").text):
            pass
        cut_off(world, http)
        asking.join()
        check_whole(world, long_tokens)
        if metric(world, http, "engine_retries_total"):
            return
    pytest.fail(f"none of {CUT_TRIES} answers was cut off")


def metric(world: World, http: httpx.Client, name: str) -> float:
    lines = http.get(f"{world.url}/metrics").text.splitlines()
    return float([line for line in lines if name in line][-1].split()[-1])


def cut_off(world: World, http: httpx.Client) -> None:
    """End what the engine is at, and let it go on with what comes next."""
    http.post(f"{world.engine_url}/pause", params={"mode": "abort"}).raise_for_status()
    http.post(f"{world.engine_url}/resume").raise_for_status()


def check_whole(world: World, tokens: int) -> None:
    [span] = world.bus.spans
    call = model_call(span)
    assert (call.untrainable, len(call.response_ids_R), span.attributes[s.FINISH_REASONS]) == ("", tokens, ["length"])
    assert [part[1] for part in call.weight_versions[1:]] == [part[2] for part in call.weight_versions[:-1]]
    assert call.weight_versions[-1][2] == tokens
