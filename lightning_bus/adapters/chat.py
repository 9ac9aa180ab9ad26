"""Recorded model calls → conversations in OpenAI's chat format, for imitation and for people. Pure.

An agent sends the whole conversation with each call, so one conversation is recorded many times over, each time a turn
longer. What is kept is the last of each: a call whose request and answer no later call begins with. What always holds:
messages are those of the log; nothing is rendered, and what an engine or a client added beside the format is left out.

The rows load with Hugging Face's `datasets` and are what TRL calls conversational: `messages` and `tools` for SFT, and
`prompt`, `chosen` and `rejected` for DPO (see `preferences`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, cast

import msgspec

from lightning_bus.adapters.causes import Causes
from lightning_bus.adapters.rollouts import FinishedRollout
from lightning_bus.adapters.tools import canonical
from lightning_bus.lifecycle import Status
from lightning_bus.otel import names as n
from lightning_bus.spans import Span

Json = dict[str, Any]

CHAT_COLUMNS = {
    "messages": "messages",
    "tools": "json",
    "rollout_id": "string",
    "group": "string",
    "agent": "string",
    "model": "string",
    "reward": "float64",  # the rollout's return; null where it has none
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation as its last call had it."""

    messages: list[Json]  # the answer is the last
    opening: int  # so many messages were there before the model first answered
    tools: list[Json]
    agent: str
    model: str
    call: Span


def conversations_of(spans: Sequence[Span], dropped: Counter[str] | None = None) -> list[Conversation]:
    """Return the conversations of one attempt, each as long as it became, in the order of their last calls.

    dropped  counts the calls that are left out: `answer cut off` at its limit or on the way, `no readable messages`
    """
    causes, dropped = Causes(spans), Counter[str]() if dropped is None else dropped
    said: list[Conversation] = []
    ends: list[bytes] = []  # of each: a digest of its messages
    begun: dict[bytes, int] = {}  # digest of all messages up to an answer → the shortest opening of its conversation
    passed: set[bytes] = set()  # digests of what requests begin with
    for call in causes.answered:
        spoken = _spoken(call)
        if spoken is None:
            dropped["no readable messages"] += 1
            continue
        messages, answer, tools = spoken
        digests = _digests([*messages, answer])
        passed.update(digests[:-1])
        if _is_cut_off(call):
            dropped["answer cut off"] += 1
            continue
        before = next((begun[digest] for digest in digests if digest in begun), len(messages))
        begun.setdefault(digests[-1], before)
        agent = causes.caller_of(call).agent
        model = str(call.attributes.get(n.REQUEST_MODEL, ""))
        said.append(Conversation([*map(clean, messages), clean(answer)], before, tools, agent, model, call))
        ends.append(digests[-1])
    return [conversation for conversation, end in zip(said, ends, strict=True) if end not in passed]


def chat_rows(rollout: FinishedRollout, total: float | None, dropped: Counter[str]) -> list[Json]:
    """Return a row of CHAT_COLUMNS for each conversation of a rollout; none, counted, for one that did not succeed.

    total  its return, as `RolloutRewards.total`
    """
    if rollout.status is not Status.SUCCEEDED:
        dropped["failed rollout"] += 1
        return []
    return [
        {
            "messages": one.messages, "tools": one.tools, "rollout_id": rollout.rollout_id, "group": rollout.group,
            "agent": one.agent, "model": one.model, "reward": total,
        }
        for one in conversations_of(rollout.spans, dropped)
    ]  # fmt: skip


def clean(message: Json) -> Json:
    """Return a message with what the chat format knows, and no more."""
    cleaned: Json = {"role": message.get("role", ""), "content": message.get("content")}
    if cleaned["content"] is None:
        cleaned["content"] = ""  # templates join it to text
    if calls := _tool_calls(message):
        cleaned["tool_calls"] = [
            {"id": str(call.get("id") or ""), "type": "function", "function": _function(call)} for call in calls
        ]
    for name in ("tool_call_id", "name", "reasoning_content"):
        if isinstance(message.get(name), str):
            cleaned[name] = message[name]
    return cleaned


def _spoken(call: Span) -> tuple[list[Json], Json, list[Json]] | None:
    """Return a call's messages, its answer and its tools as recorded; None where they cannot be read."""
    try:
        request: Any = msgspec.json.decode(call.attributes.get(n.REQUEST_BODY) or b"")
        answer: Any = msgspec.json.decode(call.attributes.get(n.RESPONSE_BODY) or b"")
    except (msgspec.DecodeError, TypeError, RecursionError):
        return None
    if not isinstance(request, dict) or not isinstance(answer, dict):
        return None
    asked = cast("Json", request)
    messages = _objects(asked.get("messages"))
    said: Json = {"role": "assistant", **cast("Json", answer)}
    return (messages, said, _objects(asked.get("tools"))) if messages else None


def _is_cut_off(call: Span) -> bool:
    reasons = call.attributes.get(n.FINISH_REASONS)
    return bool(call.error) or (isinstance(reasons, list) and "length" in reasons)


def _digests(messages: list[Json]) -> list[bytes]:
    """Return a digest of the first message, of the first two, and so on. Equal for what means the same."""
    digests: list[bytes] = []
    before = b""
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = cast("list[Any]", content)
            texts = [cast("Json", part).get("text") if isinstance(part, dict) else None for part in parts]
            if all(isinstance(text, str) for text in texts):
                content = "".join(map(str, texts))
        # A client sends an answer back without what it does not know: reasoning, refusals, the indices of tool calls.
        calls = [[_function(call)["name"], canonical(_function(call)["arguments"])] for call in _tool_calls(message)]
        meant = msgspec.json.encode([message.get("role"), content or "", calls, message.get("tool_call_id")])
        before = blake2b(before + meant, digest_size=16).digest()
        digests.append(before)
    return digests


def _tool_calls(message: Json) -> list[Json]:
    return _objects(message.get("tool_calls"))


def _function(call: Json) -> Json:
    function = call.get("function")
    known: Json = cast("Json", function) if isinstance(function, dict) else {}
    arguments = known.get("arguments", "")
    text = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
    return {"name": str(known.get("name") or ""), "arguments": text}


def _objects(value: Any) -> list[Json]:
    items = cast("list[Any]", value) if isinstance(value, list) else []
    return [cast("Json", item) for item in items if isinstance(item, dict)]
