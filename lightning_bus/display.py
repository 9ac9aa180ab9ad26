"""What `up` shows while a run lasts, and what it prints at the end.

    Display(…).run()  looks at the bus, metrics.jsonl and the engine twice a second, until cancelled
    render(view)      the live panel of a terminal         ┐ pure: a view in, something to print out
    line(view)        one progress line for everything else ┘

The display only looks: a run goes the same way with nobody watching, and nothing it fails to read is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import anyio
import httpx
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_bus.client import Client
from lightning_bus.clock import monotonic_s
from lightning_bus.errors import LightningBusError

LOOK_S = 0.5
LINE_S = 5.0  # at most one progress line in this time where there is no terminal
EVENTS_SHOWN = 4
SPARKS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 48
GENERATED = re.compile(r"^vllm:generation_tokens_total(?:\{[^}]*\})?\s+(\S+)", re.MULTILINE)
WRITTEN = (
    "summary.json",
    "reward.png",
    "metrics.jsonl",
    "checkpoint",
    "checkpoints",
    "policy",
    "run.toml",
    "log",
    "logs",
)


@dataclass(slots=True)
class Progress:
    """What the trainer's metrics tell: the sum of the lines of metrics.jsonl so far."""

    phase: str = "starting"
    step: int = 0
    steps: int = 0  # how many are planned; 0 when the trainer does not say
    version: int | None = None
    staleness: float | None = None
    rewards: list[float] = field(default_factory=list[float])  # mean reward of each step of the current phase
    held_out: list[float] = field(default_factory=list[float])  # success of each evaluation, in order

    def take(self, metrics: Mapping[str, Any]) -> None:
        """Learn from one line of metrics.jsonl; keys that are missing change nothing."""
        if "held_out_success" in metrics:
            self.held_out.append(float(metrics["held_out_success"]))
        phase = str(metrics.get("phase", self.phase))
        if phase != "eval":
            if phase != self.phase:
                self.rewards, self.steps = [], 0
            self.phase = phase
            self.step = int(metrics.get("step", self.step))
            self.steps = int(metrics.get("steps", self.steps))
            if metrics.get("reward_mean") is not None:
                self.rewards.append(float(metrics["reward_mean"]))
        if metrics.get("version") is not None:
            self.version = int(metrics["version"])
        if metrics.get("staleness_mean") is not None:
            self.staleness = float(metrics["staleness_mean"])


@dataclass(slots=True)
class View:
    """Everything that is shown, at one moment."""

    name: str
    elapsed_s: float = 0.0
    progress: Progress = field(default_factory=Progress)
    rollouts: dict[str, int] = field(default_factory=dict[str, int])  # by status, as the broker counts
    workers: int = 0
    tokens_per_s: float | None = None
    events: list[str] = field(default_factory=list[str])


class MetricsTail:
    """Reads what was added to metrics.jsonl since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def read(self) -> list[dict[str, Any]]:
        """Return the new complete lines. A line still being written waits for its end; one that is no JSON object is passed over."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        found: list[dict[str, Any]] = []
        for text in whole.splitlines():
            try:
                value = json.loads(text)
            except ValueError:
                continue
            if isinstance(value, dict):
                found.append(cast(dict[str, Any], value))
        return found


class Display:
    """Shows one run until it is cancelled: live in a terminal, as plain lines elsewhere."""

    def __init__(
        self, name: str, directory: Path, *, bus: str, engine: str, console: Console, key: Path | None = None
    ) -> None:
        self.view = View(name)
        self._console = console
        self._directory = directory
        self._bus = bus
        self._key = key
        self._engine = engine
        self._tail = MetricsTail(directory / "metrics.jsonl")
        self._started_s = monotonic_s()
        self._tokens_last: tuple[float, float] | None = None  # (when, how many)
        self._line_next_s = 0.0

    def event(self, what: str) -> None:
        """Show something that happened, such as a restart."""
        self.view.events.append(f"{clock(monotonic_s() - self._started_s)} {what}")
        if not self._console.is_terminal:
            self._console.print(what, markup=False, highlight=False, soft_wrap=True)

    async def run(self) -> None:
        """Look and show, until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._follow_broker)
            tasks.start_soon(self._follow_engine)
            if self._console.is_terminal:
                with Live(render(self.view), console=self._console, auto_refresh=False, transient=True) as live:
                    while True:
                        self._look()
                        live.update(render(self.view), refresh=True)
                        await anyio.sleep(LOOK_S)
            while True:
                evaluated = self._look()
                if evaluated or monotonic_s() >= self._line_next_s:
                    self._line_next_s = monotonic_s() + LINE_S
                    self._console.print(line(self.view), markup=False, highlight=False, soft_wrap=True)
                await anyio.sleep(LOOK_S)

    def finish(self) -> None:
        """Print what the run came to and where everything is."""
        self._look()
        self._console.print(line(self.view), markup=False, highlight=False, soft_wrap=True)
        try:
            summary = json.loads((self._directory / "summary.json").read_bytes())
        except (OSError, ValueError):
            self._console.print(f"no readable {self._directory / 'summary.json'}", markup=False, soft_wrap=True)
        else:
            self._console.print(summary_table(summary))
        for path in written(self._directory):
            self._console.print(f"  {path}", markup=False, highlight=False, soft_wrap=True)

    def _look(self) -> bool:
        """Bring the view up to date from the metrics; True when an evaluation is among them."""
        evaluations = len(self.view.progress.held_out)
        for metrics in self._tail.read():
            self.view.progress.take(metrics)
        self.view.elapsed_s = monotonic_s() - self._started_s
        return len(self.view.progress.held_out) > evaluations

    async def _follow_broker(self) -> None:
        while True:
            try:
                async with Client(self._bus, role="admin", key=self._key, limit_s=5.0) as client:
                    while True:
                        status = await client.status()
                        self.view.rollouts = status.rollouts
                        self.view.workers = status.workers
                        await anyio.sleep(LOOK_S)
            except LightningBusError:
                await anyio.sleep(LOOK_S)  # it is starting, or starting again

    async def _follow_engine(self) -> None:
        async with httpx.AsyncClient(timeout=2.0, trust_env=False) as http:
            while True:
                try:
                    text = (await http.get(f"{self._engine}/metrics")).text
                except httpx.HTTPError:
                    text = ""
                self._take_tokens(tokens_generated(text), monotonic_s())
                await anyio.sleep(2.0)

    def _take_tokens(self, tokens: float | None, now_s: float) -> None:
        if tokens is None:
            self._tokens_last = self.view.tokens_per_s = None
            return
        if self._tokens_last is not None and tokens >= self._tokens_last[1]:  # an engine that restarted counts from 0
            self.view.tokens_per_s = (tokens - self._tokens_last[1]) / max(1e-9, now_s - self._tokens_last[0])
        self._tokens_last = (now_s, tokens)


# -- pure: from what is known to what is shown --------------------------------------------------------------------


def render(view: View) -> RenderableType:
    """Return the live panel."""
    progress = view.progress
    facts = Table.grid(padding=(0, 2))
    facts.add_row("rollouts", Text(_rollouts(view.rollouts)))
    facts.add_row("phase", Text(_phase(progress)))
    if progress.rewards:
        curve = Text(sparkline(progress.rewards, SPARKLINE_WIDTH), style="green")
        facts.add_row("reward", Text.assemble(curve, f"  {progress.rewards[-1]:.2f}"))
    if progress.held_out:
        facts.add_row("held-out", Text(" → ".join(f"{success:.2f}" for success in progress.held_out), style="bold"))
    facts.add_row("policy", Text(_policy(view)))
    events = [Text(event, style="yellow") for event in view.events[-EVENTS_SHOWN:]]
    return Panel(Group(facts, *events), title=f"{view.name} · {clock(view.elapsed_s)}", title_align="left")


def line(view: View) -> str:
    """Return the same as one line of plain text."""
    progress = view.progress
    parts = [clock(view.elapsed_s), _phase(progress)]
    if progress.rewards:
        parts.append(f"reward {progress.rewards[-1]:.2f}")
    if progress.held_out:
        parts.append(f"held-out {progress.held_out[-1]:.2f}")
    return " · ".join([*parts, _policy(view), _rollouts(view.rollouts)])


def sparkline(values: list[float], width: int) -> str:
    """Return the values, from 0 (or their least) to 1 (or their greatest), as at most `width` bars.

    More values than bars are averaged, so that the whole history stays in sight.
    """
    if not values:
        return ""
    bars = min(width, len(values))
    edges = [len(values) * n // bars for n in range(bars + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(0.0, *means), max(1.0, *means)
    return "".join(SPARKS[min(len(SPARKS) - 1, int((mean - low) / (high - low) * len(SPARKS)))] for mean in means)


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return summary.json as a table for people."""
    table = Table(show_header=False, title="summary", title_justify="left")
    for key, value in summary.items():
        table.add_row(key.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value))
    return table


def written(directory: Path) -> list[Path]:
    """Return what a run wrote, for a reader who looks for it."""
    return [directory / name for name in WRITTEN if (directory / name).exists()]


def tokens_generated(metrics: str) -> float | None:
    """Return the engine's count of generated tokens from its Prometheus page; None when it does not say."""
    counts = [float(count) for count in GENERATED.findall(metrics)]
    return sum(counts) if counts else None


def clock(seconds: float) -> str:
    """Return minutes and seconds, as on a stop-watch."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _rollouts(counts: Mapping[str, int]) -> str:
    if not counts:
        return "no broker yet"
    get = counts.get
    text = (
        f"{get('succeeded', 0)} done, {get('leased', 0)} running, {get('queued', 0)} queued, {get('failed', 0)} failed"
    )
    return text + (f", {get('cancelled', 0)} cancelled" if get("cancelled", 0) else "")


def _phase(progress: Progress) -> str:
    if progress.phase == "starting":
        return progress.phase
    return f"{progress.phase} step {progress.step}" + (f"/{progress.steps}" if progress.steps else "")


def _policy(view: View) -> str:
    parts = ["version –" if view.progress.version is None else f"version {view.progress.version}"]
    if view.progress.staleness is not None:
        parts.append(f"staleness {view.progress.staleness:.1f}")
    if view.tokens_per_s is not None:
        parts.append(f"{view.tokens_per_s:,.0f} tokens/s")
    return " · ".join(parts)
