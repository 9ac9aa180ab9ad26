"""What the bus's benchmarks share: the span everybody carries, a broker in a process of its own, a crew, the raw disk.

What always holds: everything runs on a real disk (a directory in memory is refused), over real sockets, and each
party in its own process, as users have it. The members of a crew begin together, when all of them are connected. What
is compared is measured in turns within one run, because a shared machine's disk and neighbours change by the minute.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import tomli_w

from lightning_bus import Span
from lightning_bus.spans import pack_ids, pack_logprobs

GROUP_BYTES = 1 << 20  # of the raw measurement: what a good group commit reaches
STOP_LIMIT_S = 20.0
TOKENS = 300  # response tokens and log-probs of a span
PEERS = Path(__file__).resolve().parent.parent / ".bench"  # what `python -m bench.install` installed
PEERS_PYTHON = PEERS / "python"

# -- the span ---------------------------------------------------------------------------------------------------------


def model_call_span(number: int = 0) -> Span:
    """Return the reference span: a model call with 30 attributes, 300 token ids and 300 log-probs; 3.6 KB encoded."""
    rng = np.random.default_rng(number)
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "policy",
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.max_tokens": 512,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 40,
        "gen_ai.usage.output_tokens": TOKENS,
        "gen_ai.agent.name": "calculator",
        "lightning.prompt_token_ids": pack_ids(rng.integers(0, 32_000, 40)),
        "lightning.response_token_ids": pack_ids(rng.integers(0, 32_000, TOKENS)),
        "lightning.response_logprobs": pack_logprobs(rng.normal(-1.0, 0.5, TOKENS)),
        "lightning.weight_versions": [["7", 0, TOKENS]],
        "lightning.time_to_first_token_ms": 12.5,
        "server.address": "127.0.0.1",
        "server.port": 4752,
    }
    for at in range(30 - len(attributes)):
        attributes[f"agent.attribute.{at:02d}"] = f"value {at} " + "x" * 15
    return Span(rng.bytes(8), rng.bytes(16), rng.bytes(8), "chat", 1, 2, attributes, sequence=number)


# -- a broker, and crews ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Broker:
    """A running broker."""

    address: str
    pid: int

    def cpu_s(self) -> float:
        """CPU time used so far; nan where /proc does not tell."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return float("nan")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def anonymous_mb(self) -> float:
        """Resident memory beyond mapped files, so beyond the log; nan where /proc does not tell."""
        with suppress(OSError):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    return int(line.split()[1]) / 1024
        return float("nan")


@contextmanager
def broker(directory: Path, **section: Any) -> Generator[Broker]:
    """Run `lightning-bus broker` on the log in this directory; it has ended when the context has.

    section  what RUN.toml would say under [broker], such as segment_bytes=1 << 28.
    """
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    command = [sys.executable, "-m", "lightning_bus.cli", "broker", "--bind", address, "--log", str(directory)]
    if section:
        file = directory.with_name(f"{directory.name}.toml")
        file.parent.mkdir(parents=True, exist_ok=True)
        run = {"directory": str(directory.parent), "name": f"{directory.name}.run"}
        # A run file is not whole without them.
        others = {"policy": {"model": "unused"}, "train": {"tasks": "unused", "held_out": "unused"}}
        file.write_text(tomli_w.dumps({"run": run, "broker": section, **others}))
        command += ["--run", str(file)]
    with running(command) as process:
        connect(port, process=process).close()
        yield Broker(address, process.pid)


@contextmanager
def running(command: Sequence[str]) -> Generator[subprocess.Popen[bytes]]:
    """Run a server, silently, and end it with SIGTERM."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_crew(commands: Iterable[Sequence[str]]) -> list[dict[str, Any]]:
    """Run processes that call `say_ready`, let them begin together, and return what each `report`s."""
    crew: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            crew.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        for member in crew:
            assert member.stdout is not None
            if member.stdout.readline() != "ready\n":
                raise SystemExit(f"{' '.join(map(str, member.args))} ended before it was ready; see above")  # type: ignore[arg-type]
        for member in crew:
            assert member.stdin is not None
            member.stdin.write("go\n")
            member.stdin.flush()
        outputs = [member.communicate()[0] for member in crew]
        for member in crew:
            if member.returncode:
                raise SystemExit(f"{' '.join(map(str, member.args))} failed; see above")  # type: ignore[arg-type]
        return [json.loads(output.splitlines()[-1]) for output in outputs]
    finally:
        for member in crew:
            if member.poll() is None:
                member.kill()
                member.wait()


def member(module: str, *arguments: object, python: str = sys.executable) -> list[str]:
    """Return the command that runs a bench module as a member of a crew."""
    return [python, "-m", f"bench.{module}", *map(str, arguments)]


def say_ready() -> None:
    """In a crew's member: connected. Returns when all are."""
    print("ready", flush=True)
    if not sys.stdin.readline():
        raise SystemExit("the benchmark that started this process is gone")


async def say_ready_async() -> None:
    await anyio.to_thread.run_sync(say_ready)


def report(result: dict[str, Any]) -> None:
    """In a crew's member: hand over what was measured."""
    print(json.dumps(result), flush=True)


def run_async(main: Callable[[], Awaitable[Any]]) -> Any:
    """Run `main` on the event loop that daemons use."""
    return anyio.run(main, backend_options={"use_uvloop": find_spec("uvloop") is not None})


@dataclass(slots=True)
class Meter:
    """Counts what happens between warm-up and end."""

    warmup_s: float
    seconds: float
    counted: int = 0
    _began: float = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def add(self, count: int) -> bool:
        """Count something that ended now. False when the time is over."""
        at = time.perf_counter() - self._began - self.warmup_s
        if 0.0 <= at < self.seconds:
            self.counted += count
        return at < self.seconds

    @property
    def per_s(self) -> float:
        return self.counted / self.seconds


# -- the raw disk -----------------------------------------------------------------------------------------------------


def raw_bytes_per_s(directory: Path, seconds: float) -> float:
    """Return how fast bytes become durable when nothing else is done: append 1 MiB, fdatasync, again."""
    group = os.urandom(GROUP_BYTES)
    path = directory / "raw"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        written, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            written += os.write(descriptor, group)
            os.fdatasync(descriptor)
        return written / (time.perf_counter() - began)
    finally:
        os.close(descriptor)
        path.unlink()


# -- peers ------------------------------------------------------------------------------------------------------------


def peer_module(name: str) -> Any:
    """Return a peer's Python client, from this environment or from `.bench`; None where it is not installed."""
    if str(PEERS_PYTHON) not in sys.path:
        sys.path.append(str(PEERS_PYTHON))  # last: what is installed beside the bus wins
    return import_module(name) if find_spec(name) else None


def nats_server() -> str | None:
    """Return the path of nats-server: NATS_SERVER, or on PATH, or from `.bench`."""
    return (
        os.environ.get("NATS_SERVER") or shutil.which("nats-server") or shutil.which("nats-server", path=_peers_bin())
    )


def agentlightning_python() -> str | None:
    """Return the interpreter of the environment that has Agent Lightning: AGENTLIGHTNING_PYTHON, or from `.bench`."""
    own = PEERS / "agentlightning" / "bin" / "python"
    return os.environ.get("AGENTLIGHTNING_PYTHON") or (str(own) if own.with_name("agl").exists() else None)


def trl_python() -> str | None:
    """Return the interpreter of the environment that has TRL: TRL_PYTHON, or from `.bench`."""
    own = PEERS / "trl" / "bin" / "python"
    return os.environ.get("TRL_PYTHON") or (str(own) if own.with_name("trl").exists() else None)


def _peers_bin() -> str:
    return str(PEERS_PYTHON / "bin")


# -- the command line and the result ----------------------------------------------------------------------------------


def parser(doc: str | None, *, seconds: float, runs: int) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    made.add_argument("--seconds", type=float, default=seconds, help="of each measurement")
    made.add_argument("--runs", type=int, default=runs)
    made.add_argument("--quick", action="store_true", help="one short run, to see that it works")
    made.add_argument("--dir", type=Path, help="where to write; default: the directory for temporary files")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    options = made.parse_args()
    if options.quick:
        options.runs, options.seconds = 1, min(options.seconds, 0.5)
    return options


@contextmanager
def workspace(directory: Path | None) -> Generator[Path]:
    """A directory on a real disk, removed afterwards."""
    parent = directory or Path(tempfile.gettempdir())
    if filesystem(parent) in ("tmpfs", "ramfs"):
        raise SystemExit(f"{parent} is in memory, so nothing in it is durable. Give --dir DIRECTORY on a disk.")
    parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="lightning-bus-bench-", dir=parent))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def finish(summary: dict[str, Any], as_json: bool) -> None:
    """Print the result; as the last line, and in one, when a program asked."""
    print(json.dumps(summary, indent=None if as_json else 2))


def machine(directory: Path) -> dict[str, Any]:
    """Return what a number needs beside it to be compared."""
    return {
        "cpus": os.cpu_count(),
        "cpu": _cpu_model(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "filesystem": filesystem(directory),
        "load_1min": round(os.getloadavg()[0], 2),  # what else ran when the benchmark ended; its own processes included
        "commit": commit(),
    }


def commit() -> str:
    """Return the checkout's commit, with a + when the bus differs from it; empty outside a checkout."""
    try:
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "lightning_bus"], check=False)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return name.stdout.strip() + ("+" if changed.returncode else "")


def filesystem(directory: Path) -> str:
    """Return the type of file system, where the system tells."""
    best = ("", "")
    with suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, kind, *_ = line.split()
            if directory.resolve().is_relative_to(mount) and len(mount) >= len(best[0]):
                best = (mount, kind)
    return best[1]


def median(values: Sequence[float], digits: int = 0) -> float:
    return _rounded(statistics.median(values), digits)


def spread(values: Sequence[float], digits: int = 0) -> list[float]:
    """[least, greatest]"""
    return [_rounded(min(values), digits), _rounded(max(values), digits)]


def percentile(values: Sequence[float], percent: float, digits: int = 2) -> float:
    return round(float(np.percentile(np.asarray(values), percent)), digits)


def connect(port: int, *, limit_s: float = 10.0, process: subprocess.Popen[bytes] | None = None) -> socket.socket:
    """Connect to a server that may still be starting; stop when its process has ended."""
    until = time.perf_counter() + limit_s
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port))
        except OSError:
            if process is not None and process.poll() is not None:
                raise SystemExit(f"{' '.join(map(str, process.args))} ended; see above") from None  # type: ignore[arg-type]
            if time.perf_counter() > until:
                raise
            time.sleep(0.02)
        else:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rounded(value: float, digits: int) -> float:
    return round(value, digits) if digits else round(value)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
