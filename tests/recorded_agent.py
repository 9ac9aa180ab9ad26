"""An agent that plays its rollout into spans: model calls through the gateway's own recording code, tools as they come.

Time is a counter, ids are numbers, so the same play gives the same spans.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_bus import spans as s
from lightning_bus.adapters import FinishedRollout
from lightning_bus.gateway.recording import Call, model_call_spans
from lightning_bus.lifecycle import Status
from lightning_bus.otel import names as n
from lightning_bus.spans import Span

SECOND_NS = 1_000_000_000
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("calc", "search")]

# What each way of tracing writes about the use of a tool: (name, arguments, result, call id) → attributes.
TRACED: dict[str, Callable[[str, str, str, str], dict[str, Any]]] = {
    "gen_ai": lambda name, arguments, result, call_id: {
        "gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": name, "gen_ai.tool.call.id": call_id,
        "gen_ai.tool.call.arguments": arguments, "gen_ai.tool.call.result": result,
    },
    "openinference": lambda name, arguments, result, call_id: {
        "openinference.span.kind": "TOOL", "tool.name": name, "input.value": arguments, "output.value": result,
    },
    "traceloop": lambda name, arguments, result, call_id: {
        "traceloop.span.kind": "tool", "traceloop.entity.name": name, "traceloop.entity.input": arguments,
        "traceloop.entity.output": result,
    },
    "mcp": lambda name, arguments, result, call_id: {
        "mcp.method.name": "tools/call", "gen_ai.tool.name": name, "gen_ai.tool.call.arguments": arguments,
        "gen_ai.tool.call.result": result,
    },
    "operation": lambda name, arguments, result, call_id: {
        f"{n.OPERATION_INPUT}.expression": arguments, n.OPERATION_OUTPUT: result,
    },
}  # fmt: skip


@dataclass
class Play:
    """One attempt being played. Spans are in `spans`, in log order."""

    rollout_id: str = "r-1"
    group: str = "g"
    question: str = "How much is 1 + 1?"
    agent: str = ""
    tools: list[dict[str, Any]] = field(default_factory=lambda: list(TOOLS))
    spans: list[Span] = field(default_factory=list)
    now_ns: int = SECOND_NS
    messages: list[dict[str, Any]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)  # tool calls of the newest answer
    _numbers: Any = field(default_factory=lambda: itertools.count(1))
    _tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.messages = self.messages or [{"role": "user", "content": self.question}]
        self._tokens = [len(self.question)]

    def say(
        self, content: str = "", *calls: tuple[str, str], took_s: float = 0.5, tokens: int = 3, finish: str = "",
        retry: int = 0, parent: Span | None = None, agent: str = "",
    ) -> Span:  # fmt: skip
        """Call the model, which answers this, and return the recorded span. calls: (tool, arguments)."""
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            message["tool_calls"] = [
                {"id": f"call-{next(self._numbers)}", "type": "function", "function": {"name": a, "arguments": b}}
                for a, b in calls
            ]
        request = {"model": "policy", "messages": self.messages, "tools": self.tools, "temperature": 1.0}
        sampled = [1000 + next(self._numbers) for _ in range(tokens)]
        response = {
            "prompt_token_ids": self._tokens,
            "choices": [
                {
                    "message": message, "finish_reason": finish or ("tool_calls" if calls else "stop"), "token_ids": sampled,
                    "logprobs": {"content": [{"logprob": -0.5}] * tokens},
                    "weight_versions": [{"version": "1", "start": 0, "end": tokens}],
                }
            ],
        }  # fmt: skip
        call = Call(
            self.rollout_id, 1, b"t" * 16, None if parent is None else parent.span_id, request,
            json.dumps(request).encode(), self.now_ns, retry, agent_name=agent or self.agent,
        )  # fmt: skip
        self.now_ns += int(took_s * SECOND_NS)
        (span,) = model_call_spans(call, response, self.now_ns, self._id)
        self.spans.append(span)
        self.messages = [*self.messages, message]
        self.asked = message.get("tool_calls", [])
        self._tokens = [*self._tokens, *sampled]
        return span

    def tool(
        self, result: str = "2", *, traced: str = "", error: str = "", nth: int = 0, told: bool = True
    ) -> Span | None:
        """Carry out the nth tool call of the newest answer, and tell the model its result.

        traced  as whom a span is recorded; "": nobody traces, so that only the next request shows the result
        """
        call = self.asked[nth]
        span = None
        if traced:
            function = call["function"]
            attributes = TRACED[traced](function["name"], function["arguments"], result, call["id"])
            span = self.span(function["name"], attributes=attributes, error=error)
        if told:
            self.messages = [*self.messages, {"role": "tool", "tool_call_id": call["id"], "content": result}]
        return span

    def span(
        self, name: str, *, attributes: dict[str, Any] | None = None, error: str = "", parent: Span | None = None,
        took_s: float = 0.1,
    ) -> Span:  # fmt: skip
        """Record any other span, from now on."""
        start_ns = self.now_ns
        self.now_ns += int(took_s * SECOND_NS)
        parent_id = None if parent is None else parent.span_id
        made = Span(
            self._id(),
            b"t" * 16,
            parent_id,
            name,
            start_ns,
            self.now_ns,
            attributes or {},
            self.rollout_id,
            1,
            0,
            error,
        )
        self.spans.append(made)
        return made

    def reward(self, value: Any, name: str = "", span: Span | None = None) -> Span:
        """Emit a reward, for the rollout or for one span."""
        attributes = {s.REWARD: value} | ({s.REWARD_NAME: name} if name else {})
        if span is not None:
            attributes[n.REWARD_SPAN] = span.span_id.hex()
        return self.span(s.REWARD_SPAN_NAME, attributes=attributes, took_s=0)

    def finish(self, reward: float | None = 1.0, status: Status = Status.SUCCEEDED, error: str = "") -> FinishedRollout:
        """Return the rollout, ended."""
        return FinishedRollout(
            self.rollout_id, self.group, {}, status, 1, reward, error, list(self.spans), 0, 1,
        )  # fmt: skip

    def _id(self) -> bytes:
        return next(self._numbers).to_bytes(8, "big")
