"""The operator's tools: look at a log or a running broker, prove that promises were kept, copy a log out.

Thin doors: each command is a function of the log or of the client, and a way to print what it found.
"""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lightning_bus.cli_shared import (
    BusOption,
    JsonOption,
    KeyOption,
    RunOption,
    connect,
    named,
    print_json,
    run_directory,
)
from lightning_bus.cli_show import record_facts, record_line, span_facts
from lightning_bus.errors import ConfigError
from lightning_bus.lifecycle import Status
from lightning_bus.log.codec import decode_event
from lightning_bus.log.reader import LogReader, backup
from lightning_bus.log.verify import Report, verify
from lightning_bus.otel.tree import tree_facts, tree_lines
from lightning_bus.records import Kind, Record
from lightning_bus.spans import Span, decode_spans


class Content(StrEnum):
    """What `export` makes of a log."""

    SPANS = "spans"
    CHAT = "chat"
    PREFERENCES = "preferences"
    TRANSITIONS = "transitions"


class Format(StrEnum):
    """What `export` writes."""

    JSONL = "jsonl"
    PARQUET = "parquet"


FOLLOW_S = 0.2  # how often `tail --follow` looks at a log on disk


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (status, tail, spans, cursors, export, backup_command, verify_command):
        name = command.__name__.removesuffix("_command")
        app.command(name)(command)


def status(run: RunOption = None, bus: BusOption = None, key: KeyOption = None, json_: JsonOption = False) -> None:
    """Count rollouts, workers and records: of a running broker, or with --run of a log on this disk.

    Of a broker it also tells how many rollouts are dead letters or delayed, whether it drains, where the log begins,
    and what it has refused since it started.

    Example: lightning-bus status --run runs/calc-seed0
    """
    if run is not None:
        facts = _status_of_log(run_directory(run))
    else:
        with connect(bus, key) as client:
            facts = named(client.status())
    if json_:
        return print_json(facts)
    table = Table(show_header=False)
    refused = facts.pop("refused", {})
    for name, value in {**facts.pop("rollouts"), **facts}.items():
        table.add_row(name.replace("_", " "), str(value))
    for error, count in refused.items():
        table.add_row(f"refused: {error}", str(count))
    Console().print(table)


def tail(
    run: RunOption = None,
    bus: BusOption = None,
    key: KeyOption = None,
    lines: Annotated[int, typer.Option("--lines", "-n", help="How many of the newest records to show first.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as records arrive, until Ctrl-C.")] = False,
    json_: JsonOption = False,
) -> None:
    """Show the newest records of the log, one a line.

    Example: lightning-bus tail --follow
    """
    for record in _records(run, bus, key, lines=lines, follow=follow):
        if json_:
            print(json.dumps(record_facts(record)), flush=True)
        else:
            print(record_line(record), flush=True)


def spans(
    rollout: Annotated[str, typer.Argument(help="Id of a rollout.")],
    run: RunOption = None,
    bus: BusOption = None,
    key: KeyOption = None,
    json_: JsonOption = False,
) -> None:
    """Show everything that a rollout did: its events in order, then the spans of each attempt as a tree.

    Example: lightning-bus spans rl-0-3 --run runs/calc-seed0
    """
    found = [record for record in _records(run, bus, key) if record.rollout_id == rollout]
    if not found:
        raise ConfigError(f"the log knows no rollout {rollout!r}. `lightning-bus tail` shows ids.")
    attempts: dict[int, list[Span]] = {}
    for record in found:
        if record.kind is Kind.SPANS:
            attempts.setdefault(record.attempt, []).extend(decode_spans(record.body))
            continue
        print(json.dumps(record_facts(record)) if json_ else record_line(record))
        if not json_ and record.kind is Kind.ROLLOUT and (error := decode_event(record).error.rstrip()):
            print(textwrap.indent(error, f"{'':>10}"))
    for attempt, of_attempt in attempts.items():
        if json_:
            print(json.dumps({"attempt": attempt, "spans": tree_facts(of_attempt, span_facts)}))
        else:
            print(f"attempt {attempt}", *tree_lines(of_attempt), sep="\n")


def cursors(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's directory, such as runs/calc-seed0.")],
    json_: JsonOption = False,
) -> None:
    """Show where each named reader of the log is, and how many records it has before it.

    What a cursor has not passed is never dropped, so one that nobody moves any more keeps the log from shrinking.

    Example: lightning-bus cursors runs/calc-seed0
    """
    with LogReader(run_directory(run) / "log") as reader:
        end, at = reader.end_offset, reader.cursors()
    if json_:
        return print_json({name: {"offset": offset, "behind": end - offset} for name, offset in at.items()})
    table = Table("cursor", "offset", "behind")
    for name, offset in at.items():
        table.add_row(name, str(offset), str(end - offset))
    Console().print(table if at else "no cursors")


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's directory, such as runs/calc-seed0.")],
    out: Annotated[Path, typer.Option(help="Directory to write to; it must be empty or new.")],
    as_: Annotated[
        Content,
        typer.Option(
            "--as",
            help="spans: everything, as tables. chat: conversations, for SFT. preferences: pairs, for DPO. transitions: "
            "model calls with rewards and advantages, by the run's \\[rewards] and \\[credit].",
        ),
    ] = Content.SPANS,
    format_: Annotated[Format, typer.Option("--format", help="JSON Lines, or Parquet for data frames.")] = Format.JSONL,
    return_min: Annotated[float | None, typer.Option(help="chat: only rollouts that earned at least this.")] = None,
    margin_min: Annotated[float, typer.Option(help="preferences: how far two returns must differ.")] = 0.0,
    scores: Annotated[
        Path | None, typer.Option(help="chat, preferences: returns of this replay, not those recorded.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="All but spans: only rollouts with this label.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Write a log as rows, for other tools to read. Works while the run goes on.

    Example: lightning-bus export runs/calc-seed0 --as chat --return-min 1 --out calc-sft
    """
    from lightning_bus.cli_replay import export_data_set, labels_of
    from lightning_bus.log.export import export as export_log

    directory = run_directory(run)
    with LogReader(directory / "log") as reader, _progress(json_) as progress:
        task = progress.add_task("exporting", total=None)

        def tell(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        if as_ is Content.SPANS:
            facts = export_log(reader, out, format_.value, tell)._asdict()
        else:
            facts = export_data_set(
                reader, directory, out, as_.value, format_.value, return_min=return_min, margin_min=margin_min,
                scores=scores, labels=labels_of(label), progress=tell,
            )  # fmt: skip
    _print_result(facts, json_)


def backup_command(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's directory, such as runs/calc-seed0.")],
    target: Annotated[Path, typer.Argument(help="Directory for the copy; it must be empty or new.")],
    json_: JsonOption = False,
) -> None:
    """Copy a log, whole and of one moment, also while a broker writes it. The copy is a log like any other.

    Example: lightning-bus backup runs/calc-seed0 /mnt/other-disk/calc-seed0/log
    """
    with _progress(json_) as progress:
        progress.add_task("copying", total=None)
        end = backup(run_directory(run) / "log", target)
    _print_result({"records": end, "target": str(target)}, json_)


def verify_command(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's directory, such as runs/calc-seed0.")],
    json_: JsonOption = False,
) -> None:
    """Prove from the log alone that the promises were kept. Exit code 0 only when all is proved, 1 otherwise.

    Example: lightning-bus verify runs/calc-seed0
    """
    report = verify(run_directory(run))
    if json_:
        print_json(report.to_builtins())
    else:
        _print_report(report)
    raise typer.Exit(0 if report.proved else 1)


def _records(
    run: Path | None, bus: str | None, key: Path | None, *, lines: int | None = None, follow: bool = False
) -> Iterator[Record]:
    """Yield records of a log on this disk or of a broker: all, or the newest `lines`, and then what comes."""
    if run is not None:
        with LogReader(run_directory(run) / "log") as reader:
            offset = reader.first_offset if lines is None else max(reader.first_offset, reader.end_offset - lines)
            while True:
                for record in reader.records(offset):
                    offset = record.offset + 1
                    yield record
                if not follow:
                    return
                time.sleep(FOLLOW_S)
    with connect(bus, key) as client:
        known = client.status()
        offset = known.first_offset if lines is None else max(known.first_offset, known.next_offset - lines)
        while follow or offset < known.next_offset:
            records, offset, _ = client.fetch(offset, bytes_max=4 << 20, wait_s=10.0 if follow else 0.0)
            yield from records


def _status_of_log(directory: Path) -> dict[str, Any]:
    with LogReader(directory / "log") as reader:
        counts: dict[str, int] = {}
        dead = 0
        for rollout in reader.rollouts():
            counts[rollout.status.value] = counts.get(rollout.status.value, 0) + 1
            dead += rollout.status is Status.FAILED and not rollout.replayed_as and not rollout.purged
        newest: dict[str, int] = {}
        for resource in reader.resources():
            newest[resource.name] = max(resource.version, newest.get(resource.name, 0))
        return {
            "rollouts": counts, "dead": dead, "first_offset": reader.first_offset, "next_offset": reader.end_offset,
            **newest,
        }  # fmt: skip


def _progress(json_: bool) -> Progress:
    """A bar on stderr for people: stdout is for what was asked."""
    return Progress(console=Console(stderr=True, quiet=json_), transient=True)


def _print_result(facts: dict[str, Any], json_: bool) -> None:
    print_json(facts) if json_ else print("  ".join(f"{name} {value}" for name, value in facts.items()))


def _print_report(report: Report) -> None:
    table = Table(title=report.log, title_justify="left")
    for heading in ("", "promise", "looked at", "offenders"):
        table.add_column(heading, justify="right" if heading == "offenders" else "left")
    for check in report.checks:
        proved = "[green]proved[/green]" if check.looked_at else "[yellow]nothing[/yellow]"
        mark = proved if check.proved else "[red]broken[/red]"
        text = "\n".join([check.promise, *([check.note] if check.note else []), *(f"  {what}" for what in check.first)])
        table.add_row(mark, text.replace("[", r"\["), f"{check.looked_at} {check.unit}", str(check.offenders))
    Console().print(table)
