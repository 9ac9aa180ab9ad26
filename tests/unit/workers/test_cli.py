"""`lightning-bus worker`: flags, run file, and which of them wins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lightning_bus import AgentError, ConfigError, RunFile, config
from workers import cli
from workers.config import WorkerSection

RUN_TOML = """
[run]
name = "test"

[broker]
bind = "tcp://127.0.0.1:5001"

[gateway]
bind = "0.0.0.0:5002"

[worker]
agent = "the_users_agent:agent"
concurrency = 4
"""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[WorkerSection, dict[str, str]]]:
    """What `serve_worker` was called with."""
    calls: list[tuple[WorkerSection, dict[str, str]]] = []

    async def serve_worker(agent: Any, section: WorkerSection, **addresses: str) -> None:
        keys.append(os.environ.get("LIGHTNING_BUS_KEY"))
        calls.append((section, addresses))

    def load_run(path: Path) -> RunFile:  # other packages' sections have required keys of their own
        return config.load(path, {**config.BUS_SECTIONS, "worker": WorkerSection})

    monkeypatch.setattr(cli, "serve_worker", serve_worker)
    monkeypatch.setattr(cli, "load_run", load_run)
    (tmp_path / "the_users_agent.py").write_text("def agent(task):\n    return 1.0\n", encoding="utf-8")
    (tmp_path / "run.toml").write_text(RUN_TOML, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return calls


keys: list[str | None] = []  # that the clients of workers would find, newest last


def call(*arguments: str) -> None:
    app = typer.Typer()
    app.callback()(lambda: None)
    cli.register(app)
    result = CliRunner().invoke(app, ["worker", *arguments])
    if result.exception is not None:
        raise result.exception


def test_flags_alone_are_enough(served: list[tuple[WorkerSection, dict[str, str]]]) -> None:
    call("the_users_agent:agent", "--concurrency", "2")
    [(section, addresses)] = served
    assert (section.agent, section.concurrency, section.processes) == ("the_users_agent:agent", 2, 1)
    assert addresses == {"bus_address": "tcp://127.0.0.1:4750", "gateway_url": "http://127.0.0.1:4751"}


def test_the_run_file_is_the_default_and_flags_win(served: list[tuple[WorkerSection, dict[str, str]]]) -> None:
    call("--run", "run.toml", "--bus", "tcp://10.0.0.1:1", "--concurrency", "8")
    [(section, addresses)] = served
    assert (section.agent, section.concurrency) == ("the_users_agent:agent", 8)
    assert addresses == {"bus_address": "tcp://10.0.0.1:1", "gateway_url": "http://127.0.0.1:5002"}


def test_a_key_comes_from_the_flag_or_the_environment(
    served: list[tuple[WorkerSection, dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_BUS_KEY", "environment.key")
    call("the_users_agent:agent")
    call("the_users_agent:agent", "--key", "flag.key")
    assert [Path(str(key)).name for key in keys[-2:]] == ["environment.key", "flag.key"]


def test_a_wrong_agent_is_told_before_anything_starts(served: list[tuple[WorkerSection, dict[str, str]]]) -> None:
    with pytest.raises(ConfigError, match="no agent is named"):
        call()
    with pytest.raises(AgentError, match="has no other"):
        call("the_users_agent:other")
    assert served == []
