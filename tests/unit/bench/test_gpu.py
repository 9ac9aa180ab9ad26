"""bench.gpu runs from end to end on tiny shapes, so that it works at the first call where there is a GPU."""

import subprocess
import sys
import time

import pytest
import torch

from bench import gpu
from bench.gpu_parts import DisagreesError, Here, check_close
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
    matched = {case.name for case in CASES if case.recompute and case.micro_batches == 2 and case.row_tokens is None}
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.gpu"])
    with pytest.raises(SystemExit) as exited:
        gpu.main()
    assert exited.value.code == 2
    assert "finds no GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_call_writes_rows_as_they_come_and_one_object_last(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--json", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert '"errors": 0' in done.stdout.splitlines()[-1]
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) > len(CASES)
