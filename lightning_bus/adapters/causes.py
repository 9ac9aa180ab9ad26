"""Which model call led to a span. Pure.

    a model call                    itself
    the use of a tool               the call that asked for it
    a step with calls in it         the last of them: its answer is what the step came to
    anything in a call or a tool    that call, or the call that asked for the tool
    anything else                   the last call before it that the same agent made; without an agent's name, any

"Before" is by wall clocks, the gateway's and the agent's: where they differ by more than an agent takes between an
answer and what it does with it, set them right, or have spans name what they are about.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property

from lightning_bus.adapters.selection import Caller, Callers
from lightning_bus.adapters.tools import ToolUse, tool_uses
from lightning_bus.otel import names as n
from lightning_bus.spans import Span, is_model_call


class Causes:
    """The spans of one attempt, given in log order, and what led to what among them."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self.spans: dict[bytes, Span] = {}
        for span in spans:
            self.spans.setdefault(span.span_id, span)
        self._callers = Callers(self.spans.values())
        self.calls = [span for span in self.spans.values() if is_model_call(span)]

    @cached_property
    def uses(self) -> list[ToolUse]:
        """Every use of a tool, in order of time."""
        return self._tools[0]

    @cached_property
    def answered(self) -> list[Span]:
        """The calls whose answer the agent had: not those that failed, nor those that its client sent again."""
        kept: dict[bytes, Span] = {}
        newest: dict[tuple[object, object], bytes] = {}
        for call in self.calls:
            attributes = call.attributes
            if not attributes.get(n.RESPONSE_BODY):
                continue
            asked = str(attributes.get(n.REQUEST_BODY)), str(attributes.get(n.CHOICE, 0))
            if attributes.get(n.RETRY_COUNT, 0) and asked in newest:
                kept.pop(newest[asked], None)
            newest[asked] = call.span_id
            kept[call.span_id] = call
        return list(kept.values())

    def call_of(self, span_id: bytes) -> bytes | None:
        """Return the span id of the model call that led to this span; None when there is none."""
        span = self.spans[span_id]
        led = self._led_to(span)
        if led is not None:
            return led or None
        if span_id in self._last_under:
            return self._last_under[span_id]
        for above in self.ancestors(span):
            led = self._led_to(above)
            if led:
                return led
        return self._call_before(span)

    def is_tool(self, span: Span) -> bool:
        """True for spans that record the use of a tool."""
        return span.span_id in self._tools[1]

    def caller_of(self, span: Span) -> Caller:
        """Return the agent that a span belongs to, and where that stands in the tree."""
        return self._callers.of(span)

    def ancestors(self, span: Span) -> Iterator[Span]:
        """Yield the spans above one, nearest first; each once, whatever circles ids make."""
        seen = {span.span_id}
        above = self.spans.get(span.parent_id or b"")
        while above is not None and above.span_id not in seen:
            seen.add(above.span_id)
            yield above
            above = self.spans.get(above.parent_id or b"")

    def _led_to(self, span: Span) -> bytes | None:
        """Return the call that a span is or that asked for the tool it records; b"" for a tool that none asked for."""
        return span.span_id if is_model_call(span) else self._tools[1].get(span.span_id)

    def _call_before(self, span: Span) -> bytes | None:
        ends, calls = self._timeline.get(self.caller_of(span).agent) or self._timeline[""]
        at = bisect_right(ends, span.start_ns)
        return calls[at - 1].span_id if at else None

    @cached_property
    def _tools(self) -> tuple[list[ToolUse], dict[bytes, bytes]]:
        return tool_uses(self.spans.values(), self.calls, self._call_before)

    @cached_property
    def _last_under(self) -> dict[bytes, bytes]:
        return {above.span_id: call.span_id for call in self.calls for above in self.ancestors(call)}

    @cached_property
    def _timeline(self) -> dict[str, tuple[list[int], list[Span]]]:
        """Calls by when they ended, of each agent; under "" those of all."""
        timeline: dict[str, tuple[list[int], list[Span]]] = {"": ([], [])}
        for call in sorted(self.calls, key=lambda call: call.end_ns):
            for agent in {"", self.caller_of(call).agent}:
                ends, calls = timeline.setdefault(agent, ([], []))
                ends.append(call.end_ns)
                calls.append(call)
        return timeline
