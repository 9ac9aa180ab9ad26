"""What is wrong ends in one clear message, a non-zero exit, and nothing lost: tried on the real command line.

A message is clear when it names the value and the way out, in words that a newcomer understands, without a traceback.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_bus.log.reader import LogReader
from lightning_bus.records import Kind
from tests.journeys.ring import CLI, LIMIT_S, Ring, cli, wait_until

pytestmark = pytest.mark.timeout(1800)

MINIMAL = """
[run]
name = "mini"

[policy]
model = "examples.calc.policy:build"

[train]
tasks = "examples.calc.tasks:train"
held_out = "examples.calc.tasks:held_out"
"""
RAISES = "def agent(task):\n    raise RuntimeError('the tool is out of order')\n"
TEXT = "def agent(task):\n    return 'forty-two'\n"
VERSION_99 = (
    "import sys; import lightning_bus.wire as wire; wire.PROTOCOL_VERSION = 99; "
    "from lightning_bus.cli import main; main(sys.argv[1:])"
)


def assert_clear(shown: str, *words: str) -> None:
    """Check that one message was told, that it has these words, and that nobody has to read a traceback."""
    assert "Traceback" not in shown, shown
    assert shown.count("lightning-bus: ") == 1, shown
    flat = " ".join(shown.split())
    for word in words:
        assert word in flat, shown


# -- before anything starts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[run\nname = "mini"', ["is not TOML", "line 1", "see examples/calc/run.toml"]),
        (MINIMAL + "[brokr]\n", ["unknown section [brokr]", "did you mean broker?"]),
        (MINIMAL + "[train.rl]\nstep_max = 5\n", ["unknown key train.rl.step_max", "did you mean steps_max?"]),
        (MINIMAL + "[worker]\nconcurrency = 'many'\n", ["worker.concurrency", "expected `int`, got `str`", "'many'"]),
        (MINIMAL + "[train.rl]\nloss = 'ppo'\n", ["train.rl.loss", "'ppo'", "ppo_clip, cispo, reinforce"]),
        (MINIMAL.replace('name = "mini"', ""), ["run.name is required and missing"]),
        (MINIMAL.replace('"mini"', '"a/b"'), ["run.name 'a/b'", "letters, digits"]),
        (MINIMAL + "[broker]\nbind = 'localhost'\n", ["broker.bind 'localhost' has no port", "127.0.0.1:"]),
    ],
)
def test_a_run_file_that_cannot_work_is_refused_with_the_keys_path(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    ended = cli("up", "run.toml", cwd=tmp_path)
    assert ended.returncode == 2
    assert_clear(ended.stderr, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.toml"]


def test_a_missing_run_file_is_named(tmp_path: Path) -> None:
    ended = cli("up", "nowhere/run.toml", cwd=tmp_path)
    assert ended.returncode == 2
    assert_clear(ended.stderr, "nowhere/run.toml: no such file", "Copy examples/calc/run.toml")


@pytest.mark.parametrize("section", ["broker", "gateway", "serve"])
def test_a_port_in_use_is_told_before_anything_starts(ring: Ring, section: str) -> None:
    bind = str(ring.table[section]["bind"])
    with socket.create_server(("127.0.0.1", int(bind.rpartition(":")[2]))):
        ended = cli("up", str(ring.write()), cwd=ring.cwd)
    assert ended.returncode == 2
    assert_clear(ended.stderr, f"{section}.bind {bind}", "in use", f"change [{section}] bind")
    assert not ring.run_dir.exists()


def test_a_run_that_exists_is_not_touched(ring: Ring) -> None:
    ring.run_dir.mkdir(parents=True)
    (ring.run_dir / "run.toml").write_text("precious", encoding="utf-8")
    ended = cli("up", str(ring.write()), cwd=ring.cwd)
    assert ended.returncode == 2
    assert_clear(ended.stderr, "runs/mini already exists", "lightning-bus up runs/mini", "--name", "--force")
    assert [path.name for path in ring.run_dir.iterdir()] == ["run.toml"]
    assert (ring.run_dir / "run.toml").read_text(encoding="utf-8") == "precious"


def test_force_does_not_delete_what_is_no_run(ring: Ring) -> None:
    ring.run_dir.mkdir(parents=True)
    (ring.run_dir / "thesis.tex").write_text("precious", encoding="utf-8")
    ended = cli("up", str(ring.write()), "--force", cwd=ring.cwd)
    assert ended.returncode == 2
    assert_clear(ended.stderr, "runs/mini is not a run's directory", "--force will not delete it")
    assert (ring.run_dir / "thesis.tex").exists()


@pytest.mark.parametrize("command", ["status", "worker"])
def test_a_client_of_another_protocol_version_is_told_both_versions(ring: Ring, command: str) -> None:
    arguments = {"status": ["status"], "worker": ["worker", "journey_agent:agent"]}[command]
    ring.agent(TEXT)
    ring.write()
    broker = [*CLI, "broker", "--log", "log", "--bind", ring.bus]
    with subprocess.Popen(broker, cwd=ring.cwd, stdin=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: cli("status", "--bus", ring.bus, cwd=ring.cwd).returncode == 0, "the broker")
            ended = subprocess.run(
                [sys.executable, "-c", VERSION_99, *arguments, "--bus", ring.bus],
                cwd=ring.cwd, capture_output=True, text=True, timeout=LIMIT_S, check=False,
            )  # fmt: skip
            assert ended.returncode == 76, ended.stderr
            assert_clear(ended.stderr, "protocol version", "99", "version 1", "the same lightning-bus")
            assert process.poll() is None, "the broker must not mind"
        finally:
            process.terminate()


# -- an agent that cannot work ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("agent", "source", "words"),
    [
        ("nowhere:agent", "", ["agent nowhere:agent", "no module nowhere", "directory that holds it"]),
        ("journey_agent:agnt", TEXT, ["agent journey_agent:agnt", "has no agnt"]),
        ("journey_agent:agent", "import nonsense_library\n", ["needs nonsense_library, which is not installed"]),
        ("journey_agent:agent", "def agent(prompt):\n    return 1\n", ["wants a parameter 'prompt'", "task, base_url"]),
    ],
)
def test_an_agent_that_cannot_be_loaded_ends_the_run(ring: Ring, agent: str, source: str, words: list[str]) -> None:
    ring.table["worker"]["agent"] = agent
    ring.agent(source)
    ring.start()
    assert ring.wait() == 2
    assert_clear(ring.said(), *words)
    assert not ring.pids()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "attempts", "words", "record"),
    [
        (RAISES, 2, ["RuntimeError: the tool is out of order"], r'(?s)Traceback.*journey_agent.py", line 2.*the tool'),
        (TEXT, 1, ["returned 'forty-two' of type str", "a number"], "returned 'forty-two' of type str"),
    ],
)
def test_an_agent_that_never_succeeds_ends_the_run_and_its_errors_are_kept(
    ring: Ring, source: str, attempts: int, words: list[str], record: str
) -> None:
    ring.table["broker"]["max_attempts"] = 2
    ring.agent(source)
    ring.start()
    assert ring.wait() == 2, ring.said()
    assert_clear(ring.said(), "all 8 rollouts of phase eval failed", "lightning-bus spans eval-v0-0000 --run", *words)
    assert not ring.pids()
    assert {(rollout.status.value, rollout.attempt) for rollout in ring.rollouts()} == {("failed", attempts)}
    shown = cli("spans", "eval-v0-0000", "--run", str(ring.run_dir), cwd=ring.cwd)
    assert re.search(record, shown.stdout), shown.stdout
    verified = cli("verify", str(ring.run_dir), cwd=ring.cwd)
    assert verified.returncode == 0, verified.stdout


@pytest.mark.slow
def test_an_agent_that_raises_now_and_then_costs_only_those_rollouts(ring: Ring) -> None:
    ring.table["broker"]["max_attempts"] = 3
    source = (ring.cwd / "journey_agent.py").read_text(encoding="utf-8")
    broken = "def agent(task, *, base_url, api_key):\n    assert task['answer'] % 4, 'cannot count by fours'\n"
    ring.agent(source.replace("def agent(task, *, base_url, api_key):\n", broken))
    ring.start()
    assert ring.wait() == 0, ring.said()
    summary = ring.assert_complete(steps=3)
    assert summary["rollouts_failed"] > 0
    with LogReader(ring.run_dir / "log") as log:
        events = [(r.rollout_id, r.attempt, r.body) for r in log.records() if r.kind is Kind.ROLLOUT]
    stands = {one.submission.rollout_id: one for one in ring.rollouts()}
    failed = {rollout_id: one.attempt for rollout_id, one in stands.items() if one.status.value == "failed"}
    assert set(failed.values()) == {3}
    for rollout_id, attempt in failed.items():
        ends = [body for one, number, body in events if (one, number) == (rollout_id, attempt) and b"Traceback" in body]
        assert len(ends) == 1
        assert b"AssertionError: cannot count by fours" in ends[0]


@pytest.mark.slow
@pytest.mark.parametrize("key", ["train.tasks", "policy.model", "serve.scripted.teacher"])
def test_a_name_in_the_run_file_that_cannot_be_imported_ends_the_run(ring: Ring, key: str) -> None:
    *parents, last = key.split(".")
    table = ring.table
    for parent in parents:
        table = table[parent]
    table[last] = "examples.calc.nowhere:thing"
    ring.start()
    assert ring.wait() == 2, ring.said()
    assert_clear(ring.said(), f"{key} = 'examples.calc.nowhere:thing'", "No module named", "Start in the directory")
    assert not ring.pids()


# -- a disk that is full ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_log_that_reached_its_limit_ends_the_run_which_goes_on_with_a_higher_one(ring: Ring) -> None:
    ring.table["broker"]["map_bytes_max"] = 1 << 18
    ring.table["train"]["rl"]["steps_max"] = 10
    ring.start()
    assert ring.wait() == 74, ring.said()
    assert_clear(ring.said(), "runs/mini/log", "map_bytes_max", "lightning-bus up")
    assert not ring.pids()
    ring.start("runs/mini", "--set", f"broker.map_bytes_max={1 << 30}")
    assert ring.wait() == 0, ring.said()
    ring.assert_complete(steps=10)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_which_goes_on_when_there_is_space(ring: Ring) -> None:
    runs = ring.cwd / "runs"
    runs.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or os.geteuid() != 0
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=64m", "tmpfs", runs]).returncode
    ):
        pytest.skip("a small disk needs the right to mount one")
    try:
        ring.endless()
        ring.start()
        ring.wait_step(1)
        fill(runs / "filler")
        assert ring.wait() == 74, ring.said()
        assert_clear(ring.said(), "runs/mini", "MB", "Free space", "go on with: lightning-bus up runs/mini")
        assert not ring.pids()
        (runs / "filler").unlink()
        ring.start("runs/mini")
        ring.wait_steps(1)
        ring.end()
    finally:
        subprocess.run(["umount", "--lazy", runs], check=True)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass
