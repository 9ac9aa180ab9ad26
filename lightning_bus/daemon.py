"""What every process of a run needs before it does its own work: the run file, the run's secret, and an end.

A daemon ends in one of three ways, all of them orderly: its work is done, it gets SIGTERM or SIGINT, or whoever
supervises it is gone. The last is seen by a lifeline: the supervisor holds the other end of the daemon's stdin and
never writes to it, so end-of-file means that the supervisor is dead, however it died. Nothing outlives its run.

An orderly end may take its time: a broker and a worker let attempts end. Who does not want to wait signals again, and
the process is gone at once. That is safe, as being killed is: nothing was promised that is not on disk.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import TaskStatus

from lightning_bus.adapters import RewardsSection
from lightning_bus.config import BUS_SECTIONS, RunFile, Section, load
from lightning_bus.errors import ConfigError, StorageError, first_error
from lightning_bus.tokens import SECRET_BYTES

LIFELINE = "LIGHTNING_BUS_LIFELINE"  # set in the environment of daemons whose stdin is a lifeline
END_LIMIT_S = 20.0  # for an orderly end once the lifeline is cut; nobody is left who could kill the process
SECTIONS_GROUP = "lightning_bus.sections"


def sections() -> dict[str, type[Section]]:
    """Return every section that RUN.toml may have: the bus's own and those of the installed packages."""
    found = {**BUS_SECTIONS, "rewards": RewardsSection}
    for entry in entry_points(group=SECTIONS_GROUP):
        found[entry.name] = entry.load()
    return found


def load_run(path: Path, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> RunFile:
    """Return the run file at `path`; a run's directory stands for the run.toml in it. Raises ConfigError.

    The run.toml that lies in a run's directory means that directory, wherever it was moved and from wherever it is read.
    """
    path = path / "run.toml" if path.is_dir() else path
    changes = {name: dict(keys) for name, keys in (overrides or {}).items()}
    if (path.parent / "secret").exists():
        changes.setdefault("run", {}).update(directory=str(path.parent.parent), name=path.parent.name)
    return load(path, sections(), changes)


def run_secret(directory: Path) -> bytes:
    """Return the run's secret, made on first use and readable by its owner only. Safe when several ask at once."""
    path = directory / "secret"
    try:
        if not path.exists():
            directory.mkdir(parents=True, exist_ok=True)
            # Whole or not at all: a reader must never see a secret that is still being written.
            draft = directory / f"secret.{os.getpid()}"
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(os.urandom(SECRET_BYTES))
            try:
                os.link(draft, path)  # unlike a rename it fails when someone was faster
            except FileExistsError:
                pass
            draft.unlink()
        secret = path.read_bytes()
    except OSError as exc:
        raise StorageError(f"cannot make or read the run's secret {path}: {exc}") from exc
    if len(secret) != SECRET_BYTES:
        raise ConfigError(
            f"{path} has {len(secret)} bytes, not {SECRET_BYTES}. Delete it; the next start makes a new one."
        )
    return secret


def client_address(bind: str) -> str:
    """Return the address under which processes on this machine reach what binds to `bind`."""
    for everywhere in ("//*:", "//0.0.0.0:", "//[::]:"):
        bind = bind.replace(everywhere, "//127.0.0.1:")
    return "127.0.0.1:" + bind.removeprefix("0.0.0.0:") if bind.startswith("0.0.0.0:") else bind


def run_daemon(main: Callable[[], Awaitable[None]]) -> None:
    """Run `main` until it returns, a signal asks for the end, or the supervisor is gone.

    On the latter two `main` is cancelled, may end in order, and the process leaves with 128 + the signal's number: only
    work that is done exits with 0. A second signal ends it in the middle of that, with the same number. What `main` raises is raised here, out of the exception groups of task groups.
    """
    asked = anyio.run(until_stopped, main, backend_options={"use_uvloop": find_spec("uvloop") is not None})
    if asked is not None:
        sys.exit(128 + asked)


async def until_stopped(main: Callable[[], Awaitable[None]], abort: Callable[[int], object] = os._exit) -> int | None:
    """Run `main` as `run_daemon` does; return the signal that ended it, or None when it returned by itself.

    A supervisor that is gone counts as SIGTERM. `abort` is called with the exit code when a signal comes after that.
    """
    failure: Exception | None = None
    asked: list[int] = []
    listening = anyio.CancelScope(shield=True)

    async with anyio.create_task_group() as tasks:

        async def stop_on_signal(*, task_status: TaskStatus[None]) -> None:
            # Shielded, for it is needed most when everything else is cancelled and does not come to its end.
            with listening, anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                task_status.started()
                async for number in signals:
                    if asked:
                        print(
                            f"signal {number} again: stopped without waiting for the end", file=sys.stderr, flush=True
                        )
                        abort(128 + number)
                    stop(number)

        async def stop_without_supervisor() -> None:
            await wait_lifeline_cut()
            stop(signal.SIGTERM)

        def stop(number: int) -> None:
            asked.append(number)
            tasks.cancel_scope.cancel()

        await tasks.start(stop_on_signal)  # before any work that a signal could find half begun
        tasks.start_soon(stop_without_supervisor)
        try:
            await main()
        except Exception as exc:
            failure = exc
        finally:
            listening.cancel()
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise first_error(failure)
    return asked[0] if asked else None


async def wait_lifeline_cut() -> None:
    """Return when the supervisor is gone; never in a process that has none."""
    if not os.environ.get(LIFELINE):
        await anyio.sleep_forever()
    stdin = sys.stdin.fileno()
    await anyio.wait_readable(stdin)
    while os.read(stdin, 4096):
        await anyio.wait_readable(stdin)
    deadline = threading.Timer(END_LIMIT_S, os._exit, args=(1,))
    deadline.daemon = True
    deadline.start()
