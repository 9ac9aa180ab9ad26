"""Looking at rollouts, and at the dead letters among them: QUERY, REPLAY, PURGE.

A dead letter is a rollout that failed and that nobody has replayed or purged. It keeps its task until then. What
always holds. Terminal is final: a replay is a new rollout, and the old one tells which. Asking again changes nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from copy import copy
from itertools import islice

import msgspec

from lightning_bus import messages as m
from lightning_bus.broker import moves
from lightning_bus.broker.rollouts import check_queue_room, enter, new_rollout
from lightning_bus.broker.state import BrokerState, Context, rollout_of
from lightning_bus.errors import CallError
from lightning_bus.lifecycle import Status

ID_CHARS_MAX = 200  # as in rollouts.ROLLOUT_ID
REPLAY_OF = "replay_of"  # label of a replay: the rollout that it repeats
STATUSES = frozenset(status.value for status in Status)


def on_query(c: Context, body: m.Query) -> m.Body:
    state = c.state
    if body.status and body.status not in STATUSES:
        raise CallError(f"no rollout is ever {body.status!r}; the statuses are {', '.join(Status)}")
    ids: Iterable[str]
    if body.rollout_ids:
        ids = body.rollout_ids
    elif body.dead:
        ids = sorted(state.dead, key=lambda rollout_id: state.rollouts[rollout_id].order)
    else:
        ids = state.line
    after = rollout_of(state, body.after).order if body.after else -1
    if ids is state.line and body.after:
        # The line is in the order of submission, so that a page costs what it holds and not what is before it.
        ids = islice(state.line, _place_after(state, after), None)
    wanted = (
        rollout
        for rollout_id in ids
        if (status := state.rollouts.status_of(rollout_id)) is not None
        and (not body.status or status == body.status)
        and (not body.dead or rollout_id in state.dead)
        and (rollout := state.rollouts[rollout_id]).order > after
    )
    # Copies: an answer is encoded when it is sent, and must not show what was decided, but not yet written, by then.
    return m.Rollouts([copy(rollout) for rollout in islice(wanted, body.limit)])


def on_replay(c: Context, body: m.Replay) -> m.Body:
    state = c.state
    letters = [_dead_letter(state, rollout_id, replayed=True) for rollout_id in dict.fromkeys(body.rollout_ids)]
    fresh = [letter for letter in letters if not letter.replayed_as]
    check_queue_room(state, len(fresh))
    taken: set[str] = set()
    new: list[tuple[m.Rollout, bytes]] = []
    for place, letter in enumerate(fresh):
        submission = letter.submission
        rollout_id = _free_id(state, submission.rollout_id, taken)
        taken.add(rollout_id)
        labels = {**submission.labels, REPLAY_OF: submission.rollout_id}
        again = msgspec.structs.replace(submission, rollout_id=rollout_id, labels=labels, key="", delay_s=0.0)
        new.append(new_rollout(c, again, state.next_order + place))
    for letter, (rollout, stored) in zip(fresh, new, strict=True):
        enter(c, rollout, stored)
        letter.replayed_as = rollout.submission.rollout_id
        _bury(c, letter, "replay")
    moves.dispatch(state, c.effects, c.now_s, c.wall_ns)
    return m.Accepted(len(fresh), [state.rollouts[rollout_id].replayed_as for rollout_id in body.rollout_ids])


def on_purge(c: Context, body: m.Purge) -> m.Body:
    letters = [_dead_letter(c.state, rollout_id, purged=True) for rollout_id in dict.fromkeys(body.rollout_ids)]
    fresh = [letter for letter in letters if not letter.purged]
    for letter in fresh:
        letter.purged = True
        _bury(c, letter, "purge")
    return m.Accepted(len(fresh))


def _dead_letter(state: BrokerState, rollout_id: str, *, replayed: bool = False, purged: bool = False) -> m.Rollout:
    """Return a dead letter, or what was one until the same was asked before. Raises CallError for anything else."""
    rollout = rollout_of(state, rollout_id)
    if rollout.status is not Status.FAILED:
        raise CallError(f"rollout {rollout_id} is {rollout.status.value}; only what failed is a dead letter")
    if rollout.replayed_as and not replayed:
        raise CallError(f"rollout {rollout_id} was replayed as {rollout.replayed_as}, so it is no dead letter any more")
    if rollout.purged and not purged:
        raise CallError(f"rollout {rollout_id} was purged, its task is gone. Submit it anew, under another id.")
    return rollout


def _bury(c: Context, letter: m.Rollout, what: str) -> None:
    """It is a dead letter no more: log why, and let go of its task."""
    del c.state.dead[letter.submission.rollout_id]
    moves.record_event(c.state, c.effects, letter, what, c.wall_ns)
    c.state.rollouts.pack(letter.submission.rollout_id)


def _free_id(state: BrokerState, rollout_id: str, taken: set[str]) -> str:
    number = 1
    while True:
        suffix = f".r{number}"
        free = rollout_id[: ID_CHARS_MAX - len(suffix)] + suffix
        if free not in state.rollouts and free not in taken:
            return free
        number += 1


def _place_after(state: BrokerState, order: int) -> int:
    return bisect_right(state.line, order, key=lambda rollout_id: state.rollouts[rollout_id].order)
