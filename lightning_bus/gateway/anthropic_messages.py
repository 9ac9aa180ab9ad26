"""Anthropic's Messages API, for agents whose SDK speaks it, over an engine that answers chat completions.

What always holds: what the engine has no words for (documents, server tools, files) is refused with its place in the
request, never left out in silence; what only steers Anthropic's own service (metadata, caching, tiers) is.
"""

from __future__ import annotations

from typing import Any, cast

import msgspec

from lightning_bus.gateway.dialects import (
    CHAT,
    BadRequest,
    Json,
    Stream,
    array,
    dictionary,
    dicts,
    encode,
    event,
    image_part,
    objects,
    plain_if_text,
    reasoning_of,
    text_of,
    tokens_of,
)

MESSAGES = "/v1/messages"

_OF_THE_SERVICE = frozenset(
    {"metadata", "service_tier", "container", "context_management", "thinking", "output_config", "inference_geo",
     "cache_control", "betas", "mcp_servers"}
)  # fmt: skip
_TRANSLATED = frozenset({"system", "messages", "tools", "tool_choice", "stop_sequences"})
_STOP_REASONS = {
    "stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "function_call": "tool_use",
    "content_filter": "refusal",
}  # fmt: skip

_decode = msgspec.json.Decoder().decode


class Messages:
    """The dialect."""

    route = MESSAGES
    target = CHAT

    def to_engine(self, asked: Json) -> Json:
        messages = list(_system(asked.get("system")))
        for name, message in objects(asked.get("messages"), "messages"):
            messages += _chat_messages(message, name)
        sent = {name: value for name, value in asked.items() if name not in _OF_THE_SERVICE | _TRANSLATED}
        sent["messages"] = messages
        if asked.get("stop_sequences"):
            sent["stop"] = asked["stop_sequences"]
        if asked.get("tools"):
            sent["tools"] = [_tool(tool, name) for name, tool in objects(asked["tools"], "tools")]
        choice = dictionary(asked.get("tool_choice"))
        if choice:
            sent["tool_choice"] = _tool_choice(choice)
            if choice.get("disable_parallel_tool_use"):
                sent["parallel_tool_calls"] = False
        return sent

    def as_chat(self, answer: Json) -> Json:
        return answer

    def answer(self, body: Json, asked: Json, ident: str) -> Json:
        message = dictionary(dicts(body["choices"])[0].get("message"))
        content: list[Json] = []
        if reasoning := reasoning_of(message):
            content.append({"type": "thinking", "thinking": reasoning, "signature": ""})
        if message.get("content"):
            content.append({"type": "text", "text": message["content"]})
        for call in dicts(message.get("tool_calls")):
            function = dictionary(call.get("function"))
            content.append(
                {"type": "tool_use", "id": call.get("id"), "name": function.get("name"), "input": _input(function)}
            )
        return {**_head(body, ident), **_stop(body, asked), "content": content, "usage": _usage(body)}

    def stream(self, asked: Json, ident: str) -> Stream:
        return _MessageStream(asked, ident)


def error_body(status: int, message: str) -> Json:
    """Return an error as Anthropic's SDK expects it."""
    kind = _ERROR_KINDS.get(status) or ("invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


_ERROR_KINDS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip


def models_page(models: Json) -> Json:
    """Return OpenAI's list of models as Anthropic's."""
    data = [
        {"type": "model", "id": model.get("id"), "display_name": model.get("id"), "created_at": "1970-01-01T00:00:00Z"}
        for model in dicts(models.get("data"))
    ]
    ids = [model["id"] for model in data]
    return {
        "data": data, "has_more": False, "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None,
    }  # fmt: skip


class _MessageStream:
    """Chunks of one choice → content blocks, one open at a time."""

    def __init__(self, asked: Json, ident: str) -> None:
        self._asked = asked
        self._ident = ident
        self._begun = False
        self._blocks = 0
        self._open: tuple[str, int] | None = None  # kind of the open block, and which tool call it is

    def push(self, chunk: Json) -> bytes:
        parts: list[bytes] = []
        if not self._begun:
            self._begun = True
            usage = {"input_tokens": tokens_of(chunk)[0], "output_tokens": 0}
            head: Json = {**_head(chunk, self._ident), "content": [], "stop_reason": None, "stop_sequence": None}
            parts.append(_event("message_start", message={**head, "usage": usage}))
        for choice in dicts(chunk.get("choices"))[:1]:
            delta = dictionary(choice.get("delta"))
            if reasoning := reasoning_of(delta):
                parts += self._enter("thinking", 0, {"type": "thinking", "thinking": "", "signature": ""})
                parts.append(self._delta({"type": "thinking_delta", "thinking": reasoning}))
            if delta.get("content"):
                parts += self._enter("text", 0, {"type": "text", "text": ""})
                parts.append(self._delta({"type": "text_delta", "text": delta["content"]}))
            for call in dicts(delta.get("tool_calls")):
                function = dictionary(call.get("function"))
                block: Json = {"type": "tool_use", "id": call.get("id"), "name": function.get("name"), "input": {}}
                parts += self._enter("tool", int(call.get("index") or 0), block)
                if function.get("arguments"):
                    parts.append(self._delta({"type": "input_json_delta", "partial_json": function["arguments"]}))
        return b"".join(parts)

    def end(self, answer: Json) -> bytes:
        stop = _stop(answer, self._asked)
        return b"".join(
            [*self._leave(), _event("message_delta", delta=stop, usage=_usage(answer)), _event("message_stop")]
        )

    def failed(self, error: Json) -> bytes:
        return event(error_body(500, str(error.get("message"))), "error")

    def _enter(self, kind: str, which: int, block: Json) -> list[bytes]:
        if self._open == (kind, which):
            return []
        events = self._leave()
        self._open = (kind, which)
        return [*events, _event("content_block_start", index=self._blocks, content_block=block)]

    def _leave(self) -> list[bytes]:
        if self._open is None:
            return []
        self._open = None
        self._blocks += 1
        return [_event("content_block_stop", index=self._blocks - 1)]

    def _delta(self, delta: Json) -> bytes:
        return _event("content_block_delta", index=self._blocks, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


# -- requests


def _system(system: object) -> list[Json]:
    if system is None or system == "" or system == []:
        return []
    if isinstance(system, str):
        return [{"role": "system", "content": system}]
    texts = [text_of(block.get("text"), f"{name}.text") for name, block in objects(system, "system")]
    return [{"role": "system", "content": "\n".join(texts)}]


def _chat_messages(message: Json, name: str) -> list[Json]:
    """One message of theirs → one or several of the chat's: results of tools are messages of their own there."""
    role = message.get("role")
    if role not in ("user", "assistant", "system"):
        raise BadRequest(f"{name}.role is {role!r:.80}. Send user or assistant.")
    content = message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    results: list[Json] = []
    parts: list[Json] = []
    calls: list[Json] = []
    thinking = ""
    for path, block in objects(content, f"{name}.content"):
        kind = block.get("type")
        if kind == "text":
            parts.append({"type": "text", "text": text_of(block.get("text"), f"{path}.text")})
        elif kind == "image" and role == "user":
            parts.append(_image(block, path))
        elif kind == "tool_result" and role == "user":
            call_id = text_of(block.get("tool_use_id"), f"{path}.tool_use_id")
            results.append({"role": "tool", "tool_call_id": call_id, "content": _result(block, path)})
        elif kind == "tool_use" and role == "assistant":
            function = {
                "name": text_of(block.get("name"), f"{path}.name"),
                "arguments": encode(dictionary(block.get("input"))).decode(),
            }
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking" and role == "assistant":
            thinking += str(block.get("thinking") or "")
        elif kind != "redacted_thinking":
            raise BadRequest(
                f"{path} is a {kind!r:.40} of the {role}, which this model cannot read. Send text, images, tool_use and tool_result."
            )
    if role == "assistant":
        own: Json = {"role": role, "content": plain_if_text(parts) if parts else None}
        if thinking:
            own["reasoning"] = thinking
        return [{**own, "tool_calls": calls}] if calls else [{**own, "content": own["content"] or ""}]
    return [*results, {"role": role, "content": plain_if_text(parts)}] if parts or not results else results


def _image(block: Json, name: str) -> Json:
    source = dictionary(block.get("source"))
    if source.get("type") == "base64":
        return image_part(f"data:{source.get('media_type')};base64,{source.get('data')}")
    if source.get("type") == "url":
        return image_part(text_of(source.get("url"), f"{name}.source.url"))
    raise BadRequest(f"{name}.source is of type {source.get('type')!r:.40}. Send base64 or url.")


def _result(block: Json, name: str) -> str | list[Json]:
    content = block.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    parts: list[Json] = []
    for path, part in objects(content, f"{name}.content"):
        if part.get("type") == "image":
            parts.append(_image(part, path))
        else:
            parts.append({"type": "text", "text": text_of(part.get("text"), f"{path}.text")})
    return plain_if_text(parts)


def _tool(tool: Json, name: str) -> Json:
    if tool.get("type") not in (None, "custom"):
        raise BadRequest(
            f"{name} is the server tool {tool['type']!r:.60}, which nobody runs here. Send tools with name and input_schema."
        )
    function: Json = {
        "name": text_of(tool.get("name"), f"{name}.name"),
        "parameters": dictionary(tool.get("input_schema")),
    }
    if tool.get("description"):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _tool_choice(choice: Json) -> str | Json:
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": text_of(choice.get("name"), "tool_choice.name")}}
    words = {"auto": "auto", "any": "required", "none": "none"}
    if kind not in words:
        raise BadRequest(f"tool_choice.type is {kind!r:.40}. Send auto, any, tool or none.")
    return words[cast(str, kind)]


# -- answers


def _head(body: Json, ident: str) -> Json:
    return {"id": f"msg_{ident}", "type": "message", "role": "assistant", "model": body.get("model") or ""}


def _stop(body: Json, asked: Json) -> Json:
    choice = dicts(body["choices"])[0]
    reason = choice.get("stop_reason")
    if (
        choice.get("finish_reason") == "stop"
        and isinstance(reason, str)
        and reason in array(asked.get("stop_sequences"))
    ):
        return {"stop_reason": "stop_sequence", "stop_sequence": reason}
    return {"stop_reason": _STOP_REASONS.get(str(choice.get("finish_reason")), "end_turn"), "stop_sequence": None}


def _usage(body: Json) -> Json:
    asked, answered = tokens_of(body)
    return {"input_tokens": asked, "output_tokens": answered}


def _input(function: Json) -> Any:
    """Return a tool call's arguments as an object, as their SDK wants them; what is no JSON is kept in one."""
    text = str(function.get("arguments") or "{}")
    try:
        value = _decode(text)
    except (msgspec.DecodeError, RecursionError):
        value = None
    return cast(Json, value) if isinstance(value, dict) else {"INVALID_JSON": text}
