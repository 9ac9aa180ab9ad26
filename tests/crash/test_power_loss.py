"""The power goes, or the disk refuses to sync: what was acknowledged is there, whole, and nothing else is pretended.

A shim under the process writes down every write and sync of the log's file, in order; a checker rebuilds files that a
power cut could have left and opens them with the real store. power_loss/checker.py says what is watched and what is not.
The machine that runs the tests keeps its power.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from lightning_bus import decode_spans, wire
from lightning_bus import messages as m
from lightning_bus.errors import StorageError
from lightning_bus.log.layout import DROPPED
from lightning_bus.log.reader import LogReader
from lightning_bus.records import Kind
from lightning_bus.spans import encode_spans
from tests.bus_fixtures import ROOT, RawPeer, span
from tests.crash.power_loss.checker import LOST, Finding, examine
from tests.crash.power_loss.disk import read_trace

pytestmark = pytest.mark.timeout(600)

COMMITS = 120
ACKED = 5  # batches, before the disk refuses one
EXIT_LIMIT_S = 90.0
_BROKER = "from lightning_bus.cli import main; main()"


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shim, compiled here and now: a few lines of C need no packaging."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip(
            "recording what the log writes takes Linux (LD_PRELOAD, /proc) and a C compiler named cc, gcc or clang"
        )
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    source = Path(__file__).parent / "power_loss" / "shim.c"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", str(library), str(source), "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return library


def under(shim: Path, trace: Path) -> dict[str, str]:
    """Return the environment of a process whose log is recorded in `trace`."""
    return {**os.environ, "LD_PRELOAD": str(shim), "POWER_LOSS_TRACE": str(trace)}


def examine_workload(shim: Path, directory: Path, *options: str, seed: int, states: int) -> list[Finding]:
    """Record a workload in an empty directory and return what power cuts do to its log."""
    directory.mkdir()
    trace = directory / "trace"
    command = [sys.executable, "-m", "tests.crash.power_loss.workload", str(directory), str(seed), str(COMMITS)]
    subprocess.run([*command, *options], env=under(shim, trace), cwd=ROOT, check=True)
    renamed = [entry.paths[1].name for entry in read_trace(trace) if entry.kind == "R"]
    assert sum(name.isdigit() for name in renamed) > 10, "the log goes on in new segments"
    assert sum(name.startswith(DROPPED) for name in renamed) > 5, "and drops old ones"
    return examine(trace, directory / "scratch", seed=seed, commits=COMMITS, states=states)


def assert_kept(findings: list[Finding], seed: int, states: int) -> None:
    broken = [f"seed {seed}, {finding}" for finding in findings if finding.wrong]
    assert not broken, f"{len(broken)} of {states} states break a promise:\n" + "\n".join(broken[:10])
    assert len(findings) == states
    assert len({finding.acked for finding in findings}) > states // 3, "the cuts are spread over the workload"


def test_a_power_cut_loses_nothing_acknowledged(shim: Path, tmp_path: Path) -> None:
    assert_kept(examine_workload(shim, tmp_path / "run", seed=4, states=30), 4, 30)


@pytest.mark.crash
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_100_power_cuts_of_each_of_three_workloads_lose_nothing_acknowledged(
    shim: Path, tmp_path: Path, seed: int
) -> None:
    assert_kept(examine_workload(shim, tmp_path / "run", seed=seed, states=100), seed, 100)


@pytest.mark.parametrize("option", ["--no-metasync", "--no-names"])
def test_without_all_its_syncs_a_power_cut_loses_what_was_acknowledged(shim: Path, tmp_path: Path, option: str) -> None:
    """The test of the tests: leave out what costs a commit, or a segment's name, and it is seen."""
    findings = examine_workload(shim, tmp_path / "run", option, seed=4, states=60)
    assert len(findings) == 60
    wrong = [finding for finding in findings if finding.wrong]
    assert len(wrong) >= 6, "a tenth of the cuts, or the checker does not look"
    assert any(finding.wrong.startswith(LOST) for finding in wrong), list(map(str, wrong))


@contextmanager
def recorded_broker(shim: Path, directory: Path, address: str) -> Iterator[subprocess.Popen[str]]:
    """Run a broker whose log is directory/log, recorded in directory/trace."""
    command = [sys.executable, "-c", _BROKER, "broker", "--log", str(directory / "log"), "--bind", address]
    environment = under(shim, directory / "trace")
    with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.crash
@pytest.mark.anyio
@pytest.mark.parametrize("call", ["sync", "meta"])
async def test_a_sync_that_fails_stops_the_broker_and_is_never_tried_again(
    shim: Path, tmp_path: Path, call: str
) -> None:
    """The next sync would succeed, about pages that the kernel has dropped: who asks again acknowledges lost data."""
    address = free_address()
    batch = m.Append([m.Part("", 0, 1)])
    bodies = [[encode_spans([span(f"batch {number}")])] for number in range(1, ACKED + 2)]
    with RawPeer(address) as peer:
        with recorded_broker(shim, tmp_path, address) as process:
            await peer.ask(m.Hello("producer"))
            for seq in range(1, ACKED + 1):
                answer = await peer.ask(batch, bodies[seq - 1], epoch=1, seq=seq, request=seq)
                assert isinstance(answer.body, m.Acked)
            (tmp_path / f"trace.fail-{call}").touch()
            peer.send(wire.encode(batch, bodies[ACKED], producer=peer.name, epoch=1, seq=ACKED + 1))
            _, said = await anyio.to_thread.run_sync(partial(process.communicate, timeout=EXIT_LIMIT_S))
            assert process.returncode == StorageError.exit_code, said
            assert "Input/output error" in said
        kinds = [entry.kind + "!" * entry.durable for entry in read_trace(tmp_path / "trace")]
        after = kinds[kinds.index("E") + 1 :]
        assert not {"E", "S", "W!"} & set(after), f"after the failure the broker went on: {after}"

        with recorded_broker(shim, tmp_path, address):
            # Had the refused batch been acknowledged, that answer would stand first in line.
            welcome = await peer.ask(m.Hello("producer", epoch=1), request=99)
            assert welcome.header.request == 99
            assert isinstance(welcome.body, m.Welcome)
            assert welcome.body.seq_last in (ACKED, ACKED + 1)
            answer = await peer.ask(batch, bodies[ACKED], epoch=1, seq=ACKED + 1)
            assert isinstance(answer.body, m.Acked)
    with LogReader(tmp_path / "log") as reader:
        spans = [one for record in reader.records() if record.kind is Kind.SPANS for one in decode_spans(record.body)]
    assert [one.name for one in spans] == [f"batch {number}" for number in range(1, ACKED + 2)]
