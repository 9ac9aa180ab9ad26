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
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from lightning_bus.adapters.rewards import Reward
from lightning_bus.adapters.rows import MergeStats, Row, conversations, row_of
from lightning_bus.adapters.selection import ALL, NOBODY, Caller, Callers, Selection
from lightning_bus.spans import (
    CHOICE,
    FINISH_REASONS,
    PROMPT_IDS,
    REQUEST_MODEL,
    RETRY_COUNT,
    ModelCall,
    Span,
    is_model_call,
    model_call,
)

Truncated = Literal["keep", "mask", "drop"]
REASON_CHARS_MAX = 80  # reasons are names of counters, and an instrumented agent may write anything

_Chosen = tuple[ModelCall, Caller, str, str]  # call, who made it, the policy it trains, why it is left out


# gc=False, here and of what it holds: none of it can be part of a circle, and a step's worth of transitions is more
# than the garbage collector should look through time and again.
class Transition(msgspec.Struct, frozen=True, eq=False, gc=False):
    """One model call as (state, action, reward, next state)."""

    call: ModelCall
    agent: str = ""  # who made it, where a selection asked
    policy: str = ""  # which one it trains; "": the one that is trained
    rewards: tuple[Reward, ...] = ()  # its own, without any share of the rollout's
    next_state_P: NDArray[np.int32] | None = None  # the prompt of the next call of its row; None at the end
    left_out: str = ""  # why it is not trained; empty when it is

    @property
    def span_id(self) -> bytes:
        return self.call.span.span_id

    @property
    def state_P(self) -> NDArray[np.int32]:
        """(P,) the prompt."""
        return self.call.prompt_ids_P

    @property
    def state(self) -> bytes:
        """The prompt's ids, packed: two turns with the same have been shown the same."""
        packed = self.call.span.attributes.get(PROMPT_IDS)
        return packed if isinstance(packed, bytes) else b""

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
    dropped: Counter[str] = msgspec.field(default_factory=lambda: Counter[str]())
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
        lengths = [[_tokens(turn.call) for turn in members] for members in self.members]
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
    if not isinstance(spans, (list, tuple)):
        spans = list(spans)
    result = Transitions(rollout_id, attempt, group)
    dropped = result.dropped
    calls = _calls_of(rollout_id, attempt, spans, result)
    callers = Callers(spans) if selection.rules else None
    if callers is None and truncated == "keep" and tokens_max is None:  # the same, sooner
        chosen = [(call, NOBODY, "", _reason(call.untrainable) if call.untrainable else "") for call in calls]
        _merge(chosen, _by_turn(rewards, calls, chosen) if rewards else None, result)
        return result
    chosen: list[_Chosen] = []
    for call in calls:
        caller, trains = NOBODY, ""
        if callers is not None:
            caller = callers.of(call.span)
            result.callers.add(caller)
            whose = selection.policy_of(caller)
            if whose is None:
                dropped["other agent" if caller.agent else "no agent named"] += 1
                continue
            trains = whose
            if policy is not None and trains not in ("", policy):
                dropped["other policy"] += 1
                continue
            if trains and not any_model and call.span.attributes.get(REQUEST_MODEL) != trains:
                dropped["answered by another model than the policy"] += 1
                continue
        left_out = call.untrainable
        if left_out:
            left_out = _reason(left_out)
        elif truncated != "keep" and _truncated(call):
            left_out = "truncated"
        elif tokens_max is not None and _tokens(call) > tokens_max:
            left_out = "over length"
        chosen.append((call, caller, trains, left_out))
    if truncated == "drop" and any(left_out == "truncated" for _, _, _, left_out in chosen):
        chosen = [(*one[:3], one[3] or "in a truncated rollout") for one in chosen]
    _merge(chosen, _by_turn(rewards, calls, chosen) if rewards else None, result)
    return result


def _calls_of(rollout_id: str, attempt: int, spans: Sequence[Span], result: Transitions) -> list[ModelCall]:
    """Return the attempt's model calls that count, each once, in order of time; count the others."""
    calls: list[ModelCall] = []
    seen: set[bytes] = set()
    retried = False
    for span in spans:
        if not is_model_call(span):
            continue
        result.calls += 1
        if (span.rollout_id and span.rollout_id != rollout_id) or (span.attempt and span.attempt != attempt):
            result.dropped["of another attempt"] += 1
        elif span.span_id in seen:
            result.dropped["span recorded twice"] += 1
        else:
            seen.add(span.span_id)
            retried = retried or RETRY_COUNT in span.attributes
            calls.append(model_call(span))
    if len(calls) > 1:
        calls.sort(key=_start)
    return _without_superseded(calls, result.dropped) if retried else calls


def _without_superseded(calls: list[ModelCall], dropped: Counter[str]) -> list[ModelCall]:
    """Drop the call that a client's SDK sent again: of two with the same prompt, the one before the marked retry."""
    kept: list[ModelCall | None] = []
    newest: dict[tuple[bytes, int], int] = {}
    for call in calls:
        prompt = call.prompt_ids_P.tobytes(), _count(call, CHOICE)
        if _count(call, RETRY_COUNT) > 0 and prompt in newest:
            kept[newest[prompt]] = None
            dropped["superseded by the client's retry"] += 1
        newest[prompt] = len(kept)
        kept.append(call)
    return [call for call in kept if call is not None]


def _merge(chosen: list[_Chosen], rewards: dict[bytes, tuple[Reward, ...]] | None, result: Transitions) -> None:
    """Make the turns, with what follows each, and note which make up the rows."""
    trained = chosen
    if any([left_out for _, _, _, left_out in chosen]):  # noqa: C419 - a list is twice as fast here
        trained = [one for one in chosen if not one[3]]
        result.dropped.update([left_out for _, _, _, left_out in chosen if left_out])
    rows = conversations([one[0] for one in trained], [one[2] for one in trained]) if trained else []
    after: list[NDArray[np.int32] | None] = [None] * len(trained)
    for members in rows:
        for k in range(1, len(members)):
            after[members[k - 1]] = trained[members[k]][0].prompt_ids_P
    nexts = iter(after)
    turns = result.turns
    for call, caller, policy, left_out in chosen:
        own = () if rewards is None else rewards.get(call.span.span_id, ())
        turns.append(Transition(call, caller.agent, policy, own, None if left_out else next(nexts), left_out))
    kept = turns if trained is chosen else [turn for turn in turns if not turn.left_out]
    result.members = [[kept[member] for member in members] for members in rows]


def _by_turn(
    rewards: Mapping[bytes, Sequence[Reward]],
    calls: Sequence[ModelCall],
    chosen: list[_Chosen],
) -> dict[bytes, tuple[Reward, ...]]:
    """Return rewards by turn: a turn's own, and those of calls after it that are no turns."""
    turns = [call.span.span_id for call, _, _, _ in chosen]
    if not turns:
        return {}
    found: dict[bytes, tuple[Reward, ...]] = {}
    turn, is_turn, placed = turns[0], set(turns), 0
    for call in calls:
        span_id = call.span.span_id
        turn = span_id if span_id in is_turn else turn
        if span_id in rewards:
            found[turn] = (*found.get(turn, ()), *rewards[span_id])
            placed += 1
    if placed < len(rewards):  # those of calls that were asked again: time says nothing about them, so the first turn's
        known = {call.span.span_id for call in calls}
        lost = tuple(reward for span_id, each in rewards.items() if span_id not in known for reward in each)
        found[turns[0]] = (*found.get(turns[0], ()), *lost)
    return found


def _reason(untrainable: str) -> str:
    """Return a counter's name without particulars."""
    return "log-probs of another length" if untrainable[0].isdecimal() else untrainable[:REASON_CHARS_MAX]


def _truncated(call: ModelCall) -> bool:
    reasons = call.span.attributes.get(FINISH_REASONS)
    return isinstance(reasons, (list, tuple)) and "length" in reasons


def _tokens(call: ModelCall) -> int:
    return len(call.prompt_ids_P) + len(call.response_ids_R)


def _count(call: ModelCall, name: str) -> int:
    value = call.span.attributes.get(name)
    return value if isinstance(value, int) else 0


def _start(call: ModelCall) -> int:
    return call.span.start_ns
