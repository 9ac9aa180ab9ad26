"""Render, generate, derender: the three in a row say what the chat route says at once, whole, streamed or continued."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from tests.unit.trainer.serving_fixtures import build_model, build_tokenizer
from trainer.serving.app import build_app
from trainer.serving.engine import Engine

pytestmark = pytest.mark.anyio

TOOLS = [{"type": "function", "function": {"name": "calculate", "parameters": {"type": "object"}}}]
USER = {"role": "user", "content": "2+2?"}
CALL = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "2+2"}}\n</tool_call>'
RENDER, GENERATE, DERENDER = "/v1/chat/completions/render", "/inference/v1/generate", "/v1/chat/completions/derender"
TOKENIZER = build_tokenizer()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(build_model(), build_tokenizer(), seed=1, torch_threads=1) as running:
        yield running


@pytest.fixture
async def client(engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(engine, model_name="policy", scripted={"teacher": lambda messages, tools: {"content": "4"}})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as opened:
        yield opened


def chat_body(**more: Any) -> dict[str, Any]:
    body = {"model": "policy", "messages": [USER], "max_tokens": 12, "seed": 3, "temperature": 1.0}
    return {**body, "logprobs": True, "return_token_ids": True, **more}


async def post(client: httpx.AsyncClient, route: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post(route, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def generate_stream(client: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await client.post(GENERATE, json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    return events(response.text)


async def derender_stream(
    client: httpx.AsyncClient,
    chunks: list[dict[str, Any]],
    body: dict[str, Any],
    prompt_ids: list[int],
    *,
    window_max: int = 512,
) -> list[dict[str, Any]]:
    """The chat choices of all chunks, each choice with a state of its own, which carries at most window_max ids."""
    states: dict[int, Any] = {}
    choices = []
    for chunk in chunks:
        index = chunk["choices"][0]["index"]
        more = {"stream_state": states.get(index), "chat_request": body, "prompt_token_ids": prompt_ids}
        derendered = await post(client, DERENDER, {"stream": True, "generate_chunk": chunk, **more})
        states[index] = derendered["stream_state"]
        assert len(states[index]["window"]) <= window_max
        choices += derendered["chunk"]["choices"]
    return choices


def without_call_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = [{**call, "id": None} for call in message.get("tool_calls", [])]
    return {**message, "tool_calls": calls}


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"n": 3, "top_logprobs": 3},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "ignore_eos": True},
        {"temperature": 0, "tools": TOOLS},
        {"tools": TOOLS, "tool_choice": "none", "max_tokens": None, "max_completion_tokens": 7},
        {"stop": ["e", "a"], "max_tokens": 60, "n": 2, "ignore_eos": True},
        {"logprobs": False, "return_token_ids": False},
        {"add_generation_prompt": False},
    ],
)
async def test_render_generate_derender_say_what_chat_says(client: httpx.AsyncClient, asked: dict[str, Any]) -> None:
    body = chat_body(**asked)
    chat = await post(client, "/v1/chat/completions", body)
    rendered = await post(client, RENDER, body)
    generated = await post(client, GENERATE, {**rendered, "return_token_ids": True})
    assert generated["prompt_token_ids"] == rendered["token_ids"]
    assert generated["usage"] == chat["usage"]
    derendered = await post(client, DERENDER, {"generate_response": generated, "chat_request": body})
    for answer in (chat, derendered):
        answer.pop("id"), answer.pop("created")
        for choice in answer["choices"]:
            for at, entry in enumerate((choice["logprobs"] or {"content": []})["content"]):
                for value in (entry, *entry["top_logprobs"]):
                    value["logprob"] = pytest.approx(value["logprob"], abs=1e-5) if answer is chat else value["logprob"]
                assert at < 60
    assert derendered == chat


async def test_streamed_ids_join_to_the_whole_and_the_last_chunk_brings_the_versions(client: httpx.AsyncClient) -> None:
    rendered = await post(client, RENDER, chat_body(n=2, top_logprobs=1, ignore_eos=True))
    whole = await post(client, GENERATE, {**rendered, "return_token_ids": True})
    options = {"stream_options": {"include_usage": True}, "return_token_ids": True}
    chunks = await generate_stream(client, {**rendered, **options})
    assert chunks[0]["prompt_token_ids"] == rendered["token_ids"]
    assert all("prompt_token_ids" not in chunk for chunk in chunks[1:])
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
    assert {len(chunk["choices"]) for chunk in chunks[:-1]} == {1}
    for index, expected in enumerate(whole["choices"]):
        parts = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
        assert sum([part["token_ids"] for part in parts], []) == expected["token_ids"]
        rows = sum([part["logprobs"]["content"] for part in parts], [])
        assert [row["token_id"] for row in rows] == expected["token_ids"]
        logprobs = [row["logprob"] for row in expected["logprobs"]["content"]]
        assert [row["logprob"] for row in rows] == pytest.approx(logprobs, abs=1e-5)
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        assert parts[-1]["token_ids"]  # no empty chunk only to say the end
        assert parts[-1]["weight_versions"] == [{"version": "0", "start": 0, "end": 12}]
        assert not any("weight_versions" in part for part in parts[:-1])


@pytest.mark.parametrize("asked", [{}, {"n": 2, "stop": ["e", "a"], "max_tokens": 40}, {"tools": TOOLS}])
async def test_a_streamed_derender_says_what_the_streamed_chat_says(
    client: httpx.AsyncClient, asked: dict[str, Any]
) -> None:
    body = chat_body(ignore_eos=True, **asked)
    chat = await post(client, "/v1/chat/completions", body)
    rendered = await post(client, RENDER, body)
    chunks = await generate_stream(client, rendered)
    choices = await derender_stream(client, chunks, body, rendered["token_ids"])
    for index, expected in enumerate(chat["choices"]):
        parts = [choice for choice in choices if choice["index"] == index]
        assert [part["delta"].get("role") for part in parts] == ["assistant"] + [None] * (len(parts) - 1)
        assert "".join(part["delta"]["content"] for part in parts) == expected["message"]["content"]
        assert sum([part["token_ids"] for part in parts], []) == expected["token_ids"]
        for name in ("finish_reason", "stop_reason", "weight_versions"):
            assert parts[-1][name] == expected[name]


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
async def test_a_tool_call_comes_out_of_ids_whole_and_in_pieces(client: httpx.AsyncClient, step: int) -> None:
    token_ids = TOKENIZER.encode("Sum: é " + CALL + "\n" + CALL + "<|im_end|>")
    body = chat_body(tools=TOOLS)
    choice = {"index": 0, "token_ids": token_ids, "finish_reason": "stop"}
    derendered = await post(
        client, DERENDER, {"generate_response": {"choices": [choice]}, "chat_request": body, "prompt_tokens": 9}
    )
    assert derendered["usage"]["prompt_tokens"] == 9
    whole = derendered["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] == "Sum: é "
    assert len(whole["message"]["tool_calls"]) == 2
    pieces = [token_ids[at : at + step] for at in range(0, len(token_ids), step)]
    chunks = [{"choices": [{"index": 0, "token_ids": piece}]} for piece in pieces]
    chunks[-1]["choices"][0]["finish_reason"] = "stop"
    # What is carried does not grow with the answer, only with the chunks.
    choices = await derender_stream(client, chunks, body, [1], window_max=2 * step + 4)
    message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": []}
    for part in choices:
        message["content"] += part["delta"]["content"]
        message["tool_calls"] += part["delta"].get("tool_calls", [])
    assert [call.pop("index") for call in message["tool_calls"]] == [0, 1]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert without_call_ids(message) == without_call_ids(whole["message"])
    assert choices[-1]["finish_reason"] == "tool_calls"


async def test_text_mode_says_the_text_beside_the_ids(client: httpx.AsyncClient) -> None:
    sampling = {"max_tokens": 20, "seed": 3, "logprobs": 2, "stop": ["e", "a"], "ignore_eos": True, "n": 2}
    body = {"token_ids": [65, 66, 67], "sampling_params": sampling, "output_mode": "text"}
    whole = await post(client, GENERATE, body)
    ids_only = await post(client, GENERATE, {**body, "output_mode": "tokens"})
    assert (whole["output_mode"], ids_only["output_mode"]) == ("text", "tokens")
    chunks = await generate_stream(client, body)
    for index, choice in enumerate(whole["choices"]):
        assert choice["token_ids"] == ids_only["choices"][index]["token_ids"]
        assert "text" not in ids_only["choices"][index]
        assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2
        assert set(choice["logprobs"]["content"][0]) == {"token", "logprob", "bytes", "top_logprobs"}
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        if choice["stop_reason"] is not None:
            assert not any(stop in choice["text"] for stop in ("e", "a"))


async def test_the_sampled_token_comes_first_and_ranks_tell_the_likeliest(client: httpx.AsyncClient) -> None:
    sampling = {"max_tokens": 30, "temperature": 2.0, "seed": 1, "logprobs": 2, "ignore_eos": True}
    answer = await post(client, GENERATE, {"token_ids": [65, 66], "sampling_params": sampling})
    rows = answer["choices"][0]["logprobs"]["content"]
    unlikely = [row for row in rows if row["rank"] is None]
    assert unlikely and len(unlikely) < len(rows)
    for row in rows:
        first, *others = row["top_logprobs"]
        assert first == {name: row[name] for name in ("token_id", "logprob", "rank")}
        ranks = [entry["rank"] for entry in row["top_logprobs"] if entry["rank"]]
        assert sorted(ranks) == [1, 2]
        assert all(entry["token_id"] != row["token_id"] for entry in others)


async def test_history_alone_and_an_open_last_message_can_be_rendered(client: httpx.AsyncClient) -> None:
    answered = [USER, {"role": "assistant", "content": "It is"}]
    history = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nIt is"
    closed = await post(client, RENDER, chat_body(messages=answered, add_generation_prompt=False))
    assert TOKENIZER.decode(closed["token_ids"]) == history + "<|im_end|>\n"
    options = {"add_generation_prompt": False, "continue_final_message": True}
    opened = await post(client, RENDER, chat_body(messages=answered, **options))
    assert TOKENIZER.decode(opened["token_ids"]) == history
    both = await client.post(RENDER, json=chat_body(messages=answered, continue_final_message=True))
    assert both.status_code == 400


async def test_template_variables_reach_the_template_and_a_template_does_not(client: httpx.AsyncClient) -> None:
    plain = await post(client, RENDER, chat_body())
    options = {"enable_thinking": False, "add_generation_prompt": False}
    with_variables = await post(client, RENDER, chat_body(chat_template_kwargs=options))
    assert with_variables["token_ids"] == plain["token_ids"]  # the request's own field outweighs a variable's
    refused = await client.post(RENDER, json=chat_body(chat_template_kwargs={"chat_template": "{{ 1 }}"}))
    assert refused.json()["error"]["param"] == "chat_template_kwargs"


async def test_generate_cuts_max_tokens_to_the_room_that_is_left(client: httpx.AsyncClient) -> None:
    sampling = {"max_tokens": 900, "ignore_eos": True, "logprobs": 0}
    answer = await post(client, GENERATE, {"token_ids": [65] * 500, "sampling_params": sampling, "priority": 3})
    choice = answer["choices"][0]
    assert (choice["finish_reason"], len(choice["token_ids"])) == ("length", 12)


@pytest.mark.parametrize(
    ("route", "body", "status", "param", "message"),
    [
        (RENDER, chat_body(model="teacher"), 404, "model", "no weights"),
        (RENDER, chat_body(model="gpt"), 404, "model", "does not exist"),
        (RENDER, chat_body(max_tokens=5000), 400, "max_tokens", "maximum context length is 512"),
        (GENERATE, {"token_ids": [1], "sampling_params": {}, "model": "teacher"}, 404, "model", "no weights"),
        (GENERATE, {"token_ids": [], "sampling_params": {}}, 400, "prompt", "no tokens"),
        (GENERATE, {"token_ids": [264], "sampling_params": {}}, 400, "prompt", "run from 0 to 263"),
        (GENERATE, {"token_ids": [-1], "sampling_params": {}, "stream": True}, 400, "prompt", "token id -1"),
        (GENERATE, {"token_ids": [1] * 512, "sampling_params": {}}, 400, "messages", "maximum context length"),
        (GENERATE, {"token_ids": [1], "sampling_params": {"top_p": 0}}, 400, "top_p", "above 0"),
        (GENERATE, {"token_ids": [1], "sampling_params": {}, "output_mode": "x"}, 400, "output_mode", "Invalid"),
        (DERENDER, {}, 400, "generate_response", "missing"),
        (DERENDER, {"stream": True}, 400, "generate_chunk", "missing"),
        (
            DERENDER,
            {"generate_response": {"choices": [{"index": 0, "token_ids": [9999]}]}},
            400,
            "token_ids",
            "264|263",
        ),
        (
            DERENDER,
            {"generate_response": {"choices": [{"index": 0, "token_ids": [1], "logprobs": {"content": []}}]}},
            400,
            "logprobs",
            "one for each",
        ),
        (
            DERENDER,
            {"stream": True, "generate_chunk": {"choices": [{"index": 0}, {"index": 1}]}},
            400,
            "generate_chunk",
            "by itself",
        ),
        (
            DERENDER,
            {"stream": True, "generate_chunk": {"choices": []}, "stream_state": {"sofar": 1}},
            400,
            "stream_state",
            "unknown field",
        ),
        (
            DERENDER,
            {"stream": True, "generate_chunk": {"choices": []}, "stream_state": {"window": [-3]}},
            400,
            "token_ids",
            "token id -3",
        ),
        (DERENDER, {"model": "teacher", "generate_response": {"choices": []}}, 404, "model", "no weights"),
    ],
)
async def test_what_does_not_fit_is_refused_by_name(
    client: httpx.AsyncClient, route: str, body: dict[str, Any], status: int, param: str, message: str
) -> None:
    response = await client.post(route, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, status, param), error
    assert any(part in error["message"] for part in message.split("|"))
