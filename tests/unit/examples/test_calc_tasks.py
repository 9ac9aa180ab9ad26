"""What the calculator's tasks promise: repeatable, solvable by one operation, and held out for real."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from examples.calc import tasks
from examples.calc.agent import calculate


def test_the_same_seed_gives_the_same_tasks_and_another_seed_gives_others() -> None:
    assert tasks.train(3, 50) == tasks.train(3, 50)
    assert tasks.train(3, 50) != tasks.train(4, 50)
    assert tasks.held_out(3, 50) == tasks.held_out(3, 50)


def test_no_held_out_numbers_are_ever_trained_on() -> None:
    trained = {_kind_and_numbers(task) for seed in range(5) for task in tasks.train(seed, 2000)}
    held_out = {_kind_and_numbers(task) for seed in range(5) for task in tasks.held_out(seed, 500)}
    assert trained.isdisjoint(held_out)


def test_every_number_has_at_most_two_digits_and_one_operation_gives_the_answer() -> None:
    for task in tasks.train(0, 1000) + tasks.held_out(0, 500):
        a, b = re.findall(r"\d+", task["question"])
        results = {calculate(f"{a}{operator}{b}") for operator in "+-*/"}
        assert str(task["answer"]) in results
        assert all(0 <= number <= tasks.NUMBER_MAX for number in (int(a), int(b), task["answer"]))


def test_held_out_tasks_cover_every_story_equally() -> None:
    count = {story: 0 for stories in tasks.STORIES.values() for story in stories}
    for task in tasks.held_out(1, 8 * len(count)):
        count[_story(task)] += 1
    assert set(count.values()) == {8}


def test_gsm8k_lines_are_read_with_commas_signs_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "sample.jsonl"
    rows = [
        {"question": "A farm sells 3 cows for $400 each.", "answer": "3*400 = <<3*400=1200>>1200\n#### 1,200"},
        {"question": "How cold is it?", "answer": "#### -7 "},
    ]
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    assert tasks.read_jsonl(path) == [
        {"question": "A farm sells 3 cows for $400 each.", "answer": 1200},
        {"question": "How cold is it?", "answer": -7},
    ]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"question": "x"}', '{"question": "x", "answer": "5"}', '{"question": "x", "answer": "#### 1.5"}'],
)
def test_a_line_that_is_no_task_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "x", "answer": "#### 5"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: expected"):
        tasks.read_jsonl(path)


def _story(task: tasks.Task) -> str:
    for stories in tasks.STORIES.values():
        for story in stories:
            pattern = re.sub(r"\\{\w+\\}", r"\\w+", re.escape(story))
            if re.fullmatch(pattern, task["question"]):
                return story
    raise AssertionError(f"no story tells {task['question']!r}")


def _kind_and_numbers(task: tasks.Task) -> tuple[str, ...]:
    return (_story(task), *re.findall(r"\d+", task["question"]))
