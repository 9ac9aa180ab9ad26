"""Scripted models beside vLLM answer as they do inside the embedded engine, token for token."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.unit.trainer.serving_fixtures import build_model, build_tokenizer
from tests.unit.trainer.test_serving_app import TOOLS, USER, teacher
from trainer.policy.model import save_policy
from trainer.serving.app import build_app
from trainer.serving.engine import Engine
from trainer.serving.scripted import build_scripted_app

pytestmark = pytest.mark.anyio

ASKED = {"model": "teacher", "messages": [USER], "return_token_ids": True, "logprobs": True}


@pytest.fixture
async def both(tmp_path: Path) -> AsyncGenerator[list[httpx.AsyncClient]]:
    """The embedded engine with a teacher in it, and the teacher by itself."""
    model, tokenizer = build_model(), build_tokenizer()
    save_policy(model, tokenizer, tmp_path / "policy")
    with Engine(model, tokenizer, torch_threads=1) as engine:
        inside = httpx.ASGITransport(build_app(engine, model_name="policy", scripted={"teacher": teacher}))
        beside = httpx.ASGITransport(build_scripted_app(tmp_path / "policy", {"teacher": teacher}))
        async with (
            httpx.AsyncClient(transport=inside, base_url="http://inside") as one,
            httpx.AsyncClient(transport=beside, base_url="http://beside") as other,
        ):
            yield [one, other]


@pytest.mark.parametrize("body", [ASKED, {**ASKED, "tools": TOOLS}, {**ASKED, "tools": TOOLS, "tool_choice": "none"}, {**ASKED, "n": 2}])  # fmt: skip
async def test_a_teacher_beside_vllm_is_recorded_as_one_inside_the_engine_is(
    both: list[httpx.AsyncClient], body: dict[str, Any]
) -> None:
    answers = [(await client.post("/v1/chat/completions", json=body)).raise_for_status().json() for client in both]
    inside, beside = answers
    for answer in answers:
        answer.update(id="", created=0)
        for choice in answer["choices"]:
            for call in choice["message"].get("tool_calls", []):
                call["id"] = ""
    assert beside == inside
    assert beside["choices"][0]["weight_versions"][0]["version"] == "scripted"


async def test_it_streams_what_it_would_say_at_once(both: list[httpx.AsyncClient]) -> None:
    streamed = await both[1].post("/v1/chat/completions", json={**ASKED, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert '"content":"It is 4."' in streamed.text


async def test_it_names_its_models_and_is_well_without_weights(both: list[httpx.AsyncClient]) -> None:
    beside = both[1]
    listed = (await beside.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["teacher"]
    assert (await beside.get("/health")).status_code == 200
    assert (await beside.get("/weight_info")).status_code == 404  # so that gateways go by its health alone


async def test_what_it_cannot_do_is_an_error_that_openai_clients_understand(both: list[httpx.AsyncClient]) -> None:
    beside = both[1]
    unknown = await beside.post("/v1/chat/completions", json={**ASKED, "model": "policy"})
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "NotFoundError")
    assert "Served: teacher" in unknown.json()["error"]["message"]
    render = await beside.post("/v1/chat/completions/render", json=ASKED)
    assert (render.status_code, render.json()["error"]["code"]) == (404, 404)
    failed = await beside.post(
        "/v1/chat/completions", json={**ASKED, "messages": [{"role": "user", "content": "fail"}]}
    )
    assert (failed.status_code, failed.json()["error"]["type"]) == (500, "InternalServerError")
