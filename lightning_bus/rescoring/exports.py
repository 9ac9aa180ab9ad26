"""A recorded run as data sets for other trainers: conversations for imitation, pairs for preference learning.

Each is one file in a new directory, which appears whole or not at all. Memory does not grow with the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from lightning_bus.adapters import FinishedRollout, RewardsSection, rewards_of
from lightning_bus.adapters.chat import CHAT_COLUMNS, chat_rows
from lightning_bus.adapters.differences import Scoring
from lightning_bus.adapters.preferences import PREFERENCE_COLUMNS, preference_rows
from lightning_bus.log.backup import appearing
from lightning_bus.log.reader import LogReader
from lightning_bus.log.tables import Format, check_format, open_table
from lightning_bus.rescoring.runs import Progress, finished_groups, finished_rollouts
from lightning_bus.rescoring.verdicts import Verdicts

Returns = Callable[[FinishedRollout], float | None]


class ExportedRows(NamedTuple):
    """What was written, and what was left out by reason."""

    rows: int
    left_out: dict[str, int]


def returns_by(section: RewardsSection, verdicts: Verdicts | None = None) -> Returns:
    """Return a function that gives a rollout's return as recorded and by a run's rules; no hook is asked.

    verdicts  what the run's hook said when the run was trained
    """
    if verdicts is None:
        return lambda rollout: rewards_of(rollout, section).total
    return lambda rollout: rewards_of(verdicts.apply(rollout), section).total


def returns_from(scores: Mapping[str, Scoring]) -> Returns:
    """Return a function that gives the return that a replay found; None for rollouts that it did not score."""
    unknown = Scoring(None, {})
    return lambda rollout: scores.get(rollout.rollout_id, unknown).total


def export_chat(
    reader: LogReader, out: Path, form: Format, returns: Returns, *, return_min: float | None = None,
    labels: Mapping[str, str] | None = None, progress: Progress | None = None,
) -> ExportedRows:  # fmt: skip
    """Write chat.<form> into the new directory `out`: one row for each conversation of each rollout that succeeded.

    return_min  leave out rollouts whose return is less, or that have none

    Raises CallError when `out` is not empty.
    """
    check_format(form)
    left_out: Counter[str] = Counter()
    with appearing(out) as draft, open_table(draft, "chat", form, CHAT_COLUMNS) as table:
        for rollout in finished_rollouts(reader, labels=labels, progress=progress):
            total = returns(rollout)
            if return_min is not None and (total is None or total < return_min):
                left_out["rollout below return_min"] += 1
                continue
            for row in chat_rows(rollout, total, left_out):
                table.add(row)
    return ExportedRows(table.rows, dict(left_out))


def export_preferences(
    reader: LogReader, out: Path, form: Format, returns: Returns, *, margin_min: float = 0.0,
    labels: Mapping[str, str] | None = None, progress: Progress | None = None,
) -> ExportedRows:  # fmt: skip
    """Write preferences.<form> into the new directory `out`: the best against the worst of each group.

    margin_min  by how much their returns must differ at least

    Raises CallError when `out` is not empty.
    """
    check_format(form)
    left_out: Counter[str] = Counter()
    with appearing(out) as draft, open_table(draft, "preferences", form, PREFERENCE_COLUMNS) as table:
        for group in finished_groups(reader, labels=labels, progress=progress):
            scored = [(rollout, returns(rollout)) for rollout in group]
            for row in preference_rows(scored, left_out, margin_min=margin_min):
                table.add(row)
    return ExportedRows(table.rows, dict(left_out))
