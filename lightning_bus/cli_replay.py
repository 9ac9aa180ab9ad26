"""Recorded runs scored again, and data sets made of them: `replay`, and what `export --as` makes beside tables.

Thin doors to `lightning_bus.rescoring`. Both only read the log, and work while its run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio
import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from lightning_bus.adapters import RewardsSection
from lightning_bus.adapters.differences import Differences, GroupChange
from lightning_bus.cli_shared import JsonOption, print_json, run_directory
from lightning_bus.config import CreditSection, Section, load_section
from lightning_bus.errors import ConfigError
from lightning_bus.log.reader import LogReader
from lightning_bus.log.tables import Format
from lightning_bus.rescoring import (
    Replayed,
    Rescoring,
    Returns,
    Verdicts,
    export_chat,
    export_preferences,
    read_scores,
    read_verdicts,
    returns_by,
    returns_from,
)
from lightning_bus.rescoring import replay as replay_log

S = TypeVar("S", bound=Section)


class FileFormat(StrEnum):
    """What files are written as."""

    JSONL = "jsonl"
    PARQUET = "parquet"


class CreditRule(StrEnum):
    """Rules that need nothing but the log; see `lightning_bus.adapters.credit`."""

    IDENTICAL = "identical"
    TURN = "turn"
    LEAVE_ONE_OUT = "leave_one_out"


class Estimator(StrEnum):
    """How rollouts of a group are compared; see `lightning_bus.adapters.advantages`."""

    GRPO = "grpo"
    DR_GRPO = "dr_grpo"
    RLOO = "rloo"
    MAXRL = "maxrl"


RunArgument = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's directory, such as runs/calc-seed0.")]
LabelOption = Annotated[
    list[str] | None,
    typer.Option(
        "--label", metavar="KEY=VALUE", help="Only rollouts with this label, such as phase=train. Repeatable."
    ),
]
FormatOption = Annotated[FileFormat, typer.Option("--format", help="JSON Lines, or Parquet for data frames.")]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(replay)


def replay(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write to, empty or new. Default: write nothing, only compare.")
    ] = None,
    reward: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="Reward hook, called with each finished rollout.")
    ] = None,
    rules: Annotated[
        Path | None, typer.Option(help="TOML file whose \\[rewards] and \\[credit] are used. What it has not: the run's own.")
    ] = None,
    credit: Annotated[CreditRule | None, typer.Option(help="How rewards are given to calls.")] = None,
    relevance: Annotated[float | None, typer.Option(help="Of --credit turn: earlier turns' share of the outcome.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Discount for each turn to the end.")] = None,
    estimator: Annotated[Estimator | None, typer.Option(help="How rollouts of a group are compared.")] = None,
    agent: Annotated[
        list[str] | None, typer.Option(help="Train calls of these agents: a name, a path or /regex/. Repeatable.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Compare with this earlier replay, not with what was recorded.")] = None,
    label: LabelOption = None,
    ask_again: Annotated[
        bool, typer.Option("--ask-again", help="Ask the hook about rollouts, too, whose verdict by the same code is in the log.")
    ] = False,
    limit_s: Annotated[float | None, typer.Option(help="How long the hook may take for one rollout.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="How many processes run the hook.")] = None,
    memory_mb: Annotated[int | None, typer.Option(min=1, help="Address space of each of them.")] = None,
    format_: FormatOption = FileFormat.JSONL,
    json_: JsonOption = False,
) -> None:  # fmt: skip
    """Score a recorded run again, with another reward or another credit rule, and show what changed.

    Writes new transitions and scores; touches neither the log nor any agent. The hook runs in a process of its own: one
    that raises or hangs leaves that rollout out, with the reason counted. What the same hook said when the run was
    trained is in the log and is not asked for again.

    Example: lightning-bus replay runs/calc-seed0 --reward my_rewards:reward --credit turn --out calc-turn
    """
    directory = run_directory(run)
    own = load_section(directory / "run.toml", "rewards", RewardsSection)
    own_credit = load_section(directory / "run.toml", "credit", CreditSection)
    source = directory / "run.toml" if rules is None else rules
    if rules is not None and not rules.is_file():
        raise ConfigError(f"{rules}: no such file. --rules wants a TOML file with [rewards] or [credit].")
    rewards = _changed(
        load_section(source, "rewards", RewardsSection, own),
        hook=reward, hook_limit_s=limit_s, hook_processes=processes,
        hook_memory_bytes=None if memory_mb is None else memory_mb << 20,
    )  # fmt: skip
    how = Rescoring(
        rewards=rewards,
        credit=_changed(
            load_section(source, "credit", CreditSection, own_credit),
            rule=credit and credit.value, relevance=relevance, gamma=gamma, estimator=estimator and estimator.value,
            agents=agent,
        ),
        before=own,
        against=None if against is None else read_scores(against),
        labels=labels_of(label),
        ask_again=ask_again,
    )  # fmt: skip
    with LogReader(directory / "log") as reader, _progress(json_) as progress:
        task = progress.add_task("replaying", total=None)

        def tell(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        async def run_replay() -> Replayed:
            return await replay_log(reader, how, out, format_.value, progress=tell)

        replayed = anyio.run(run_replay)
    if json_:
        return print_json(replayed.facts())
    print_replayed(replayed, Console())
    if out is not None:
        print(f"written: {out}")


def export_data_set(
    reader: LogReader, run: Path, out: Path, as_: str, form: Format, *, return_min: float | None, margin_min: float,
    scores: Path | None, labels: Mapping[str, str], progress: Any,
) -> dict[str, Any]:  # fmt: skip
    """Carry out `export --as chat|preferences|transitions` and return what came of it."""
    settings = run / "run.toml"
    if as_ == "transitions":
        section = load_section(settings, "rewards", RewardsSection)
        how = Rescoring(
            rewards=section, credit=load_section(settings, "credit", CreditSection), before=section, labels=labels
        )

        async def run_replay() -> Replayed:
            return await replay_log(reader, how, out, form, progress=progress)

        replayed = anyio.run(run_replay)
        facts = replayed.facts()
        return {name: facts[name] for name in ("rollouts", "transitions", "dropped", "left_out")}
    returns: Returns
    if scores is not None:
        returns = returns_from(read_scores(scores))
    else:
        section = load_section(settings, "rewards", RewardsSection)
        verdicts = Verdicts(section.hook) if section.hook else None
        if verdicts is not None:
            read_verdicts(reader.records(), verdicts)
        returns = returns_by(section, verdicts)
    if as_ == "chat":
        exported = export_chat(
            reader, out, form, returns, return_min=return_min, labels=labels, progress=progress
        )  # fmt: skip
    else:
        exported = export_preferences(
            reader, out, form, returns, margin_min=margin_min, labels=labels, progress=progress
        )  # fmt: skip
    return exported._asdict()


def labels_of(assignments: list[str] | None) -> dict[str, str]:
    """Return what KEY=VALUE options say. Raises ConfigError for one that is not of that form."""
    labels: dict[str, str] = {}
    for assignment in assignments or []:
        name, equals, value = assignment.partition("=")
        if not (name and equals):
            raise ConfigError(f"--label {assignment}: write KEY=VALUE, such as phase=train.")
        labels[name] = value
    return labels


def print_replayed(replayed: Replayed, console: Console) -> None:
    """Print what a replay did, for people."""
    differences = replayed.differences
    console.print(_summary(replayed))
    if differences.sources(after=False) or differences.sources(after=True):
        console.print(_sources(differences))
    if differences.most_changed_groups:
        console.print(_groups(differences.most_changed_groups))
    if differences.most_changed:
        console.print(_rollouts(differences))


def _summary(replayed: Replayed) -> Table:
    one = replayed.differences
    table = Table("", "before", "after", title="scoring", title_justify="left")
    table.add_row("mean return", _number(one.mean(after=False)), _number(one.mean(after=True)))
    table.add_row("groups that teach", str(one.informative_before), str(one.informative_after))
    table.add_section()
    for name, value in (
        ("rollouts", one.rollouts),
        ("… whose return changed", one.changed),
        ("… that have one only now", one.gained),
        ("… that have none now", one.lost),
        ("groups", one.groups),
        ("… with another best rollout", one.groups_best_changed),
        ("pairs of a group", one.pairs),
        ("… that swapped ranks", one.pairs_swapped),
        ("… tied now", one.pairs_tied),
        ("… tied no more", one.pairs_untied),
        ("transitions", replayed.transitions),
        ("verdicts found in the log", replayed.recalled),
    ):
        table.add_row(name, "", str(value))
    for what, counts in (
        ("dropped", replayed.dropped),
        ("left out", replayed.left_out),
        ("unplaced", replayed.unplaced),
    ):
        for reason, count in counts.most_common():
            table.add_row(f"{what}: {escape(reason)}", "", str(count))
    return table


def _sources(one: Differences) -> Table:
    table = Table("source", "mean before", "share", "mean after", "share", title="where returns came from", title_justify="left")  # fmt: skip
    before, after = one.sources(after=False), one.sources(after=True)
    for source in dict.fromkeys([*after, *before]):
        cells = [text for side in (before, after) for text in _source_cells(side.get(source))]
        table.add_row(escape(source), *cells)
    return table


def _source_cells(values: tuple[float, float] | None) -> tuple[str, str]:
    return ("–", "–") if values is None else (_number(values[0]), f"{values[1]:+.1%}")


def _groups(groups: list[GroupChange]) -> Table:
    table = Table("group", "rollouts", "mean before", "mean after", "swapped pairs", title="groups that changed most", title_justify="left")  # fmt: skip
    for one in groups:
        table.add_row(
            escape(one.group), str(one.rollouts), _number(one.before), _number(one.after),
            f"{one.swapped}{', another best' if one.best_changed else ''}",
        )  # fmt: skip
    return table


def _rollouts(one: Differences) -> Table:
    table = Table("rollout", "before", "after", "from", title="rollouts that changed most", title_justify="left")
    for changed in one.most_changed:
        sources = "  ".join(f"{source} {value:+.3g}" for source, value in changed.after.by_source.items())
        table.add_row(
            escape(changed.rollout_id), _number(changed.before.total), _number(changed.after.total), escape(sources)
        )
    return table


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _changed(section: S, **given: Any) -> S:
    """Return the section with what the command line gave, checked as a run file is."""
    changes = {name: value for name, value in given.items() if value is not None}
    kind: type[S] = type(section)
    try:
        return msgspec.convert({**msgspec.to_builtins(section), **changes}, kind)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{', '.join(changes)}: {exc}") from exc


def _progress(json_: bool) -> Progress:
    return Progress(console=Console(stderr=True, quiet=json_), transient=True)
