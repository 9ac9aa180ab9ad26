"""How much better each rollout was than the others of its task: one number per rollout.

Statistics run over rollouts, never over rows or turns: a rollout of many turns would otherwise weigh more in
its group's mean than its neighbours. Every row of a rollout is later stamped with that rollout's advantage.
The arithmetic is float64, the answer float32; a group of one has nobody to be compared with and gets 0.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

# N rollouts, G groups.

STD_EPSILON = 1e-6  # rewards are of order 1; below this spread a group is constant, not informative


def group_advantages(
    rewards_N: ArrayLike, group_N: Sequence[object] | NDArray, *, scale: Literal["none", "std"] = "none"
) -> NDArray[np.float32]:
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
        square_sums_G = np.bincount(members_N, weights=centred_N**2)
        std_N = np.sqrt(square_sums_G[members_N] / np.maximum(counts_N - 1, 1))
        centred_N = centred_N / (std_N + STD_EPSILON)
    return np.where(counts_N > 1, centred_N, 0.0).astype(np.float32)


def rloo_advantages(rewards_N: ArrayLike, group_N: Sequence[object] | NDArray) -> NDArray[np.float32]:
    """Compare each reward with the mean of the *other* rollouts of its group (RLOO, arXiv 2402.14740).

    It is n / (n - 1) times `group_advantages`, whose shapes, errors and lone rollout's 0 hold here too.
    """
    rewards_N, members_N, counts_N = _groups(rewards_N, group_N)
    centred_N = rewards_N - _group_means(rewards_N, members_N, counts_N)
    leave_one_out_N = centred_N * counts_N / np.maximum(counts_N - 1, 1)
    return np.where(counts_N > 1, leave_one_out_N, 0.0).astype(np.float32)


def _groups(
    rewards_N: ArrayLike, group_N: Sequence[object] | NDArray
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
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


def _group_means(
    rewards_N: NDArray[np.float64], members_N: NDArray[np.int64], counts_N: NDArray[np.int64]
) -> NDArray[np.float64]:
    return np.bincount(members_N, weights=rewards_N, minlength=1)[members_N] / counts_N
