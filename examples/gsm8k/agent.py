"""An agent for grade-school word problems: it lets the model think, then asks for the number.

A plain function over the official `openai` client, in two turns of one conversation. What always holds: whatever the
*model* says, the agent returns a score; only a failing *server* raises. A very small model is seldom right, and a group
of rollouts that all earn nothing teaches nothing, so an answer that at least is a number earns a little.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from openai import OpenAI

THINKING_TOKENS_MAX = 48  # a laptop's CPU pays for every one; a larger model deserves several hundred
ANSWER_TOKENS_MAX = 16
TIMEOUT_S = 300.0  # dozens of calls share the cores
RETRIES_MAX = 4

RIGHT, A_NUMBER_ALONE, SOME_NUMBER = 1.0, 0.2, 0.1
SYSTEM = "Solve the problem step by step. Be brief."
ASK = "So what is the answer? Reply with the number only."
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


def agent(task: Mapping[str, Any], *, base_url: str, api_key: str) -> float:
    """Carry out one task against an OpenAI-compatible server and return its reward, see `score`.

    task  `{"question": str, "answer": int}`, see `examples.gsm8k.tasks`

    The client's own errors (`openai.APIError`) pass through.
    """
    client = _client().with_options(base_url=base_url, api_key=api_key)
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task["question"]}]
    content = ""
    for tokens_max in (THINKING_TOKENS_MAX, ANSWER_TOKENS_MAX):
        completion = client.chat.completions.create(model="policy", messages=messages, max_tokens=tokens_max)
        content = completion.choices[0].message.content or ""
        messages += [{"role": "assistant", "content": content}, {"role": "user", "content": ASK}]
    return score(content, task["answer"])


def score(content: str, answer: int) -> float:
    """1.0 where the last number of the reply is the answer; else 0.2 for nothing but a number, 0.1 for some number, 0.0."""
    numbers = re.findall(NUMBER, content)
    if not numbers:
        return 0.0
    if float(numbers[-1].replace(",", "")) == answer:
        return RIGHT
    return A_NUMBER_ALONE if re.fullmatch(rf"\s*\$?{NUMBER}\.?\s*", content) else SOME_NUMBER


@cache
def _client() -> OpenAI:
    # One connection pool for the process, which `with_options` keeps while it changes address and key.
    return OpenAI(base_url="http://127.0.0.1", api_key="none", timeout=TIMEOUT_S, max_retries=RETRIES_MAX)
