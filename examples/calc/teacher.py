"""A scripted teacher: an honest but limited keyword script in the place of the model.

It answers as an OpenAI chat model would, so that its rollouts travel the same road as any other and are recorded
span by span; supervised training on those spans gives a policy the format, the copying and the teacher's confusion.
The script knows that a word points to an operation, but of most words only that it is one of two, and then it
guesses: it is right somewhat more than half of the time, and which of the two it is the policy must learn from
reward. What always holds: the reply depends on the conversation alone, guesses included, so a run can be repeated.
"""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

# Each pair of operations belongs to the stories of one operation. So the confusion that a policy copies already
# tells the four apart, and reward has only to settle what each stands for: that takes hundreds of rollouts on a
# laptop's CPU. With one guess among all four operations it took several thousand.
CANDIDATES = {
    "total": "+", "found": "+*", "walked": "+*",
    "difference": "-+", "gave": "-+", "ate": "-+",
    "filled": "*/", "planted": "*/", "earns": "*/",
    "shared": "/-", "cut": "/-", "put": "/-",
}  # fmt: skip
UNKNOWN = "+-*/"


def reply(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Return the next assistant message: a calculator call for a question, the answer once the tool has spoken.

    messages  an OpenAI conversation; the last message is from `user` or `tool`
    tools     OpenAI tool descriptions; the first is called with one argument, `expression`. Without tools the
              expression itself is the reply.
    """
    last = messages[-1]
    if last["role"] == "tool":
        return {"role": "assistant", "content": f"Answer: {last['content']}"}
    expression = _expression(str(last["content"]))
    if not tools:
        return {"role": "assistant", "content": expression}
    name = tools[0]["function"]["name"]
    arguments = json.dumps({"expression": expression})
    call_id = f"call_{zlib.crc32(str(last['content']).encode()):08x}"
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def _expression(question: str) -> str:
    """The first two numbers of the question, joined by the operator that its first known word suggests."""
    words = re.findall(r"[a-z]+", question.lower())
    candidates = next((CANDIDATES[word] for word in words if word in CANDIDATES), UNKNOWN)
    # A checksum, not hash() or random: the same question must get the same guess in every process.
    guess = candidates[zlib.crc32(question.encode()) % len(candidates)]
    return guess.join(re.findall(r"\d+", question)[:2])
