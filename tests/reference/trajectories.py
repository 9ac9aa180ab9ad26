"""Rollouts made by hand for tests of credit by token, and the slow twin: one token at a time, from the formulas.

The twin follows verl's loop (compute_gae_advantage_return): it walks back over *every* token of a rollout's rows, prompts
and tool answers included, and carries next value and next advantage over those that the policy did not sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_bus import Status
from lightning_bus import spans as s
from lightning_bus.adapters import FinishedRollout, ScoredRollout, scored
from lightning_bus.otel import names as n
from tests.bus_fixtures import span


@dataclass(frozen=True)
class Said:
    """One model call: what it was shown and what it said, in tokens; what it earned; how it ended."""

    prompt: Sequence[int]
    response: Sequence[int]
    reward: float | None = None
    finish: str = "stop"
    trainable: bool = True
    logprobs: Sequence[float] = ()


def rollout_of(rollout_id: str, calls: Sequence[Said], final: float, *, group: str = "g") -> FinishedRollout:
    """A finished rollout of these calls, in order of time."""
    recorded = []
    for call in calls:
        one = span("chat", rollout_id, 1, **{
            s.OPERATION: s.MODEL_CALL_NAME, s.PROMPT_IDS: s.pack_ids(call.prompt),
            s.RESPONSE_IDS: s.pack_ids(call.response),
            s.LOGPROBS: s.pack_logprobs((call.logprobs or [-1.0] * len(call.response)) if call.trainable else []),
            s.WEIGHT_VERSIONS: [["0", 0, len(call.response)]], s.TEMPERATURE: 1.0,
            s.FINISH_REASONS: [call.finish],
        })  # fmt: skip
        recorded.append(one)
        if call.reward is not None:
            recorded.append(span("reward", rollout_id, 1, **{n.REWARD: call.reward, n.REWARD_SPAN: one.span_id.hex()}))
    return FinishedRollout(rollout_id, group, {"phase": "train"}, Status.SUCCEEDED, 1, final, "", recorded, 0, 1)


def scored_rollouts(rollouts: Sequence[FinishedRollout]) -> list[ScoredRollout]:
    return scored(rollouts)[0]


def conversation(rng: np.random.Generator, turns: int, *, vocabulary: int = 30, fork: float = 0.0) -> list[Said]:
    """Calls that continue one another, a tool's answer between two of them; some rendered anew, which makes a new row."""
    calls: list[Said] = []
    history = rng.integers(1, vocabulary, rng.integers(1, 5)).tolist()
    for _ in range(turns):
        response = rng.integers(1, vocabulary, rng.integers(1, 6)).tolist()
        own = float(rng.normal()) if rng.random() < 0.4 else None
        calls.append(Said(history, response, own, trainable=rng.random() > 0.15))
        if rng.random() < fork:
            history = rng.integers(1, vocabulary, len(history) + len(response)).tolist()
        else:
            history = [*history, *response]
        history = [*history, *rng.integers(1, vocabulary, rng.integers(0, 4)).tolist()]
    return calls


def token_credit(
    rollout: ScoredRollout,
    values: dict[int, Sequence[float]],
    *,
    gamma: float,
    lambda_: float,
    by_turn: bool,
    cut_off: bool,
) -> dict[tuple[int, int], tuple[float, float]]:
    """(row, token) → (advantage, target) of one rollout.

    values  by row: of the state after each of its tokens
    """
    assert rollout.transitions is not None
    where = {}
    for k, row in enumerate(rollout.rows):
        for span_id, (start, end) in zip(row.span_ids, row.sampled, strict=True):
            where[span_id] = k, start, end
    # Every token that was ever in front of the policy, in order of time: (row, place, sampled, last of its call, reward)
    walk: list[tuple[int, int, bool, bool, float]] = []
    shown = dict.fromkeys(range(len(rollout.rows)), 0)
    carried = 0.0
    for turn in rollout.transitions.turns:
        if turn.span_id not in where:
            carried += turn.reward
            if walk:
                walk[-1] = (*walk[-1][:4], walk[-1][4] + carried)
            carried = 0.0
            continue
        k, start, end = where[turn.span_id]
        walk += [(k, at, False, False, 0.0) for at in range(shown[k], start)]
        walk += [(k, at, True, at == end - 1, turn.reward if at == end - 1 else 0.0) for at in range(start, end)]
        shown[k] = end
    found: dict[tuple[int, int], tuple[float, float]] = {}
    next_value, next_advantage, pending = 0.0, 0.0, float(rollout.reward or 0.0)
    if walk and cut_off:
        next_value = float(values[walk[-1][0]][walk[-1][1]])
    for k, at, sampled, last, reward in reversed(walk):
        if not sampled:
            pending += reward
            continue
        value = float(values[k][at - 1])
        g, decay = (1.0, 1.0) if by_turn and not last else (gamma, gamma * lambda_)
        advantage = reward + pending + g * next_value - value + decay * next_advantage
        found[k, at] = advantage, advantage + value
        next_value, next_advantage, pending = value, advantage, 0.0
    return found
