"""What each sampled token earned, by a critic's values: from rollouts and their rows to advantages and targets. Pure.

A rollout is one trajectory: the tokens that its calls sampled, in order of time, whatever rows they lie in and whatever
stands between them. So GAE's next value and next advantage are carried over observations (a tool's answer, the next
prompt), as verl does within a row, and from one row to the next where a history was rendered anew. What a call earned is
the reward of its last token, what the rollout earned that of the last one of all; a call that is not trained on hands
what it earned to the call before it. What was earned before the first trained call is the past, and nobody's merit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_bus.adapters import Episode, Row, ScoredRollout, Transition, call_advantages, gae_batch

# N rollouts, L tokens of a row, R tokens of a call.

Floats = NDArray[np.float32]
Level = Literal["token", "turn"]
Bootstrap = Literal["length", "turns", "never"]
NOTHING = np.zeros(0)


class Step(NamedTuple):
    """One call of a trajectory: which turn of the rollout, where its tokens are, and what it earned."""

    turn: int
    row: int
    start: int
    end: int
    reward: float


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The calls of one rollout that are in rows, in order of time.

    final    what the rollout earned as a whole, on top of what its steps did
    cut_off  it did not end but was stopped
    """

    group: str
    steps: list[Step]
    final: float
    cut_off: bool


@dataclass(frozen=True, slots=True)
class TokenCredit:
    """What a batch earned.

    advantages  for each rollout one entry a turn: (R,) float32, or 0.0 for a turn that is in no row
    targets     for each row (L,) float32: what the state before each sampled token was worth; 0 elsewhere
    cut_off     how many rollouts were given the critic's value of where they were stopped
    """

    advantages: list[list[float | Floats]]
    targets: list[Floats]
    cut_off: int


def trajectories(batch: Sequence[ScoredRollout], rows: Sequence[Row], *, bootstrap: Bootstrap) -> list[Trajectory]:
    """Return the trajectory of each rollout over these rows.

    bootstrap  what counts as cut off: "length", that the last answer stopped at a token limit; "turns", also that it
               called a tool and nobody went on, as where an agent's turns are limited; "never", nothing
    """
    place: dict[tuple[str, bytes], tuple[int, int, int]] = {}
    for k, row in enumerate(rows):
        if len(row.sampled) != len(row.span_ids):
            raise ValueError(f"a row of rollout {row.rollout_id} does not say where its calls' tokens lie")
        for span_id, (start, end) in zip(row.span_ids, row.sampled, strict=True):
            place[row.rollout_id, span_id] = k, start, end
    made: list[Trajectory] = []
    for rollout in batch:
        turns = rollout.transitions.turns if rollout.transitions is not None else []
        steps: list[Step] = []
        for at, turn in enumerate(turns):
            found = place.get((rollout.rollout_id, turn.span_id))
            if found is not None and found[1] < found[2]:
                steps.append(Step(at, *found, turn.reward))
            elif steps:
                steps[-1] = steps[-1]._replace(reward=steps[-1].reward + turn.reward)
        final = rollout.episode.final if rollout.episode is not None else 0.0
        made.append(Trajectory(rollout.group, steps, final, bool(turns) and _cut_off(turns[-1], bootstrap)))
    return made


def token_credit(
    batch: Sequence[ScoredRollout],
    rows: Sequence[Row],
    values: Sequence[Floats],
    *,
    gamma: float = 1.0,
    lambda_: float = 1.0,
    level: Level = "token",
    bootstrap: Bootstrap = "length",
) -> TokenCredit:
    """Return what each token earned, by GAE (arXiv 1506.02438) over the tokens of each rollout.

        δ_t = r_t + γ_t V_{t+1} − V_t        A_t = δ_t + γ_t λ_t A_{t+1}        target_t = A_t + V_t

    values  for each row (L,): the critic's, of the state *after* each token (`critic.row_values`)
    level   "token": γ and λ are those of every token. "turn": of a call's last token, and 1 at the others, so that a
            delay is counted in turns and not by how much is said in them
    """
    if level not in ("token", "turn"):
        raise ValueError(f"level={level!r} is not known: use 'token' or 'turn'")
    made = trajectories(batch, rows, bootstrap=bootstrap)
    rewards: list[NDArray[np.float64]] = []
    befores: list[NDArray[np.float64]] = []
    last: list[NDArray[np.bool_]] = []  # of its call
    for one in made:
        lengths = [step.end - step.start for step in one.steps]
        ends = np.cumsum(lengths, dtype=np.int64) - 1
        earned, closing = np.zeros(sum(lengths)), np.zeros(sum(lengths), np.bool_)
        earned[ends] = [step.reward for step in one.steps]
        earned[-1:] += one.final
        closing[ends] = True
        rewards.append(earned)
        last.append(closing)
        before = [values[step.row][step.start - 1 : step.end - 1] for step in one.steps]
        befores.append(np.concatenate(before or [NOTHING], dtype=np.float64))
    found = gae_batch(
        rewards,
        befores,
        gammas=gamma if level == "token" else [np.where(closing, gamma, 1.0) for closing in last],
        lambdas=lambda_ if level == "token" else [np.where(closing, lambda_, 1.0) for closing in last],
        bootstraps_N=_bootstraps(made, values),
    )
    return _laid_out(batch, rows, made, [one.advantages_T for one in found], [one.targets_T for one in found])


def turn_credit(
    batch: Sequence[ScoredRollout],
    rows: Sequence[Row],
    values: Sequence[Floats],
    *,
    gamma: float = 1.0,
    lambda_: float = 1.0,
    bootstrap: Bootstrap = "length",
) -> TokenCredit:
    """Return what each call earned by [credit] rule "value": TD(λ) over turns, the same for all tokens of a call.

    The value of a turn is the critic's where its first token was sampled. All tokens of a call share its target: within
    a turn nothing is earned or discounted, so they are worth the same until it is over.
    """
    made = trajectories(batch, rows, bootstrap=bootstrap)
    episodes = [
        Episode(one.group, one.final, np.array([step.reward for step in one.steps], np.float64)) for one in made
    ]
    firsts = [np.array([values[step.row][step.start - 1] for step in one.steps], np.float64) for one in made]
    found = call_advantages(
        episodes, rule="value", gamma=gamma, lambda_=lambda_, values=firsts, bootstraps=_bootstraps(made, values)
    )
    lengths = [[step.end - step.start for step in one.steps] for one in made]
    advantages = [np.repeat(one, length) for one, length in zip(found, lengths, strict=True)]
    targets = [np.repeat(one + first, length) for one, first, length in zip(found, firsts, lengths, strict=True)]
    return _laid_out(batch, rows, made, advantages, targets)


def whitened(rows: Sequence[Row], *, epsilon: float = 1e-8) -> list[Row]:
    """Return the rows with advantages of mean 0 and variance 1 over all their trained tokens, 0 elsewhere.

    One trained token, or advantages that are all equal, become 0: there is nothing to tell apart.
    """
    carried = [row.advantages for row in rows if row.advantages is not None]
    if len(carried) != len(rows):
        raise ValueError(f"{len(rows) - len(carried)} of {len(rows)} rows carry no advantages to whiten")
    trained = [one[row.trained].astype(np.float64) for row, one in zip(rows, carried, strict=True)]
    every = np.concatenate(trained or [NOTHING])
    mean = every.mean() if len(every) else 0.0
    scale = 1.0 / np.sqrt(every.var() + epsilon) if len(every) else 1.0
    result: list[Row] = []
    for row, one in zip(rows, carried, strict=True):
        result.append(replace(row, advantages=np.where(row.trained, (one - mean) * scale, 0.0).astype(np.float32)))
    return result


def _laid_out(
    batch: Sequence[ScoredRollout],
    rows: Sequence[Row],
    made: Sequence[Trajectory],
    advantages: Sequence[NDArray[np.floating[Any]]],
    targets: Sequence[NDArray[np.floating[Any]]],
) -> TokenCredit:
    """From trajectories back to where their tokens are: by turn, and by row."""
    by_turn: list[list[float | Floats]] = []
    by_row = [np.zeros(len(row.token_ids), np.float32) for row in rows]
    for rollout, one, of_tokens, worth in zip(batch, made, advantages, targets, strict=True):
        turns: list[float | Floats] = [0.0] * (len(rollout.transitions.turns) if rollout.transitions is not None else 0)
        at = 0
        for step in one.steps:
            length = step.end - step.start
            turns[step.turn] = of_tokens[at : at + length].astype(np.float32)
            by_row[step.row][step.start : step.end] = worth[at : at + length]
            at += length
        by_turn.append(turns)
    return TokenCredit(by_turn, by_row, sum(one.cut_off and bool(one.steps) for one in made))


def _bootstraps(made: Sequence[Trajectory], values: Sequence[Floats]) -> list[float]:
    """The value of the state after the last token where a rollout was cut off; 0 where it ended."""
    return [
        float(values[one.steps[-1].row][one.steps[-1].end - 1]) if one.cut_off and one.steps else 0.0 for one in made
    ]


def _cut_off(last: Transition, bootstrap: Bootstrap) -> bool:
    if bootstrap not in ("length", "turns", "never"):
        raise ValueError(f"bootstrap={bootstrap!r} is not known: use 'length', 'turns' or 'never'")
    reasons = last.call.attributes.finish_reasons
    asked = isinstance(reasons, (list, tuple)) and "tool_calls" in reasons
    return bootstrap != "never" and (last.truncated or (bootstrap == "turns" and asked))
