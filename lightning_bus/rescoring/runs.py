"""A recorded run's finished rollouts, in the log's order, one by one or in whole groups.

A group is handed out once all of its rollouts have ended that ended before reading began. Memory holds the groups that
are not whole yet: where a trainer wrote the log, about as many as ran at the same time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from lightning_bus.adapters import Assembler, FinishedRollout
from lightning_bus.log.reader import LogReader

Progress = Callable[[int, int], None]

PROGRESS_RECORDS = 1000


def finished_rollouts(
    reader: LogReader, *, labels: Mapping[str, str] | None = None, progress: Progress | None = None
) -> Iterator[FinishedRollout]:
    """Yield every rollout that has ended, with its spans, in the order of their ends.

    labels    only rollouts that carry these
    progress  called now and then with how many records are read, and how many there are

    Rollouts whose beginning retention has dropped are passed over.
    """
    assembler = Assembler()
    first, end = reader.first_offset, reader.end_offset
    assembler.next_offset = first
    for record in reader.records(first):
        if record.offset >= end:
            break
        rollout = assembler.feed(record)
        if rollout is not None and _carries(rollout.labels, labels):
            yield rollout
        if progress is not None and record.offset % PROGRESS_RECORDS == 0:
            progress(record.offset - first, end - first)
    if progress is not None:
        progress(end - first, end - first)


def finished_groups(
    reader: LogReader, *, labels: Mapping[str, str] | None = None, progress: Progress | None = None
) -> Iterator[list[FinishedRollout]]:
    """Yield whole groups, each sorted by rollout id, in the order in which they became whole.

    A rollout without a group is a group of its own. What retention has half dropped comes at the end, as it is.
    """
    missing: Counter[str] = Counter()
    end = reader.end_offset
    for rollout in reader.rollouts():
        submission = rollout.submission
        if rollout.status.terminal and rollout.ended_offset < end and _carries(submission.labels, labels):
            missing[submission.group or submission.rollout_id] += 1
    open_: dict[str, list[FinishedRollout]] = {}
    for rollout in finished_rollouts(reader, labels=labels, progress=progress):
        group = rollout.group or rollout.rollout_id
        members = open_.setdefault(group, [])
        members.append(rollout)
        missing[group] -= 1
        if not missing[group]:
            del missing[group]
            yield sorted(open_.pop(group), key=_by_id)
    for members in open_.values():
        yield sorted(members, key=_by_id)


def _by_id(rollout: FinishedRollout) -> str:
    return rollout.rollout_id


def _carries(labels: Mapping[str, str], wanted: Mapping[str, str] | None) -> bool:
    return all(labels.get(name) == value for name, value in (wanted or {}).items())
