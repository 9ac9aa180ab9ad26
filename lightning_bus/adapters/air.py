"""Automatic intermediate rewards: what the spans show anyway, turned into rewards by rules. Pure.

    [rewards]
    rules = [
        { on = "tool_error", value = -0.1, cap = -0.3 },
        { on = "tool_repeat", value = -0.05, tools = "search|fetch" },
        { on = "format_error", value = -0.2, pattern = '(?s)<think>.*</think>.*' },
        { on = "tokens", over = 512, per = 100, value = -0.01, cap = -0.2 },
    ]

Each time that a rule's event happens, `value` goes to the model call that caused it (see `causes`), until the rule's
rewards of the rollout reach `cap`. Agent Lightning's paper proposes the idea (arXiv 2508.03680, automatic intermediate
rewarding); the rules here are ours. What always holds: the same spans give the same rewards, each names its rule and
the span that shows the event, and what nothing shows is rewarded by no rule.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import msgspec

from lightning_bus.adapters.causes import Causes
from lightning_bus.adapters.rewards import Reward
from lightning_bus.adapters.selection import Selection
from lightning_bus.adapters.tools import FAILED, ToolUse, answer_of
from lightning_bus.config import Section
from lightning_bus.errors import ConfigError
from lightning_bus.otel import names as n
from lightning_bus.spans import Span, is_model_call

Event = Literal[
    "tool_error",  # a tool raised, or answered that it failed (`pattern`: what such an answer begins with)
    "tool_ok",  # a tool was carried out and did not fail
    "tool_retry",  # a tool that had just failed was called again, by the same agent
    "tool_repeat",  # a tool was called again with the very same arguments, by the same agent
    "bad_arguments",  # a tool call whose arguments are not a JSON object
    "unknown_tool",  # a call of a tool that the request did not offer
    "exception",  # the agent's own code raised, once wherever it was seen; not its tools, nor its model client
    "format_error",  # an answer that does not match `pattern` as a whole, or is not JSON where `json = true`
    "format_ok",  # an answer that does
    "truncated",  # an answer that was cut off at its length limit
    "latency",  # seconds `over` a budget, of a call or of the rollout since its first span
    "tokens",  # sampled tokens `over` a budget
    "turns",  # model calls `over` a budget, each
]
_TOOL_EVENTS = ("tool_error", "tool_ok", "tool_retry", "tool_repeat", "bad_arguments", "unknown_tool")
_BUDGETS = ("latency", "tokens", "turns")
_FORMATS = ("format_error", "format_ok")

# An engine that is away is no doing of the policy.
_CLIENT_MODULES = ("openai.", "anthropic.", "httpx.", "httpcore.", "litellm.", "requests.", "aiohttp.")


class RuleSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rule of [rewards]."""

    on: Event
    value: float  # for each time that it happens
    cap: float | None = None  # where this rule's rewards of one rollout stop; of value's sign
    name: str = ""  # the source that its rewards name; empty: `on`
    agents: list[str] = msgspec.field(default_factory=list[str])  # only calls of these; patterns as in credit.agents
    tools: str = ""  # regular expression: only tools whose whole name matches
    pattern: str = ""  # regular expression, for formats and tool_error
    json: bool = False  # for formats: the answer must be JSON
    over: float = 0.0  # for budgets: how much is free
    per: float = 0.0  # for budgets: value is for so much beyond it; 0: for going beyond it at all
    of: Literal["call", "rollout"] = "call"  # whose budget; formats: every answer without tool calls, or the last one

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or self.value == 0:
            raise ValueError(f"a rule's value is a finite number other than 0, not {self.value}")
        if self.cap is not None and not (math.isfinite(self.cap) and self.cap * self.value > 0):
            raise ValueError(f"cap = {self.cap} must have the sign of value = {self.value}")
        try:
            Selection.of(self.agents)
        except ConfigError as exc:
            raise ValueError(str(exc)) from exc
        for what, text in (("tools", self.tools), ("pattern", self.pattern)):
            try:
                re.compile(text)
            except re.error as exc:
                raise ValueError(f"{what} = {text!r} is no regular expression: {exc}") from exc
        if self.on in _FORMATS and bool(self.pattern) == self.json:
            raise ValueError(f'on = "{self.on}" wants either pattern = "…" or json = true')
        allowed = {
            "tools": self.on in _TOOL_EVENTS,
            "pattern": self.on in _FORMATS or self.on == "tool_error",
            "json": self.on in _FORMATS,
            "over": self.on in _BUDGETS,
            "per": self.on in _BUDGETS,
            "of": self.on in _BUDGETS or self.on in _FORMATS,
        }
        for field in msgspec.structs.fields(type(self)):
            if not allowed.get(field.name, True) and getattr(self, field.name) != field.default:
                raise ValueError(f'{field.name} means nothing for on = "{self.on}"')
        if self.over < 0 or self.per < 0:
            raise ValueError("over and per are not negative")

    @property
    def source(self) -> str:
        return self.name or self.on


class Caused(NamedTuple):
    """A reward and the model call that caused it."""

    call_id: bytes
    reward: Reward


def automatic_rewards(
    causes: Causes, rules: Iterable[RuleSection], *, weight: float = 1.0, cap: float | None = None
) -> list[Caused]:
    """Return what the rules give to one attempt's model calls, in log order of the calls.

    weight  multiplies every reward, after its rule's cap
    cap     the rewards of all rules together stay within ±cap

    Events that no model call led to give nothing.
    """
    place = {call.span_id: at for at, call in enumerate(causes.calls)}
    found: list[Caused] = []
    for rule in rules:
        events = [event for event in _events(causes, rule) if event.call_id in place]
        events.sort(key=lambda event: place[event.call_id])
        earned = _until(rule.cap, (event.times * rule.value for event in events))
        found += [
            Caused(event.call_id, Reward(event.span_id, value * weight, rule.source))
            for event, value in zip(events, earned, strict=True)
            if value
        ]
    found.sort(key=lambda caused: place[caused.call_id])
    if cap is None:
        return found
    within = _within(cap, (caused.reward.value for caused in found))
    return [
        Caused(caused.call_id, caused.reward._replace(value=value))
        for caused, value in zip(found, within, strict=True)
        if value
    ]


class _Seen(NamedTuple):
    """An event: what caused it, what shows it, and how many times over it counts."""

    call_id: bytes
    span_id: bytes
    times: float = 1.0


def _events(causes: Causes, rule: RuleSection) -> Iterator[_Seen]:
    events = _EVENTS[rule.on](causes, rule)
    if not rule.agents:
        return events
    of_agents = Selection.of(rule.agents)

    def selected(event: _Seen) -> bool:
        return bool(event.call_id) and of_agents.policy_of(causes.caller_of(causes.spans[event.call_id])) is not None

    return filter(selected, events)


# -- tools ----------------------------------------------------------------------------------------------------------------


def _uses(causes: Causes, rule: RuleSection) -> list[ToolUse]:
    tools = re.compile(rule.tools)
    return [use for use in causes.uses if not rule.tools or tools.fullmatch(use.name)]


def _tool_errors(causes: Causes, rule: RuleSection) -> Iterator[_Seen]:
    pattern = re.compile(rule.pattern) if rule.pattern else FAILED
    for use in _uses(causes, rule):
        if use.failed(pattern) == (rule.on == "tool_error") and use.seen:
            yield _Seen(use.call_id, use.span_id)


def _tool_retries(causes: Causes, rule: RuleSection) -> Iterator[_Seen]:
    before: dict[tuple[str, str], ToolUse] = {}
    for use in _uses(causes, rule):
        key = _agent_of(causes, use), use.name
        if key in before and before[key].failed():
            yield _Seen(use.call_id, use.span_id)
        before[key] = use


def _tool_repeats(causes: Causes, rule: RuleSection) -> Iterator[_Seen]:
    # Only what was carried out: an answer that its client never saw is asked for again, and that is no repetition.
    before: set[tuple[str, str, str]] = set()
    for use in _uses(causes, rule):
        if use.seen:
            key = _agent_of(causes, use), *use.identity
            if key in before:
                yield _Seen(use.call_id, use.span_id)
            before.add(key)


def _agent_of(causes: Causes, use: ToolUse) -> str:
    return causes.caller_of(causes.spans[use.call_id]).agent if use.call_id else ""


def _bad_arguments(causes: Causes, rule: RuleSection) -> Iterator[_Seen]:
    for use in _uses(causes, rule):
        if use.asked and not isinstance(_parsed(use.arguments), dict):
            yield _Seen(use.call_id, use.call_id)


def _unknown_tools(causes: Causes, rule: RuleSection) -> Iterator[_Seen]:
    for use in _uses(causes, rule):
        if not use.offered:
            yield _Seen(use.call_id, use.call_id)


# -- the agent's code, and answers ----------------------------------------------------------------------------------------


def _exceptions(causes: Causes, rule: RuleSection) -> Iterator[_Seen]:
    raised = {span.span_id: what for span in causes.spans.values() if (what := _raised(span))}
    # An exception on its way up fails every span that it passes; it happened in the innermost.
    passed = {
        above.span_id
        for span_id, what in raised.items()
        for above in causes.ancestors(causes.spans[span_id])
        if raised.get(above.span_id) == what
    }
    for span_id, what in raised.items():
        span = causes.spans[span_id]
        if span_id not in passed and not _is_elsewhere(causes, span, what):
            yield _Seen(causes.call_of(span_id) or b"", span_id)


def _raised(span: Span) -> tuple[str, str] | None:
    kind = str(span.attributes.get(n.EXCEPTION_TYPE) or "")
    if kind:
        return kind, str(span.attributes.get(n.EXCEPTION_MESSAGE) or "")
    return ("", span.error) if span.error else None


def _is_elsewhere(causes: Causes, span: Span, what: tuple[str, str]) -> bool:
    """True for what has rules of its own or is the engine's doing."""
    is_client = span.attributes.get(n.OPERATION) == "chat" or span.attributes.get("openinference.span.kind") == "LLM"
    return (
        is_model_call(span)
        or is_client
        or causes.is_tool(span)
        or any(text.startswith(_CLIENT_MODULES) for text in what)
    )


def _formats(causes: Causes, rule: RuleSection) -> Iterator[_Seen]:
    pattern = re.compile(rule.pattern)
    answers = [call for call in causes.answered if not answer_of(call).tool_calls]
    for call in answers[-1:] if rule.of == "rollout" else answers:
        text = answer_of(call).text
        fits = _parsed(text) is not None if rule.json else pattern.fullmatch(text) is not None
        if fits == (rule.on == "format_ok"):
            yield _Seen(call.span_id, call.span_id)


def _truncated(causes: Causes, rule: RuleSection) -> Iterator[_Seen]:
    for call in causes.calls:
        reasons = call.attributes.get(n.FINISH_REASONS)
        if isinstance(reasons, list) and "length" in reasons:
            yield _Seen(call.span_id, call.span_id)


def _parsed(text: str) -> object:
    """Return what JSON text says, None for what is not JSON (and for null, which is no answer either)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# -- budgets --------------------------------------------------------------------------------------------------------------


def _budget(causes: Causes, rule: RuleSection) -> Iterator[_Seen]:
    calls = causes.answered
    if rule.on == "turns":
        spent, whole, per = [1.0] * len(calls), True, rule.per or 1.0
    elif rule.on == "tokens":
        spent, whole, per = [float(_sampled_tokens(call)) for call in calls], rule.of == "rollout", rule.per
    else:
        spent, whole, per = _seconds(causes, calls, rule), rule.of == "rollout", rule.per
    before = 0.0
    for call, amount in zip(calls, spent, strict=True):
        beyond = max(0.0, (before + amount if whole else amount) - rule.over)
        already = max(0.0, before - rule.over) if whole else 0.0
        times = (beyond - already) / per if per else float(beyond > 0 and not already)
        if times > 0:
            yield _Seen(call.span_id, call.span_id, times)
        before += amount


def _seconds(causes: Causes, calls: Sequence[Span], rule: RuleSection) -> list[float]:
    """Return how long each call took; of a rollout, how long until its end since the end of the one before."""
    if rule.of == "call":
        return [(call.end_ns - call.start_ns) / 1e9 for call in calls]
    at = min((span.start_ns for span in causes.spans.values()), default=0)
    spent: list[float] = []
    for call in calls:
        spent.append(max(0, call.end_ns - at) / 1e9)
        at = max(at, call.end_ns)
    return spent


def _sampled_tokens(call: Span) -> int:
    ids = call.attributes.get(n.RESPONSE_IDS)
    counted = call.attributes.get(n.OUTPUT_TOKENS)
    return len(ids) // 4 if isinstance(ids, bytes) and ids else counted if isinstance(counted, int) else 0


# -- helpers --------------------------------------------------------------------------------------------------------------


def _until(cap: float | None, values: Iterable[float]) -> Iterator[float]:
    """Yield values of one sign until their sum reaches the cap, the one that would pass it cut short."""
    total = 0.0
    for value in values:
        if cap is not None:
            left = cap - total
            value = max(value, left) if cap < 0 else min(value, left)
        total += value
        yield value


def _within(cap: float, values: Iterable[float]) -> Iterator[float]:
    """Yield values cut so that their running sum stays within ±cap."""
    total = 0.0
    for value in values:
        following = min(cap, max(-cap, total + value))
        yield following - total
        total = following


_EVENTS: dict[str, Callable[[Causes, RuleSection], Iterator[_Seen]]] = {
    "tool_error": _tool_errors,
    "tool_ok": _tool_errors,
    "tool_retry": _tool_retries,
    "tool_repeat": _tool_repeats,
    "bad_arguments": _bad_arguments,
    "unknown_tool": _unknown_tools,
    "exception": _exceptions,
    "format_error": _formats,
    "format_ok": _formats,
    "truncated": _truncated,
    "latency": _budget,
    "tokens": _budget,
    "turns": _budget,
}
