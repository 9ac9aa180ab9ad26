"""What RUN.toml names by import path: functions that make tasks, policies and teachers."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from lightning_bus import ConfigError


def load_tasks(source: str, seed: int, key: str) -> list[Any]:
    """Return the tasks that `source` names: MODULE:FUNCTION called with the seed, or a .jsonl file."""
    if source.endswith(".jsonl"):
        try:
            return [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as exc:
            raise ConfigError(f"{key} = {source!r}: {exc}. Give a file with one JSON value a line.") from exc
    tasks = list(import_named(source, key)(seed))
    if not tasks:
        raise ConfigError(f"{key} = {source!r} returned no tasks")
    return tasks


def import_named(source: str, key: str) -> Any:
    """Return what "module:name" names. Raises ConfigError saying what is missing."""
    module_name, colon, name = source.partition(":")
    if not colon:
        raise ConfigError(f"{key} = {source!r} is neither a path nor MODULE:NAME")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module_name), name)
    except ImportError as exc:
        raise ConfigError(
            f"{key} = {source!r}: cannot import {module_name}: {exc}. Start in the directory that holds it."
        ) from exc
    except AttributeError as exc:
        raise ConfigError(f"{key} = {source!r}: module {module_name} has no {name!r}") from exc
