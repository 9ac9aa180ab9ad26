"""The supervisor over real processes: small scripts that live, die and end as daemons do."""

from __future__ import annotations

import os
import select
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import anyio
import pytest

from lightning_bus import supervisor as module
from lightning_bus.config import BUS_SECTIONS, RunFile, Section, load
from lightning_bus.daemon import client_address, load_run, run_secret
from lightning_bus.errors import ConfigError
from lightning_bus.supervisor import Daemon, DaemonFailed, Stage, Supervisor, daemons, prepare

ROOT = Path(__file__).resolve().parents[3]
LIVE = "import sys; sys.stdin.read()"  # until the lifeline is cut


class Worker(Section):
    processes: int = 1


class Serve(Section):
    bind: str = "127.0.0.1:4752"


def script(name: str, source: str, stage: Stage | None = None, **fields: object) -> Daemon:
    argv = [sys.executable, "-S", "-c", textwrap.dedent(source)]
    return Daemon(name, stage or name, argv, **fields)  # pyright: ignore[reportArgumentType]


async def healthy() -> bool:
    return True


async def never_healthy() -> bool:
    return False


class Run:
    """One supervised run of scripts in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "logs").mkdir()
        self.events: list[str] = []
        self.on_event = self.events.append

    def __call__(self, *scripts: Daemon) -> int:
        self.supervisor = Supervisor(scripts, self.directory, lambda what: self.on_event(what))
        return anyio.run(self.supervisor.run)

    def interrupt_at(self, word: str) -> None:
        """Send SIGINT to this process, which is the supervisor, at each event that has the word in it."""

        def on_event(what: str) -> None:
            self.events.append(what)
            if word in what:
                os.kill(os.getpid(), signal.SIGINT)

        self.on_event = on_event

    def lines(self, name: str) -> list[str]:
        return (self.directory / name).read_text().splitlines()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    monkeypatch.setattr(module, "GRACE_S", 60.0)  # a machine may stand still for a while
    monkeypatch.chdir(tmp_path)
    return Run(tmp_path)


def wait_gone(pid: int, limit_s: float = 30.0) -> bool:
    """Return whether a process, not a child of ours, ends within the limit."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], limit_s)[0])
    finally:
        os.close(descriptor)


# -- a run --------------------------------------------------------------------------------------------------------


def test_the_end_of_train_completes_the_run_and_daemons_end_in_order(run: Run) -> None:
    tell = "import sys; sys.stdin.read(); print(sys.argv[1], file=open('ended', 'a'))"
    # SIGTERM comes with the end of stdin; these scripts go by stdin alone.
    source = (
        f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); open(__import__('sys').argv[1], 'w'); {tell}"
    )
    stages: list[tuple[str, Stage]] = [
        ("broker", "broker"), ("serve", "serve"), ("gateway", "gateway"), ("worker-1", "worker"),
    ]  # fmt: skip
    scripts = [
        Daemon(name, stage, [sys.executable, "-S", "-c", source, name], lambda name=name: ready(run.directory / name))
        for name, stage in stages
    ]
    assert run(*scripts, script("train", "")) == 0
    assert run.lines("ended") == ["worker-1", "gateway", "serve", "broker"]
    assert run.events == ["broker is up", "serve is up", "gateway is up", "worker-1 is up"]


async def ready(path: Path) -> bool:
    return await anyio.Path(path).exists()


def test_a_daemon_that_was_killed_is_started_again(run: Run) -> None:
    dies_once = """
        import os, signal, sys
        if not os.path.exists("died"):
            open("died", "w")
            os.kill(os.getpid(), signal.SIGKILL)
        open("again", "w").close()
        sys.stdin.read()
    """
    os.mkfifo(run.directory / "again")  # train reads it, and so waits until the worker is back
    assert run(script("worker-1", dies_once, "worker"), script("train", "open('again').read()")) == 0
    assert run.events == ["worker-1 died (signal 9), restarting"]
    assert run.supervisor.restarts == {"worker-1": 1}


@pytest.mark.parametrize("code", [2, 70, 74, 76])
def test_an_error_that_no_restart_mends_ends_the_run_and_is_shown(run: Run, code: int) -> None:
    source = (
        f"import sys; print('noise', file=sys.stderr); print('the disk is full', file=sys.stderr); sys.exit({code})"
    )
    with pytest.raises(DaemonFailed, match=f"broker ended with exit code {code}:\nthe disk is full") as caught:
        run(script("broker", source), script("train", LIVE))
    assert caught.value.exit_code == code
    assert run.supervisor.restarts == {}


def test_train_that_fails_is_started_again(run: Run) -> None:
    source = "import os, sys; done = os.path.exists('x'); open('x', 'w'); sys.exit(0 if done else 1)"
    assert run(script("train", source)) == 0
    assert run.events == ["train died (exit code 1), restarting"]


def test_a_daemon_that_never_gets_healthy_is_given_up_with_the_end_of_its_log(run: Run) -> None:
    with pytest.raises(DaemonFailed, match=r"3 times without ever being healthy(.|\n)*broker.log:\n  no such thing"):
        run(script("broker", "print('no such thing', flush=True); raise SystemExit(1)", probe=never_healthy))


def test_a_daemon_that_lives_but_is_not_healthy_in_time_is_given_up(run: Run) -> None:
    daemon = script("broker", "import sys; sys.stdin.read()", probe=never_healthy, healthy_within_s=0.05)
    with pytest.raises(DaemonFailed, match=r"broker is not healthy after 0.05 s"):
        run(daemon)


def test_restarts_have_an_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESTARTS_MAX", 2)
    with pytest.raises(DaemonFailed, match="after 2 restarts"):
        run(script("worker-1", "raise SystemExit(1)", "worker"), script("train", LIVE))


def test_an_interrupt_ends_the_run_in_order(run: Run) -> None:
    run.interrupt_at("broker is up")
    assert run(script("broker", LIVE, probe=healthy), script("train", LIVE)) == 130
    assert run.events[:2] == ["broker is up", "ending in order; once more to kill"]


def test_a_second_interrupt_kills(run: Run) -> None:
    deaf = """
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open("deaf", "w")
        signal.pause()
    """
    run.interrupt_at("")
    daemon = script("broker", deaf, probe=lambda: ready(run.directory / "deaf"))
    assert run(daemon, script("train", LIVE)) == 130


def test_a_daemon_that_does_not_end_is_killed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.1)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('deaf', 'w'); signal.pause()"
    assert run(script("serve", deaf, probe=lambda: ready(run.directory / "deaf")), script("train", "")) == 0
    assert run.events[-1] == "serve did not end within 0.1 s and was killed"


def test_a_killed_supervisor_leaves_no_orphans(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    daemon = "import anyio, os; from lightning_bus.daemon import run_daemon; print(os.getpid(), flush=True); run_daemon(anyio.sleep_forever)"
    up = f"""
        import anyio, sys
        from pathlib import Path
        from lightning_bus.supervisor import Daemon, Supervisor
        daemon = Daemon("broker", "broker", [sys.executable, "-c", {daemon!r}])
        anyio.run(Supervisor([daemon], Path({str(tmp_path)!r}), print).run)
    """
    os.mkfifo(tmp_path / "logs" / "broker.log")  # reading it waits for the daemon's first words
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(up)], cwd=ROOT) as process:
        with (tmp_path / "logs" / "broker.log").open() as log:
            pid = int(log.readline())
            process.kill()
            process.wait()
            assert wait_gone(pid)


def test_a_daemon_without_a_supervisor_does_not_mind_a_closed_stdin(tmp_path: Path) -> None:
    source = "from lightning_bus.daemon import run_daemon\nasync def main(): print('worked')\nrun_daemon(main)"
    done = subprocess.run(
        [sys.executable, "-c", source], stdin=subprocess.DEVNULL, cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout == "worked\n"


def test_a_daemon_raises_what_its_work_raised() -> None:
    source = """
        import anyio
        from lightning_bus.daemon import run_daemon
        async def main():
            async with anyio.create_task_group():
                raise LookupError("this one")
        try:
            run_daemon(main)
        except LookupError as exc:
            print(exc)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout == "this one\n"


def test_sigterm_ends_a_daemon_in_order_but_not_as_if_its_work_were_done() -> None:
    source = """
        import anyio
        from lightning_bus.daemon import run_daemon
        async def main():
            print("at work", flush=True)
            try:
                await anyio.sleep_forever()
            finally:
                print("ended", flush=True)
        run_daemon(main)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        process.terminate()
        assert process.stdout.read() == "ended\n"
    assert process.returncode == 128 + signal.SIGTERM


# -- before a run -------------------------------------------------------------------------------------------------

KINDS = {**BUS_SECTIONS, "worker": Worker, "serve": Serve}


def run_file(tmp_path: Path, port: int = 0, **changes: object) -> RunFile:
    path = tmp_path / "RUN.toml"
    path.write_text(f'[run]\nname = "r"\ndirectory = "{tmp_path}/runs"\n')
    free = {
        "broker": {"bind": f"tcp://127.0.0.1:{port}"},
        "gateway": {"bind": "127.0.0.1:0"},
        "serve": {"bind": "127.0.0.1:0"},
    }
    return load(path, KINDS, {**free, **changes})  # pyright: ignore[reportArgumentType]


def test_prepare_writes_what_was_resolved_and_a_secret_for_the_owner_only(tmp_path: Path) -> None:
    file = run_file(tmp_path, worker={"processes": 3})
    directory = prepare(file)
    assert load(directory / "run.toml", KINDS).sections == file.sections
    secret = directory / "secret"
    assert len(secret.read_bytes()) == 32
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert sorted(path.name for path in directory.iterdir()) == ["logs", "run.toml", "secret"]


def test_a_run_is_never_overwritten_unasked(tmp_path: Path) -> None:
    directory = prepare(run_file(tmp_path))
    (directory / "metrics.jsonl").write_text("precious")
    with pytest.raises(
        ConfigError,
        match=r"already exists. Go on with that run: .* Or choose another --name, or replace it with --force",
    ):
        prepare(run_file(tmp_path))
    assert (directory / "metrics.jsonl").exists()
    prepare(run_file(tmp_path), force=True)
    assert not (directory / "metrics.jsonl").exists()


def test_a_run_that_was_moved_is_gone_on_with_where_it_lies_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_bus.daemon.sections", lambda: KINDS)
    directory = prepare(run_file(tmp_path))
    moved = directory.rename(tmp_path / "elsewhere")
    file = load_run(moved)
    assert file.directory == moved
    assert prepare(file, resume=True) == moved


def test_force_deletes_nothing_but_runs(tmp_path: Path) -> None:
    (tmp_path / "runs" / "r" / "thesis").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is not a run's directory"):
        prepare(run_file(tmp_path), force=True)
    assert (tmp_path / "runs" / "r" / "thesis").exists()


def test_a_taken_port_is_named_with_its_section(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"broker.bind tcp://127.0.0.1:{port}: .*change \[broker\] bind"):
            prepare(run_file(tmp_path, port))
    assert not (tmp_path / "runs").exists()


def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="becomes a directory name"):
        prepare(run_file(tmp_path, run={"name": "../elsewhere"}))


def test_a_run_has_one_supervised_process_per_worker(tmp_path: Path) -> None:
    found = daemons(run_file(tmp_path, worker={"processes": 2}), tmp_path)
    assert [daemon.name for daemon in found] == ["broker", "serve", "gateway", "worker-1", "worker-2", "train"]
    assert found[3].argv[2:] == ["lightning_bus.cli", "worker", "--processes", "1", "--run", str(tmp_path / "run.toml")]


def test_a_secret_is_made_once(tmp_path: Path) -> None:
    assert run_secret(tmp_path) == run_secret(tmp_path)
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(ConfigError, match="has 5 bytes, not 32"):
        run_secret(tmp_path)


@pytest.mark.parametrize(
    ("bind", "address"),
    [
        ("tcp://*:4750", "tcp://127.0.0.1:4750"),
        ("tcp://0.0.0.0:4750", "tcp://127.0.0.1:4750"),
        ("0.0.0.0:4751", "127.0.0.1:4751"),
        ("10.0.0.1:4751", "10.0.0.1:4751"),
        ("ipc:///run/bus", "ipc:///run/bus"),
    ],
)
def test_what_listens_everywhere_is_reached_here(bind: str, address: str) -> None:
    assert client_address(bind) == address
