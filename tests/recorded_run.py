"""A run on disk, as if a broker had written it: the real core decides, the real log writer writes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from lightning_bus import messages as m
from lightning_bus.adapters import FinishedRollout
from lightning_bus.lifecycle import Status
from lightning_bus.log.store import LogWriter
from lightning_bus.records import Put
from lightning_bus.spans import encode_spans
from tests.core_harness import Desk


def write_run(
    directory: Path,
    rollouts: Sequence[FinishedRollout],
    *,
    tasks: dict[str, Any] | None = None,
    open_: Sequence[str] = (),
) -> Path:
    """Write a log in which these rollouts happened, one after the other, and return the run's directory.

    tasks  by rollout id
    open_  ids of further rollouts, which were submitted and have not ended
    """
    desk = Desk(max_attempts=1)
    desk.hello("gw")
    submissions = [
        m.Submission(
            one.rollout_id,
            msgspec.msgpack.encode((tasks or {}).get(one.rollout_id)),
            group=one.group,
            labels=one.labels,
        )
        for one in rollouts
    ]
    desk.say("t", m.Submit([*submissions, *(m.Submission(name, b"") for name in open_)]))
    desk.beat("w", len(rollouts) + len(open_))
    for seq, one in enumerate(rollouts, 1):
        desk.append("gw", 1, seq, (one.rollout_id, 1, encode_spans(one.spans)))
        if one.status is Status.SUCCEEDED:
            desk.say("w", m.Done(one.rollout_id, 1, one.reward))
        else:
            desk.say("w", m.Fail(one.rollout_id, 1, one.error, retryable=False))
    with closing(LogWriter(directory / "log", map_bytes_max=1 << 30)) as log:
        for at in range(0, len(desk.log.records), 500):
            log.commit(desk.log.records[at : at + 500])
        log.commit([Put(table, key, value) for table, rows in desk.log.tables.items() for key, value in rows.items()])
    return directory
