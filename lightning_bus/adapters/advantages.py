"""How much better each rollout was than it might have been: one number a rollout, or one a turn with a critic. Pure.

Statistics run over rollouts, never over rows or turns: a rollout of many turns would otherwise weigh more in its
group's mean than its neighbours. The arithmetic is float64, the answer float32. A reward that is not finite is
refused; a group of one has nobody to be compared with and gets 0.

    x reward, m mean of its group, n rollouts of the group, s standard deviation

    grpo                    x − m, or (x − m) / s of the group                        arXiv 2402.03300
    dr_grpo                 x − m                                                     arXiv 2503.20783
    rloo                    x − mean of the others = (x − m) · n / (n − 1)            arXiv 2402.14740
    reinforce++             (x − mean of the batch) / s of the batch                  arXiv 2501.03262
    reinforce++_baseline    y = x − m, then y / s of all y in the batch               arXiv 2501.03262
    maxrl                   (x − m) / m, for rewards that are not negative            arXiv 2602.02710
    gae                     of turns or tokens, with a critic's values                arXiv 1506.02438
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

# N rollouts, G groups, T turns or tokens.

Estimator = Literal["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "maxrl"]
Scale = Literal["none", "std"]
Groups = Sequence[object] | NDArray[Any]
Floats = NDArray[np.float64]

STD_EPSILON = 1e-6  # rewards are of order 1; below this spread a group is constant, not informative


def rollout_advantages(
    rewards_N: ArrayLike, group_N: Groups, *, estimator: Estimator = "grpo", scale: Scale = "none"
) -> NDArray[np.float32]:
    """Return the advantage of each rollout by the estimator of that name; see the table above.

    rewards_N  (N,) float   one finite number a rollout: its return
    group_N    (N,)         rollouts of the same task share a value
    scale      grpo only: "std" also divides by the group's standard deviation, as the paper does
    returns    (N,) float32

    Raises ValueError for lengths that differ, a reward that is not finite, and a name that is not known.
    """
    if estimator == "grpo":
        return group_advantages(rewards_N, group_N, scale=scale)
    if estimator == "rloo":
        return rloo_advantages(rewards_N, group_N)
    compared = comparison(rewards_N, group_N, estimator=estimator, scale=scale)
    return np.where(compared.known_N, (compared.rewards_N - compared.baseline_N) / compared.scale_N, 0.0).astype(
        np.float32
    )


def group_advantages(rewards_N: ArrayLike, group_N: Groups, *, scale: Scale = "none") -> NDArray[np.float32]:
    """Centre each reward on the mean of its group (GRPO, arXiv 2402.03300).

    rewards_N  (N,) float   one finite scalar per rollout
    group_N    (N,)         rollouts of the same task share a value
    scale      "std" also divides by the group's standard deviation (n - 1 in the denominator). The paper
               does; the default does not, because the division blows up groups that are almost constant
               (arXiv 2503.20783).
    returns    (N,) float32 sums to 0 within a group; a lone rollout gets 0

    Raises ValueError when the lengths differ or a reward is not finite.
    """
    if scale not in ("none", "std"):
        raise ValueError(f"scale={scale!r} is not known: use 'none' or 'std'")
    rewards_N, members_N, counts_N = _groups(rewards_N, group_N)
    centred_N = rewards_N - _group_means(rewards_N, members_N, counts_N)
    if scale == "std":
        centred_N = centred_N / (_group_stds(centred_N, members_N, counts_N) + STD_EPSILON)
    return np.where(counts_N > 1, centred_N, 0.0).astype(np.float32)


def dr_grpo_advantages(rewards_N: ArrayLike, group_N: Groups) -> NDArray[np.float32]:
    """Centre each reward on the mean of its group and leave it at that (Dr. GRPO, arXiv 2503.20783).

    The paper's other half, a constant instead of each response's length in the denominator, is the loss's affair.
    """
    return group_advantages(rewards_N, group_N)


def rloo_advantages(rewards_N: ArrayLike, group_N: Groups) -> NDArray[np.float32]:
    """Compare each reward with the mean of the *other* rollouts of its group (RLOO, arXiv 2402.14740).

    It is n / (n - 1) times `group_advantages`, whose shapes, errors and lone rollout's 0 hold here too.
    """
    rewards_N, members_N, counts_N = _groups(rewards_N, group_N)
    centred_N = rewards_N - _group_means(rewards_N, members_N, counts_N)
    leave_one_out_N = centred_N * counts_N / np.maximum(counts_N - 1, 1)
    return np.where(counts_N > 1, leave_one_out_N, 0.0).astype(np.float32)


def reinforce_pp_advantages(rewards_N: ArrayLike, group_N: Groups | None = None) -> NDArray[np.float32]:
    """Whiten rewards over the whole batch (REINFORCE++, arXiv 2501.03262), after centring them by group if asked.

    group_N  None: A = (x − mean) / std over the batch. Given: the variant with baseline, y = x − group mean,
             A = y / std of all y; a lone rollout gets 0 and counts in no statistic
    returns  (N,) float32, of mean 0 and standard deviation 1 (n in the denominator) over the batch

    The paper whitens over tokens; over rollouts long answers do not weigh more. Errors as `group_advantages`.
    """
    if group_N is None:
        rewards_N = np.asarray(rewards_N, dtype=np.float64)
        return rollout_advantages(rewards_N, np.zeros(len(rewards_N), np.int64), estimator="reinforce++")
    return rollout_advantages(rewards_N, group_N, estimator="reinforce++_baseline")


def maxrl_advantages(rewards_N: ArrayLike, group_N: Groups) -> NDArray[np.float32]:
    """Divide the centred reward by the group's mean (MaxRL's p-normalisation, arXiv 2602.02710): A = (x − m) / m.

    The gradient is that of log p(success) instead of p(success), so hard tasks, where m is small, count more. A group
    that earned nothing gets 0. Raises ValueError also for a negative reward: the mean is to be a success rate.
    """
    return rollout_advantages(rewards_N, group_N, estimator="maxrl")


class Comparison(NamedTuple):
    """What each rollout is compared with: A = (x − baseline) / scale where known, else 0. All (N,)."""

    rewards_N: Floats
    baseline_N: Floats
    scale_N: Floats
    known_N: NDArray[np.bool_]


def comparison(rewards_N: ArrayLike, group_N: Groups, *, estimator: Estimator, scale: Scale = "none") -> Comparison:
    """Return baseline and scale of each rollout, for credit rules that give calls other numbers than their rollout's."""
    rewards_N, members_N, counts_N = _groups(rewards_N, group_N)
    ones_N, several_N = np.ones(len(rewards_N)), counts_N > 1
    means_N = _group_means(rewards_N, members_N, counts_N)
    if estimator == "reinforce++":
        batch_N = np.full(len(rewards_N), rewards_N.mean() if len(rewards_N) else 0.0)
        return Comparison(rewards_N, batch_N, ones_N * _spread(rewards_N - batch_N), ones_N > 0)
    if estimator == "reinforce++_baseline":
        return Comparison(rewards_N, means_N, ones_N * _spread((rewards_N - means_N)[several_N]), several_N)
    if estimator == "maxrl":
        if (rewards_N < 0).any():
            raise ValueError(
                f"reward {rewards_N.min():g} is negative, and maxrl divides by the mean as by a success rate: give "
                "rewards from 0 on, or choose another estimator"
            )
        earned_N = means_N > 0
        return Comparison(rewards_N, means_N, np.where(earned_N, means_N, 1.0), several_N & earned_N)
    if estimator == "rloo":
        others_N = (means_N * counts_N - rewards_N) / np.maximum(counts_N - 1, 1)
        return Comparison(rewards_N, others_N, ones_N, several_N)
    if estimator not in ("grpo", "dr_grpo"):
        raise ValueError(f"estimator={estimator!r} is not known: use one of {', '.join(Estimator.__args__)}")
    if estimator == "grpo" and scale == "std":
        stds_N = _group_stds(rewards_N - means_N, members_N, counts_N) + STD_EPSILON
        return Comparison(rewards_N, means_N, stds_N, several_N)
    return Comparison(rewards_N, means_N, ones_N, several_N)


class Gae(NamedTuple):
    """Advantages, and what the critic should have said: advantage + value. Both (T,) float64."""

    advantages_T: Floats
    targets_T: Floats


def gae(
    rewards_T: ArrayLike,
    values_T: ArrayLike,
    *,
    gamma: float = 1.0,
    lambda_: float = 1.0,
    bootstrap: float = 0.0,
    acted_T: ArrayLike | None = None,
) -> Gae:
    """Generalised advantage estimation over one sequence (arXiv 1506.02438).

        δ_t = r_t + γ V_{t+1} − V_t        A_t = δ_t + γ λ A_{t+1}        V_T = bootstrap

    rewards_T  (T,)  what each step earned
    values_T   (T,)  the critic's value of the state *before* each step
    bootstrap  value of the state after the last step: 0 where the episode ended there, the critic's where it was
               only cut off
    acted_T    (T,)  True where the policy acted. Other steps, a tool's answer between two turns, are passed over:
               they discount nothing, get 0, and what they earned is the action's before them
    returns    advantages and targets; λ = 1 makes targets the discounted return, λ = 0 the one-step target

    Raises ValueError for lengths that differ and for what is not finite.
    """
    rewards, values = np.asarray(rewards_T, np.float64), np.asarray(values_T, np.float64)
    acted = np.ones(len(rewards), np.bool_) if acted_T is None else np.asarray(acted_T, np.bool_)
    if rewards.ndim != 1 or rewards.shape != values.shape or rewards.shape != acted.shape:
        raise ValueError(
            f"rewards have shape {rewards.shape}, values {values.shape}, acted {acted.shape}: they must be equal"
        )
    if not (np.isfinite(rewards).all() and np.isfinite(values[acted]).all() and np.isfinite(bootstrap)):
        raise ValueError(
            "a reward, a value or the bootstrap value is not finite: drop the rollout before it is compared"
        )
    estimates = np.zeros(len(rewards))
    next_value, next_advantage, earned = float(bootstrap), 0.0, 0.0
    for t in range(len(rewards) - 1, -1, -1):
        earned += float(rewards[t])
        if acted[t]:
            value = float(values[t])
            next_advantage = earned + gamma * next_value - value + gamma * lambda_ * next_advantage
            next_value, earned = value, 0.0
            estimates[t] = next_advantage
    return Gae(estimates, np.where(acted, estimates + np.where(acted, values, 0.0), 0.0))


def gae_batch(
    rewards: Sequence[ArrayLike],
    values: Sequence[ArrayLike],
    *,
    gammas: Sequence[ArrayLike] | float = 1.0,
    lambdas: Sequence[ArrayLike] | float = 1.0,
    bootstraps_N: ArrayLike | None = None,
) -> list[Gae]:
    """Generalised advantage estimation over many sequences of steps at once; each as `gae` has it.

    rewards       N sequences, (T,) of their own length
    values        as long: the critic's value of the state *before* each step
    gammas        γ of every step, or (T,) for each sequence: what the way from step t to t + 1 discounts
    lambdas       λ likewise
    bootstraps_N  (N,) value of the state after each last step; None: 0, they all ended there

    The sequences hold actions only: what lies between two of them, an observation, is left out by the caller, so the
    next value and the next advantage are carried over it. Raises ValueError as `gae` does.
    """
    count = len(rewards)
    lengths = [len(np.atleast_1d(np.asarray(one))) for one in rewards]
    columns = max(lengths, default=0)

    def padded(given: Sequence[ArrayLike] | float, what: str) -> Floats:
        """(columns, N): every sequence ends in the last row, so that one loop from there serves them all."""
        if isinstance(given, (int, float)):
            return np.full((columns, count), float(given))
        made = np.zeros((columns, count))
        if len(given) != count:
            raise ValueError(f"there are {count} sequences of rewards and {len(given)} of {what}")
        for n, (one, length) in enumerate(zip(given, lengths, strict=True)):
            steps = np.asarray(one, np.float64)
            if steps.shape != (length,):
                raise ValueError(f"sequence {n} has {length} rewards and {what} of shape {steps.shape}: they must fit")
            made[columns - length :, n] = steps
        return made

    ends_N = np.zeros(count) if bootstraps_N is None else np.asarray(bootstraps_N, np.float64)
    if ends_N.shape != (count,):
        raise ValueError(f"there are {count} sequences and bootstrap values of shape {ends_N.shape}")
    rewards_TN, values_TN = padded(rewards, "rewards"), padded(values, "values")
    gammas_TN, lambdas_TN = padded(gammas, "gammas"), padded(lambdas, "lambdas")
    if not all(np.isfinite(given).all() for given in (rewards_TN, values_TN, ends_N)):
        raise ValueError(
            "a reward, a value or the bootstrap value is not finite: drop the rollout before it is compared"
        )
    deltas_TN = rewards_TN + gammas_TN * np.vstack([values_TN[1:], ends_N]) - values_TN
    decays_TN = gammas_TN * lambdas_TN
    advantages_TN = deltas_TN
    for t in range(columns - 2, -1, -1):
        advantages_TN[t] += decays_TN[t] * advantages_TN[t + 1]
    targets_TN = advantages_TN + values_TN
    return [
        Gae(advantages_TN[columns - length :, n].copy(), targets_TN[columns - length :, n].copy())
        for n, length in enumerate(lengths)
    ]


def _spread(centred_N: Floats) -> float:
    return float(np.sqrt((centred_N**2).mean())) + STD_EPSILON if len(centred_N) else 1.0


def _groups(rewards_N: ArrayLike, group_N: Groups) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """Rewards as float64, the group of each rollout as 0..G-1, and the size of that group."""
    rewards_N = np.asarray(rewards_N, dtype=np.float64)
    if rewards_N.ndim != 1 or len(rewards_N) != len(group_N):
        raise ValueError(
            f"rewards have shape {rewards_N.shape}, groups have length {len(group_N)}: pass one of each per rollout"
        )
    bad = np.flatnonzero(~np.isfinite(rewards_N))
    if len(bad):
        raise ValueError(
            f"reward {rewards_N[bad[0]]} at index {bad[0]} ({len(bad)} of {len(rewards_N)} are not finite): "
            "drop a rollout without a reward before its group is compared"
        )
    index_of: dict[object, int] = {}
    members_N = np.array([index_of.setdefault(group, len(index_of)) for group in group_N], dtype=np.int64)
    return rewards_N, members_N, np.bincount(members_N, minlength=1)[members_N]


def _group_means(rewards_N: Floats, members_N: NDArray[np.int64], counts_N: NDArray[np.int64]) -> Floats:
    return np.bincount(members_N, weights=rewards_N, minlength=1)[members_N] / counts_N


def _group_stds(centred_N: Floats, members_N: NDArray[np.int64], counts_N: NDArray[np.int64]) -> Floats:
    """Standard deviation of each rollout's group, n - 1 in the denominator."""
    square_sums_G = np.bincount(members_N, weights=centred_N**2)
    return np.sqrt(square_sums_G[members_N] / np.maximum(counts_N - 1, 1))
