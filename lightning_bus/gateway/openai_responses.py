"""OpenAI's Responses API, for agents whose SDK speaks it, over an engine that answers chat completions.

What always holds: no state is kept between calls, so a request that refers to an earlier response is refused with the
way out; what the engine has no words for (hosted tools, files) is refused with its place in the request. What only
steers OpenAI's own service (store, metadata, caching) is left out.
"""

from __future__ import annotations

from typing import Any

from lightning_bus.gateway.dialects import (
    CHAT,
    BadRequest,
    Json,
    Stream,
    array,
    dictionary,
    dicts,
    event,
    image_part,
    objects,
    plain_if_text,
    reasoning_of,
    text_of,
    tokens_of,
)

RESPONSES = "/v1/responses"

_PASSED_ON = frozenset(
    {"model", "temperature", "top_p", "parallel_tool_calls", "stream", "seed", "stop", "top_k", "min_p",
     "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "chat_template_kwargs", "cache_salt",
     "return_token_ids", "priority", "vllm_xargs"}
)  # fmt: skip
_NEEDS_STATE = {
    "previous_response_id": "Send the whole conversation as input.",
    "conversation": "Send the whole conversation as input.",
    "prompt": "Send instructions and input.",
    "background": "Ask without it, or with stream.",
}
TEXT_LOGPROBS = "message.output_text.logprobs"


class Responses:
    """The dialect."""

    route = RESPONSES
    target = CHAT

    def to_engine(self, asked: Json) -> Json:
        for name, way_out in _NEEDS_STATE.items():
            if asked.get(name):
                raise BadRequest(f"{name} is set, and the gateway keeps nothing between calls. {way_out}")
        sent = {name: value for name, value in asked.items() if name in _PASSED_ON and value is not None}
        sent["messages"] = _messages(asked)
        if asked.get("max_output_tokens") is not None:
            sent["max_completion_tokens"] = asked["max_output_tokens"]
        if asked.get("tools"):
            sent["tools"] = [_tool(tool, name) for name, tool in objects(asked["tools"], "tools")]
        if asked.get("tool_choice") is not None:
            sent["tool_choice"] = _tool_choice(asked["tool_choice"])
        form = dictionary(dictionary(asked.get("text")).get("format"))
        if form.get("type") == "json_schema":
            sent["response_format"] = {"type": "json_schema", "json_schema": _without(form, "type")}
        elif form.get("type") == "json_object":
            sent["response_format"] = {"type": "json_object"}
        if effort := dictionary(asked.get("reasoning")).get("effort"):
            sent["reasoning_effort"] = effort
        if asked.get("top_logprobs"):
            sent["top_logprobs"] = asked["top_logprobs"]
        return sent

    def as_chat(self, answer: Json) -> Json:
        return answer

    def answer(self, body: Json, asked: Json, ident: str) -> Json:
        return _response(body, asked, ident, _output(body, asked, ident))

    def stream(self, asked: Json, ident: str) -> Stream:
        return _ResponseStream(asked, ident)


class _ResponseStream:
    """Chunks of one choice → output items, one open at a time."""

    def __init__(self, asked: Json, ident: str) -> None:
        self._asked = asked
        self._ident = ident
        self._sequence = -1
        self._items: list[Json] = []
        self._open = ""  # what the last item is while more of it may come: "message", "reasoning" or "function_call N"

    def push(self, chunk: Json) -> bytes:
        events: list[bytes] = []
        if self._sequence < 0:
            begun = _response(chunk, self._asked, self._ident, [], status="in_progress")
            events += [self._event("response.created", response=begun)]
            events += [self._event("response.in_progress", response=begun)]
        for choice in dicts(chunk.get("choices"))[:1]:
            delta = dictionary(choice.get("delta"))
            if reasoning := reasoning_of(delta):
                events += self._text("reasoning", reasoning, [])
            if delta.get("content"):
                logprobs = _token_logprobs(choice) if _wants_logprobs(self._asked) else []
                events += self._text("message", delta["content"], logprobs)
            for call in dicts(delta.get("tool_calls")):
                events += self._call(call)
        return b"".join(events)

    def end(self, answer: Json) -> bytes:
        events = self._leave()
        whole = _response(answer, self._asked, self._ident, self._items)
        events.append(self._event(f"response.{whole['status']}", response=whole))
        return b"".join(events)

    def failed(self, error: Json) -> bytes:
        # The fields beside `error` are what the reference names, `error` is what the SDK looks for.
        about = {"code": error.get("code"), "message": error.get("message"), "param": error.get("param")}
        return self._event("error", **about, error=error)

    def _text(self, kind: str, text: str, logprobs: list[Json]) -> list[bytes]:
        events: list[bytes] = []
        part = "output_text" if kind == "message" else "reasoning_text"
        if self._open != kind:
            item = _text_item(kind, f"{self._ident}_{len(self._items)}", [], "in_progress")
            events = self._enter(kind, item)
            item["content"].append(_part(part))
            events.append(self._event("response.content_part.added", **self._at_part(), part=_part(part)))
        content = self._items[-1]["content"][0]
        content["text"] += text
        more: Json = {}
        if kind == "message":
            content["logprobs"] += logprobs
            more["logprobs"] = logprobs
        return [*events, self._event(f"response.{part}.delta", **self._at_part(), delta=text, **more)]

    def _call(self, call: Json) -> list[bytes]:
        events: list[bytes] = []
        function = dictionary(call.get("function"))
        kind = f"function_call {call.get('index') or 0}"
        if self._open != kind:
            item = _call_item(call, f"{self._ident}_{len(self._items)}", "in_progress")
            item["arguments"] = ""
            events = self._enter(kind, item)
        text = function.get("arguments")
        if text:
            self._items[-1]["arguments"] += text
            events.append(self._event("response.function_call_arguments.delta", **self._at(), delta=text))
        return events

    def _enter(self, kind: str, item: Json) -> list[bytes]:
        events = self._leave()
        self._open = kind
        self._items.append(item)
        added = {"output_index": len(self._items) - 1, "item": item}
        return [*events, self._event("response.output_item.added", **added)]

    def _leave(self) -> list[bytes]:
        """The events that close the open item."""
        if not self._open:
            return []
        kind, self._open = self._open, ""
        item = self._items[-1]
        item["status"] = "completed"
        events: list[bytes] = []
        if kind.startswith("function_call"):
            done = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self._event("response.function_call_arguments.done", **self._at(), **done))
        else:
            part = item["content"][0]
            more = {"logprobs": part["logprobs"]} if kind == "message" else {}
            events.append(self._event(f"response.{part['type']}.done", **self._at_part(), text=part["text"], **more))
            events.append(self._event("response.content_part.done", **self._at_part(), part=part))
        events.append(self._event("response.output_item.done", output_index=len(self._items) - 1, item=item))
        return events

    def _at(self) -> Json:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _at_part(self) -> Json:
        return {**self._at(), "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._sequence += 1
        return event({"type": kind, **fields, "sequence_number": self._sequence}, kind)


# -- requests


def _messages(asked: Json) -> list[Json]:
    messages: list[Json] = []
    if asked.get("instructions"):
        messages.append({"role": "system", "content": text_of(asked["instructions"], "instructions")})
    given = asked.get("input")
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for name, item in objects(given, "input"):
        kind = item.get("type") or "message"
        last = messages[-1] if messages else {}
        if kind == "message":
            messages.append(_message(item, name))
        elif kind == "function_call":
            function = {
                "name": text_of(item.get("name"), f"{name}.name"),
                "arguments": text_of(item.get("arguments"), f"{name}.arguments"),
            }
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if last.get("role") == "assistant":  # what the model said and called in one turn is one message
                last.setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif kind == "function_call_output":
            output = item.get("output")
            content = output if isinstance(output, str) else _content(output, f"{name}.output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        elif kind != "reasoning":  # templates leave the reasoning of earlier turns out
            raise BadRequest(
                f"{name} is of type {kind!r:.40}, which this model cannot read. Send messages, function calls and their outputs."
            )
    return messages


def _message(item: Json, name: str) -> Json:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise BadRequest(f"{name}.role is {role!r:.40}. Send user, assistant, system or developer.")
    content = item.get("content")
    return {
        "role": "system" if role == "developer" else role,
        "content": content if isinstance(content, str) else _content(content, f"{name}.content"),
    }


def _content(content: object, name: str) -> str | list[Json]:
    parts: list[Json] = []
    for path, part in objects(content, name):
        kind = part.get("type")
        if kind in ("input_text", "output_text", "text"):
            parts.append({"type": "text", "text": text_of(part.get("text"), f"{path}.text")})
        elif kind == "refusal":
            parts.append({"type": "text", "text": text_of(part.get("refusal"), f"{path}.refusal")})
        elif kind == "input_image" and part.get("image_url"):
            parts.append(image_part(text_of(part["image_url"], f"{path}.image_url"), part.get("detail")))
        else:
            raise BadRequest(
                f"{path} is of type {kind!r:.40}, which this model cannot read. Send input_text, or input_image with image_url."
            )
    return plain_if_text(parts)


def _tool(tool: Json, name: str) -> Json:
    if tool.get("type") != "function":
        raise BadRequest(
            f"{name} is the hosted tool {tool.get('type')!r:.60}, which nobody runs here. Send tools of type function."
        )
    function: Json = {"name": text_of(tool.get("name"), f"{name}.name")}
    for key in ("description", "parameters", "strict"):
        if tool.get(key) is not None:
            function[key] = tool[key]
    return {"type": "function", "function": function}


def _tool_choice(choice: object) -> str | Json:
    if isinstance(choice, str):
        return choice
    fields = dictionary(choice)
    if fields.get("type") != "function":
        raise BadRequest(f"tool_choice is {choice!r:.80}. Send auto, required, none, or a function's name.")
    return {"type": "function", "function": {"name": text_of(fields.get("name"), "tool_choice.name")}}


def _wants_logprobs(asked: Json) -> bool:
    return TEXT_LOGPROBS in array(asked.get("include")) or bool(asked.get("top_logprobs"))


# -- answers


def _response(body: Json, asked: Json, ident: str, output: list[Json], *, status: str = "") -> Json:
    """The response object, with the request's fields repeated as the API does."""
    choices = dicts(body.get("choices"))
    cut = bool(choices) and choices[0].get("finish_reason") == "length"
    asked_tokens, answered = tokens_of(body)
    status = status or ("incomplete" if cut else "completed")
    usage = {
        "input_tokens": asked_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": answered,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": asked_tokens + answered,
    }
    return {
        "id": f"resp_{ident}",
        "object": "response",
        "created_at": body.get("created") or 0,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": asked.get("instructions"),
        "max_output_tokens": asked.get("max_output_tokens"),
        "metadata": asked.get("metadata") or {},
        "model": body.get("model") or "",
        "output": output,
        "parallel_tool_calls": asked.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "reasoning": asked.get("reasoning") or {"effort": None, "summary": None},
        "store": False,
        "temperature": asked.get("temperature"),
        "text": asked.get("text") or {"format": {"type": "text"}},
        "tool_choice": asked.get("tool_choice") or "auto",
        "tools": asked.get("tools") or [],
        "top_p": asked.get("top_p"),
        "truncation": "disabled",
        "usage": None if status == "in_progress" else usage,
        "user": asked.get("user"),
    }


def _output(body: Json, asked: Json, ident: str) -> list[Json]:
    choice = dicts(body["choices"])[0]
    message = dictionary(choice.get("message"))
    items: list[Json] = []
    if reasoning := reasoning_of(message):
        items.append(_text_item("reasoning", f"{ident}_{len(items)}", [_part("reasoning_text", reasoning)]))
    if message.get("content"):
        logprobs = _token_logprobs(choice) if _wants_logprobs(asked) else []
        part = {**_part("output_text", message["content"]), "logprobs": logprobs}
        items.append(_text_item("message", f"{ident}_{len(items)}", [part]))
    for call in dicts(message.get("tool_calls")):
        items.append(_call_item(call, f"{ident}_{len(items)}"))
    return items


def _text_item(kind: str, ident: str, content: list[Json], status: str = "completed") -> Json:
    if kind == "reasoning":
        return {"type": kind, "id": f"rs_{ident}", "summary": [], "content": content, "status": status}
    return {"type": kind, "id": f"msg_{ident}", "role": "assistant", "content": content, "status": status}


def _call_item(call: Json, ident: str, status: str = "completed") -> Json:
    function = dictionary(call.get("function"))
    return {
        "type": "function_call",
        "id": f"fc_{ident}",
        "call_id": call.get("id"),
        "name": function.get("name"),
        "arguments": function.get("arguments") or "",
        "status": status,
    }


def _part(kind: str, text: str = "") -> Json:
    extra: Json = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return {"type": kind, "text": text, **extra}


def _token_logprobs(choice: Json) -> list[Json]:
    return dicts(dictionary(choice.get("logprobs")).get("content"))


def _without(fields: Json, name: str) -> Json:
    return {key: value for key, value in fields.items() if key != name}
