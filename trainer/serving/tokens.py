"""Token in, token out: messages to ids, ids to ids, ids to messages, in the shapes of vLLM 0.32.

    /v1/chat/completions/render → /inference/v1/generate → /v1/chat/completions/derender

What holds: the three in a row give what /v1/chat/completions gives at once, streamed or not, given the same seed; the
server keeps nothing between them. So whoever holds the exact ids of a conversation may continue those instead of
rendering its history again.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from trainer.serving.answers import ChatAnswer
from trainer.serving.chat import ChatFormat
from trainer.serving.choices import complete, each_choice, streams, usage
from trainer.serving.engine import Engine
from trainer.serving.errors import BadRequestError
from trainer.serving.protocol import (
    ChatBody,
    DerenderBody,
    GenerateBody,
    Generated,
    GeneratedChoice,
    IdLogprobs,
    NoWeightsError,
    StreamState,
    TokenizeBody,
    json_response,
    read_body,
)
from trainer.serving.request import Completion, Delta
from trainer.serving.streaming import StreamedText, merged, server_sent

LOGPROB_MIN = -9999.0  # JSON has no -inf; OpenAI writes this for a token that could not have been sampled


class TokenRoutes:
    """check_model raises where a model name has no weights behind it here."""

    def __init__(
        self, engine: Engine, chat_format: ChatFormat, model_name: str, check_model: Callable[[str], None]
    ) -> None:
        self._engine = engine
        self._format = chat_format
        self._model_name = model_name
        self._check_model = check_model

    def routes(self) -> list[Route]:
        return [
            Route("/v1/chat/completions/render", self.render, methods=["POST"]),
            Route("/inference/v1/generate", self.generate, methods=["POST"]),
            Route("/v1/chat/completions/derender", self.derender, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
        ]

    async def render(self, request: HttpRequest) -> Response:
        """The /inference/v1/generate body that stands for a chat request."""
        body = await read_body(request, ChatBody)
        self._check_model(body.model)
        params = body.chat_params()
        token_ids = prompt_ids(self._format, body)
        sampling = {
            "n": body.n or 1,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "seed": params.seed,
            "stop": params.stop,
            "stop_token_ids": params.stop_token_ids,
            "ignore_eos": params.ignore_eos,
            "max_tokens": self._engine.tokens_max(token_ids, params),
            "logprobs": params.top_logprobs if body.logprobs else None,
            "skip_special_tokens": not body.offered_tools(),
        }
        return json_response(
            {
                "request_id": body.request_id or f"chatcmpl-{uuid.uuid4().hex}",
                "token_ids": token_ids,
                "sampling_params": sampling,
                "model": body.model,
                "stream": bool(body.stream),
                "stream_options": body.stream_options if body.stream else None,
                "cache_salt": body.cache_salt,
                "priority": body.priority or 0,
                "return_token_ids": None,
                "output_mode": "tokens",
            }
        )

    async def tokenize(self, request: HttpRequest) -> Response:
        """The ids of a text or a conversation: to count them, or to compare them with another tokenizer's."""
        body = await read_body(request, TokenizeBody)
        with contextlib.suppress(NoWeightsError):  # a script speaks by the same tokenizer
            self._check_model(body.model or self._model_name)
        if (body.prompt is None) == (body.messages is None):
            raise BadRequestError("send either a prompt or messages", param="prompt")
        if body.prompt is not None:
            ids: list[int] = self._format.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
        else:
            ids = self._format.prompt_ids(
                body.messages or [],
                body.tools,
                add_generation_prompt=body.add_generation_prompt,
                template_kwargs=body.chat_template_kwargs,
            )
        return json_response({"count": len(ids), "max_model_len": self._engine.context_tokens, "tokens": ids})

    async def generate(self, request: HttpRequest) -> Response:
        body = await read_body(request, GenerateBody)
        self._check_model(body.model or self._model_name)
        params = body.sampling_params.params(top_logprobs=body.sampling_params.logprobs or 0)
        room = self._engine.context_tokens - len(body.token_ids)
        if params.max_tokens is not None and params.max_tokens > room > 0:
            # As vLLM does here: the ids may be longer than those that max_tokens was worked out for.
            params = replace(params, max_tokens=room)
        answer = _GenerateAnswer(body, params.stop, self._format, body.model or self._model_name)
        each = each_choice(params, body.sampling_params.n)
        if body.stream:
            events = answer.events(streams(self._engine, body.token_ids, each, body.cache_salt))
            # The first event is drawn here so that a refusal still has its own status code.
            first = await anext(events)
            return StreamingResponse(server_sent(first, events), media_type="text/event-stream")
        completions = await complete(self._engine, request, body.token_ids, each, body.cache_salt)
        return json_response(answer.whole(completions))

    async def derender(self, request: HttpRequest) -> Response:
        """A chat answer from generated ids: the whole of them, or chunk by chunk with the state the caller carries."""
        body = await read_body(request, DerenderBody)
        model = body.model or self._model_name
        self._check_model(model)
        generated = body.generate_chunk if body.stream else body.generate_response
        if generated is None:
            name = "generate_chunk" if body.stream else "generate_response"
            raise BadRequestError(f"there is nothing to derender: {name} is missing", param=name)
        asked = body.chat_request or ChatBody(model=model, messages=[])
        prompt = body.prompt_token_ids or generated.prompt_token_ids or []
        answer = ChatAnswer(self._format, asked, prompt, identifier=generated.request_id, model=model)
        completions = [self._completion(choice) for choice in generated.choices]
        if body.stream:
            return json_response(self._next_chunk(answer, generated, completions, body.stream_state or StreamState()))
        whole = answer.whole(completions)
        for choice, given in zip(whole["choices"], generated.choices, strict=True):
            choice["index"] = given.index
        if body.prompt_tokens is not None:
            whole["usage"] = usage(body.prompt_tokens, completions)
        return json_response(whole)

    def _next_chunk(
        self, answer: ChatAnswer, generated: Generated, completions: list[Completion], state: StreamState
    ) -> dict[str, Any]:
        self._check_ids(state.window)
        chunk = answer.chunk_head() | ({} if generated.usage is None else {"usage": generated.usage})
        if not completions:
            return {"chunk": {**chunk, "choices": []}, "stream_state": state}
        if len(completions) > 1:
            raise BadRequestError(
                f"the chunk holds {len(completions)} choices; derender each by itself, with a stream_state of its own",
                param="generate_chunk",
            )
        [given], [completion] = generated.choices, completions
        text = answer.text(state)
        delta = {} if state.role_sent else {"role": "assistant"}
        delta |= text.push(completion.token_ids, last=given.finish_reason is not None)
        ending = {"finish_reason": None} if given.finish_reason is None else answer.ending(text, completion)
        choice = {"index": given.index, "delta": delta, **answer.tokens(completion), **ending}
        after = StreamState(**msgspec.structs.asdict(text.state()), role_sent=True)
        return {"chunk": {**chunk, "choices": [choice]}, "stream_state": after}

    def _completion(self, choice: GeneratedChoice) -> Completion:
        """What this engine would have handed over, had it sampled the choice. Raises BadRequestError."""
        token_ids = choice.token_ids or []
        self._check_ids(token_ids)
        rows = choice.logprobs.content if choice.logprobs is not None else None
        if rows is None:
            logprobs, top = [0.0] * len(token_ids), [[] for _ in token_ids]
        elif len(rows) != len(token_ids):
            raise BadRequestError(
                f"choice {choice.index} has {len(token_ids)} token_ids and {len(rows)} logprobs; send one for each",
                param="logprobs",
            )
        else:
            logprobs, top = [row.logprob for row in rows], [_likeliest(row) for row in rows]
        reason = choice.finish_reason or ""
        return Completion(token_ids, logprobs, top, reason, choice.stop_reason, choice.weight_versions or [])

    def _check_ids(self, token_ids: list[int]) -> None:
        if len(token_ids) > self._engine.context_tokens:
            raise BadRequestError(
                f"{len(token_ids)} token_ids are more than the {self._engine.context_tokens} this model ever generates",
                param="token_ids",
            )
        self._engine.check_ids(token_ids, param="token_ids")


def prompt_ids(chat_format: ChatFormat, body: ChatBody) -> list[int]:
    """The ids a chat request stands for. Raises BadRequestError."""
    return chat_format.prompt_ids(
        body.messages,
        body.offered_tools(),
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        template_kwargs=body.chat_template_kwargs,
    )


class _GenerateAnswer:
    """The answer to one generate request: ids, or with output_mode "text" their text as well."""

    def __init__(self, body: GenerateBody, stops: tuple[str, ...], chat_format: ChatFormat, model: str) -> None:
        self._body = body
        self._stops = stops
        self._format = chat_format
        self._show_special = body.sampling_params.skip_special_tokens is False
        self._text = body.output_mode == "text"
        self._model = model
        self._head = {
            "request_id": body.request_id or uuid.uuid4().hex,
            "output_mode": body.output_mode or "tokens",
        }

    def whole(self, completions: list[Completion]) -> dict[str, Any]:
        answer = {
            **self._head,
            "model": self._model,
            "created": int(time.time()),
            "prompt_token_ids": self._body.token_ids if self._body.return_token_ids else None,
            "usage": usage(len(self._body.token_ids), completions),
        }
        choices = [
            {"index": index, **self._tokens(completion), **_ending(completion)}
            for index, completion in enumerate(completions)
        ]
        if self._text:
            for choice, completion in zip(choices, completions, strict=True):
                choice["text"] = self._format.text(completion, self._stops, with_special=self._show_special)
        return {**answer, "choices": choices}

    async def events(self, sources: list[AsyncIterator[Delta | Completion]]) -> AsyncGenerator[dict[str, Any]]:
        """A choice a chunk; the chunk with a choice's last tokens says how it ended and which weights made it."""
        texts = [StreamedText(self._format, self._stops, with_special=self._show_special) for _ in sources]
        lasts: dict[int, Delta] = {}
        completions: list[Completion] = []
        first = {"prompt_token_ids": self._body.token_ids} if self._body.return_token_ids else {}
        async with contextlib.aclosing(merged(sources)) as items:
            async for index, item in items:
                if isinstance(item, Delta) and item.last:
                    lasts[index] = item  # goes out with the Completion, which is on its way
                    continue
                if isinstance(item, Completion):
                    completions.append(item)
                    tokens, ending = lasts.get(index, Delta([], [], [])), _ending(item)
                else:
                    tokens, ending = item, {"finish_reason": None}
                choice = {"index": index, **self._tokens(tokens), **ending}
                if self._text:
                    last = isinstance(item, Completion)
                    choice["text"] = texts[index].push(tokens.token_ids, last=last)["content"]
                yield {**self._head, **first, "usage": None, "choices": [choice]}
                first = {}
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield {**self._head, "choices": [], "usage": usage(len(self._body.token_ids), completions)}

    def _tokens(self, item: Completion | Delta) -> dict[str, Any]:
        logprobs = None
        if self._body.sampling_params.logprobs is not None:
            if self._text:
                logprobs = self._format.logprobs(item.token_ids, item.logprobs, item.top_logprobs)
            else:
                logprobs = _id_logprobs(item)
        return {"token_ids": item.token_ids, "logprobs": logprobs}


def _ending(completion: Completion) -> dict[str, Any]:
    return {
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "weight_versions": completion.weight_versions,
    }


def _id_logprobs(item: Completion | Delta) -> dict[str, Any]:
    rows = zip(item.token_ids, item.logprobs, item.top_logprobs, strict=True)
    return {"content": [_id_row(token_id, logprob, top) for token_id, logprob, top in rows]}


def _id_row(token_id: int, logprob: float, top: list[tuple[int, float]]) -> dict[str, Any]:
    ranks = {other: rank for rank, (other, _) in enumerate(top, start=1)}
    sampled = {"token_id": token_id, "logprob": max(logprob, LOGPROB_MIN), "rank": ranks.get(token_id)}
    others = [
        {"token_id": other, "logprob": max(value, LOGPROB_MIN), "rank": ranks[other]}
        for other, value in top
        if other != token_id
    ]
    return {**sampled, "top_logprobs": [sampled, *others] if top else []}


def _likeliest(row: IdLogprobs) -> list[tuple[int, float]]:
    """The likeliest tokens of one position, best first: the sampled one comes first and may not be among them."""
    ranked = [(top.rank, top.token_id, top.logprob) for top in row.top_logprobs if top.rank is not None]
    return [(token_id, logprob) for _, token_id, logprob in sorted(ranked)]
