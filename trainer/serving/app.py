"""The engine's HTTP face: vLLM's routes and shapes, so that nobody needs to know which of the two is behind.

What holds: a choice carries the ids the engine produced, their log-probs and the weight versions that made them,
streamed or not (vLLM reports versions on /inference/v1/generate only); every refusal is OpenAI's error object; a
client that goes away frees its slot. Control routes are in `control.py`.

A request whose model is a key of `scripted` is answered by that function instead of the weights, in the policy's
own tokens: how a teacher's rollouts are recorded exactly as the policy's will be.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from trainer.serving.batch import Completion, Delta
from trainer.serving.chat import ChatFormat, Script
from trainer.serving.control import control_routes
from trainer.serving.engine import Engine
from trainer.serving.errors import BadRequestError, ServingError
from trainer.serving.protocol import (
    ChatBody,
    CompletionBody,
    GenerateBody,
    UnknownModelError,
    error_body,
    json_response,
    on_serving_error,
    read_body,
)
from trainer.serving.sampling import SamplingParams
from trainer.serving.streaming import StreamedText, merged, scripted_stream, server_sent


def build_app(engine: Engine, *, model_name: str, scripted: Mapping[str, Script] | None = None) -> Starlette:
    """The ASGI application over a running engine; the caller closes the engine."""
    routes = _GenerationRoutes(engine, model_name, scripted or {})
    return Starlette(
        routes=[
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/inference/v1/generate", routes.generate, methods=["POST"]),
            Route("/v1/models", routes.models),
            *control_routes(engine, model_name),
        ],
        exception_handlers={ServingError: on_serving_error, HTTPException: _on_http_error},
    )


class _GenerationRoutes:
    def __init__(self, engine: Engine, model_name: str, scripted: Mapping[str, Script]) -> None:
        self._engine = engine
        self._model_name = model_name
        self._scripted = scripted
        self._format = ChatFormat(engine.tokenizer, engine.end_ids)

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
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else 0
        params = body.params(top_logprobs=top_logprobs, max_tokens=body.max_completion_tokens)
        tools = None if body.tool_choice == "none" else body.tools
        prompt_ids, reply = self._prompt(body, tools)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        if body.stream:
            if reply is not None:
                sources = [scripted_stream(reply) for _ in range(body.n or 1)]
            else:
                each = _each(params, body.n)
                sources = [self._engine.stream(prompt_ids, one, cache_salt=body.cache_salt) for one in each]
            events = self._chat_events(body, params, bool(tools), prompt_ids, sources, head)
            # The first event is drawn here so that a refusal still has its own status code.
            first = await anext(events)
            return StreamingResponse(server_sent(first, events), media_type="text/event-stream")
        if reply is not None:
            completions = [reply] * (body.n or 1)
        else:
            completions = await self._complete(request, prompt_ids, _each(params, body.n), body.cache_salt)
        choices = [
            self._chat_choice(index, body, params, bool(tools), completion)
            for index, completion in enumerate(completions)
        ]
        return json_response(
            {
                **head,
                "object": "chat.completion",
                "choices": choices,
                "usage": _usage(prompt_ids, completions),
                "prompt_token_ids": prompt_ids if body.return_token_ids else None,
            }
        )

    async def completions(self, request: HttpRequest) -> Response:
        body = await read_body(request, CompletionBody)
        self._check_model(body.model)
        if body.model in self._scripted:
            raise BadRequestError(
                f"/v1/completions continues a prompt, and the scripted model {body.model!r} answers messages. "
                "Use /v1/chat/completions.",
                param="model",
            )
        params = body.params(top_logprobs=body.logprobs or 0)
        if params.max_tokens is None:
            params = replace(params, max_tokens=16)  # OpenAI's default on this route
        prompt_ids = self._format.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        head["object"] = "text_completion"  # streamed too
        each = _each(params, body.n)
        if body.stream:
            sources = [self._engine.stream(prompt_ids, one, cache_salt=body.cache_salt) for one in each]
            events = self._text_events(body, params, prompt_ids, sources, head)
            first = await anext(events)  # as in chat
            return StreamingResponse(server_sent(first, events), media_type="text/event-stream")
        completions = await self._complete(request, prompt_ids, each, body.cache_salt)
        choices = [
            {
                "index": index,
                "text": self._format.text(completion, params.stop),
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
                "logprobs": None if body.logprobs is None else self._text_logprobs(completion),
                "token_ids": completion.token_ids if body.return_token_ids else None,
                "prompt_token_ids": prompt_ids if body.return_token_ids else None,
                "weight_versions": completion.weight_versions,
            }
            for index, completion in enumerate(completions)
        ]
        return json_response({**head, "choices": choices, "usage": _usage(prompt_ids, completions)})

    async def generate(self, request: HttpRequest) -> Response:
        body = await read_body(request, GenerateBody)
        self._check_model(body.model or self._model_name)
        if body.stream or body.model in self._scripted:
            raise BadRequestError(
                "/inference/v1/generate answers neither streams nor scripted models here. Use /v1/chat/completions.",
                param="stream" if body.stream else "model",
            )
        wanted = body.sampling_params.logprobs
        params = body.sampling_params.params(top_logprobs=wanted or 0)
        each = _each(params, body.sampling_params.n)
        completions = await self._complete(request, body.token_ids, each, body.cache_salt)
        choices = [
            {
                "index": index,
                "token_ids": completion.token_ids,
                "logprobs": None if wanted is None else _id_logprobs(completion),
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
                "weight_versions": completion.weight_versions,
            }
            for index, completion in enumerate(completions)
        ]
        answer = {"request_id": body.request_id or uuid.uuid4().hex, "choices": choices}
        if body.return_token_ids:
            answer["prompt_token_ids"] = body.token_ids
        return json_response({**answer, "usage": _usage(body.token_ids, completions)})

    def _prompt(self, body: ChatBody, tools: list[dict[str, Any]] | None) -> tuple[list[int], Completion | None]:
        """Prompt ids, and the completion where a script answers instead of the weights."""
        script = self._scripted.get(body.model)
        if script is not None:
            return self._format.scripted(script, body.messages, tools)
        return self._format.prompt_ids(body.messages, tools), None

    async def _complete(
        self, request: HttpRequest, prompt_ids: list[int], each: list[SamplingParams], cache_salt: str | None
    ) -> list[Completion]:
        """One completion per entry of `each`; all are given up when one is refused or the client goes away."""
        tasks = [
            asyncio.ensure_future(self._engine.generate(prompt_ids, params, cache_salt=cache_salt)) for params in each
        ]
        gone = asyncio.ensure_future(_wait_gone(request))
        finished = asyncio.gather(*tasks)
        try:
            await asyncio.wait((finished, gone), return_when=asyncio.FIRST_COMPLETED)
            if not finished.done():
                raise ClientDisconnect
            return finished.result()
        finally:
            finished.cancel()
            for task in (*tasks, gone):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ServingError):
                await finished

    def _chat_choice(
        self, index: int, body: ChatBody, params: SamplingParams, tools: bool, completion: Completion
    ) -> dict[str, Any]:
        message = self._format.message(self._format.text(completion, params.stop, with_special=tools), tools=tools)
        called = "tool_calls" in message and completion.finish_reason == "stop"
        return {
            "index": index,
            "message": message,
            "logprobs": self._chat_logprobs(completion) if body.logprobs else None,
            "finish_reason": "tool_calls" if called else completion.finish_reason,
            "stop_reason": completion.stop_reason,
            "token_ids": completion.token_ids if body.return_token_ids else None,
            "weight_versions": completion.weight_versions,
        }

    async def _chat_events(
        self,
        body: ChatBody,
        params: SamplingParams,
        tools: bool,
        prompt_ids: list[int],
        sources: list[AsyncIterator[Delta | Completion]],
        head: dict[str, Any],
    ) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of a streamed chat: role first, then text, ids and log-probs as they come, versions last."""
        head = {**head, "object": "chat.completion.chunk"}
        texts = [StreamedText(self._format, params.stop, tools) for _ in sources]
        completions: list[Completion] = []
        async with contextlib.aclosing(merged(sources)) as items:
            opened = False
            async for index, item in items:
                if not opened:
                    # Only now: had the engine refused, the answer would have been an error with its own status.
                    opened = True
                    for role_index in range(len(sources)):
                        choice = {"index": role_index, "delta": {"role": "assistant", "content": ""}}
                        ids = {"prompt_token_ids": prompt_ids} if body.return_token_ids and role_index == 0 else {}
                        yield {
                            **head,
                            **ids,
                            "choices": [{**choice, "logprobs": None, "finish_reason": None}],
                        }
                if isinstance(item, Completion):
                    completions.append(item)
                    delta = texts[index].finish()
                    called = texts[index].called and item.finish_reason == "stop"
                    choice = {
                        "logprobs": None,
                        "finish_reason": "tool_calls" if called else item.finish_reason,
                        "stop_reason": item.stop_reason,
                        "weight_versions": item.weight_versions,
                    }
                else:
                    delta = texts[index].push(item.token_ids)
                    choice = {
                        "logprobs": self._chat_logprobs(item) if body.logprobs else None,
                        "finish_reason": None,
                        "token_ids": item.token_ids if body.return_token_ids else None,
                    }
                yield {**head, "choices": [{"index": index, "delta": delta, **choice}]}
        if body.stream_options is not None and body.stream_options.include_usage:
            yield {**head, "choices": [], "usage": _usage(prompt_ids, completions)}

    async def _text_events(
        self,
        body: CompletionBody,
        params: SamplingParams,
        prompt_ids: list[int],
        sources: list[AsyncIterator[Delta | Completion]],
        head: dict[str, Any],
    ) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of a streamed completion: a choice's first brings its prompt's ids, its last the versions."""
        texts = [StreamedText(self._format, params.stop, tools=False) for _ in sources]
        offsets = [0] * len(sources)  # in the text of all tokens, as the whole answer counts
        begun: set[int] = set()
        completions: list[Completion] = []
        async with contextlib.aclosing(merged(sources)) as items:
            async for index, item in items:
                choice: dict[str, Any] = {"logprobs": None, "finish_reason": None}
                if isinstance(item, Completion):
                    completions.append(item)
                    delta = texts[index].finish()
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
                    choice["prompt_token_ids"] = prompt_ids
                yield {**head, "choices": [{"index": index, "text": delta["content"], **choice}]}
        if body.stream_options is not None and body.stream_options.include_usage:
            yield {**head, "choices": [], "usage": _usage(prompt_ids, completions)}

    def _check_model(self, model: str) -> None:
        if model != self._model_name and model not in self._scripted:
            raise UnknownModelError(model, [self._model_name, *self._scripted])

    def _chat_logprobs(self, item: Completion | Delta) -> dict[str, Any]:
        return self._format.logprobs(item.token_ids, item.logprobs, item.top_logprobs)

    def _text_logprobs(self, item: Completion | Delta, begin: int = 0) -> dict[str, Any]:
        """The logprobs object of tokens whose text begins at offset `begin`."""
        tokens = [self._format.token_text(token_id) for token_id in item.token_ids]
        offsets = [begin]
        for token in tokens[:-1]:
            offsets.append(offsets[-1] + len(token))
        return {
            "tokens": tokens,
            "token_logprobs": item.logprobs,
            "top_logprobs": [
                {self._format.token_text(token_id): logprob for token_id, logprob in pairs}
                for pairs in item.top_logprobs
            ],
            "text_offset": offsets[: len(tokens)],
        }


def _each(params: SamplingParams, count: int | None) -> list[SamplingParams]:
    # One seed for n choices would make them one and the same; vLLM counts the seed up, and so do we.
    return [params if params.seed is None else replace(params, seed=params.seed + at) for at in range(count or 1)]


def _id_logprobs(completion: Completion) -> dict[str, Any]:
    rows = zip(completion.token_ids, completion.logprobs, completion.top_logprobs, strict=True)
    return {
        "content": [
            {
                "token_id": token_id,
                "logprob": logprob,
                "top_logprobs": [{"token_id": other, "logprob": max(value, -9999.0)} for other, value in pairs],
            }
            for token_id, logprob, pairs in rows
        ]
    }


def _usage(prompt_ids: list[int], completions: list[Completion]) -> dict[str, int]:
    sampled = sum(len(completion.token_ids) for completion in completions)
    prompt = len(prompt_ids)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


async def _wait_gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _on_http_error(request: HttpRequest, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    message = f"{request.method} {request.url.path}: {exc.detail}"
    return JSONResponse(error_body(message, exc.status_code), status_code=exc.status_code, headers=exc.headers)
