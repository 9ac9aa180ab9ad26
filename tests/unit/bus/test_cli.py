"""The command line: what it prints, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from lightning_bus import cli, cli_tools
from lightning_bus.errors import BrokenError, ConfigError, LightningBusError, StorageError
from lightning_bus.log.codec import encode_event
from lightning_bus.log.store import LogWriter
from lightning_bus.records import Kind, Put, Record, RolloutEvent, Table
from lightning_bus.resources import Resource
from lightning_bus.spans import (
    LOGPROBS,
    MODEL_CALL_NAME,
    OPERATION,
    PROMPT_IDS,
    RESPONSE_IDS,
    Span,
    encode_spans,
    pack_ids,
    pack_logprobs,
)

COMMANDS = [
    "up", "demo", "broker", "gateway", "status", "tail", "spans", "verify", "cursors", "export", "backup", "submit", "wait",
    "cancel", "drain", "resume", "dead list", "dead show", "dead replay", "dead purge",
    "keys create", "keys list", "keys revoke", "replay",
]  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run whose log holds one finished rollout with one model call, and one resource."""
    attributes = {
        OPERATION: MODEL_CALL_NAME, PROMPT_IDS: pack_ids([1, 2]), RESPONSE_IDS: pack_ids([3]), LOGPROBS: pack_logprobs([-0.5]),
    }  # fmt: skip
    call = Span(b"8 bytes.", b"sixteen bytes...", None, "chat", 0, 2_000_000, attributes)
    bodies = [
        (Kind.ROLLOUT, encode_event(RolloutEvent("submit", "queued", task=b"12")), "", 0, 0),
        (Kind.ROLLOUT, encode_event(RolloutEvent("lease", "leased")), "", 0, 1),
        (Kind.SPANS, encode_spans([call]), "gateway-1", 1, 1),
        (Kind.ROLLOUT, encode_event(RolloutEvent("succeed", "succeeded", reward=1.0)), "", 0, 1),
    ]
    records = [
        Record(offset, kind, producer, seq, seq, 0, "r-1", attempt, seq, 0, body)
        for offset, (kind, body, producer, seq, attempt) in enumerate(bodies)
    ]
    resource = msgspec.msgpack.encode(Resource("prompt/system", 3, b"\xa0"))
    records.append(Record(4, Kind.RESOURCE, "trainer-1", 0, 0, 0, "", 0, 0, 0, resource))
    log = LogWriter(tmp_path / "log", map_bytes_max=1 << 24)
    log.commit(records)
    log.close()
    return tmp_path


def exit_code(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    return int(caught.value.code or 0)


def test_verify_exits_0_only_when_all_is_proved(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("verify", str(run_dir), "--json") == 0
    assert json.loads(capsys.readouterr().out)["proved"] is True
    log = LogWriter(run_dir / "log", map_bytes_max=1 << 24)
    log.commit([Record(5, Kind.ROLLOUT, "", 0, 0, 0, "r-2", 0, 0, 0, encode_event(RolloutEvent("submit", "queued")))])
    log.close()
    assert exit_code("verify", str(run_dir)) == 1
    shown = capsys.readouterr().out
    assert "broken" in shown
    assert "r-2 ended 0 times" in shown


def test_tail_shows_the_newest_records(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("tail", "--run", str(run_dir), "-n", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "r-1/1" in lines[0]
    assert "succeed → succeeded  reward 1" in lines[0]
    assert "prompt/system version 3" in lines[1]
    assert exit_code("tail", "--run", str(run_dir), "--json") == 0
    facts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [fact["offset"] for fact in facts] == [0, 1, 2, 3, 4]
    assert facts[0]["event"]["what"] == "submit"


def test_spans_shows_a_rollout_and_refuses_an_unknown_one(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("spans", "r-1", "--run", str(run_dir)) == 0
    assert "2 + 1 tokens" in capsys.readouterr().out
    assert exit_code("spans", "r-1", "--run", str(run_dir), "--json") == 0
    *_, attempt = map(json.loads, capsys.readouterr().out.splitlines())
    (span,) = attempt["spans"]
    assert span["attributes"]["prompt_token_ids"] == [1, 2]
    assert span["attributes"]["response_logprobs"] == [-0.5]
    assert span["span_id"] == b"8 bytes.".hex()
    assert exit_code("spans", "r-9", "--run", str(run_dir)) == 2
    assert "knows no rollout 'r-9'" in capsys.readouterr().err


def test_status_of_a_log_on_disk(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("status", "--run", str(run_dir), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["first_offset"], facts["next_offset"], facts["dead"]) == (0, 5, 0)


def test_cursors_show_how_far_behind_they_are(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = LogWriter(run_dir / "log", map_bytes_max=1 << 24)
    log.commit([Put(Table.CURSORS, b"trainer", msgspec.msgpack.encode(3))])
    log.close()
    assert exit_code("cursors", str(run_dir), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"trainer": {"offset": 3, "behind": 2}}
    assert exit_code("cursors", str(run_dir)) == 0
    assert "trainer" in capsys.readouterr().out


def test_a_backup_is_a_log_like_any_other(
    run_dir: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path_factory.mktemp("elsewhere") / "log"
    assert exit_code("backup", str(run_dir), str(target), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"records": 5, "target": str(target)}
    assert exit_code("tail", "--run", str(target.parent), "-n", "1") == 0
    assert "prompt/system version 3" in capsys.readouterr().out
    assert exit_code("backup", str(run_dir), str(target)) == 2
    assert "not an empty directory" in capsys.readouterr().err


def test_export_writes_rows_and_says_how_many(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_dir / "export"
    assert exit_code("export", str(run_dir), "--out", str(out), "--json") == 0
    assert json.loads(capsys.readouterr().out)["spans"] == 1
    assert "chat" in (out / "spans.jsonl").read_text(encoding="utf-8")
    assert exit_code("export", str(run_dir), "--out", str(out)) == 2
    assert "not an empty directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["up", "nowhere.toml"], "nowhere.toml: no such file"),
        (["up", "nowhere.toml", "--set", "steps=5"], "--set steps=5: write section.key=value"),
        (["broker"], "Give --run RUN.toml or --log DIRECTORY"),
        (["gateway"], "Give --run RUN.toml or --secret FILE"),
        (["verify", "nowhere"], "holds no log"),
        (["status", "--run", "nowhere"], "no such file"),
    ],
)
def test_a_wrong_call_is_one_message_and_exit_code_2(
    argv: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere").mkdir(exist_ok=True) if argv[0] == "verify" else None
    assert exit_code(*argv) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("x"), 2), (StorageError("x"), 74), (BrokenError("x"), 1), (KeyboardInterrupt(), 130)],
)
def test_every_error_leaves_with_its_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(path: Path) -> None:
        raise ExceptionGroup("tasks", [error]) if isinstance(error, LightningBusError) else error

    monkeypatch.setattr(cli_tools, "verify", fail)
    assert exit_code("verify", str(tmp_path)) == code
    if isinstance(error, LightningBusError):
        assert "lightning-bus: x" in capsys.readouterr().err


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv(cli.DEBUG, "1")
    assert exit_code("up", str(tmp_path / "nowhere.toml")) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*command.split(), "--help") == 0
    assert f"Example: lightning-bus {command}" in capsys.readouterr().out


def test_settings_are_toml_or_plain_text() -> None:
    found = cli.parse_settings(["train.steps=5", "run.name=calc", 'run.directory="a b"', "train.sft.lr=1e-3"])
    assert found == {"train": {"steps": 5, "sft": {"lr": 1e-3}}, "run": {"name": "calc", "directory": "a b"}}


def test_a_second_demo_takes_the_next_free_name(tmp_path: Path) -> None:
    assert cli.free_name(tmp_path, "calc-seed0") == "calc-seed0"
    (tmp_path / "calc-seed0").mkdir()
    assert cli.free_name(tmp_path, "calc-seed0") == "calc-seed0-2"
    (tmp_path / "calc-seed0-2").mkdir()
    assert cli.free_name(tmp_path, "calc-seed0") == "calc-seed0-3"
