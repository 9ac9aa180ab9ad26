"""What every engine promises, asked of the embedded one and of a real vLLM: OpenAI's routes, exact ids and log-probs,
ids in and ids out. What it promises about weights is in test_engine_weights.py.

Log-probs are compared with plain float32 forward passes under the weights that sampled them. Both engines hold the
same parrot (tests/engines.py): it calls a tool when asked the one question it knows, and is unsure of everything else.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from lightning_bus import ConfigError
from tests.engines import (
    CALL,
    CHAT,
    DERENDER,
    GENERATE,
    NEAR,
    QUESTION,
    RENDER,
    REPLY,
    TOOLS,
    Door,
    check_logprobs,
    generate_body,
    own_logprobs,
    prompt_ids,
    reference_logprobs_TV,
    spans,
)
from trainer.refusals import PROBE, refuse_engine
from trainer.serving.errors import EngineAnsweredError

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(1800)]

WORDY = {"role": "user", "content": "Tom has 3 apples and buys 4 more. Tell me a story about all of them."}


def chat_body(**more: Any) -> dict[str, Any]:
    body = {"model": "policy", "messages": [WORDY], "max_tokens": 24, "temperature": 1.0, "seed": 7}
    return {**body, "logprobs": True, "top_logprobs": 3, "return_token_ids": True, **more}


# --- chat ---


@pytest.mark.parametrize("temperature", [1.2, 2.0])
async def test_log_probs_of_chat_are_those_of_the_distribution_sampled_from(door: Door, temperature: float) -> None:
    answer = await door.post(CHAT, chat_body(temperature=temperature, n=2))
    for choice in answer["choices"]:
        parts = [(door.weights.parrot, choice["token_ids"])]
        reference_TV = reference_logprobs_TV(parts, answer["prompt_token_ids"], temperature)
        logprobs = own_logprobs(choice)
        check_logprobs(reference_TV, choice["token_ids"], logprobs)
        assert sum(logprobs) < -0.5  # not a distribution that anybody would hit
    assert answer["choices"][0]["token_ids"] != answer["choices"][1]["token_ids"]


async def test_ids_are_the_templates_and_the_text_is_theirs(door: Door) -> None:
    answer = await door.post(CHAT, chat_body())
    tokenizer = door.weights.tokenizer
    text = tokenizer.apply_chat_template([WORDY], add_generation_prompt=True, tokenize=False)
    assert answer["prompt_token_ids"] == tokenizer.encode(text, add_special_tokens=False)
    choice = answer["choices"][0]
    shown = [id for id in choice["token_ids"] if id != door.end_id]
    assert choice["message"]["content"] == tokenizer.decode(shown, skip_special_tokens=True)
    assert choice["message"]["role"] == "assistant"
    assert answer["usage"]["prompt_tokens"] == len(answer["prompt_token_ids"])
    assert answer["usage"]["completion_tokens"] == len(choice["token_ids"])


async def test_a_seed_gives_the_same_tokens_again_and_greed_gives_one_answer(door: Door) -> None:
    one, two = [await door.post(CHAT, chat_body()) for _ in range(2)]
    assert one["choices"][0]["token_ids"] == two["choices"][0]["token_ids"]
    greedy = [await door.post(CHAT, chat_body(temperature=0, seed=seed)) for seed in (1, 2)]
    assert greedy[0]["choices"][0]["token_ids"] == greedy[1]["choices"][0]["token_ids"]


@pytest.mark.parametrize("asked", [{}, {"messages": [QUESTION], "tools": TOOLS, "temperature": 0, "max_tokens": 60}])
async def test_a_stream_says_what_the_whole_answer_says(door: Door, asked: dict[str, Any]) -> None:
    body = chat_body(**asked)
    expected = (await door.post(CHAT, body))["choices"][0]
    events = [event async for event in door.stream(CHAT, {**body, "stream_options": {"include_usage": True}})]
    parts = [choice for event in events for choice in event["choices"]]
    assert parts[0]["delta"]["role"] == "assistant"
    assert events[0]["prompt_token_ids"]
    assert "".join(part["delta"].get("content") or "" for part in parts) == (expected["message"]["content"] or "")
    assert sum([part.get("token_ids") or [] for part in parts], []) == expected["token_ids"]
    logprobs = [own for part in parts if part.get("logprobs") for own in own_logprobs(part)]
    assert logprobs == pytest.approx(own_logprobs(expected), abs=NEAR)
    assert parts[-1]["finish_reason"] == expected["finish_reason"]
    assert (events[-1]["choices"], events[-1]["usage"]["completion_tokens"]) == ([], len(expected["token_ids"]))
    called = [call for part in parts for call in part["delta"].get("tool_calls") or []]
    names = "".join(call["function"].get("name") or "" for call in called)
    arguments = "".join(call["function"].get("arguments") or "" for call in called)
    for call in expected["message"].get("tool_calls") or []:
        assert names == call["function"]["name"]
        assert json.loads(arguments) == json.loads(call["function"]["arguments"])


async def test_a_tool_call_comes_as_a_tool_call(door: Door) -> None:
    body = chat_body(messages=[QUESTION], tools=TOOLS, temperature=0, max_tokens=60)
    choice = (await door.post(CHAT, body))["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "So: "
    [call] = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"]
    assert call["function"]["name"] == json.loads(CALL)["name"]
    assert json.loads(call["function"]["arguments"]) == json.loads(CALL)["arguments"]
    tokenizer = door.weights.tokenizer
    assert tokenizer.decode(choice["token_ids"]) == f"{REPLY}<|im_end|>"


async def test_a_stop_string_ends_the_text_and_not_the_ids(door: Door) -> None:
    body = chat_body(messages=[QUESTION], tools=TOOLS, tool_choice="none", temperature=0, max_tokens=60, stop=["calc"])
    choice = (await door.post(CHAT, body))["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "calc")
    assert "calc" not in choice["message"]["content"]
    assert "calc" in door.weights.tokenizer.decode(choice["token_ids"])


# --- ids in, ids out ---


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
async def test_log_probs_of_generate_are_those_of_the_distribution_sampled_from(door: Door, temperature: float) -> None:
    prompt = prompt_ids(door.weights.tokenizer)
    answer = await door.post(
        GENERATE, generate_body(prompt, temperature=temperature, max_tokens=48, n=2 if temperature else 1)
    )
    assert answer["prompt_token_ids"] == prompt
    for choice in answer["choices"]:
        reference_TV = reference_logprobs_TV([(door.weights.parrot, choice["token_ids"])], prompt, temperature)
        for position, entry in enumerate(choice["logprobs"]["content"]):
            assert entry["token_id"] == choice["token_ids"][position]
            assert entry["top_logprobs"][0]["token_id"] == entry["token_id"]
            for top in entry["top_logprobs"]:
                expected = float(reference_TV[position, top["token_id"]])
                # The unlikely ones lie at -20 and below, where float32 has fewer digits left behind the point.
                assert top["logprob"] == pytest.approx(expected, abs=NEAR, rel=1e-6), position
        assert [(start, end) for _, start, end in spans(choice)] == [(0, 48)]


async def test_streamed_ids_join_to_the_whole_and_the_end_brings_the_versions(door: Door) -> None:
    body = generate_body(prompt_ids(door.weights.tokenizer))
    expected = (await door.post(GENERATE, body))["choices"][0]
    events = [event async for event in door.stream(GENERATE, {**body, "stream_options": {"include_usage": True}})]
    assert events[0]["prompt_token_ids"] == body["token_ids"]
    assert events[-1]["usage"]["completion_tokens"] == 24
    parts = [choice for event in events for choice in event["choices"]]
    assert sum([part["token_ids"] for part in parts], []) == expected["token_ids"]
    logprobs = [own for part in parts for own in own_logprobs(part)]
    assert logprobs == pytest.approx(own_logprobs(expected), abs=NEAR)
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert spans(parts[-1]) == spans(expected)
    assert not any(part.get("weight_versions") for part in parts[:-1])


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 0.0, "messages": [QUESTION], "tools": TOOLS, "max_tokens": 60},
        {"temperature": 0.7, "n": 2, "top_logprobs": 0},
        {"max_tokens": None, "max_completion_tokens": 5},
    ],
)
async def test_render_generate_derender_say_what_chat_says(door: Door, asked: dict[str, Any]) -> None:
    body = chat_body(**asked)
    chat = await door.post(CHAT, body)
    rendered = await door.post(RENDER, body)
    assert rendered["token_ids"] == chat["prompt_token_ids"]
    generated = await door.post(GENERATE, {**rendered, "return_token_ids": True})
    derendered = await door.post(
        DERENDER,
        {
            "model": "policy",
            "generate_response": without_end(generated, door.end_id),
            "chat_request": body,
            "prompt_token_ids": rendered["token_ids"],
            "prompt_tokens": len(rendered["token_ids"]),
        },
    )
    for index, expected in enumerate(chat["choices"]):
        assert generated["choices"][index]["token_ids"] == expected["token_ids"]
        assert own_logprobs(generated["choices"][index]) == pytest.approx(own_logprobs(expected), abs=NEAR)
        assert said(derendered["choices"][index]["message"]) == said(expected["message"])


@pytest.mark.parametrize(
    "asked", [{}, {"messages": [QUESTION], "tools": TOOLS, "temperature": 0.0, "max_tokens": 60}, {"stop": ["e"]}]
)
async def test_a_streamed_derender_says_what_the_whole_one_says(door: Door, asked: dict[str, Any]) -> None:
    body = chat_body(**asked, logprobs=False, top_logprobs=None)
    rendered = await door.post(RENDER, body)
    events = [event async for event in door.stream(GENERATE, rendered)]
    chunks = [without_end(event, door.end_id) for event in events if event["choices"]]
    token_ids: list[int] = sum([chunk["choices"][0]["token_ids"] for chunk in chunks], [])
    more = {"chat_request": body, "prompt_token_ids": rendered["token_ids"], "model": "policy"}
    whole = await door.post(
        DERENDER, {**more, "generate_response": {"choices": [{**chunks[-1]["choices"][0], "token_ids": token_ids}]}}
    )
    state, message = None, {"content": "", "tool_calls": {}}
    for chunk in chunks:
        derendered = await door.post(DERENDER, {**more, "stream": True, "generate_chunk": chunk, "stream_state": state})
        state = derendered["stream_state"]
        delta = derendered["chunk"]["choices"][0]["delta"]
        message["content"] += delta.get("content") or ""
        for call in delta.get("tool_calls") or []:
            name, arguments = message["tool_calls"].get(call["index"], ("", ""))
            function = call["function"]
            joined = (name + (function.get("name") or ""), arguments + (function.get("arguments") or ""))
            message["tool_calls"][call["index"]] = joined
    content, calls = said(whole["choices"][0]["message"])
    assert message["content"] == content
    assert [(name, json.loads(arguments)) for name, arguments in message["tool_calls"].values()] == calls


async def test_a_history_rendered_by_itself_begins_the_next_prompt(door: Door) -> None:
    call = {"id": "c1", "type": "function", "function": json.loads(CALL) | {"arguments": '{"expression": "2+2"}'}}
    answered = [QUESTION, {"role": "assistant", "content": "So: ", "tool_calls": [call]}]
    body = {"model": "policy", "tools": TOOLS}
    history = await door.post(RENDER, {**body, "messages": answered, "add_generation_prompt": False})
    following = [*answered, {"role": "tool", "tool_call_id": "c1", "content": "4"}]
    whole = await door.post(RENDER, {**body, "messages": following})
    assert whole["token_ids"][: len(history["token_ids"])] == history["token_ids"]


def without_end(generated: dict[str, Any], end_id: int) -> dict[str, Any]:
    """The end token is no text, and vLLM's derender would write it out."""
    choices = []
    for choice in generated["choices"]:
        ids, logprobs = choice["token_ids"], choice["logprobs"]
        if ids and ids[-1] == end_id:
            logprobs = logprobs and {"content": logprobs["content"][:-1]}
            ids = ids[:-1]
        choices.append({**choice, "token_ids": ids, "logprobs": logprobs})
    return {**generated, "choices": choices}


def said(message: dict[str, Any]) -> tuple[str, list[tuple[str, Any]]]:
    calls = [call["function"] for call in message.get("tool_calls") or []]
    return message["content"] or "", [(call["name"], json.loads(call["arguments"])) for call in calls]


async def test_a_text_becomes_the_trainers_tokens_and_another_tokenizer_is_refused(door: Door) -> None:
    tokenizer = door.weights.tokenizer
    assert await door.control.tokenize("policy", PROBE) == tokenizer.encode(PROBE, add_special_tokens=False)
    await refuse_engine(door.control, "policy", tokenizer)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["brown"])
    with pytest.raises(ConfigError, match="different tokenizers: .* which differ from token"):
        await refuse_engine(door.control, "policy", other)
    with pytest.raises(EngineAnsweredError, match="404.*nobody"):
        await door.control.tokenize("nobody", PROBE)


# --- refusals ---


@pytest.mark.parametrize(
    ("route", "body", "status"),
    [
        (CHAT, chat_body(model="nobody"), 404),
        (CHAT, chat_body(messages="hi"), 400),
        (CHAT, chat_body(messages=[{**WORDY, "content": "word " * 3000}]), 400),
        (CHAT, chat_body(max_tokens=100_000), 400),
        (CHAT, chat_body(top_p=2.0), 400),
        (CHAT, chat_body(temperature=-1.0), 400),
        (CHAT, chat_body(top_logprobs=1000), 400),
        (CHAT, chat_body(messages=[{**WORDY, "content": "word " * 3000}], stream=True), 400),
        (RENDER, chat_body(model="nobody"), 404),
        (RENDER, chat_body(max_tokens=100_000), 400),
        (GENERATE, generate_body([]), 400),
        (GENERATE, generate_body([-1]), 400),
        (GENERATE, generate_body([10_000_000]), 400),
        (GENERATE, generate_body([5] * 5000), 400),
        (GENERATE, {**generate_body([5]), "model": "nobody"}, 404),
        (GENERATE, {"sampling_params": {}}, 400),
        (DERENDER, {"model": "nobody", "generate_response": {"choices": []}, "chat_request": chat_body()}, 404),
        ("/v1/completions", {"model": "nobody", "prompt": "x"}, 404),
    ],
)
async def test_every_refusal_is_openais_error_object(door: Door, route: str, body: dict[str, Any], status: int) -> None:
    response = await door.ask(route, body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, status), error
    assert error["message"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert await door.control.health()
