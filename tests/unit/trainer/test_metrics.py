"""metrics.jsonl: whole lines, each said once, whatever dies in between."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from trainer.metrics import MetricsFile


def line(step: int, phase: str = "rl", **values: Any) -> dict[str, Any]:
    return {"phase": phase, "step": step, "version": step, "wall_s": 0.1, **values}


def test_lines_are_read_back_in_order_with_six_digits(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "deep" / "metrics.jsonl")
    metrics.write(line(1, loss=0.123456789))
    metrics.write(line(2, dropped={"stale": 1}))
    assert list(metrics.lines()) == [line(1, loss=0.123457), line(2, dropped={"stale": 1})]


def test_a_line_cut_short_by_a_crash_is_dropped_and_said_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).write(line(1))
    with path.open("a") as file:
        file.write('{"phase": "rl", "step": 2, "vers')
    metrics = MetricsFile(path)
    assert list(metrics.lines()) == [line(1)]
    metrics.write(line(2))
    assert list(MetricsFile(path).lines()) == [line(1), line(2)]


def test_a_disk_that_is_full_when_the_run_goes_on_costs_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).write(line(1))
    with path.open("a") as file:
        file.write('{"phase": "rl", "step": 2, "vers')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        assert list(MetricsFile(path).lines()) == [line(1)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_resumed_run_does_not_say_a_thing_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).write(line(1, loss=1.0))
    again = MetricsFile(path)
    again.write(line(1, loss=2.0))
    again.write(line(1, phase="eval"))
    assert list(again.lines()) == [line(1, loss=1.0), line(1, phase="eval")]
