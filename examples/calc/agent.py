"""The calculator agent: a plain function over the official `openai` client, as it would be written anywhere.

It knows nothing of lightning-bus. It asks a model for help with a word problem, carries out the calculator calls
that the model makes and scores the final answer: 1.0 for the right number, else 0.0. What always holds: whatever
the *model* says, the agent returns a score; only a failing *server* raises, because a rollout that could not be
carried out must not pass for one that earned nothing.
"""

import ast
import json
import operator
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from openai import OpenAI

TURNS_MAX = 3
TOKENS_MAX = 48  # a tool call takes about 15 tokens; this only bounds the babble of an untrained model
TIMEOUT_S = 60.0
RETRIES_MAX = 4  # a broker or gateway that is full says so, and the client waits and asks again

CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}


def agent(task: Mapping[str, Any], *, base_url: str, api_key: str) -> float:
    """Carry out one task against an OpenAI-compatible server and return its reward, 1.0 or 0.0.

    task  `{"question": str, "answer": int}`, see `examples.calc.tasks`

    A malformed tool call, an expression that cannot be evaluated, or no answer within TURNS_MAX model calls earns
    0.0. The client's own errors (`openai.APIError`) pass through.
    """
    client = _client().with_options(base_url=base_url, api_key=api_key)
    tools: list[Any] = [CALCULATOR]
    messages: list[Any] = [{"role": "user", "content": task["question"]}]
    for _ in range(TURNS_MAX):
        completion = client.chat.completions.create(
            model="policy", messages=messages, tools=tools, max_tokens=TOKENS_MAX
        )
        message = completion.choices[0].message
        if not message.tool_calls:
            return float(_answers(message.content or "", task["answer"]))
        messages.append(message.to_dict())
        for call in message.tool_calls:
            if call.type != "function":
                return 0.0
            try:
                result = calculate(json.loads(call.function.arguments)["expression"])
            except (ValueError, TypeError, KeyError, AttributeError):
                return 0.0
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return 0.0


def calculate(expression: str) -> str:
    """Evaluate + - * / and parentheses over decimal numbers; "7", or "3.50" where the result is not whole.

    Raises ValueError for anything else, a division by zero included.
    """
    if not isinstance(expression, str) or len(expression) > EXPRESSION_CHARS_MAX:
        raise ValueError(f"expected an expression of at most {EXPRESSION_CHARS_MAX} characters, got {expression!r:.80}")
    try:
        value = _evaluate(ast.parse(expression.strip(), mode="eval").body)
        return str(int(value)) if value == int(value) else f"{value:.2f}"
    except (SyntaxError, ArithmeticError) as exc:
        raise ValueError(f"cannot evaluate {expression!r}: {exc}") from exc


EXPRESSION_CHARS_MAX = 200
OPERATIONS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _evaluate(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            return OPERATIONS[type(op)](_evaluate(left), _evaluate(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand)
        case _:
            raise ValueError(f"only numbers and + - * / are understood, got {ast.unparse(node)!r:.80}")


def _answers(content: str, answer: int) -> bool:
    """Whether the last number of the reply is the answer."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", content)
    return bool(numbers) and float(numbers[-1].replace(",", "")) == answer


@cache
def _client() -> OpenAI:
    # One connection pool for the process, which `with_options` keeps while it changes address and key: building
    # a client with its TLS context anew for every rollout would cost more than the rollout's model calls.
    return OpenAI(base_url="http://127.0.0.1", api_key="none", timeout=TIMEOUT_S, max_retries=RETRIES_MAX)
