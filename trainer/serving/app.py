"""The engine's HTTP face: vLLM's routes and shapes, so that nobody needs to know which of the two is behind.

What holds: a choice carries the ids the engine produced, their log-probs and the weight versions that made them,
streamed or not (vLLM reports versions on /inference/v1/generate only); every refusal is OpenAI's error object; a
client that goes away frees its slot. Chat and completions are here, ids in and out in `tokens.py`, control routes in
`control.py`.

A request whose model is a key of `scripted` is answered by that function instead of the weights, in the policy's
own tokens: how a teacher's rollouts are recorded exactly as the policy's will be.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from trainer.serving.answers import ChatAnswer
from trainer.serving.chat import ChatFormat, Script
from trainer.serving.choices import complete, each_choice, streams, usage
from trainer.serving.control import control_routes
from trainer.serving.engine import Engine
from trainer.serving.errors import ServingError
from trainer.serving.protocol import (
    ChatBody,
    CompletionBody,
    NoWeightsError,
    UnknownModelError,
    error_body,
    json_response,
    on_serving_error,
    read_body,
)
from trainer.serving.request import Completion, Delta
from trainer.serving.sampling import SamplingParams
from trainer.serving.streaming import StreamedText, merged, scripted_stream, server_sent
from trainer.serving.tokens import TokenRoutes, prompt_ids


def build_app(engine: Engine, *, model_name: str, scripted: Mapping[str, Script] | None = None) -> Starlette:
    """The ASGI application over a running engine; the caller closes the engine."""
    routes = _GenerationRoutes(engine, model_name, scripted or {})
    return Starlette(
        routes=[
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/models", routes.models),
            *TokenRoutes(engine, routes.format, model_name, routes.check_weights).routes(),
            *control_routes(engine, model_name),
        ],
        exception_handlers={ServingError: on_serving_error, HTTPException: _on_http_error},
    )


class _GenerationRoutes:
    def __init__(self, engine: Engine, model_name: str, scripted: Mapping[str, Script]) -> None:
        self.format = ChatFormat(engine.tokenizer, engine.end_ids)
        self._engine = engine
        self._model_name = model_name
        self._scripted = scripted

    async def models(self, _: HttpRequest) -> Response:
        limit = self._engine.context_tokens
        entries = [
            {"id": name, "object": "model", "created": 0, "owned_by": "lightning-bus", "max_model_len": limit}
            for name in (self._model_name, *self._scripted)
        ]
        return json_response({"object": "list", "data": entries})

    async def chat(self, request: HttpRequest) -> Response:
        body = await read_body(request, ChatBody)
        self._check_model(body.model)
        params = body.chat_params()
        script = self._scripted.get(body.model)
        if script is not None:
            prompt, reply = self.format.scripted(script, body.messages, body.offered_tools())
        else:
            prompt, reply = prompt_ids(self.format, body), None
        answer = ChatAnswer(self.format, body, prompt)
        each = each_choice(params, body.n)
        if body.stream:
            if reply is None:
                sources = streams(self._engine, prompt, each, body.cache_salt)
            else:
                sources = [scripted_stream(reply) for _ in each]
            events = answer.events(sources)
            # The first event is drawn here so that a refusal still has its own status code.
            first = await anext(events)
            return StreamingResponse(server_sent(first, events), media_type="text/event-stream")
        if reply is None:
            completions = await complete(self._engine, request, prompt, each, body.cache_salt)
        else:
            completions = [reply for _ in each]
        return json_response(answer.whole(completions))

    async def completions(self, request: HttpRequest) -> Response:
        body = await read_body(request, CompletionBody)
        self.check_weights(body.model)
        params = body.params(top_logprobs=body.logprobs or 0)
        if params.max_tokens is None:
            params = replace(params, max_tokens=16)  # OpenAI's default on this route
        prompt = self.format.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        head["object"] = "text_completion"  # streamed too
        each = each_choice(params, body.n)
        if body.stream:
            sources = streams(self._engine, prompt, each, body.cache_salt)
            events = self._text_events(body, params, prompt, sources, head)
            first = await anext(events)  # as in chat
            return StreamingResponse(server_sent(first, events), media_type="text/event-stream")
        completions = await complete(self._engine, request, prompt, each, body.cache_salt)
        choices = [
            {
                "index": index,
                "text": self.format.text(completion, params.stop),
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
                "logprobs": None if body.logprobs is None else self._text_logprobs(completion),
                "token_ids": completion.token_ids if body.return_token_ids else None,
                "prompt_token_ids": prompt if body.return_token_ids else None,
                "weight_versions": completion.weight_versions,
            }
            for index, completion in enumerate(completions)
        ]
        return json_response({**head, "choices": choices, "usage": usage(len(prompt), completions)})

    async def _text_events(
        self,
        body: CompletionBody,
        params: SamplingParams,
        prompt: list[int],
        sources: list[AsyncIterator[Delta | Completion]],
        head: dict[str, Any],
    ) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of a streamed completion: a choice's first brings its prompt's ids, its last the versions."""
        texts = [StreamedText(self.format, params.stop) for _ in sources]
        offsets = [0] * len(sources)  # in the text of all tokens, as the whole answer counts
        begun: set[int] = set()
        completions: list[Completion] = []
        async with contextlib.aclosing(merged(sources)) as items:
            async for index, item in items:
                choice: dict[str, Any] = {"logprobs": None, "finish_reason": None}
                if isinstance(item, Completion):
                    completions.append(item)
                    delta = texts[index].push([], last=True)
                    choice["finish_reason"] = item.finish_reason
                    choice["stop_reason"] = item.stop_reason
                    choice["weight_versions"] = item.weight_versions
                else:
                    delta = texts[index].push(item.token_ids)
                    if body.logprobs is not None:
                        choice["logprobs"] = self._text_logprobs(item, offsets[index])
                        offsets[index] += sum(map(len, choice["logprobs"]["tokens"]))
                    if body.return_token_ids:
                        choice["token_ids"] = item.token_ids
                if body.return_token_ids and index not in begun:
                    begun.add(index)
                    choice["prompt_token_ids"] = prompt
                yield {**head, "choices": [{"index": index, "text": delta["content"], **choice}]}
        if body.stream_options is not None and body.stream_options.include_usage:
            yield {**head, "choices": [], "usage": usage(len(prompt), completions)}

    def check_weights(self, model: str) -> None:
        """Raise when no weights answer under this name: it is not served, or a script."""
        self._check_model(model)
        if model in self._scripted:
            raise NoWeightsError(model)

    def _check_model(self, model: str) -> None:
        if model != self._model_name and model not in self._scripted:
            raise UnknownModelError(model, [self._model_name, *self._scripted])

    def _text_logprobs(self, item: Completion | Delta, begin: int = 0) -> dict[str, Any]:
        """The logprobs object of tokens whose text begins at offset `begin`."""
        tokens = [self.format.token_text(token_id) for token_id in item.token_ids]
        offsets = [begin]
        for token in tokens[:-1]:
            offsets.append(offsets[-1] + len(token))
        return {
            "tokens": tokens,
            "token_logprobs": item.logprobs,
            "top_logprobs": [
                {self.format.token_text(token_id): logprob for token_id, logprob in pairs}
                for pairs in item.top_logprobs
            ],
            "text_offset": offsets[: len(tokens)],
        }


async def _on_http_error(request: HttpRequest, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    message = f"{request.method} {request.url.path}: {exc.detail}"
    return JSONResponse(error_body(message, exc.status_code), status_code=exc.status_code, headers=exc.headers)
