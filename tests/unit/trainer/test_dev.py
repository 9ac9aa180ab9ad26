"""dev(): the whole ring on a few tasks in this process; and what the face knows of an agent before it starts anything."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.calc.agent import _client
from examples.calc.agent import agent as calculator
from lightning_bus import AgentError, ConfigError
from trainer.beside import run_to_end
from trainer.dev import byte_tokenizer, calls_first_tool
from trainer.face import Trainer, name_of

pytestmark = pytest.mark.anyio

TASK = {"question": "Ada has 3 pens and buys 4 more. How many?", "answer": 7}


def ask(base_url: str, api_key: str, *messages: dict[str, Any]) -> dict[str, Any]:
    body = {"model": "anything", "messages": list(messages)}
    headers = {"Authorization": f"Bearer {api_key}"}
    answer = httpx.post(f"{base_url}/chat/completions", json=body, headers=headers, trust_env=False, timeout=90)
    return answer.raise_for_status().json()["choices"][0]["message"]


def buggy(task: Any, *, base_url: str, api_key: str) -> float:
    said = ask(base_url, api_key, {"role": "user", "content": "half of what?"})
    return float(len(said["content"])) / task["nothing"]


async def told_by_tool(task: Any, base_url: str, api_key: str) -> float:
    return float(len(task))


def told(*args: Any, **kwargs: Any) -> tuple[Any, str]:
    """dev() in a thread, for a loop runs here, and what it said."""
    said: list[str] = []
    report = Trainer().dev(*args, progress=said.append, limit_s=90.0, **kwargs)
    return report, "\n".join(said)


async def test_a_buggy_agents_traceback_is_shown_and_nothing_is_raised() -> None:
    report, said = told(buggy, [{"nothing": 0}])
    assert not report.ok
    (one,) = report.rollouts
    assert one.reward is None and len(one.calls) == 1
    assert "half of what?" in said and "Scripted answer to: half of what?" in said
    assert said.rstrip().endswith("ZeroDivisionError: float division by zero")
    assert 'return float(len(said["content"])) / task["nothing"]' in said


async def test_a_sound_agent_is_shown_with_its_calls_rewards_and_rows() -> None:
    def model(messages: Any, tools: Any) -> Any:
        if messages[-1]["role"] == "tool":
            return f"Answer: {messages[-1]['content']}"
        call = {"name": "calculator", "arguments": '{"expression": "3+4"}'}
        return {"content": None, "tool_calls": [{"id": "c", "type": "function", "function": call}]}

    report, said = told(calculator, [TASK], model=model, group_size=2)
    assert report.ok and report.rewards == [1.0, 1.0]
    assert [len(one.calls) for one in report.rollouts] == [2, 2]
    assert [one.rows for one in report.rollouts] == [1, 1], "its second prompt continues the first"
    assert "every rollout earned 1.0" in said
    _client().close()  # the example keeps one for its process


async def test_what_keeps_an_agent_from_learning_is_told() -> None:
    report, said = told(told_by_tool, ["ab"])
    assert not report.ok and report.rewards == [2.0]
    assert "1 of 1 rollouts made no model call" in said


@pytest.mark.parametrize(
    ("agent", "tasks", "said"),
    [
        (lambda nobody_has_this: 1.0, ["a"], "wants a parameter 'nobody_has_this'"),
        ("no_such_module:agent", ["a"], "there is no module no_such_module"),
        (told_by_tool, [], "there are no tasks"),
    ],
)
async def test_what_cannot_run_is_a_report_as_well(agent: Any, tasks: list[Any], said: str) -> None:
    report, text = told(agent, tasks)
    assert not report.ok and said in text


def test_the_scripted_model_calls_a_tool_once_with_arguments_of_its_types() -> None:
    schema = {"properties": {"n": {"type": "integer"}, "word": {}}}
    tools = [{"type": "function", "function": {"name": "count", "parameters": schema}}]
    call = calls_first_tool([{"role": "user", "content": "?"}], tools)["tool_calls"][0]["function"]
    assert call == {"name": "count", "arguments": '{"n": 1, "word": "example"}'}
    assert "tool_calls" not in calls_first_tool([{"role": "tool", "content": "3"}], tools)


def test_any_text_goes_through_the_bytes() -> None:
    tokenizer = byte_tokenizer()
    for text in ("¿qué? 木 🤖\n\t", "<|im_start|>user\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_only_what_another_process_finds_under_its_name_runs_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def inner() -> None: ...

    assert name_of(calculator) == "examples.calc.agent:agent"
    assert (name_of(inner), name_of(lambda: None)) == ("", "")
    monkeypatch.setattr(calculator, "__module__", "__main__")
    assert name_of(calculator) == ""
    monkeypatch.setattr(calculator, "__module__", __name__)
    monkeypatch.setattr(sys.modules[__name__], "agent", ask, raising=False)
    assert name_of(calculator) == "", "another function has that name"


@pytest.mark.parametrize(
    ("agent", "tasks", "settings", "error", "said"),
    [
        (calculator, [], {}, ConfigError, "train_tasks"),
        (None, [TASK], {}, ConfigError, "no agent is given"),
        (calculator, [{1, 2}], {}, ConfigError, r"train_tasks\[0\].*JSON"),
        (calculator, [TASK], {"train.rl.los": "grpo"}, ConfigError, "unknown key train.rl.los"),
        ("examples.calc.agent:agnet", [TASK], {}, AgentError, "has no agnet"),
    ],
)
def test_fit_refuses_what_cannot_work_before_it_leaves_anything_behind(
    tmp_path: Path, agent: Any, tasks: list[Any], settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    trainer = Trainer(policy="examples.calc.policy:build", directory=tmp_path, settings=settings)
    with pytest.raises(error, match=said):
        trainer.fit(agent, tasks, [TASK], progress=None)
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_runs_the_agent_where_it_is_found_now(tmp_path: Path) -> None:
    trainer = Trainer(policy="examples.calc.policy:build", directory=tmp_path, n_workers=3)
    workers: list[Any] = []
    for agent, resume in ((lambda task: 1.0, False), (calculator, True), (None, True)):
        file = trainer._prepared(agent, [TASK], [TASK], here=agent is not None, resume=resume)
        workers.append((file.sections["worker"].agent, file.sections["worker"].processes))
    assert workers == [("", 0), ("examples.calc.agent:agent", 3), ("", 0)]


def test_the_first_error_comes_out_of_the_groups() -> None:
    async def main() -> None:
        raise ExceptionGroup("tasks", [ExceptionGroup("inner", [ConfigError("the reason")])])

    with pytest.raises(ConfigError, match="the reason"):
        run_to_end(main)
