"""The words that agents speak: each of their APIs to the engine's, and the engine's answer back.

A dialect is pure. It says where the engine is asked and in which words, and turns the engine's answer, or its stream
chunk by chunk, into what the agent's own SDK reads. What always holds: recording sees the engine's answer in the shape
of a chat completion and never what a dialect made of it, so ids and log-probs do not pass through a translation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

import msgspec

Json = dict[str, Any]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

encode = msgspec.json.Encoder().encode


class BadRequest(ValueError):
    """A request that cannot be said to the engine."""


class Stream(Protocol):
    """One answer on its way out, as the agent's SDK expects it."""

    def push(self, chunk: Json) -> bytes:
        """Return the events for one chunk of the engine's; may change `chunk`."""
        ...

    def end(self, answer: Json) -> bytes:
        """Return the events that end the stream, given the whole answer in the shape of a chat completion."""
        ...

    def failed(self, error: Json) -> bytes:
        """Return the event that tells of an error, given OpenAI's error object."""
        ...


class Dialect(Protocol):
    """How one API is spoken."""

    route: str  # where the agent posts
    target: str  # where the engine is asked

    def to_engine(self, asked: Json) -> Json:
        """Return the engine's request for the agent's. Raises BadRequest for what the engine has no words for."""
        ...

    def as_chat(self, answer: Json) -> Json:
        """Return an answer of the engine, or a chunk of its stream, in the shape of a chat completion's."""
        ...

    def answer(self, body: Json, asked: Json, ident: str) -> Json:
        """Return what the agent gets for the engine's answer; may change `body`. `ident` names answers made here."""
        ...

    def stream(self, asked: Json, ident: str) -> Stream: ...


class Chat:
    """OpenAI's chat completions: the engine's own words."""

    route = target = CHAT

    def to_engine(self, asked: Json) -> Json:
        return asked

    def as_chat(self, answer: Json) -> Json:
        return answer

    def answer(self, body: Json, asked: Json, ident: str) -> Json:
        return as_asked(body, asked)

    def stream(self, asked: Json, ident: str) -> Stream:
        return _Passing(asked)


class Completions:
    """OpenAI's completions of a bare prompt: the engine's own words too, but for where its answer keeps things."""

    route = target = COMPLETIONS

    def to_engine(self, asked: Json) -> Json:
        return asked

    def as_chat(self, answer: Json) -> Json:
        choices: list[Json] = []
        for choice in dicts(answer.get("choices")):
            message = {"role": "assistant", "content": choice.get("text") or ""}
            logprobs = dictionary(choice.get("logprobs")).get("token_logprobs")
            content = None if logprobs is None else [{"logprob": value} for value in array(logprobs)]
            choices.append({**choice, "message": message, "delta": message, "logprobs": {"content": content}})
        return {**answer, "choices": choices}

    def answer(self, body: Json, asked: Json, ident: str) -> Json:
        return as_asked(body, asked)

    def stream(self, asked: Json, ident: str) -> Stream:
        return _Passing(asked)


def as_asked(answer: Json, asked: Json) -> Json:
    """Take out of an answer, or of a stream's chunk, what only the gateway asked for. Changes and returns `answer`."""
    wants_ids = bool(asked.get("return_token_ids"))
    logprobs = asked.get("logprobs")
    wants_logprobs = logprobs is not None and logprobs is not False  # 0 asks a completion for those of its own tokens
    if not wants_ids:
        answer.pop("prompt_token_ids", None)
    for choice in dicts(answer.get("choices")):
        if not wants_ids:
            choice.pop("token_ids", None)
            choice.pop("weight_versions", None)
            choice.pop("prompt_token_ids", None)
        if not wants_logprobs and "logprobs" in choice:
            choice["logprobs"] = None
    return answer


class _Passing:
    """A stream that passes through."""

    def __init__(self, asked: Json) -> None:
        self._asked = asked
        self._wants_usage = bool(dictionary(asked.get("stream_options")).get("include_usage"))

    def push(self, chunk: Json) -> bytes:
        if not chunk.get("choices") and not self._wants_usage:
            return b""
        return event(as_asked(chunk, self._asked))

    def end(self, answer: Json) -> bytes:
        return b"data: [DONE]\n\n"

    def failed(self, error: Json) -> bytes:
        return event({"error": error})


# -- what all dialects need


def event(body: Json, name: str = "") -> bytes:
    """Return a server-sent event, named where the SDK goes by the name."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + encode(body) + b"\n\n"


def tokens_of(answer: Json) -> tuple[int, int]:
    """Return how many tokens an answer was asked with and has."""
    usage = dictionary(answer.get("usage"))
    asked = usage.get("prompt_tokens") or len(array(answer.get("prompt_token_ids")))
    answered = usage.get("completion_tokens") or sum(
        len(array(choice.get("token_ids"))) for choice in dicts(answer.get("choices"))
    )
    return int(asked), int(answered)


def reasoning_of(message: Json) -> str:
    """Return what a reasoning parser in the engine set apart; vLLM has had two names for it."""
    return str(message.get("reasoning") or message.get("reasoning_content") or "")


def image_part(url: str, detail: str | None = None) -> Json:
    """Return an image as a part of a chat message."""
    return {"type": "image_url", "image_url": {"url": url, **({"detail": detail} if detail else {})}}


def plain_if_text(parts: list[Json]) -> str | list[Json]:
    """Return the parts of a message; a single text as a string, which is what most chat templates expect."""
    if not parts:
        return ""
    return parts[0]["text"] if len(parts) == 1 and parts[0].get("type") == "text" else parts


def objects(value: object, name: str) -> Iterator[tuple[str, Json]]:
    """Yield each member of a list of objects with its path. Raises BadRequest where it is none."""
    if not isinstance(value, list):
        raise BadRequest(f"{name} is {value!r:.80}. Send a list of objects.")
    for at, item in enumerate(cast(list[Any], value)):
        if not isinstance(item, dict):
            raise BadRequest(f"{name}[{at}] is {item!r:.80}. Send an object.")
        yield f"{name}[{at}]", cast(Json, item)


def text_of(value: object, name: str) -> str:
    """Return a value that must be text."""
    if not isinstance(value, str):
        raise BadRequest(f"{name} is {value!r:.80}. Send text.")
    return value


def array(value: object) -> list[Any]:
    return cast(list[Any], value) if isinstance(value, list) else []


def dicts(value: object) -> list[Json]:
    return [cast(Json, item) for item in array(value) if isinstance(item, dict)]


def dictionary(value: object) -> Json:
    return cast(Json, value) if isinstance(value, dict) else {}
