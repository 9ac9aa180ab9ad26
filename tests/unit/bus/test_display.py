"""What people see of a run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import anyio
import pytest
from rich.console import Console

from lightning_bus.display import (
    Display,
    MetricsTail,
    Progress,
    View,
    clock,
    line,
    render,
    sparkline,
    summary_table,
    tokens_generated,
    written,
)


def text_of(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(renderable)
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def trained_view() -> View:
    progress = Progress()
    for metrics in (
        {"phase": "eval", "step": 0, "held_out_success": 0.01},
        {"phase": "sft", "step": 9, "version": 1},
        {"phase": "eval", "step": 9, "held_out_success": 0.55},
        {"phase": "rl", "step": 1, "steps": 40, "reward_mean": 0.5, "version": 2, "staleness_mean": 0.0},
        {"phase": "rl", "step": 2, "steps": 40, "reward_mean": 0.75, "version": 3, "staleness_mean": 1.25},
    ):
        progress.take(metrics)
    rollouts = {"succeeded": 120, "leased": 16, "queued": 8, "failed": 2, "cancelled": 0}
    return View("calc", 92.0, progress, rollouts, 2, 1234.5, ["1:20 worker-1 died (signal 9), restarting"])


def test_the_panel_shows_where_a_run_stands() -> None:
    shown = text_of(render(trained_view()))
    for fact in (
        "calc · 1:32", "120 done, 16 running, 8 queued, 2 failed", "rl step 2/40", "0.75", "0.01 → 0.55", "version 3",
        "staleness 1.2", "1,234 tokens/s", "worker-1 died (signal 9), restarting",
    ):  # fmt: skip
        assert fact in shown


def test_the_line_says_the_same() -> None:
    assert line(trained_view()) == (
        "1:32 · rl step 2/40 · reward 0.75 · held-out 0.55 · version 3 · staleness 1.2 · 1,234 tokens/s · "
        "120 done, 16 running, 8 queued, 2 failed"
    )


def test_a_run_that_has_not_begun_is_shown_too() -> None:
    assert line(View("calc")) == "0:00 · starting · version – · no broker yet"
    assert "no broker yet" in text_of(render(View("calc")))


def test_an_evaluation_does_not_change_the_phase() -> None:
    progress = trained_view().progress
    progress.take({"phase": "eval", "step": 3, "held_out_success": 0.9})
    assert (progress.phase, progress.step, progress.held_out) == ("rl", 2, [0.01, 0.55, 0.9])


def test_each_phase_has_its_own_curve() -> None:
    progress = trained_view().progress
    assert progress.rewards == [0.5, 0.75]
    progress.take({"phase": "sft", "step": 0, "reward_mean": 0.1})
    assert progress.rewards == [0.1]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([], ""),
        ([0.0], "▁"),
        ([0.0, 0.5, 1.0], "▁▅█"),
        ([-1.0, 1.0], "▁█"),
        ([0.0, 0.0, 1.0, 1.0], "▁█"),
        ([0.0, 5.0], "▁█"),
    ],
)
def test_a_sparkline_keeps_its_scale_and_its_whole_history(values: list[float], shown: str) -> None:
    assert sparkline(values, 3 if len(values) < 4 else 2) == shown


def test_metrics_are_read_once_and_only_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.read() == []
    path.write_text('{"step": 1}\n{"step"')
    assert tail.read() == [{"step": 1}]
    with path.open("a") as file:
        file.write(': 2}\nnot json\n[3]\n{"step": 4}\n')
    assert tail.read() == [{"step": 2}, {"step": 4}]
    assert tail.read() == []


def test_tokens_are_counted_over_all_series() -> None:
    page = '# TYPE vllm:generation_tokens_total counter\nvllm:generation_tokens_total{model="a"} 10.0\nvllm:generation_tokens_total{model="b"} 2.5e1\n'
    assert tokens_generated(page) == 35.0
    assert tokens_generated("vllm:generation_tokens_created 1.0\n") is None


def test_time_is_shown_as_on_a_stop_watch() -> None:
    assert [clock(0), clock(61.9), clock(3600)] == ["0:00", "1:01", "60:00"]


def plain_display(directory: Path) -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    address = "tcp://127.0.0.1:9"  # nobody is there, and nobody needs to be
    return Display(
        "calc", directory, bus=address, engine="http://127.0.0.1:9", console=Console(file=out, width=80)
    ), out


def test_without_a_terminal_there_are_lines_and_events(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"phase": "rl", "step": 7, "reward_mean": 0.25}\n')
    display, out = plain_display(tmp_path)

    async def watch_until_a_line() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(display.run)
            while "\n" not in out.getvalue():
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()

    anyio.run(watch_until_a_line)
    display.event("worker-1 died (signal 9), restarting")
    assert out.getvalue() == (
        "0:00 · rl step 7 · reward 0.25 · version – · no broker yet\nworker-1 died (signal 9), restarting\n"
    )


def test_the_end_shows_the_summary_and_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"success_after_rl": 0.98, "seed": 3}))
    (tmp_path / "run.toml").write_text("")
    display, out = plain_display(tmp_path)
    display.finish()
    assert "success after rl │ 0.980" in out.getvalue()
    assert f"  {tmp_path / 'run.toml'}\n" in out.getvalue()
    assert written(tmp_path) == [tmp_path / "summary.json", tmp_path / "run.toml"]


def test_a_missing_summary_is_said(tmp_path: Path) -> None:
    display, out = plain_display(tmp_path)
    display.finish()
    assert "no readable" in out.getvalue()


def test_the_summary_is_a_table_for_people() -> None:
    assert "rollouts failed │ 0" in text_of(summary_table({"rollouts_failed": 0}))
