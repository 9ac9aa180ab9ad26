"""What each turn of a rollout is worth: from rewards to one advantage a model call. Pure.

    T turns of one rollout; own_t their own rewards; R the rollout's final one; k = T − 1 − t turns to the end

    identical        G_t = R + Σ own                                 every turn answers for the whole rollout
    turn             G_t = own_t + ρ γ^k R, and own_t + R at the end           ρ is the relevance factor
    value            A_t = Σ (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t        GAE over turns, R is in the last r
    leave_one_out    A_t = G_t − mean G of the other rollouts at this very state, G_t = own_t + γ own_{t+1} + … + γ^k R

The first two give returns, which are then compared within the group (`advantages`): the baseline of a turn is what the
same rule would have given it, had the rollout been the group's average one. So each rollout counts once, whatever its
number of turns, and a final reward that is merely average gives credit or blame to no turn. For `identical` that is
plain GRPO (RLOO, …) on the return; for `turn` with γ = 1 and scale none it is MT-GRPO's A_own + ρ A_final (arXiv
2505.11821), for any number of turns.

Sources: identical: Agent Lightning (arXiv 2508.03680); turn: MT-GRPO (arXiv 2505.11821); value: TD(λ), GAE (arXiv
1506.02438) at the level of turns; leave_one_out: GiGPO's anchor states (arXiv 2505.10978), with RLOO's baseline (arXiv
2402.14740) over the rollouts that share a state, which here is a prefix of tokens, as in tree-shaped rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_bus.adapters.advantages import Estimator, Floats, Gae, Scale, comparison, gae, rollout_advantages
from lightning_bus.adapters.transitions import Transitions

# N rollouts, T turns of one of them.

Rule = Literal["identical", "turn", "value", "leave_one_out"]


class Episode(msgspec.Struct, frozen=True, eq=False):
    """What credit looks at in one rollout that has a reward."""

    group: str
    final: float
    rewards_T: Floats  # own ones, of every turn
    states_T: Sequence[Hashable] = ()  # what the policy was shown at each; only leave_one_out compares them

    @classmethod
    def of(cls, transitions: Transitions, final: float) -> Episode:
        """Return the episode of an attempt: its turns, and the reward of the rollout itself."""
        turns = transitions.turns
        rewards_T = np.array([turn.reward if turn.rewards else 0.0 for turn in turns], np.float64)
        return cls(transitions.group, final, rewards_T, [turn.call.prompt_ids for turn in turns])

    @property
    def total(self) -> float:
        """The rollout's return: what its group compares."""
        return self.final + math.fsum(self.rewards_T.tolist())


def identical(rewards_T: ArrayLike, final: float) -> Floats:
    """Return (T,) the whole return for every turn: G_t = R + Σ own."""
    rewards = np.asarray(rewards_T, np.float64)
    return np.full(len(rewards), final + float(rewards.sum()))


def turn(rewards_T: ArrayLike, final: float, *, relevance: float, gamma: float = 1.0) -> Floats:
    """Return (T,) a turn's own reward and its share of the final one: G_t = own_t + ρ γ^k R; the last has R in full.

    relevance  ρ in [0, 1]: how much of the outcome is due to a turn that did not bring it about itself
    gamma      (0, 1]: and how much less, the more turns followed

    The shares sum to Σ own + R (1 + ρ Σ_{k=1}^{T−1} γ^k). Linear in (own, R).
    """
    _check("relevance", relevance)
    _check("gamma", gamma)
    rewards = np.asarray(rewards_T, np.float64)
    share = relevance * gamma ** np.arange(len(rewards) - 1, -1, -1, dtype=np.float64)
    share[-1:] = 1.0
    return rewards + share * final


def to_go(rewards_T: ArrayLike, final: float, *, gamma: float = 1.0) -> Floats:
    """Return (T,) the discounted return from each turn on: G_t = own_t + γ G_{t+1}, G of the last = own + R."""
    rewards = np.array(rewards_T, np.float64)
    if len(rewards):
        rewards[-1] += final
    for t in range(len(rewards) - 2, -1, -1):
        rewards[t] += gamma * rewards[t + 1]
    return rewards


def td_lambda(
    rewards_T: ArrayLike, final: float, values_T: ArrayLike, *, gamma: float, lambda_: float, bootstrap: float = 0.0
) -> Gae:
    """Return advantages and the critic's targets, GAE over turns: r_t = own_t, the last one's + R.

    values_T   (T,) the critic's value of each turn's state, before its response
    bootstrap  value of the state after the last turn: 0 where the rollout ended, the critic's where it was cut off
    """
    _check("gamma", gamma)
    _check("lambda", lambda_)
    rewards = np.array(rewards_T, np.float64)
    rewards[-1:] += final
    return gae(rewards, values_T, gamma=gamma, lambda_=lambda_, bootstrap=bootstrap)


def leave_one_out(episodes: Sequence[Episode], *, gamma: float = 1.0) -> list[Floats]:
    """Return, for each episode, (T,) the return from each turn on, less that of the other rollouts at the same state.

        A_t = G_t − mean over the other rollouts of the group that pass this state of their mean G there

    A rollout that passes a state several times counts once. A turn whose state nobody else passed inherits the
    advantage of the turn before it: its branch is explored by one rollout alone, and only where it left the others
    can be compared. A first turn that is alone is compared with the others' first turns. So where rollouts share nothing
    but the task's prompt, this is RLOO on the rollouts. Where all of a group pass a state once, advantages there sum to 0;
    a rollout without a group gets 0.
    """
    _check("gamma", gamma)
    returns = [to_go(one.rewards_T, one.final, gamma=gamma) for one in episodes]
    passing: dict[tuple[str, Hashable], dict[int, list[float]]] = {}  # state → rollout → its returns there
    for i, (episode, returns_T) in enumerate(zip(episodes, returns, strict=True)):
        for state, value in zip(episode.states_T, returns_T, strict=True):
            passing.setdefault((episode.group, state), {}).setdefault(i, []).append(float(value))
    firsts: dict[str, dict[int, float]] = {}
    for i, (episode, returns_T) in enumerate(zip(episodes, returns, strict=True)):
        if len(returns_T):
            firsts.setdefault(episode.group, {})[i] = float(returns_T[0])
    means = {key: {i: sum(each) / len(each) for i, each in there.items()} for key, there in passing.items()}
    sums = {key: sum(each.values()) for key, each in means.items()}
    result: list[Floats] = []
    for i, (episode, returns_T) in enumerate(zip(episodes, returns, strict=True)):
        found = np.zeros(len(returns_T))
        for t, state in enumerate(episode.states_T):
            key = (episode.group, state)
            others = len(means[key]) - 1
            if others:
                found[t] = returns_T[t] - (sums[key] - means[key][i]) / others
            elif t:
                found[t] = found[t - 1]
            else:
                peers = firsts[episode.group]
                rest = len(peers) - 1
                found[t] = returns_T[0] - (sum(peers.values()) - peers[i]) / rest if rest else 0.0
        result.append(found)
    return result


def call_advantages(
    episodes: Sequence[Episode],
    *,
    rule: Rule = "identical",
    relevance: float = 0.5,
    gamma: float = 1.0,
    lambda_: float = 1.0,
    estimator: Estimator = "grpo",
    scale: Scale = "none",
    values: Sequence[ArrayLike] | None = None,
    bootstraps: Sequence[float] | None = None,
) -> list[NDArray[np.float32]]:
    """Return, for each episode, the advantage of each of its turns, (T,) float32.

    episodes    of whole groups; those without a reward were left out before, for failing is not a reward of 0
    estimator   how rollouts of a group are compared, where the rule is identical or turn
    values      rule "value": the critic's, (T,) for each episode
    bootstraps  rule "value": for each episode the value after its last turn; 0 unless it was cut off

    Raises ValueError for a reward that is not finite, and for rule "value" without values.
    """
    totals = [episode.total for episode in episodes]
    for episode, total in zip(episodes, totals, strict=True):
        if not math.isfinite(total):
            raise ValueError(
                f"a rollout of group {episode.group} has a final reward of {episode.final} and own rewards "
                f"{episode.rewards_T}: drop what is not finite before groups are compared"
            )
    groups = [episode.group for episode in episodes]
    if rule == "identical":
        compared_N = rollout_advantages(totals, groups, estimator=estimator, scale=scale)
        lengths = [len(one.rewards_T) for one in episodes]
        of_turns, ends = np.repeat(compared_N, lengths), np.cumsum(lengths).tolist()
        return [of_turns[end - length : end] for length, end in zip(lengths, ends, strict=True)]
    if rule == "turn":
        return _turn_advantages(episodes, groups, relevance, gamma, estimator, scale)
    if rule == "leave_one_out":
        return [each.astype(np.float32) for each in leave_one_out(episodes, gamma=gamma)]
    if values is None:
        raise ValueError(
            "credit rule 'value' needs a critic's values, one for each turn: pass them, or choose another rule"
        )
    ends = bootstraps or [0.0] * len(episodes)
    return [
        td_lambda(one.rewards_T, one.final, values_T, gamma=gamma, lambda_=lambda_, bootstrap=end).advantages_T.astype(
            np.float32
        )
        for one, values_T, end in zip(episodes, values, ends, strict=True)
    ]


def _turn_advantages(
    episodes: Sequence[Episode], groups: list[str], relevance: float, gamma: float, estimator: Estimator, scale: Scale
) -> list[NDArray[np.float32]]:
    """The rule on what each rollout had more than the average one: rule(own, R) − rule(mean own, mean R)."""
    totals = comparison([one.total for one in episodes], groups, estimator=estimator, scale=scale)
    centre: Estimator = "grpo" if estimator == "maxrl" else estimator  # of its parts only the sum need not be negative
    finals_N = comparison([one.final for one in episodes], groups, estimator=centre).baseline_N
    # Each rollout enters with the mean of its turns, so that one of many turns does not weigh more.
    owns = [float(one.rewards_T.mean()) if len(one.rewards_T) else 0.0 for one in episodes]
    owns_N = comparison(owns, groups, estimator=centre).baseline_N
    found: list[NDArray[np.float32]] = []
    for i, one in enumerate(episodes):
        beyond_T = turn(one.rewards_T - owns_N[i], one.final - finals_N[i], relevance=relevance, gamma=gamma)
        found.append((beyond_T / totals.scale_N[i] * totals.known_N[i]).astype(np.float32))
    return found


def _check(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value}; it lies between 0 and 1")
