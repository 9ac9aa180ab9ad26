"""The agent against a real HTTP server, and the scripted teacher in the model's place."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest

from examples.calc import tasks, teacher
from examples.calc.agent import CALCULATOR, agent, calculate

Model = Callable[[dict[str, Any]], dict[str, Any]]  # request body → assistant message
TASK = {"question": "Ada has 12 eggs and buys 30 more. How many eggs in total?", "answer": 42}


def test_a_right_answer_earns_one_and_a_wrong_one_nothing() -> None:
    with server(scripted) as url:
        assert agent(TASK, base_url=url, api_key="k") == 1.0
        assert agent({**TASK, "answer": 41}, base_url=url, api_key="k") == 0.0


def test_the_conversation_carries_the_call_and_its_result() -> None:
    requests: list[dict[str, Any]] = []

    def model(request: dict[str, Any]) -> dict[str, Any]:
        requests.append(request)
        return scripted(request)

    with server(model) as url:
        agent(TASK, base_url=url, api_key="k")
    first, second = requests
    assert first["messages"] == [{"role": "user", "content": TASK["question"]}]
    assert first["tools"] == second["tools"] == [CALCULATOR]
    assert second["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"expression": "12+30"}'
    assert second["messages"][2]["role"] == "tool"
    assert second["messages"][2]["content"] == "42"


@pytest.mark.parametrize(
    "arguments", ["{", "[]", "{}", '{"expression": 7}', '{"expression": "7/0"}', '{"expression": "open(1)"}']
)
def test_a_malformed_tool_call_earns_nothing_and_does_not_raise(arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "calculator", "arguments": arguments}}
    with server(lambda _: {"role": "assistant", "content": None, "tool_calls": [call]}) as url:
        assert agent(TASK, base_url=url, api_key="k") == 0.0


@pytest.mark.parametrize("content", ["", "no idea", "Answer: 4 2", "-42", "42.5"])
def test_a_reply_without_the_answer_earns_nothing(content: str) -> None:
    with server(lambda _: {"role": "assistant", "content": content}) as url:
        assert agent(TASK, base_url=url, api_key="k") == 0.0


@pytest.mark.parametrize("content", ["42", "Answer: 42", "12 + 30 is 42.", "It is 42.00"])
def test_the_last_number_of_a_reply_is_the_answer(content: str) -> None:
    with server(lambda _: {"role": "assistant", "content": content}) as url:
        assert agent(TASK, base_url=url, api_key="k") == 1.0


def test_a_model_that_never_stops_calling_tools_earns_nothing() -> None:
    calls: list[int] = []

    def model(request: dict[str, Any]) -> dict[str, Any]:
        calls.append(len(request["messages"]))
        return scripted({**request, "messages": request["messages"][:1]})

    with server(model) as url:
        assert agent(TASK, base_url=url, api_key="k") == 0.0
    assert calls == [1, 3, 5]


def test_a_server_that_refuses_is_an_error_and_not_a_score() -> None:
    def model(request: dict[str, Any]) -> dict[str, Any]:
        raise PermissionError

    with server(model) as url, pytest.raises(openai.PermissionDeniedError):
        agent(TASK, base_url=url, api_key="k")


def test_the_calculator_knows_arithmetic_and_nothing_else() -> None:
    assert calculate("(1 + 2) * -3") == "-9"
    assert calculate("7/2") == "3.50"
    assert calculate(" 84 / 2 ") == "42"
    for bad in ("", "1+", "2**9", "1//2", "True", "a", "f(1)", "'a'*9", "1;2", "9" * 500, "(" * 150, "1e999", "\0"):
        with pytest.raises(ValueError, match="expected|evaluate|understood"):
            calculate(bad)


def test_the_teacher_is_right_about_half_of_the_time_and_never_changes_its_mind() -> None:
    problems = tasks.train(0, 1200)
    expressions = [_asked(problem["question"]) for problem in problems]
    assert expressions == [_asked(problem["question"]) for problem in problems]
    right = [calculate(e) == str(p["answer"]) for e, p in zip(expressions, problems, strict=True)]
    assert 0.45 < sum(right) / len(right) < 0.65


def test_the_teacher_answers_any_question_at_all() -> None:
    assert teacher.reply([{"role": "user", "content": "How are you?"}])["content"] == ""
    assert teacher.reply([{"role": "user", "content": "7 in total"}])["content"] == "7"


def scripted(request: dict[str, Any]) -> dict[str, Any]:
    return teacher.reply(request["messages"], request.get("tools"))


def _asked(question: str) -> str:
    reply = teacher.reply([{"role": "user", "content": question}], [CALCULATOR])
    return json.loads(reply["tool_calls"][0]["function"]["arguments"])["expression"]


@contextmanager
def server(model: Model) -> Iterator[str]:
    """An OpenAI-compatible server on a free port of this machine; yields its base URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            try:
                message, status = model(request), 200
            except PermissionError:
                message, status = {}, 403
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "policy", "choices": [choice]}
            body = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            # The agent's connection pool outlives this server: a kept connection would leak into the next test.
            self.send_header("connection", "close")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}/v1"
        finally:
            http.shutdown()
            thread.join()
