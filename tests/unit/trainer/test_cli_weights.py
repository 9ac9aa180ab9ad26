"""`lightning-bus weights`: what it prints for people and programs, and what it says when something is missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lightning_bus import POLICY_WEIGHTS, BlockingClient, Resource, WeightVersion, cli, wall_ns
from lightning_bus.daemon import run_secret
from tests.bus_fixtures import BrokerProcess
from tests.gateway_fixtures import serving
from tests.unit.trainer.test_replicas import NOWHERE, Stub

Said = Callable[..., str]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "runs" / "r"
    (directory / "policy").mkdir(parents=True)
    (directory / "checkpoints").mkdir()
    run_secret(directory)
    return directory


@pytest.fixture
def address(run_dir: Path) -> Iterator[str]:
    """A broker that knows versions 0 to 3, of which the checkpoint of 2 is gone."""
    with BrokerProcess(run_dir / "log") as process:
        (run_dir / "run.toml").write_text(
            f'[run]\nname = "r"\n[broker]\nbind = "{process.address}"\n[policy]\nmodel = "m"\n'
            '[worker]\nagent = "a:b"\n[train]\ntasks = "t"\nheld_out = "h"\n'
        )
        (run_dir / "metrics.jsonl").write_text(
            '{"phase": "eval", "step": 3, "version": 3, "wall_s": 9, "held_out_success": 0.75}\n{"phase": "torn'
        )
        with BlockingClient(process.address) as bus:
            for number in range(4):
                path = run_dir / "checkpoints" / f"step-{number:08d}.safetensors"
                if number in (1, 3):
                    path.touch()
                version = WeightVersion(
                    version=number, parent=number - 1 if number else None, phase="rl" if number else "init", step=number,
                    path=str(path if number else run_dir / "policy"), checksum=f"crc:{number}",
                    metrics={"reward_mean": number / 10}, created_ns=wall_ns() - 7200 * 10**9,
                )  # fmt: skip
                bus.put(Resource(POLICY_WEIGHTS, number, msgspec.msgpack.encode(version)))
        yield process.address


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Run a command and return what it printed, on stdout when it succeeds and on stderr when it does not."""

    def run(*argv: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as caught:
            cli.main(["weights", *argv])
        out, err = capsys.readouterr()
        assert int(caught.value.code or 0) == code, err
        return out if code == 0 else err or out

    return run


def listed(text: str) -> dict[int, dict[str, Any]]:
    return {version["version"]: version for version in json.loads(text)["versions"]}


def test_a_run_tells_its_versions_where_they_lie_and_who_serves_them(address: str, run_dir: Path, said: Said) -> None:
    with serving(Stub("3").app()) as one, serving(Stub("2").app()) as other:
        engines = [word for url in (one, other, NOWHERE) for word in ("--engine", url)]
        told = said("list", "--run", str(run_dir), *engines, "--json")
        table = said("list", "--run", str(run_dir), *engines, "--last", "2")
    versions = listed(told)
    assert list(versions) == [3, 2, 1, 0]
    newest = versions[3]
    assert (newest["parent"], newest["phase"], newest["step"], newest["checksum"]) == (2, "rl", 3, "crc:3")
    assert (newest["reward_mean"], newest["held_out_success"], newest["pinned"]) == (0.3, 0.75, False)
    assert newest["age_s"] == pytest.approx(7200, abs=600)
    assert [versions[number]["served_by"] for number in range(4)] == [[], [], [other], [one]]
    assert [Path(versions[number]["file"] or "gone").name for number in range(4)] == [
        "policy", "step-00000001.safetensors", "gone", "step-00000003.safetensors",
    ]  # fmt: skip
    assert [replica["version"] for replica in json.loads(told)["replicas"]] == ["3", "2", ""]
    assert f"{NOWHERE} did not say what it serves: /weight_info gave no answer" in table.replace("\n", " ")
    assert "2 older ones are not shown; --all shows them" in table


def test_pins_are_set_and_lifted_and_shown_however_old(address: str, run_dir: Path, said: Said) -> None:
    run = ("--run", str(run_dir))
    assert said("pin", "1", *run) == "version 1 is pinned\n"
    assert said("pin", "1", "--bus", address) == "version 1 is pinned already\n"
    assert list(listed(said("list", "--bus", address, "--last", "1", "--json"))) == [3, 1]
    assert json.loads(said("unpin", "1", *run, "--json")) == {"version": 1, "pinned": False}
    assert said("unpin", "1", *run) == "version 1 is not pinned\n"
    assert "version 2 cannot be kept" in said("pin", "2", *run, code=2)
    assert "no weight version 9: there are versions up to 3" in said("pin", "9", *run, code=2)


def test_what_needs_a_broker_says_so_and_what_does_not_goes_on_without(
    address: str, run_dir: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.cli_weights.BUS_LIMIT_S", 0.1)
    (run_dir / "run.toml").write_text((run_dir / "run.toml").read_text().replace(address, "tcp://127.0.0.1:9"))
    error = said("pin", "1", "--run", str(run_dir), code=1)
    assert error.count("\n") == 1
    assert f"no broker answers at tcp://127.0.0.1:9, and this needs one. Start the run, or only: lightning-bus broker --run {run_dir}" in error  # fmt: skip
    assert list(listed(said("list", "--run", str(run_dir), "--engine", NOWHERE, "--json"))) == [3, 2, 1, 0]


def test_checking_compares_what_replicas_hold(said: Said) -> None:
    with serving(Stub("3", a="1").app()) as one, serving(Stub("3", a="2").app()) as other:
        assert "all 1 hold the same 1 tensors" in said("check", "--engine", one)
        assert "replicas of one version differ in 1 things (a): restart them" in said(
            "check", "--engine", one, "--engine", other, code=1
        )
        assert json.loads(said("check", "--engine", one, "--engine", other, "--json", code=1))["differing"] == ["a"]
    assert "whose weights? Give --run RUN" in said("check", code=2)


def test_a_run_without_versions_or_without_a_checkpoint_says_so(address: str, run_dir: Path, said: Said) -> None:
    for path in (run_dir / "checkpoints").iterdir():
        path.unlink()
    assert "nothing has been trained yet" in said("rollback", "1", "--run", str(run_dir), code=2)
    with BrokerProcess(run_dir.parent / "other" / "log") as process:
        assert said("list", "--bus", process.address) == "no version is published yet\n"
