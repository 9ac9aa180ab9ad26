"""A whole run for tests: the real command line, real processes, a policy that learns something in seconds.

The agent makes one call and earns a reward that any policy earns now and then, so that every group of rollouts has
something to teach and each step publishes a version. What always holds: ports are free ones, files lie in the test's
own directory, and when a test is over, however it ended, no process of its ring is left.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import tomli_w

from lightning_bus.log.reader import LogReader
from lightning_bus.messages import Rollout

CLI = (sys.executable, "-m", "lightning_bus.cli")
LIMIT_S = 100.0  # for one thing to happen on a busy machine
POLL_S = 0.005

AGENT = """
from functools import cache

from openai import OpenAI


def agent(task, *, base_url, api_key):
    completion = client().with_options(base_url=base_url, api_key=api_key).chat.completions.create(
        model="policy", messages=[{"role": "user", "content": task["question"]}], max_tokens=4
    )
    return float(len(completion.choices[0].message.content or "") % 2)


@cache
def client():
    return OpenAI(base_url="http://127.0.0.1", api_key="none", timeout=30.0, max_retries=8)
"""


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def adjacent_ports(count: int) -> int:
    """Return the first of so many neighbouring ports that nobody listens on now."""
    for first in range(20_000, 30_000, count):
        with ExitStack() as sockets:
            try:
                for number in range(count):
                    sockets.enter_context(socket.create_server(("127.0.0.1", first + number)))
            except OSError:
                continue
            return first
    raise AssertionError(f"no {count} neighbouring ports are free")


def cli(*argv: str, cwd: Path, limit_s: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run([*CLI, *argv], cwd=cwd, capture_output=True, text=True, timeout=limit_s, check=False)


def wait_until(condition: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    """Return the first true value of `condition`, which other processes make true."""
    until_s = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < until_s, f"waited {limit_s:g} s in vain for {what}"
        time.sleep(POLL_S)
    return value


class Ring:
    """One run in `directory`: its RUN.toml, its agent, and what can be seen of it from outside."""

    def __init__(self, directory: Path, name: str = "mini") -> None:
        self.cwd = directory
        self.run_dir = directory / "runs" / name
        self.output = directory / "up.txt"
        self._up: subprocess.Popen[bytes] | None = None
        bus, gateway, serve = free_ports(3)
        self.bus = f"tcp://127.0.0.1:{bus}"
        self.table: dict[str, Any] = {
            "run": {"name": name},
            "policy": {"model": "examples.calc.policy:build"},
            "broker": {"bind": self.bus, "lease_s": 2.0},
            "gateway": {"bind": f"127.0.0.1:{gateway}", "upstreams": [f"http://127.0.0.1:{serve}"]},
            "serve": {"bind": f"127.0.0.1:{serve}", "scripted": {"teacher": "examples.calc.teacher:reply"}},
            "worker": {"agent": "journey_agent:agent", "processes": 1, "concurrency": 8, "grace_s": 3.0},
            "train": {
                "tasks": "examples.calc.tasks:train",
                "held_out": "examples.calc.tasks:held_out",
                "sft": {"rollouts": 16, "epochs": 1, "batch_rollouts": 8, "lr": 1e-3},
                "rl": {"steps_max": 3, "group_size": 4, "groups_per_step": 2, "refill_groups_max": 4, "lr": 1e-4},
                "eval": {"tasks": 8},
            },
        }
        self.agent(AGENT)

    def on_vllm(self, replicas: int = 1) -> None:
        """Have vLLM serve the policy, in so many replicas, and beside them what is scripted."""
        first = adjacent_ports(replicas + 1)
        self.table["gateway"]["upstreams"] = [f"http://127.0.0.1:{first + number}" for number in range(replicas + 1)]
        self.table["serve"] |= {"engine": "vllm", "bind": f"127.0.0.1:{first}", "replicas": replicas}
        if not self.table["serve"].get("scripted"):
            self.table["gateway"]["upstreams"].pop()

    def agent(self, source: str) -> None:
        """Make this the agent's source."""
        (self.cwd / "journey_agent.py").write_text(source, encoding="utf-8")

    def write(self) -> Path:
        """Write RUN.toml and return its path."""
        path = self.cwd / "run.toml"
        path.write_text(tomli_w.dumps(self.table), encoding="utf-8")
        return path

    def start(self, *argv: str) -> None:
        """Start `up` with these arguments, by default this ring's RUN.toml."""
        argv = argv or (str(self.write()),)
        with self.output.open("ab") as output:
            self._up = subprocess.Popen(
                [*CLI, "up", *argv], cwd=self.cwd, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def wait(self, limit_s: float = LIMIT_S) -> int:
        """Return the exit code of `up`."""
        assert self._up is not None
        return self._up.wait(limit_s)

    def signal(self, number: signal.Signals) -> None:
        """Send `up` a signal."""
        assert self._up is not None
        self._up.send_signal(number)

    def said(self) -> str:
        """Return what `up` printed so far."""
        return self.output.read_text(encoding="utf-8")

    def pids(self, stage: str = "") -> set[int]:
        """Return the daemons of this run that are alive, or those of one stage."""
        return {pid for pid, name in self._daemons() if stage in ("", name)}

    def kill(self, stage: str) -> set[int]:
        """SIGKILL the daemons of a stage, and return once none of them is there any more."""
        killed = wait_until(lambda: self.pids(stage), f"a {stage} to kill")
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.pids(stage) & killed, f"the end of {stage}")
        return killed

    def replica(self, number: int, word: str = "") -> set[int]:
        """Return the processes of a vLLM replica that are alive, or those with this word in their command line."""
        port = self.table["serve"]["bind"].rpartition(":")[2]
        mine = self._processes()
        # Only guard and server name their port, but they and all that descends from them are one session.
        sessions = {_session(pid) for pid, argv in mine if str(int(port) + number) in argv}
        return {pid for pid, argv in mine if _session(pid) in sessions - {0} and word in " ".join(argv)}

    def metrics(self, phase: str = "") -> list[dict[str, Any]]:
        """Return the whole lines of metrics.jsonl, or those of one phase."""
        try:
            text = (self.run_dir / "metrics.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [line for line in lines if phase in ("", line["phase"])]

    def wait_step(self, step: int) -> None:
        """Return once metrics.jsonl tells of this step of reinforcement."""

        def there() -> bool:
            assert self._up is not None
            assert self._up.poll() is None, f"up ended before step {step}:\n{self.said()}"
            return any(line["step"] >= step for line in self.metrics("rl"))

        wait_until(there, f"step {step}:\n{self.said()}")

    def rollouts(self) -> list[Rollout]:
        """Return how each rollout stands, from the log on disk."""
        with LogReader(self.run_dir / "log") as reader:
            return list(reader.rollouts())

    def assert_complete(self, steps: int) -> dict[str, Any]:
        """Check what every complete run has, and return its summary."""
        verified = cli("verify", str(self.run_dir), "--json", cwd=self.cwd)
        assert verified.returncode == 0, verified.stdout + verified.stderr
        assert [line["step"] for line in self.metrics("rl")] == list(range(1, steps + 1))
        assert not self._processes(), "something outlived its run"
        summary: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text(encoding="utf-8"))
        stands = [rollout.status.value for rollout in self.rollouts()]
        assert summary["rollouts_submitted"] == len(stands)
        assert summary["rollouts_succeeded"] == stands.count("succeeded")
        assert summary["rollouts_failed"] == stands.count("failed")
        return summary

    def __enter__(self) -> Ring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._up is not None and self._up.poll() is None:
            self._up.kill()
            self._up.wait()
        for pid, _ in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for left in Path("/dev/shm").glob(
            f"lightning-bus-{self.run_dir.name}-{zlib.crc32(str(self.run_dir).encode()):08x}-*"
        ):
            left.unlink()  # a run that is not complete keeps its weights for its next life
        if kind is not None and self.output.exists():
            print(self.said())
            for log in sorted((self.run_dir / "logs").glob("*.log")):
                print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-20:], sep="\n")

    def _daemons(self) -> Iterator[tuple[int, str]]:
        """Yield (pid, stage) of every daemon that was started for this run, from the system's own list."""
        run_toml = os.path.join("runs", self.run_dir.name, "run.toml")
        for pid, argv in self._processes():
            if "lightning_bus.cli" in argv and any(word.endswith(run_toml) for word in argv) and "up" not in argv:
                yield pid, argv[argv.index("lightning_bus.cli") + 1]

    def _processes(self) -> list[tuple[int, list[str]]]:
        """Return (pid, argv) of everything that was started here, and of all that descends from it."""
        found: list[tuple[int, list[str]]] = []
        for path in Path("/proc").iterdir():
            if not path.name.isdigit():
                continue
            try:
                argv = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if os.readlink(path / "cwd") == str(self.cwd):
                    found.append((int(path.name), argv))
            except OSError:
                continue  # it ended meanwhile
        return found


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def stop_trainer_in_a_push(ring: Ring) -> int:
    """Stop the trainer (SIGSTOP) while the engine stands still for its weights; return its pid."""
    engine = ring.table["gateway"]["upstreams"][0]
    with httpx.Client(base_url=engine, trust_env=False) as client:  # one connection, because the moments are short

        def paused() -> bool:
            return bool(client.get("/is_paused").raise_for_status().json()["is_paused"])

        return stop_trainer_when(ring, paused, paused)


def stop_trainer_when(ring: Ring, begins: Callable[[], bool], holds: Callable[[], bool]) -> int:
    """Stop the trainer (SIGSTOP) at a moment that `begins` announces and that still `holds` once it stands; return its pid."""
    (trainer,) = ring.pids("train")
    stat = Path(f"/proc/{trainer}/stat")
    until_s = time.monotonic() + LIMIT_S
    while time.monotonic() < until_s:
        if begins():
            os.kill(trainer, signal.SIGSTOP)
            wait_until(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "T", "the trainer to stand")
            if holds():
                return trainer
            os.kill(trainer, signal.SIGCONT)
    raise AssertionError(f"the moment did not come within {LIMIT_S:g} s")


@contextmanager
def running(argv: Sequence[str], cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Keep one command running while the context lasts."""
    process = subprocess.Popen([*CLI, *argv], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
