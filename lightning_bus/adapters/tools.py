"""What an agent's tools did: which model call asked for each use, with what arguments, and what came of it. Pure.

The same use may be seen from three sides, and any of them may be missing:

    the model's answer asks for it      tool_calls of the recorded message: always there through the gateway
    a span records it                   OpenTelemetry's execute_tool, OpenInference, OpenLLMetry, AgentOps, MCP, or an
                                        `operation` of our own tracer that has the tool's name
    a later request tells its result    a message of role tool: all that there is when nothing traces the agent

They are matched by the tool call's id; a span that has none by tool and arguments, then by tool alone, in order of
time. What always holds: each use stands once, and a use that nobody was seen to carry out says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import msgspec

from lightning_bus.otel import names as n
from lightning_bus.spans import Span, is_model_call

# Attribute names of those who trace tools. The first that is there counts.
_CALL_ID = ("gen_ai.tool.call.id", "tool_call.id", "tool.id")
_NAME = ("gen_ai.tool.name", "tool.name", "traceloop.entity.name", "agentops.tool.name")
_ARGUMENTS = ("gen_ai.tool.call.arguments", "input.value", "traceloop.entity.input", "tool.parameters")
_RESULT = ("gen_ai.tool.call.result", "output.value", "traceloop.entity.output", n.OPERATION_OUTPUT)
_KINDS = ("openinference.span.kind", "traceloop.span.kind", "agentops.span.kind")
_MCP = "mcp.method.name"
_ANTHROPIC = "/v1/messages"

# What a tool answers when it failed, where nothing but its answer is seen.
FAILED = re.compile(
    r"\s*(?:\W?error\b|traceback \(most recent call last\)|exception\b|\w*(?:error|exception)\s*:)", re.I
)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """One use of a tool."""

    call_id: bytes  # span id of the model call that asked for it; b"": none did
    name: str
    arguments: str  # as the model wrote them, or as the span has them
    at_ns: int
    span_id: bytes  # where it is best seen: its own span, the call whose request tells its result, or the call itself
    asked: bool = True  # by the model, in so many words
    offered: bool = True  # False: the request offered tools, and none of that name
    seen: bool = False  # carried out, as far as the log tells
    result: str | None = None
    error: str = ""  # what its span says went wrong

    def failed(self, pattern: re.Pattern[str] = FAILED) -> bool:
        """True when its span has an error or its result reads like one."""
        return bool(self.error) or (self.result is not None and reads_like_failure(self.result, pattern))

    @property
    def identity(self) -> tuple[str, str]:
        """Equal for uses of the same tool with the same arguments, however they are spaced and ordered."""
        return self.name, canonical(self.arguments)


def tool_uses(
    spans: Iterable[Span], calls: Sequence[Span], call_before: Callable[[Span], bytes | None]
) -> tuple[list[ToolUse], dict[bytes, bytes]]:
    """Return the uses of tools in order of time, and for each tool span the model call that led to it.

    spans        all of an attempt, each once
    calls        its model calls, in log order
    call_before  the model call that came before a span, for tools that no model call asks for in so many words
    """
    finder = _Finder(calls)
    for call in calls:
        finder.read_request(call)
    by_id = {span.span_id: span for span in spans}
    led_to: dict[bytes, bytes] = {}
    for span in sorted(by_id.values(), key=lambda span: span.start_ns):
        if is_model_call(span):
            continue
        name = tool_name(span)
        traced = name is not None
        name = name or (span.name if _is_operation(span) else None)
        if name is None or _repeats_parent(span, name, by_id):
            continue
        at = finder.match(span, name)
        if at is not None:
            use = finder.uses[at]
            led_to[span.span_id] = use.call_id
            finder.uses[at] = _with_span(use, span)
        elif traced:  # nobody asked for it in so many words, as with tools that are called by text
            call_id = call_before(span) or b""
            led_to[span.span_id] = call_id
            use = ToolUse(call_id, name, _text(_first(span, _ARGUMENTS)), span.start_ns, span.span_id, asked=False)
            finder.uses.append(_with_span(use, span))
    return sorted(finder.uses, key=lambda use: use.at_ns), led_to


def tool_name(span: Span) -> str | None:
    """Return the name of the tool that a span records the use of; None for spans of anything else."""
    attributes = span.attributes
    if (
        attributes.get(n.OPERATION) == "execute_tool"
        or attributes.get(_MCP) == "tools/call"
        or any(str(attributes.get(kind, "")).lower() == "tool" for kind in _KINDS)
    ):
        name = _first(span, _NAME)
        return str(name) if name else span.name.removeprefix("execute_tool ")
    return None


def reads_like_failure(result: str, pattern: re.Pattern[str] = FAILED) -> bool:
    """True when a tool's answer says that it failed: by the pattern at its start, or as JSON with an error in it."""
    if pattern.match(result):
        return True
    if pattern is FAILED and result.lstrip().startswith("{"):
        try:
            told = msgspec.json.decode(result)
        except (msgspec.DecodeError, RecursionError):
            return False
        return any(told.get(name) for name in ("error", "isError", "is_error")) or told.get("status") == "error"
    return False


def canonical(arguments: str) -> str:
    """Return JSON in one spelling; what is none without space around it."""
    try:
        return msgspec.json.encode(msgspec.json.decode(arguments), order="deterministic").decode()
    except (msgspec.DecodeError, RecursionError):
        return arguments.strip()


# -- what the gateway recorded --------------------------------------------------------------------------------------------


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: Any = ""


class _ToolCall(msgspec.Struct):
    id: str | None = None
    function: _Function | None = None


class Answer(msgspec.Struct):
    """The message that a model answered with, as far as rules look at it."""

    content: Any = None
    tool_calls: list[_ToolCall] | None = None

    @property
    def text(self) -> str:
        return _text(self.content)


class _Message(msgspec.Struct):
    role: str = ""
    tool_call_id: str | None = None
    content: Any = None


class _Offered(msgspec.Struct):
    function: _Function | None = None


class _Request(msgspec.Struct):
    messages: list[_Message] = []
    tools: list[_Offered] | None = None


_answer = msgspec.json.Decoder(Answer)
_request = msgspec.json.Decoder(_Request)


def answer_of(call: Span) -> Answer:
    """Return what the model answered; an empty answer where nothing readable was recorded."""
    try:
        return _answer.decode(call.attributes.get(n.RESPONSE_BODY) or "{}")
    except (msgspec.DecodeError, TypeError, RecursionError):
        return Answer()


class _Finder:
    """Uses that were asked for, to be matched with what is known of their being carried out."""

    def __init__(self, calls: Sequence[Span]) -> None:
        self.uses: list[ToolUse] = []
        self._by_id: dict[str, list[int]] = {}
        self._of_call: dict[bytes, list[int]] = {}
        self._unmatched: dict[str, list[int]] = {}  # by tool: uses without a span
        for call in calls:
            for asked in answer_of(call).tool_calls or ():
                function = asked.function
                if function is None or not function.name:
                    continue
                at = len(self.uses)
                name, arguments = function.name, _text(function.arguments)
                self.uses.append(ToolUse(call.span_id, name, arguments, call.end_ns, call.span_id))
                self._of_call.setdefault(call.span_id, []).append(at)
                self._unmatched.setdefault(name, []).append(at)
                if asked.id:
                    self._by_id.setdefault(asked.id, []).append(at)

    def read_request(self, call: Span) -> None:
        """Take the results that a request tells, and note which uses were of tools that it did not offer."""
        try:
            request = _request.decode(call.attributes.get(n.REQUEST_BODY) or "{}")
        except (msgspec.DecodeError, TypeError, RecursionError):
            return
        said_failed = _said_failed(call)
        told: dict[str, int] = {}
        for message in request.messages:
            if message.role == "tool" and message.tool_call_id:
                # Ids need not be unique: the second result of an id is that of the second use that has it.
                nth = told[message.tool_call_id] = told.get(message.tool_call_id, -1) + 1
                of_id = self._by_id.get(message.tool_call_id, ())
                if nth < len(of_id) and not self.uses[of_id[nth]].seen:
                    self.uses[of_id[nth]] = replace(
                        self.uses[of_id[nth]],
                        span_id=call.span_id,
                        seen=True,
                        result=_text(message.content),
                        error="is_error" if message.tool_call_id in said_failed else "",
                    )
        if request.tools:
            offered = {tool.function.name for tool in request.tools if tool.function is not None}
            for at in self._of_call.get(call.span_id, ()):
                if self.uses[at].name not in offered:
                    self.uses[at] = replace(self.uses[at], offered=False)

    def match(self, span: Span, name: str) -> int | None:
        """Return which use a tool's span records, and take it out; None when nobody asked for it."""
        asked_id = _first(span, _CALL_ID)
        waiting = self._unmatched.get(name, [])
        if asked_id is not None and (of_id := self._by_id.get(str(asked_id))):
            at = next((at for at in of_id if at in waiting), None)
            if at is None:
                return of_id[-1]  # told twice, by two that trace the same tool
        else:
            before = [at for at in waiting if self.uses[at].at_ns <= span.start_ns] or list(waiting)
            if not before:
                return None
            arguments = canonical(_text(_first(span, _ARGUMENTS)))
            same = (at for at in before if canonical(self.uses[at].arguments) == arguments)
            at = next(same, before[0])
        waiting.remove(at)
        return at


# -- helpers --------------------------------------------------------------------------------------------------------------


class _Block(msgspec.Struct):
    type: str = ""
    tool_use_id: str = ""
    is_error: bool = False


class _Turn(msgspec.Struct):
    content: str | list[_Block] = ""


class _Original(msgspec.Struct):
    messages: list[_Turn] = []


_original = msgspec.json.Decoder(_Original)


def _said_failed(call: Span) -> set[str]:
    """Return the ids of tool calls that failed, where the agent spoke an API that says so: Anthropic's."""
    if call.attributes.get(n.ROUTE) != _ANTHROPIC:
        return set()
    try:
        turns = _original.decode(call.attributes.get(n.ORIGINAL_REQUEST) or "{}").messages
    except (msgspec.DecodeError, TypeError, RecursionError):
        return set()
    return {
        block.tool_use_id
        for turn in turns
        if isinstance(turn.content, list)
        for block in turn.content
        if block.is_error
    }


def _with_span(use: ToolUse, span: Span) -> ToolUse:
    """Add what a tool's span tells of its use."""
    result = _first(span, _RESULT)
    error = span.error or str(span.attributes.get(n.EXCEPTION_TYPE) or span.attributes.get("error.type") or "")
    return replace(
        use,
        span_id=span.span_id,
        seen=True,
        result=use.result if result is None else _text(result),
        error=use.error or error,
    )


def _is_operation(span: Span) -> bool:
    """True for what our own `operation` records, which may be a tool and does not say so."""
    return any(name.startswith(n.OPERATION_INPUT) or name == n.OPERATION_OUTPUT for name in span.attributes)


def _repeats_parent(span: Span, name: str, by_id: dict[bytes, Span]) -> bool:
    """True for the second of two spans, one in the other, that two instrumentations made of one use."""
    parent = by_id.get(span.parent_id or b"")
    return parent is not None and tool_name(parent) == name


def _first(span: Span, names: Sequence[str]) -> Any:
    return next((span.attributes[name] for name in names if name in span.attributes), None)


def _text(value: Any) -> str:
    """Return text as it is, the text in a list of parts, and anything else as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        parts = cast("list[Any]", value)
        if all(isinstance(part, dict) and "text" in part for part in parts):
            return "".join(str(cast("dict[str, Any]", part)["text"]) for part in parts)
    try:
        return msgspec.json.encode(value, enc_hook=str).decode()
    except (TypeError, ValueError, RecursionError):
        return repr(cast("object", value))
