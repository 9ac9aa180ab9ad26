"""`lightning-bus keys`: what it prints, and that what it prints works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_bus import cli
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
