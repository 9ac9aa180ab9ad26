"""A whole run for tests: the real command line, real processes, a policy that learns something in seconds.

The agent makes one call, and in every group of rollouts some earn a reward and some do not, whatever the policy says,
so that each step has something to teach and publishes a version. A test that does something to a run in the middle of it
makes the run `endless`, and `end`s it when it has seen enough: a machine that stands still meanwhile is never too late.
What always holds: a port is this test's own until the tests are over, files lie in the test's own directory, and when a
test is over, however it ended, no process of its ring is left.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import tomli_w

from lightning_bus.log.reader import LogReader
from lightning_bus.messages import Rollout

CLI = (sys.executable, "-m", "lightning_bus.cli")
LIMIT_S = 600.0  # for one thing to happen: it takes half a minute at most on a machine that has nothing else to do
START_LIMIT_S = 1800.0  # for vLLM to start: a minute on two cores, ten when twenty other programs wanted them
POLL_S = 0.05  # little against what is waited for; looking more often would slow down what is looked at
ENDLESS = 100_000  # steps, which no test waits for
PORTS = range(10_000, 32_768)  # below those that the system gives to whoever asks for any

AGENT = """
from functools import cache
from pathlib import Path

from openai import OpenAI


def agent(task, *, base_url, api_key):
    client().with_options(base_url=base_url, api_key=api_key).chat.completions.create(
        model="policy", messages=[{"role": "user", "content": task["question"]}], max_tokens=4
    )
    if Path("enough").exists():
        return 1.0
    return float(int(base_url.partition("/attempt")[0][-1]) % 2)


@cache
def client():
    return OpenAI(base_url="http://127.0.0.1", api_key="none", timeout=100.0, max_retries=8)
"""

_claims: list[socket.socket] = []


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, nor any other test will ask for before these tests are over."""
    return [adjacent_ports(1) for _ in range(count)]


def adjacent_ports(count: int) -> int:
    """Return the first of so many neighbouring ports, all as those of `free_ports`.

    Whoever lets the system choose a port, listening or calling, gets one above PORTS, so that nobody takes ours by
    chance before it is bound, or while what listened on it is being restarted.
    """
    for _ in range(1000):
        first = PORTS.start + secrets.randbelow(len(PORTS) - count)
        with ExitStack() as sockets:
            claims: list[socket.socket] = []
            try:
                for port in range(first, first + count):
                    claims.append(_claim(port))
                    sockets.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                for claim in claims:
                    claim.close()
                continue
        _claims.extend(claims)
        return first
    raise AssertionError(f"no {count} neighbouring ports are free")


def _claim(port: int) -> socket.socket:
    """Make the port ours among all tests on this machine, for as long as this process lives, without binding it."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if sys.platform != "linux":
        return claim
    try:
        claim.bind(f"\0lightning-bus tests: port {port}")  # a name that goes with its process, and is no file
    except OSError:
        claim.close()
        raise
    return claim


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
            # A machine that stands still for a while loses no attempt. Who kills workers makes it shorter.
            "broker": {"bind": self.bus, "lease_s": 30.0},
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
        self.table["serve"]["start_limit_s"] = START_LIMIT_S
        if not self.table["serve"].get("scripted"):
            self.table["gateway"]["upstreams"].pop()

    def endless(self) -> None:
        """Have reinforcement go on until `end`, which an agent must understand as the one above does."""
        self.table["train"]["rl"] |= {"steps_max": ENDLESS, "stop_reward": 0.95, "stop_window": 2}

    def end(self, limit_s: float = LIMIT_S) -> dict[str, Any]:
        """Let an endless run come to its end, and return the summary of what must be complete then."""
        (self.cwd / "enough").touch()
        assert self.wait(limit_s) == 0, self.said()
        return self.assert_complete(steps=max(line["step"] for line in self.metrics("rl")))

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
        return self.output.read_text(encoding="utf-8", errors="replace")  # the last letter may be half written

    def pids(self, stage: str = "") -> set[int]:
        """Return the daemons of this run that are alive, or those of one stage."""
        return {pid for pid, name in self._daemons() if stage in ("", name)}

    def kill(self, stage: str) -> set[int]:
        """SIGKILL the daemons of a stage, and return once none of them is there any more."""
        killed = wait_until(lambda: self.pids(stage), f"a {stage} to kill")
        kill(killed)
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

    def wait_step(self, step: int, limit_s: float = LIMIT_S) -> None:
        """Return once metrics.jsonl tells of this step of reinforcement."""

        def there() -> bool:
            assert self._up is not None
            ended = self._up.poll() is not None  # looked at first: what it left behind may be that very step
            reached = any(line["step"] >= step for line in self.metrics("rl"))
            assert reached or not ended, f"up ended before step {step}:\n{self.said()}"
            return reached

        wait_until(there, f"step {step}", limit_s)

    def wait_steps(self, count: int, limit_s: float = LIMIT_S) -> None:
        """Return once so many more steps of reinforcement were made."""
        self.wait_step(max((line["step"] for line in self.metrics("rl")), default=0) + count, limit_s)

    def rollouts(self) -> list[Rollout]:
        """Return how each rollout stands, from the log on disk."""
        with LogReader(self.run_dir / "log") as reader:
            return list(reader.rollouts())

    def assert_complete(self, steps: int) -> dict[str, Any]:
        """Check what every complete run has, and return its summary."""
        verified = cli("verify", str(self.run_dir), "--json", cwd=self.cwd)
        assert verified.returncode == 0, verified.stdout + verified.stderr
        assert [line["step"] for line in self.metrics("rl")] == list(range(1, steps + 1))
        wait_until(lambda: not self._processes(), "the end of what outlived its run")
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
        until_s = time.monotonic() + LIMIT_S
        while (left := self._processes()) and time.monotonic() < until_s:  # some were being started when we looked
            kill(pid for pid, _ in left)
        for left in Path("/dev/shm").glob(
            f"lightning-bus-{self.run_dir.name}-{zlib.crc32(str(self.run_dir).encode()):08x}-*"
        ):
            left.unlink(missing_ok=True)  # a run that is not complete keeps its weights for its next life
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


def kill(pids: Iterable[int]) -> None:
    """SIGKILL those of them that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def stop(pid: int) -> None:
    """SIGSTOP a process, and return once it stands."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: is_stopped(pid), f"process {pid} to stand")


def is_stopped(pid: int) -> bool:
    """Whether a process stands, all its threads; one that has ended does not."""
    try:
        stats = [(thread / "stat").read_text() for thread in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return False  # a thread ended while we looked, or all of it has
    return all(stat.rsplit(")", 1)[1].split()[0] == "T" for stat in stats)


def stop_trainer_in_a_push(ring: Ring) -> int:
    """Stop the trainer (SIGSTOP) while the engine stands still for its weights; return its pid."""
    engine = ring.table["gateway"]["upstreams"][0]
    with httpx.Client(base_url=engine, trust_env=False, timeout=LIMIT_S) as client:  # one: the moments are short

        def paused() -> bool:
            try:
                return bool(client.get("/is_paused").raise_for_status().json()["is_paused"])
            except httpx.HTTPError:
                return False  # a connection that stood for too long was shut

        return stop_trainer_when(ring, paused, paused)


def stop_trainer_when(ring: Ring, begins: Callable[[], bool], holds: Callable[[], bool]) -> int:
    """Stop the trainer (SIGSTOP) at a moment that `begins` announces and that still `holds` once it stands; return its pid."""
    trainer = min(wait_until(lambda: ring.pids("train"), "a trainer"))
    until_s = time.monotonic() + LIMIT_S
    while time.monotonic() < until_s:
        if begins():
            stop(trainer)
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
