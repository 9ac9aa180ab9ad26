"""`lightning-bus keys`: what it prints, and that what it prints works."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path

import pytest

from lightning_bus import cli, tokens
from lightning_bus.daemon import run_secret
from lightning_bus.keys import ClientKey, KeyRing


def exit_code(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    return int(caught.value.code or 0)


def test_a_key_goes_from_create_to_list_to_revoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--dir", str(tmp_path))
    assert exit_code("keys", "create", "gpu-7", "--role", "worker", *where) == 0
    said = capsys.readouterr().out
    assert f"wrote {tmp_path / 'gpu-7.key'}" in said
    assert "export LIGHTNING_BUS_KEY=gpu-7.key" in said
    key = ClientKey.load(tmp_path / "gpu-7.key")
    assert KeyRing.load(tmp_path).lookup(key.public) is not None
    assert exit_code("keys", "list", *where, "--json") == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["role"], listed["public"], listed["revoked"]) == (
        "gpu-7", "worker", key.public, False,
    )  # fmt: skip
    assert exit_code("keys", "revoke", "gpu-7", *where) == 0
    assert "revoked gpu-7 (worker, " in capsys.readouterr().out
    assert exit_code("keys", "list", *where) == 0
    assert "revoked" in capsys.readouterr().out
    assert KeyRing.load(tmp_path).lookup(key.public) is None


def test_a_run_has_its_keys_in_its_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("keys", "create", "me", "--role", "admin", "--run", str(tmp_path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["file"] == str(tmp_path / "keys" / "me.key")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(
        '[run]\nname = "r"\n[policy]\nmodel = "m"\n[gateway]\nbind = "0.0.0.0:4751"\n[worker]\nagent = "a:b"\n[train]\ntasks = "t"\nheld_out = "h"\n'
    )
    run_secret(tmp_path)
    return tmp_path


def test_an_api_key_names_its_holder_belongs_to_no_rollout_and_ends(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("keys", "api", "alice@example.org", "--run", str(run_dir), "--expires", "2h", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["name"], told["base_url"]) == ("alice@example.org", "http://127.0.0.1:4751/v1")
    claims = tokens.check(run_secret(run_dir), told["api_key"], time.time())
    assert (claims.rollout_id, claims.attempt, claims.name) == ("", 0, "alice@example.org")
    assert 7100 < claims.expires_wall_s - time.time() <= 7200
    assert datetime.fromisoformat(told["expires"]).timestamp() == int(claims.expires_wall_s)
    assert exit_code("keys", "api", "bob", "--run", str(run_dir), "--expires", "never", "--model", "policy@3") == 0
    said = capsys.readouterr().out
    assert "OPENAI_BASE_URL=http://127.0.0.1:4751/v1\nOPENAI_API_KEY=" in said
    assert "good for ever" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("a b",), "is no name for a key"),
        (("a", "--expires", "soon"), "--expires 'soon': a number and a unit"),
        (("a", "--expires", "0d"), "a number and a unit"),
    ],
)
def test_an_api_key_that_cannot_be_is_said_in_one_line(
    run_dir: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    assert exit_code("keys", "api", *argv, "--run", str(run_dir)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_run_that_never_started_has_no_api_keys(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "secret").unlink()
    assert exit_code("keys", "api", "a", "--run", str(run_dir / "run.toml")) == 2
    assert "has no secret yet. Start the run first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("create", "a", "--role", "boss"), "choose one of worker, agent"),
        (("create", "a/b", "--role", "worker"), "no name for a key"),
        (("revoke", "a"), "holds no key 'a'"),
        (("list",), "holds no server.key"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    assert exit_code("keys", *argv, "--dir", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
