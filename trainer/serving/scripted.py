"""The scripted models as a server of their own, for a run whose policy vLLM serves: a tokenizer, functions, no weights.

Always holds: what it answers has the shape and the tokens of the policy's own chats, as the embedded engine's answers
for the same script do; so a teacher's rollouts are recorded exactly as the policy's will be, whoever serves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import AutoTokenizer, GenerationConfig

from trainer.serving.answers import ChatAnswer
from trainer.serving.chat import ChatFormat, Script
from trainer.serving.errors import ServingError
from trainer.serving.protocol import (
    ChatBody,
    UnknownModelError,
    error_body,
    json_response,
    on_serving_error,
    read_body,
)
from trainer.serving.streaming import scripted_stream, server_sent


def build_scripted_app(directory: Path, scripts: Mapping[str, Script]) -> Starlette:
    """The ASGI application that answers for `scripts` in the tokens of the model in `directory`."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    routes = _ScriptedRoutes(ChatFormat(tokenizer, _end_ids(directory, tokenizer.eos_token_id)), scripts)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/health", routes.health),
        ],
        exception_handlers={ServingError: on_serving_error, HTTPException: _on_http_error},
    )


class _ScriptedRoutes:
    def __init__(self, chat_format: ChatFormat, scripts: Mapping[str, Script]) -> None:
        self._format = chat_format
        self._scripts = scripts

    async def health(self, _: HttpRequest) -> Response:
        return Response(status_code=200)

    async def models(self, _: HttpRequest) -> Response:
        entries = [{"id": name, "object": "model", "created": 0, "owned_by": "lightning-bus"} for name in self._scripts]
        return json_response({"object": "list", "data": entries})

    async def chat(self, request: HttpRequest) -> Response:
        body = await read_body(request, ChatBody)
        script = self._scripts.get(body.model)
        if script is None:
            raise UnknownModelError(body.model, list(self._scripts))
        body.chat_params()  # a script samples nothing, but what the policy would refuse is refused here too
        prompt_ids, reply = self._format.scripted(script, body.messages, body.offered_tools())
        answer = ChatAnswer(self._format, body, prompt_ids)
        count = body.n or 1
        if body.stream:
            events = answer.events([scripted_stream(reply) for _ in range(count)])
            return StreamingResponse(server_sent(await anext(events), events), media_type="text/event-stream")
        return json_response(answer.whole([reply] * count))


def _end_ids(directory: Path, eos_token_id: int | None) -> frozenset[int]:
    """What ends an answer: the model's own say, else the tokenizer's."""
    try:
        configured = GenerationConfig.from_pretrained(directory).eos_token_id
    except OSError:  # it has no such file
        configured = None
    if configured is None:
        configured = [] if eos_token_id is None else eos_token_id
    return frozenset(configured if isinstance(configured, list) else [configured])


async def _on_http_error(request: HttpRequest, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    message = f"{request.method} {request.url.path}: {exc.detail}. Scripted models answer /v1/chat/completions only."
    return JSONResponse(error_body(message, exc.status_code), status_code=exc.status_code, headers=exc.headers)
