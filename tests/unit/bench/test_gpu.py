"""bench.gpu runs from end to end on tiny shapes, so that it works at the first call where there is a GPU."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from bench import gpu
from bench.gpu_parts import ContextLostError, DisagreesError, Here, check_close
from bench.gpu_train import CASES


@pytest.fixture
def here():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Here(torch.device("cpu"), tiny=True, until_s=time.monotonic() + 100)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("phase", gpu.PHASES)
def test_every_case_of_a_phase_is_measured_or_says_why_not(here, phase):
    rows = list(gpu.PHASES[phase][0](here))
    assert not [row for row in rows if "error" in row or "out_of_memory" in row]
    assert [row for row in rows if "skipped" not in row]
    if phase == "train":
        assert {case.name for case in CASES} <= {row["case"] for row in rows}


def test_the_phases_fit_into_nine_minutes():
    assert sum(seconds + gpu.GRACE_S for _, seconds in gpu.PHASES.values()) < 9 * 60


def test_each_published_row_has_a_matched_case():
    matched = {
        case.name
        for case in CASES
        if case.activations == "recompute" and case.micro_batches == 2 and case.row_tokens is None and not case.compiled
    }
    assert set(gpu.PUBLISHED) <= matched


def test_what_does_not_fit_disagrees_or_comes_too_late_is_a_row(here):
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def wrong():
        check_close(torch.ones(3), torch.zeros(3) + 2, 0.01, "output")
        return {}

    assert here.case("a", out_of_memory)["out_of_memory"]
    assert "relative error" in here.case("b", wrong)["error"]
    assert "needed" in here.case("c", dict, needs_s=1e6)["skipped"]


def test_a_result_that_is_not_finite_disagrees():
    with pytest.raises(DisagreesError, match="relative error nan"):
        check_close(torch.tensor([float("nan")]), torch.ones(1), 1.0, "output")


def test_a_case_that_beats_the_published_one_is_told_beside_it():
    rows = [
        {"phase": "train", "case": name, "tokens_per_s": 2.0 * row["tokens_per_s"]}
        for name, row in gpu.PUBLISHED.items()
    ]
    rows[0] = {"phase": "train", "case": rows[0]["case"], "out_of_memory": True}
    summary = gpu.summarised(rows, tiny=False)
    assert list(summary["published_ratios"].values()) == [None, 2.0, 2.0, 2.0, 2.0]
    assert summary["ok"] is False
    name = list(gpu.PUBLISHED)[1]
    assert summary["best"][name]["case"] == name
    assert summary["best"][rows[0]["case"]] is None


def processes(monkeypatch, *scripts):
    """Let each process that a phase begins say what is in its script; return what they were told to leave out."""
    told, left = [], list(scripts)

    def process_rows(phase, done, seconds, *, tiny):
        told.append(list(done))
        yield from left.pop(0)

    monkeypatch.setattr(gpu, "process_rows", process_rows)
    return told


def begun(name, **row):
    return [{"begun": name}, {"case": name, **row}] if row else [{"begun": name}]


def test_a_phase_goes_on_behind_the_case_that_its_process_died_in(monkeypatch):
    told = processes(
        monkeypatch,
        [*begun("a", ms=1), *begun("b"), {"ended": "was killed after 3 s"}],
        [*begun("a", ms=9), *begun("c", error="CUDA error: an illegal memory access"), {"ended": "lost the device"}],
        begun("d", ms=4),
    )
    rows = list(gpu.phase_rows("train", tiny=True))
    assert told == [[], ["a", "b"], ["a", "b", "c"]]
    assert [row["case"] for row in rows] == ["a", "b", "c", "d"]
    assert (
        rows[0]["ms"] == 1 and rows[1]["error"] == "its process was killed after 3 s" and "illegal" in rows[2]["error"]
    )


def test_a_phase_that_does_not_come_to_its_first_case_is_not_begun_again(monkeypatch):
    told = processes(monkeypatch, [{"ended": "failed; see above after 1 s"}])
    (row,) = gpu.phase_rows("head", tiny=True)
    assert told == [[]] and "failed" in row["error"]


def test_a_device_that_answers_nothing_any_more_ends_the_process_with_its_row(monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    here = Here(torch.device("cpu"), tiny=True, until_s=time.monotonic() + 100, done=frozenset(["a"]))
    assert here.case("a", broken) == {"case": "a", "skipped": "done"}
    monkeypatch.setattr(Here, "lost", lambda self: True)
    with pytest.raises(ContextLostError) as lost:
        here.case("b", broken)
    assert lost.value.args[0]["case"] == "b"


def test_who_stops_the_call_gets_what_there_is(monkeypatch, capsys):
    def phase_rows(phase, *, tiny):
        yield {"phase": phase, "case": "a", "ms": 1}
        os.kill(os.getpid(), signal.SIGTERM)
        yield {"phase": phase, "case": "b", "ms": 1}

    monkeypatch.setattr(gpu, "phase_rows", phase_rows)
    monkeypatch.setattr("sys.argv", ["bench.gpu", "--json", "--tiny"])
    monkeypatch.delenv("OUT", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        gpu.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["interrupted"] and [row["case"] for row in summary["rows"]] == ["a"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.gpu"])
    with pytest.raises(SystemExit) as exited:
        gpu.main()
    assert exited.value.code == 2
    assert "finds no GPU" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)  # torch is loaded twice, which a busy machine takes minutes for
def test_a_call_writes_rows_as_they_come_and_one_object_last(tmp_path):
    phases = ["copy"]
    command = [sys.executable, "-m", "bench.gpu", "--json", "--tiny", "--out", str(tmp_path), "--phases", *phases]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["errors"] == 0 and {row["phase"] for row in summary["rows"]} == set(phases)
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == summary["rows"]
