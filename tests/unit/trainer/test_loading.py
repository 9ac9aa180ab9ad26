"""What RUN.toml names is found, or refused in words that say what to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_bus import ConfigError
from trainer.loading import import_named, load_tasks


def test_tasks_come_from_a_function_that_gets_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_tasks_a.py").write_text("def make(seed):\n    return (seed + n for n in range(2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_tasks("my_tasks_a:make", 5, "train.tasks") == [5, 6]


def test_tasks_come_from_a_file_with_one_value_a_line(tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text('{"question": "q"}\n\n7\n', encoding="utf-8")
    assert load_tasks(str(tmp_path / "tasks.jsonl"), 0, "train.tasks") == [{"question": "q"}, 7]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("tasks", ["train.tasks = 'tasks'", "MODULE:FUNCTION", ".jsonl"]),
        ("nowhere_at_all:make", ["cannot import nowhere_at_all", "Start in the directory"]),
        ("my_tasks_b:nothing", ["module my_tasks_b has no 'nothing'"]),
        ("my_tasks_b:empty", ["my_tasks_b:empty", "holds no tasks"]),
        ("my_tasks_b:broken", ["my_tasks_b:broken", "KeyError: 'column'"]),
        ("my_tasks_b:one", ["my_tasks_b:one", "int", "list of tasks"]),
        ("my_tasks_b:number", ["my_tasks_b:number", "cannot be called"]),
        ("my_tasks_b:strange", ["my_tasks_b:strange", "task 1", "object", "MessagePack"]),
        ("syntax_error_c:make", ["syntax_error_c", "SyntaxError"]),
        ("missing.jsonl", ["missing.jsonl", "No such file", "one JSON value a line"]),
        ("empty.jsonl", ["empty.jsonl", "no tasks"]),
        ("bad.jsonl", ["bad.jsonl", "line 2", "one JSON value a line"]),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_key_and_the_way_out(
    source: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_tasks_b.py").write_text(
        "def empty(seed):\n    return []\n"
        "def broken(seed):\n    return {}['column']\n"
        "def one(seed):\n    return 1\n"
        "number = 1\n"
        "def strange(seed):\n    return [1, object()]\n"
    )
    (tmp_path / "syntax_error_c.py").write_text("def make(:\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text("1\n{\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_tasks(source, 0, "train.tasks")
    for word in ("train.tasks", *words):
        assert word in str(caught.value)


def test_anything_may_be_imported_by_name() -> None:
    assert import_named("examples.calc.teacher:reply", "serve.scripted.teacher").__name__ == "reply"
