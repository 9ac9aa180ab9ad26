"""Tool calls in the Hermes format, out of text and into OpenAI's shape.

    <tool_call>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_call>

Always holds: a call that is not valid JSON with a name and an object of arguments stays content, with all the text
around it, as vLLM does; beside good calls only what comes before the first is content (the ids keep everything).
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

OPENING, CLOSING = "<tool_call>", "</tool_call>"
# The last call may lack its closing tag: models like to end the turn instead.
CALL = re.compile(r"<tool_call>(.*?)</tool_call>|<tool_call>(.*)", re.DOTALL)


def parse(text: str) -> tuple[str | None, list[dict[str, Any]]]:
    """Content and OpenAI tool_calls of a response text; content is None when there is nothing but calls."""
    if OPENING not in text:
        return text, []
    calls = [parse_call(closed or open_ended) for closed, open_ended in CALL.findall(text)]
    good = [call for call in calls if call is not None]
    if len(good) < len(calls):
        return text, []
    return text[: text.index(OPENING)] or None, good


def parse_call(body: str) -> dict[str, Any] | None:
    """One OpenAI tool call from what stands between the tags; None when it is malformed."""
    try:
        call = json.loads(body)
    except ValueError:
        return None
    if not isinstance(call, dict):
        return None
    name, arguments = call.get("name"), call.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"chatcmpl-tool-{uuid.uuid4().hex}", "type": "function", "function": function}


def render_call(function: dict[str, Any]) -> str:
    """The text a policy writes for one call, given an OpenAI function with its arguments as a JSON string."""
    call = {"name": function["name"], "arguments": json.loads(function["arguments"])}
    return f"{OPENING}\n{json.dumps(call, ensure_ascii=False)}\n{CLOSING}"


class HermesStream:
    """The same over text that arrives in pieces: content goes out as it comes, a call once it is complete.

    pending  text not given out yet: it may be, or begin, a call
    called   a call has been given out; from then on content beside calls is dropped
    """

    def __init__(self, *, pending: str = "", called: bool = False) -> None:
        self.pending = pending
        self.called = called

    def push(self, piece: str) -> tuple[str, list[dict[str, Any]]]:
        """Content to show now, and calls that this piece completed."""
        self.pending += piece
        content, calls = "", []
        while True:
            before, tag, inside = self.pending.partition(OPENING)
            if not tag:
                shown = len(self.pending) - _overlap(self.pending)
                content += self._beside_calls(self.pending[:shown])
                self.pending = self.pending[shown:]
                return content, calls
            content += self._beside_calls(before)
            body, closed, rest = inside.partition(CLOSING)
            if not closed:
                self.pending = tag + inside
                return content, calls
            call = parse_call(body)
            if call is None:
                content += tag + body + closed
            else:
                calls.append(call)
                self.called = True
            self.pending = rest

    def flush(self) -> tuple[str, list[dict[str, Any]]]:
        """What was held back, once nothing more comes."""
        pending, self.pending = self.pending, ""
        call = parse_call(pending.removeprefix(OPENING)) if pending.startswith(OPENING) else None
        if call is None:
            return pending if pending.startswith(OPENING) else self._beside_calls(pending), []
        self.called = True
        return "", [call]

    def _beside_calls(self, content: str) -> str:
        return "" if self.called else content


def _overlap(text: str) -> int:
    """Length of the longest end of text that could still become the opening tag."""
    return next((n for n in range(min(len(OPENING) - 1, len(text)), 0, -1) if OPENING.startswith(text[-n:])), 0)
