"""What RUN.toml names by import path: functions that make tasks, policies and teachers."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from lightning_bus import ConfigError


def load_tasks(source: str, seed: int, key: str) -> list[Any]:
    """Return the tasks that `source` names.

    MODULE:FUNCTION is called with the run's seed, "MODULE:FUNCTION WORD" with the word instead (a path, for instance),
    and a .jsonl file holds one task a line.

    Raises ConfigError when they cannot be had, there are none, or one is nothing that the bus can carry.
    """
    function, _, word = source.partition(" ")
    if source.endswith(".jsonl") and not word:
        tasks = _read_jsonl(Path(source), key)
    else:
        tasks = _make_tasks(function, word or seed, key)
    if not tasks:
        raise ConfigError(f"{key} = {source!r} holds no tasks. One is a question to an agent; training needs some.")
    for index, task in enumerate(tasks):
        try:
            msgspec.msgpack.encode(task)
        except (TypeError, ValueError, OverflowError) as exc:
            raise ConfigError(
                f"{key} = {source!r}: task {index}, {task!r:.80}, cannot be sent as MessagePack: {exc}. "
                "Use dicts, lists, text, numbers, bytes, None."
            ) from exc
    return tasks


def json_lines(tasks: Sequence[Any], name: str) -> str:
    """Return tasks as the text of a .jsonl file. Raises ConfigError for one that JSON cannot say."""
    lines: list[str] = []
    for number, task in enumerate(tasks):
        try:
            lines.append(json.dumps(task))
        except (TypeError, ValueError) as exc:
            raise ConfigError(
                f"{name}[{number}], {task!r:.80}, is nothing that JSON can say ({exc}): use dicts, lists, text, numbers"
            ) from exc
    return "\n".join(lines) + "\n"


def import_named(source: str, key: str) -> Any:
    """Return what "module:name" names. Raises ConfigError saying what is missing."""
    module_name, colon, name = source.partition(":")
    if not colon:
        raise ConfigError(f"{key} = {source!r} is neither MODULE:FUNCTION nor, for tasks, a .jsonl file")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module_name), name)
    except ImportError as exc:
        raise ConfigError(
            f"{key} = {source!r}: cannot import {module_name}: {exc}. Start in the directory that holds it."
        ) from exc
    except SyntaxError as exc:
        raise ConfigError(f"{key} = {source!r}: importing {module_name} raised SyntaxError: {exc}") from exc
    except AttributeError as exc:
        raise ConfigError(f"{key} = {source!r}: module {module_name} has no {name!r}") from exc


def _read_jsonl(path: Path, key: str) -> list[Any]:
    way_out = "Give a file with one JSON value a line."
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold what else ends a line
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{key} = {str(path)!r}: {exc}. {way_out}") from exc
    tasks: list[Any] = []
    for number, line in enumerate(lines, start=1):
        try:
            tasks += [json.loads(line)] if line.strip() else []
        except ValueError as exc:
            raise ConfigError(f"{key} = {str(path)!r}, line {number}: {exc}. {way_out}") from exc
    return tasks


def _make_tasks(source: str, argument: str | int, key: str) -> list[Any]:
    make = import_named(source, key)
    if not callable(make):
        raise ConfigError(f"{key} = {source!r} is of type {type(make).__name__}, which cannot be called.")
    # The function is the user's: whatever it raises is for the user to read, and no restart will mend it.
    try:
        made: Any = make(argument)
        return list(made)
    except Exception as exc:
        raise ConfigError(
            f"{key}: {source}({argument!r}) raised {type(exc).__name__}: {exc}. It must return a list of tasks."
        ) from exc
