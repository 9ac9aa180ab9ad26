"""`up`: every process of a run on one machine, started in order, kept alive, and ended in order.

    prepare(file)                everything that can be wrong is found before anything starts
    Supervisor(…).run()          broker → serve, gateway, workers → train; exit 0 of train completes the run

What always holds. A daemon that dies is started again, with a growing pause, because everything it needs to go on is
in the log; one that says that a restart cannot help (exit codes 2, 70, 74, 76: see errors.py) ends the run. Daemons
are sessions of their own, so that a Ctrl-C reaches only the supervisor, which ends them in order: agents first, the
log's writer last. And their stdin is a lifeline, so that none of them survives a supervisor that was killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import anyio
import tomli_w
from anyio.abc import Process, TaskStatus

from lightning_bus.client import Client
from lightning_bus.clock import monotonic_s
from lightning_bus.config import BrokerSection, CreditSection, GatewaySection, RunFile, Section, load, to_toml_table
from lightning_bus.daemon import LIFELINE, client_address, run_secret
from lightning_bus.errors import CallError, ConfigError, LightningBusError, StopProcess, StorageError, VersionError
from lightning_bus.keys import ensure_run_keys, keys_directory
from lightning_bus.readiness import answers, is_ready, own_engines

PAUSE_S = 0.2  # before the first restart; doubles with each
PAUSE_MAX_S = 5.0
STEADY_S = 30.0  # a daemon that lived this long starts again at PAUSE_S
RESTARTS_MAX = 30  # per daemon and run: more is not bad luck but a bug
CRASHES_MAX = 5  # in a row, each by an error of its own and within STEADY_S: so is this
STILLBORN_MAX = 3  # deaths before a daemon was healthy even once
GRACE_S = 15.0  # between asking a daemon to end and killing it
PROBE_S = 0.1  # between two looks at a daemon that is starting
TAIL_LINES = 15
SAYS = "lightning-bus: "  # how the command line begins an error
HOPELESS = frozenset({CallError.exit_code, StopProcess.exit_code, StorageError.exit_code, VersionError.exit_code})

Stage = Literal["worker", "gateway", "serve", "broker", "train"]
END_ORDER: tuple[Stage, ...] = ("train", "worker", "gateway", "serve", "broker")

Event = Callable[[str], None]  # receives one line for people
Probe = Callable[[], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Daemon:
    """One process to be kept alive. `probe` says whether it is healthy; without one, running is healthy."""

    name: str
    stage: Stage
    argv: Sequence[str]
    probe: Probe | None = None
    healthy_within_s: float = 60.0


class DaemonFailed(LightningBusError):
    """A daemon ended in a way that no restart can mend; the message holds the end of its log."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# -- before anything starts ---------------------------------------------------------------------------------------


def prepare(file: RunFile, *, force: bool = False, resume: bool = False) -> Path:
    """Make the run's directory, with the resolved run.toml and the secret in it, and return its path.

    Raises ConfigError when a port is taken, the directory exists (`force` replaces it, `resume` goes on with it), or a
    value cannot work.
    """
    table = to_toml_table(file)
    directory = file.directory
    if not file.run.name or Path(file.run.name).name != file.run.name:
        raise ConfigError(f"run.name {file.run.name!r} becomes a directory name: letters, digits, . _ - please")
    for section, address in binds(table):
        _must_be_free(section, address)
    keys = keys_directory(file.section(BrokerSection).keys, directory)
    if resume:
        if keys is not None:
            ensure_run_keys(keys)
        # The daemons read run.toml there, so that is where a changed key has to be. One that says the same stays as it
        # is, its date included, which tells when the run began.
        if {**to_toml_table(load(directory / "run.toml", _kinds(file))), "run": None} != {**table, "run": None}:
            _write_run_toml(directory, table)
        return directory
    if directory.exists():
        if not force:
            raise ConfigError(
                f"{directory} already exists. Go on with that run: lightning-bus up {directory}. "
                "Or choose another --name, or replace it with --force."
            )
        if not (directory / "run.toml").exists():
            raise ConfigError(
                f"{directory} is not a run's directory (no run.toml in it), so --force will not delete it."
            )
        shutil.rmtree(directory)
    try:
        (directory / "logs").mkdir(parents=True)
    except OSError as exc:
        raise ConfigError(f"cannot make the run's directory {directory}: {exc}. Change [run] directory.") from exc
    _write_run_toml(directory, table)
    run_secret(directory)
    if keys is not None:
        ensure_run_keys(keys)
    return directory


def _write_run_toml(directory: Path, table: Mapping[str, Any]) -> None:
    """Write the resolved run.toml whole or not at all: without one, nobody can go on with the run."""
    draft = directory / ".run.toml.partial"
    try:
        draft.write_text(tomli_w.dumps(table), encoding="utf-8")
        os.replace(draft, directory / "run.toml")
    except OSError as exc:
        raise StorageError(f"cannot write {directory / 'run.toml'}: {exc}. {_free(directory)}") from exc


def _kinds(file: RunFile) -> dict[str, type[Section]]:
    return {name: type(section) for name, section in file.sections.items()}


def _free(directory: Path) -> str:
    return f"{shutil.disk_usage(directory).free / 1e6:.1f} MB are free on that disk. Free space and start again."


def binds(table: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return (section, address) of everything in the run that listens on TCP."""
    addresses = [(name, str(section["bind"])) for name, section in table.items() if "bind" in section]
    return [(name, address) for name, address in addresses if "://" not in address or address.startswith("tcp://")]


def _must_be_free(section: str, address: str) -> None:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{section}.bind {address!r} has no port. Write it like 127.0.0.1:4751.")
    host = {"*": "0.0.0.0", "": "0.0.0.0"}.get(host, host.strip("[]"))
    try:
        family, kind, proto, _, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
            probe.bind(where)
    except OSError as exc:
        raise ConfigError(
            f"{section}.bind {address}: {exc.strerror or exc}. Another run may be using it: stop that one, or change "
            f"[{section}] bind (and what points to it)."
        ) from exc


def daemons(file: RunFile, directory: Path) -> list[Daemon]:
    """Return the processes of a run, in the order in which they start."""
    run_toml = str(directory / "run.toml")
    bus = client_address(file.section(BrokerSection).bind)
    gateway = file.section(GatewaySection)
    table = to_toml_table(file)
    workers = int(table.get("worker", {}).get("processes", 1))
    engines = own_engines(table.get("serve", {}), gateway.upstreams)
    if len(file.section(CreditSection).policies) > 1:  # agents ask for all of them from the first rollout on
        engines = gateway.upstreams
    # It may load a large model, compile it, and then fetch newer weights than those it began with.
    engines_limit_s = 2 * float(table.get("serve", {}).get("start_limit_s", 300.0))
    keys = keys_directory(file.section(BrokerSection).keys, directory)

    def command(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "lightning_bus.cli", *arguments, "--run", run_toml]

    async def broker_answers() -> bool:
        admin = None if keys is None else keys / "admin.key"
        async with Client(address=bus, role="admin", key=admin, limit_s=2.0) as client:
            await client.status()
        return True

    async def engines_answer() -> bool:
        return all([await is_ready(engine) for engine in engines])

    async def gateway_answers() -> bool:
        return await answers(f"http://{client_address(gateway.bind)}/health")

    return [
        Daemon("broker", "broker", command("broker"), broker_answers, healthy_within_s=60.0),
        Daemon("serve", "serve", command("serve"), engines_answer, healthy_within_s=engines_limit_s),
        Daemon("gateway", "gateway", command("gateway"), gateway_answers, healthy_within_s=120.0),
        *(Daemon(f"worker-{n}", "worker", command("worker", "--processes", "1")) for n in range(1, workers + 1)),
        Daemon("train", "train", command("train")),
    ]


# -- while the run lasts ------------------------------------------------------------------------------------------


class Supervisor:
    """Keeps the daemons of one run alive until `train` is done."""

    def __init__(self, daemons: Sequence[Daemon], directory: Path, event: Event) -> None:
        self.directory = directory
        self.restarts: Counter[str] = Counter()
        self._daemons = daemons
        self._event = event
        self._processes: dict[str, Process] = {}
        self._healthy: set[str] = set()
        self._ending = False
        self._killed = False
        self._complete = anyio.Event()

    async def run(self) -> int:
        """Run everything to the end and return the exit code: 0 complete, 130 or 143 when asked to stop.

        Raises DaemonFailed when a daemon cannot be kept alive. However it ends, no daemon is left behind.
        """
        asked: list[int] = []
        failure: LightningBusError | None = None

        async with anyio.create_task_group() as tasks:
            keeping = anyio.CancelScope()

            async def listen(*, task_status: TaskStatus[None]) -> None:
                with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                    task_status.started()
                    async for number in signals:
                        asked.append(number)
                        if len(asked) == 1:
                            self._event("ending in order; once more to kill")
                            keeping.cancel()
                        else:
                            self._kill_all()

            await tasks.start(listen)
            try:
                with keeping:
                    await self._start_and_keep()
            except LightningBusError as exc:
                failure = exc
            with anyio.CancelScope(shield=True):
                await self.end()
            tasks.cancel_scope.cancel()
        if failure is not None and not asked:
            raise failure
        return 128 + asked[0] if asked else 0

    async def end(self) -> None:
        """End all daemons, agents first and the log's writer last; kill those that do not end in time."""
        self._ending = True
        for stage in END_ORDER:
            async with anyio.create_task_group() as tasks:
                for daemon in self._daemons:
                    if daemon.stage == stage and daemon.name in self._processes:
                        tasks.start_soon(self._end_one, daemon.name, self._processes[daemon.name])

    async def _start_and_keep(self) -> None:
        failures: list[LightningBusError] = []
        async with anyio.create_task_group() as tasks:

            async def keep(daemon: Daemon) -> None:
                try:
                    await self._keep(daemon)
                except LightningBusError as exc:
                    failures.append(exc)
                    tasks.cancel_scope.cancel()

            async def wait_healthy(daemon: Daemon) -> None:
                try:
                    await self._wait_healthy(daemon)
                except LightningBusError as exc:
                    failures.append(exc)
                    tasks.cancel_scope.cancel()

            by_stage = {stage: [d for d in self._daemons if d.stage == stage] for stage in END_ORDER}
            # The engine takes longest to start, so gateway and workers, which wait for it anyway, start beside it.
            # The trainer comes last: it may count on all that it talks to.
            for wave in (("broker",), ("serve", "gateway", "worker"), ("train",)):
                started = [daemon for stage in wave for daemon in by_stage[stage]]
                for daemon in started:
                    tasks.start_soon(keep, daemon)
                for daemon in started:
                    await wait_healthy(daemon)
            await self._complete.wait()
            tasks.cancel_scope.cancel()
        if failures:
            raise failures[0]

    async def _keep(self, daemon: Daemon) -> None:
        """Start the daemon, and again whenever it dies, until the run is complete or it is hopeless."""
        pause_s = PAUSE_S
        crashes = 0
        while True:
            process = await self._start(daemon)
            started_s = monotonic_s()
            code = await process.wait()
            if self._ending:
                return
            if daemon.stage == "train" and code == 0:
                self._complete.set()
                return
            how = _how_it_ended(code)
            if code in HOPELESS:
                way_on = f"When that is mended, go on with: lightning-bus up {self.directory}"
                raise DaemonFailed(f"{daemon.name} ended with {how}:\n{self._last_words(daemon, code)}\n{way_on}", code)
            if self.restarts[daemon.name] >= RESTARTS_MAX:
                raise DaemonFailed(f"{daemon.name} {how} after {RESTARTS_MAX} restarts. {self._tail(daemon)}", 1)
            if daemon.probe and daemon.name not in self._healthy and self.restarts[daemon.name] + 1 >= STILLBORN_MAX:
                raise DaemonFailed(
                    f"{daemon.name} {how}, {STILLBORN_MAX} times without ever being healthy. {self._tail(daemon)}", 1
                )
            steady = monotonic_s() - started_s > STEADY_S
            # A signal comes from outside; an error of its own, again and again, comes from what it was given to run.
            crashes = 0 if steady or code < 0 else crashes + 1
            if crashes >= CRASHES_MAX:
                raise DaemonFailed(f"{daemon.name} {how}, {crashes} times in a row. {self._tail(daemon)}", 1)
            last = self._log_lines(daemon)[-1:] if code > 0 else []
            self._event(f"{daemon.name} died ({': '.join([how, *last]):.200}), restarting")
            self.restarts[daemon.name] += 1
            if steady:
                pause_s = PAUSE_S
            await anyio.sleep(pause_s)
            pause_s = min(PAUSE_MAX_S, pause_s * 2)

    async def _start(self, daemon: Daemon) -> Process:
        # Shielded: a process that exists must be known here, or nobody would end it.
        with anyio.CancelScope(shield=True), self._open_log(daemon) as log:
            self._processes[daemon.name] = await anyio.open_process(
                daemon.argv,
                stdin=subprocess.PIPE,  # the lifeline: nothing is ever written, its end is the news
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, LIFELINE: "1", "PYTHONUNBUFFERED": "1"},
            )
        return self._processes[daemon.name]

    async def _wait_healthy(self, daemon: Daemon) -> None:
        if daemon.probe is None:
            return
        with anyio.move_on_after(daemon.healthy_within_s) as limit:
            while True:
                process = self._processes.get(daemon.name)
                try:
                    # Someone else's process may answer on the same port; only ours being alive makes it ours.
                    if process is not None and process.returncode is None and await daemon.probe():
                        break
                except LightningBusError:
                    pass  # not yet
                await anyio.sleep(PROBE_S)
        if limit.cancelled_caught:
            raise DaemonFailed(
                f"{daemon.name} is not healthy after {daemon.healthy_within_s:g} s. {self._tail(daemon)}", exit_code=1
            )
        self._healthy.add(daemon.name)
        self._event(f"{daemon.name} is up")

    async def _end_one(self, name: str, process: Process) -> None:
        if process.returncode is None and not self._killed:
            if process.stdin is not None:
                await process.stdin.aclose()
            _signal(process, signal.SIGTERM)
            with anyio.move_on_after(GRACE_S) as grace:
                await process.wait()
            if grace.cancelled_caught:
                self._event(f"{name} did not end within {GRACE_S:g} s and was killed")
        _signal(process, signal.SIGKILL)
        await process.wait()
        await process.aclose()

    def _kill_all(self) -> None:
        self._killed = True
        for process in self._processes.values():
            _signal(process, signal.SIGKILL)

    def _open_log(self, daemon: Daemon) -> BinaryIO:
        return (self.directory / "logs" / f"{daemon.name}.log").open("ab")

    def _log_lines(self, daemon: Daemon) -> list[str]:
        try:
            with (self.directory / "logs" / f"{daemon.name}.log").open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 16_384))
                return [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        except OSError:
            return []

    def _last_words(self, daemon: Daemon, code: int) -> str:
        """Return the message that a daemon left with, which may have several lines, without the program's name."""
        lines = self._log_lines(daemon)
        starts = [number for number, line in enumerate(lines) if line.startswith(SAYS)]
        if starts:
            return "\n".join(lines[starts[-1] :]).removeprefix(SAYS)
        if code == StorageError.exit_code:  # then not even these words may have found room
            return "\n".join([*lines[-1:], f"The disk refused data for {self.directory}. {_free(self.directory)}"])
        return lines[-1] if lines else f"(nothing in {self.directory / 'logs' / daemon.name}.log)"

    def _tail(self, daemon: Daemon) -> str:
        path = self.directory / "logs" / f"{daemon.name}.log"
        return "\n".join([f"The end of {path}:", *(f"  {line}" for line in self._log_lines(daemon)[-TAIL_LINES:])])


def _how_it_ended(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _signal(process: Process, number: signal.Signals) -> None:
    if process.returncode is None:
        try:
            process.send_signal(number)
        except ProcessLookupError:
            pass  # it ended by itself meanwhile
