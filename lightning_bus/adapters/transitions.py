"""Spans of one attempt → its transitions: what the policy was shown, what it said, what that earned, what came next.

    spans ─► calls ─► whose? ─► rewards ─► conversations ─► rows
               └─ left out, each with a counted reason

What always holds: ids and log-probs are as recorded; every call of the attempt is either trained, once, or counted
under the reason why it is not; the order is that of time, whatever order the spans came in. A call that is left out
may still be a turn, and its reward part of the return: that it cannot be trained on does not mean that the policy did
not do it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from lightning_bus.adapters.rewards import Reward
from lightning_bus.adapters.rows import MergeStats, Row, conversations, row_of
from lightning_bus.adapters.selection import ALL, Caller, Callers, Selection
from lightning_bus.spans import ModelCall, RecordedSpans, Span, calls_of, is_model_call, why_untrainable

Truncated = Literal["keep", "mask", "drop"]
REASON_CHARS_MAX = 80  # reasons are names of counters, and an instrumented agent may write anything


def _no_counts() -> Counter[str]:
    return Counter()  # every rollout has one, and Counter[str]() takes half as long again


# gc=False, here and of what it holds: none of it can be part of a circle, and a step's worth of transitions is more
# than the garbage collector should look through time and again.
class Transition(msgspec.Struct, frozen=True, eq=False, gc=False):
    """One model call as (state, action, reward, next state)."""

    call: ModelCall
    agent: str = ""  # who made it, where a selection asked
    policy: str = ""  # which one it trains; "": the one that is trained
    rewards: tuple[Reward, ...] = ()  # its own, without any share of the rollout's
    next_call: ModelCall | None = None  # the one after it in its row; None at the end
    left_out: str = ""  # why it is not trained; empty when it is

    @property
    def span_id(self) -> bytes:
        return self.call.span_id

    @property
    def state_P(self) -> NDArray[np.int32]:
        """(P,) the prompt."""
        return self.call.prompt_ids_P

    @property
    def state(self) -> bytes:
        """The prompt's ids, packed: two turns with the same have been shown the same."""
        return self.call.prompt_ids

    @property
    def next_state_P(self) -> NDArray[np.int32] | None:
        """(P,) the prompt of the next call of its row; None at the end."""
        return None if self.next_call is None else self.next_call.prompt_ids_P

    @property
    def action_R(self) -> NDArray[np.int32]:
        """(R,) the tokens that the policy sampled."""
        return self.call.response_ids_R

    @property
    def reward(self) -> float:
        return math.fsum(reward.value for reward in self.rewards) if self.rewards else 0.0

    @property
    def truncated(self) -> bool:
        """True when the engine stopped at a limit, before the policy did."""
        return _truncated(self.call)


class Transitions(msgspec.Struct, eq=False):
    """What one attempt holds to learn from.

    turns    every call of the selected agents, in order of time
    calls    model calls among the spans, of whomever
    dropped  why calls are not trained
    callers  who made calls, where a selection asked
    members  the turns that make up each row
    """

    rollout_id: str
    attempt: int
    group: str
    turns: list[Transition] = []
    calls: int = 0
    dropped: Counter[str] = msgspec.field(default_factory=_no_counts)
    callers: set[Caller] = set()
    members: list[list[Transition]] = []
    made_rows: list[Row] | None = None

    @property
    def rows(self) -> list[Row]:
        """The training rows, made when they are first asked for."""
        if self.made_rows is None:
            self.made_rows = [
                row_of(
                    [turn.call for turn in members],
                    rollout_id=self.rollout_id,
                    attempt=self.attempt,
                    group=self.group,
                    policy=members[0].policy,
                )
                for members in self.members
            ]
        return self.made_rows

    @property
    def merged(self) -> MergeStats:
        """What merging saved, counted without making the rows."""
        lengths = [[turn.call.tokens for turn in members] for members in self.members]
        return MergeStats(
            1, sum(map(len, lengths)), len(lengths), sum([one[-1] for one in lengths]), sum(map(sum, lengths))
        )


def transitions_of(
    rollout_id: str,
    attempt: int,
    group: str,
    spans: Iterable[Span],
    *,
    rewards: Mapping[bytes, Sequence[Reward]] | None = None,
    selection: Selection = ALL,
    policy: str | None = None,
    truncated: Truncated = "keep",
    tokens_max: int | None = None,
    any_model: bool = False,
) -> Transitions:
    """Return the transitions of one attempt.

    spans       in any order; spans of other attempts and spans that are there twice are passed over and counted
    rewards     of calls, by span id (`RolloutRewards.of_calls`). What a call earned that is no turn, because it is another
                agent's or was asked again, is the turn's that came before it, so nothing is lost
    selection   whose calls are trained
    policy      train this one only, of those that the selection names
    truncated   what becomes of calls that were cut off at a token limit: "keep" trains them; "mask" leaves the call's
                tokens in later prompts but does not train them; "drop" trains nothing of the rollout (DAPO's overlong
                filtering, arXiv 2503.14476)
    tokens_max  calls whose prompt and response together are longer are left out; shorter turns before them are kept
    any_model   a policy that the selection names is also trained by what other models answered: to imitate them

    Left out besides, each counted: untrainable calls, and calls whose client sent the same request again because it
    never saw the answer (the agent acted on the later one).
    """
    if not isinstance(spans, (RecordedSpans, list, tuple)):
        spans = list(spans)
    result = Transitions(rollout_id, attempt, group)
    dropped = result.dropped
    recorded = calls_of(spans)
    calls = _counting(recorded, result)
    left_out = why_untrainable(calls)
    if any(left_out):
        left_out = [reason and _reason(reason) for reason in left_out]
    agents = policies = [""] * len(calls)
    turns = calls
    if selection.rules:
        callers = Callers(spans)
        span_of = {id(call): span for call, span in zip(recorded, filter(is_model_call, spans), strict=True)}
        chosen: list[tuple[ModelCall, str, str, str]] = []
        for call, reason in zip(calls, left_out, strict=True):
            caller = callers.of(span_of[id(call)])
            result.callers.add(caller)
            trains = selection.policy_of(caller)
            if trains is None:
                dropped["other agent" if caller.agent else "no agent named"] += 1
            elif policy is not None and trains not in ("", policy):
                dropped["other policy"] += 1
            elif trains and not any_model and call.attributes.model != trains:
                dropped["answered by another model than the policy"] += 1
            else:
                chosen.append((call, caller.agent, trains, reason))
        turns, agents, policies, left_out = map(list, zip(*chosen, strict=True)) if chosen else ([], [], [], [])
    if truncated != "keep" or tokens_max is not None:
        for at, call in enumerate(turns):
            if not left_out[at] and truncated != "keep" and _truncated(call):
                left_out[at] = "truncated"
            elif not left_out[at] and tokens_max is not None and call.tokens > tokens_max:
                left_out[at] = "over length"
        if truncated == "drop" and "truncated" in left_out:
            left_out = [reason or "in a truncated rollout" for reason in left_out]
    own = _by_turn(rewards, calls, turns) if rewards else [()] * len(turns)
    _merge(turns, agents, policies, own, left_out, result)
    return result


def _counting(recorded: Sequence[ModelCall], result: Transitions) -> list[ModelCall]:
    """Return the attempt's model calls that count, each once, in order of time; count the others."""
    result.calls = len(recorded)
    rollout_id, attempt = result.rollout_id, result.attempt
    calls: list[ModelCall] = []
    seen: set[bytes] = set()
    retried = False
    for call in recorded:
        if (call.rollout_id and call.rollout_id != rollout_id) or (call.attempt and call.attempt != attempt):
            result.dropped["of another attempt"] += 1
        elif call.span_id in seen:
            result.dropped["span recorded twice"] += 1
        else:
            seen.add(call.span_id)
            calls.append(call)
            retried = retried or call.attributes.retry_count is not None
    if len(calls) > 1:
        calls.sort(key=_start)
    return _without_superseded(calls, result.dropped) if retried else calls


def _without_superseded(calls: list[ModelCall], dropped: Counter[str]) -> list[ModelCall]:
    """Drop the call that a client's SDK sent again: of two with the same prompt, the one before the marked retry."""
    kept: list[ModelCall | None] = []
    newest: dict[tuple[bytes, int], int] = {}
    for call in calls:
        prompt = call.prompt_ids, _count(call.attributes.choice)
        if _count(call.attributes.retry_count) > 0 and prompt in newest:
            kept[newest[prompt]] = None
            dropped["superseded by the client's retry"] += 1
        newest[prompt] = len(kept)
        kept.append(call)
    return [call for call in kept if call is not None]


def _merge(
    calls: Sequence[ModelCall],
    agents: Sequence[str],
    policies: Sequence[str],
    rewards: Sequence[tuple[Reward, ...]],
    left_out: Sequence[str],
    result: Transitions,
) -> None:
    """Make the turns, with what follows each, and note which make up the rows."""
    trained: Sequence[int] = range(len(calls))
    if any(left_out):
        trained = [at for at, reason in enumerate(left_out) if not reason]
        result.dropped.update(filter(None, left_out))
    rows = conversations(calls, policies, trained)
    following: list[ModelCall | None] = [None] * len(calls)
    for members in rows:
        for at, after in pairwise(members):
            following[at] = calls[after]
    turns = result.turns = list(map(Transition, calls, agents, policies, rewards, following, left_out))
    result.members = [[turns[at] for at in members] for members in rows]


def _by_turn(
    rewards: Mapping[bytes, Sequence[Reward]],
    calls: Sequence[ModelCall],
    turns: Sequence[ModelCall],
) -> list[tuple[Reward, ...]]:
    """Return the rewards of each turn: its own, and those of calls after it that are no turns."""
    if not turns:
        return []
    found: dict[bytes, tuple[Reward, ...]] = {}
    is_turn = {call.span_id for call in turns}
    first = turn = turns[0].span_id
    placed = 0
    for call in calls:
        span_id = call.span_id
        turn = span_id if span_id in is_turn else turn
        if span_id in rewards:
            found[turn] = (*found.get(turn, ()), *rewards[span_id])
            placed += 1
    if placed < len(rewards):  # those of calls that were asked again: time says nothing about them, so the first turn's
        known = {call.span_id for call in calls}
        lost = tuple(reward for span_id, each in rewards.items() if span_id not in known for reward in each)
        found[first] = (*found.get(first, ()), *lost)
    return [found.get(call.span_id, ()) for call in turns]


def _reason(untrainable: str) -> str:
    """Return a counter's name without particulars."""
    return "log-probs of another length" if untrainable[0].isdecimal() else untrainable[:REASON_CHARS_MAX]


def _truncated(call: ModelCall) -> bool:
    reasons = call.attributes.finish_reasons
    return isinstance(reasons, (list, tuple)) and "length" in reasons


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


_start = attrgetter("start_ns")
