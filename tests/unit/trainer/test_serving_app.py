"""The HTTP face: vLLM's shapes, OpenAI's errors, and the official client as the judge of both."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from tests.unit.trainer.serving_fixtures import (
    build_model,
    build_tokenizer,
    reference_logprobs,
    stand_still_after,
    until,
)
from trainer.serving.app import build_app
from trainer.serving.engine import Engine

pytestmark = pytest.mark.anyio

TOOLS = [{"type": "function", "function": {"name": "calculate", "parameters": {"type": "object"}}}]
USER = {"role": "user", "content": "2+2?"}
CALL = {
    "content": "So: ",
    "tool_calls": [{"type": "function", "function": {"name": "calculate", "arguments": '{"expression": "2+2"}'}}],
}


def teacher(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    if messages[-1]["content"] == "fail":
        raise ValueError("no script for this")
    return CALL if tools else {"content": "It is 4."}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(build_model(), build_tokenizer(), seed=1, waiting_max=4, torch_threads=1) as running:
        yield running


@pytest.fixture
async def client(engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(engine, model_name="policy", scripted={"teacher": teacher})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as opened:
        yield opened


@pytest.fixture
async def server(engine: Engine) -> AsyncIterator[str]:
    """A real server on a real socket, as agents meet it."""
    app = build_app(engine, model_name="policy", scripted={"teacher": teacher})
    running = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        task = asyncio.create_task(running.serve(sockets=[listener]))
        await until(lambda: running.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        running.should_exit = True
        await task


def chat_body(**more: Any) -> dict[str, Any]:
    return {"model": "policy", "messages": [USER], "max_tokens": 12, "seed": 3, "temperature": 1.0, **more}


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_a_chat_answer_carries_ids_logprobs_and_versions_in_vllms_places(client: httpx.AsyncClient) -> None:
    body = chat_body(n=2, logprobs=True, top_logprobs=2, return_token_ids=True, ignore_eos=True)
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    tokenizer = build_tokenizer()
    rendered = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert answer["prompt_token_ids"] == tokenizer.encode(rendered)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"] == tokenizer.decode(choice["token_ids"], skip_special_tokens=True)
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        reference = reference_logprobs(build_model(), answer["prompt_token_ids"], choice["token_ids"])
        assert logprobs == pytest.approx(reference, abs=1e-5)
        assert all(len(entry["top_logprobs"]) == 2 for entry in choice["logprobs"]["content"])
        assert choice["weight_versions"] == [{"version": "0", "start": 0, "end": 12}]
    assert answer["choices"][0]["token_ids"] != answer["choices"][1]["token_ids"]
    prompt = len(answer["prompt_token_ids"])
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": 24, "total_tokens": prompt + 24}


async def test_a_stream_says_what_the_whole_answer_says(client: httpx.AsyncClient) -> None:
    body = chat_body(logprobs=True, return_token_ids=True, n=2)
    whole = (await client.post("/v1/chat/completions", json=body)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await client.post("/v1/chat/completions", json={**body, **options})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert chunks[-1]["usage"] == whole["usage"]
    for index, expected in enumerate(whole["choices"]):
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(part["delta"]["content"] for part in parts) == expected["message"]["content"]
        assert sum([part.get("token_ids") or [] for part in parts], []) == expected["token_ids"]
        content = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert [e["logprob"] for e in content] == pytest.approx(
            [e["logprob"] for e in expected["logprobs"]["content"]], abs=1e-5
        )
        assert parts[-1]["finish_reason"] == expected["finish_reason"]
        assert parts[-1]["weight_versions"] == expected["weight_versions"]


async def test_a_scripted_reply_has_exactly_the_ids_the_policy_would_produce(client: httpx.AsyncClient) -> None:
    tokenizer = build_tokenizer()
    body = {"model": "teacher", "messages": [USER], "tools": TOOLS, "return_token_ids": True, "logprobs": True}
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "So: "
    assert choice["message"]["tool_calls"][0]["function"] == CALL["tool_calls"][0]["function"]  # type: ignore[index]
    assert tokenizer.decode(choice["token_ids"]).endswith("</tool_call><|im_end|>")
    assert {entry["logprob"] for entry in choice["logprobs"]["content"]} == {0.0}
    assert choice["weight_versions"] == [{"version": "scripted", "start": 0, "end": len(choice["token_ids"])}]
    # The next turn's prompt continues this one id for id, which is what joins the turns into one training row.
    second = [USER, choice["message"], {"role": "tool", "content": "4"}]
    following = (await client.post("/v1/chat/completions", json={**body, "messages": second})).json()
    joined = answer["prompt_token_ids"] + choice["token_ids"]
    assert following["prompt_token_ids"][: len(joined)] == joined


async def test_completions_and_generate_take_ids_and_give_ids(client: httpx.AsyncClient) -> None:
    sampling = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True}
    body = {"token_ids": [65, 66, 67], "sampling_params": {**sampling, "logprobs": 1}, "return_token_ids": True}
    generated = (await client.post("/inference/v1/generate", json={**body, "cache_salt": "1"})).json()
    choice = generated["choices"][0]
    assert generated["prompt_token_ids"] == [65, 66, 67]
    assert [entry["token_id"] for entry in choice["logprobs"]["content"]] == choice["token_ids"]
    assert choice["weight_versions"] == [{"version": "0", "start": 0, "end": 6}]
    body = {"model": "policy", "prompt": [65, 66, 67], "logprobs": 0, "return_token_ids": True, **sampling}
    completed = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    assert completed["token_ids"] == choice["token_ids"]
    assert completed["logprobs"]["token_logprobs"] == pytest.approx(
        [entry["logprob"] for entry in choice["logprobs"]["content"]], abs=1e-5
    )


async def test_a_streamed_completion_says_what_the_whole_one_says(client: httpx.AsyncClient) -> None:
    body = {
        "model": "policy", "prompt": "2+2=", "max_tokens": 12, "seed": 3, "n": 2, "logprobs": 1, "return_token_ids": True
    }  # fmt: skip
    whole = (await client.post("/v1/completions", json=body)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await client.post("/v1/completions", json={**body, **options})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    assert {chunk["object"] for chunk in chunks} == {whole["object"]}
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
    for index, expected in enumerate(whole["choices"]):
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(part["text"] for part in parts) == expected["text"]
        assert sum([part.get("token_ids") or [] for part in parts], []) == expected["token_ids"]
        assert [part.get("prompt_token_ids") for part in parts if "prompt_token_ids" in part] == [
            expected["prompt_token_ids"]
        ]
        said = [part["logprobs"] for part in parts if part["logprobs"]]
        for name in ("tokens", "text_offset"):
            assert sum([one[name] for one in said], []) == expected["logprobs"][name]
        logprobs = sum([one["token_logprobs"] for one in said], [])
        assert logprobs == pytest.approx(expected["logprobs"]["token_logprobs"], abs=1e-5)
        assert [len(pairs) for one in said for pairs in one["top_logprobs"]] == [1] * len(expected["token_ids"])
        assert (parts[-1]["finish_reason"], parts[-1]["stop_reason"]) == (expected["finish_reason"], None)
        assert parts[-1]["weight_versions"] == expected["weight_versions"]
    refused = await client.post("/v1/completions", json={**body, **options, "max_tokens": 5000})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


@pytest.mark.parametrize(
    ("change", "status", "param", "message"),
    [
        ({"model": "gpt"}, 404, "model", "'gpt' does not exist here. Served: policy, teacher"),
        ({"messages": "hi"}, 400, "messages", "Expected `array`"),
        ({"messages": []}, 400, "messages", "length >= 1"),
        ({"messages": [{"content": "x"}]}, 400, "messages", "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "image_url"),
        ({"temperature": "hot"}, 400, "temperature", "Expected `float"),
        ({"top_p": 0}, 400, "top_p", "above 0"),
        ({"max_tokens": 5000}, 400, "max_tokens", "maximum context length is 512"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages", "maximum context length is 512"),
        ({"n": 1000}, 400, "n", "<= 128"),
        ({"stream": True, "max_tokens": 5000}, 400, "max_tokens", "maximum context length is 512"),
        ({"logprobs": True, "top_logprobs": 99}, 400, "top_logprobs", "between 0 and 20"),
        ({"model": "teacher", "messages": [{"role": "user", "content": "fail"}]}, 500, None, "no script for this"),
    ],
)
async def test_every_refusal_is_openais_error_object(
    client: httpx.AsyncClient, change: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    response = await client.post("/v1/chat/completions", json=chat_body(**change))
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, status)
    assert message in error["message"]


async def test_malformed_json_and_unknown_routes_are_refused_alike(client: httpx.AsyncClient) -> None:
    malformed = await client.post("/v1/chat/completions", content=b'{"model": ')
    assert malformed.status_code == 400
    assert "truncated" in malformed.json()["error"]["message"]
    assert (await client.get("/v1/nothing")).json()["error"]["code"] == 404
    assert (await client.get("/pause")).status_code == 405
    assert (await client.post("/pause?mode=later")).json()["error"]["param"] == "mode"


async def test_a_full_queue_is_503_with_retry_after(client: httpx.AsyncClient, engine: Engine) -> None:
    await engine.pause("keep")
    queued = [asyncio.ensure_future(client.post("/v1/chat/completions", json=chat_body())) for _ in range(4)]
    await until(lambda: engine.statistics().waiting == 4)
    refused = await client.post("/v1/chat/completions", json=chat_body(n=3))
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    await client.post("/resume")
    assert {answer.status_code for answer in await asyncio.gather(*queued)} == {200}


async def test_the_control_routes_tell_what_the_engine_does(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).status_code == 200
    models = (await client.get("/v1/models")).json()["data"]
    assert [(model["id"], model["max_model_len"]) for model in models] == [("policy", 512), ("teacher", 512)]
    assert (await client.post("/pause?mode=keep&clear_cache=false")).json() == {"status": "paused"}
    assert (await client.get("/is_paused")).json() == {"is_paused": True}
    assert (await client.post("/resume")).json() == {"status": "resumed"}
    assert (await client.get("/is_paused")).json() == {"is_paused": False}
    changed = await client.post("/update_weight_version", json={"new_version": "a"})
    assert changed.json() == {"success": True, "new_version": "a"}
    assert (await client.get("/weight_info")).json() == {"weight_version": "a"}
    assert (await client.post("/init_weight_transfer_engine", json={"init_info": {}})).status_code == 200
    await client.post("/v1/chat/completions", json=chat_body(ignore_eos=True))
    metrics = (await client.get("/metrics")).text
    assert 'vllm:generation_tokens_total{model_name="policy"} 12.0' in metrics
    assert 'vllm:num_requests_running{model_name="policy"} 0.0' in metrics
    assert "vllm:prompt_tokens_total" in metrics
    assert "vllm:num_requests_waiting" in metrics


async def test_a_client_that_leaves_frees_its_slot(server: str, engine: Engine) -> None:
    endless = chat_body(max_tokens=400, ignore_eos=True)
    stand_still_after(engine, 1)
    async with httpx.AsyncClient(base_url=server, timeout=60) as leaving:
        task = asyncio.ensure_future(leaving.post("/v1/chat/completions", json=endless))
        await until(lambda: engine.statistics().running == 1 and engine.is_paused)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: engine.statistics().running == 0)
        await engine.resume()
        async with leaving.stream("POST", "/v1/chat/completions", json={**endless, "stream": True}):
            await until(lambda: engine.statistics().running == 1 and engine.is_paused)
    await until(lambda: engine.statistics().running == 0)
    assert engine.statistics().generation_tokens <= 4  # the first step makes two, one of them from the prompt


async def test_the_official_client_reads_everything(server: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="any", max_retries=0) as official:
        body: dict[str, Any] = {"model": "teacher", "messages": [USER], "tools": TOOLS}
        whole = await official.chat.completions.create(**body, logprobs=True)
        assert whole.choices[0].message.tool_calls
        assert whole.choices[0].message.tool_calls[0].to_dict()["function"] == CALL["tool_calls"][0]["function"]  # type: ignore[index]
        assert whole.choices[0].logprobs is not None

        stream = await official.chat.completions.create(**body, stream=True)
        chunks = [chunk async for chunk in stream]
        calls = [call for chunk in chunks for c in chunk.choices for call in c.delta.tool_calls or []]
        assert [call.function.arguments for call in calls if call.function] == ['{"expression": "2+2"}']
        assert chunks[-1].choices[0].finish_reason == "tool_calls"

        plain = await official.chat.completions.create(
            model="policy", messages=[{"role": "user", "content": "hi"}], max_completion_tokens=5, seed=1
        )
        assert plain.usage is not None
        assert plain.usage.completion_tokens <= 5
        with pytest.raises(openai.NotFoundError, match="Served: policy"):
            await official.chat.completions.create(model="x", messages=[{"role": "user", "content": "hi"}])
        with pytest.raises(openai.BadRequestError, match="top_p"):
            await official.chat.completions.create(
                model="policy", messages=[{"role": "user", "content": "hi"}], top_p=2.0
            )
