"""PackedBatch, the only thing the optimiser sees: rows end to end, with all that a token needs beside it.

Always true: position t scores token t + 1 of the same row and never the first token of the next one;
positions restart at 0 in every row; the weights of a step's packs sum to the step's one denominator.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lightning_bus.adapters import Row
from trainer.data.packing import plan_packs

# N rows, T packed tokens, K positions that score a trained token (K <= T).


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One forward pass of packed rows.

    What the model reads:
    token_ids_T     (T,) int64    rows end to end
    positions_T     (T,) int64    0, 1, … within each row
    row_T           (T,) int64    which row of this pack a token belongs to, 0, 0, …, 1, 1, …
    row_lengths     the lengths of those rows, summing to T
    row_indices     which of the caller's rows they are

    What position t is scored on; meaningless where trained_T is False:
    trained_T       (T,) bool     token t + 1 belongs to the same row and was sampled by the policy
    targets_T       (T,) int64    token t + 1
    logprobs_T      (T,) float32  behaviour log-prob of token t + 1, under its temperature
    temperatures_T  (T,) float32  temperature it was sampled with
    advantages_T    (T,) float32  advantage of token t + 1: of its rollout, or of the call that sampled it
    weights_T       (T,) float32  its weight in the loss, before the division by the denominator
    """

    token_ids_T: Tensor
    positions_T: Tensor
    row_T: Tensor
    row_lengths: tuple[int, ...]
    row_indices: tuple[int, ...]
    trained_T: Tensor
    targets_T: Tensor
    logprobs_T: Tensor
    temperatures_T: Tensor
    advantages_T: Tensor
    weights_T: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)


def pack_rows(
    rows: Sequence[Row],
    advantages_N: ArrayLike | None = None,
    *,
    token_budget: int,
    normalise: Literal["token", "rollout"] = "token",
    temperature: float | None = None,
) -> list[PackedBatch]:
    """Pack rows into batches of at most token_budget tokens; the packs together are one optimiser step.

    advantages_N  (N,) the advantage of each row's rollout; ones for supervised training. None: rows carry their own,
                  token by token
    normalise     "token" weighs every trained token 1: the step's loss is a mean over tokens. "rollout"
                  weighs it 1 / (trained tokens of its rollout): the loss is a mean over rollouts, however
                  many rows and turns each has
    temperature   overrides the recorded ones: supervised training wants 1, whatever the teacher used

    Raises ValueError for lengths that differ, a row longer than the budget, a row that trains nothing or
    trains its first token, an advantage that is not finite, and a temperature that is not positive.
    """
    advantages = _by_token(rows, advantages_N)
    if normalise not in ("token", "rollout"):
        raise ValueError(f"normalise={normalise!r} is not known: use 'token' or 'rollout'")
    for row in rows:
        _check(row, temperature)
    rollout_tokens: Counter[str] = Counter()
    for row in rows:
        rollout_tokens[row.rollout_id] += int(row.trained.sum())
    weights_N = [1.0 if normalise == "token" else 1.0 / rollout_tokens[row.rollout_id] for row in rows]
    return [
        _pack(rows, members, advantages, weights_N, temperature)
        for members in plan_packs([len(row.token_ids) for row in rows], token_budget)
    ]


def _pack(
    rows: Sequence[Row],
    members: Sequence[int],
    advantages: Sequence[np.ndarray],
    weights_N: Sequence[float],
    temperature: float | None,
) -> PackedBatch:
    packed = [rows[index] for index in members]
    lengths = [len(row.token_ids) for row in packed]
    # Each row's columns move one place to the left, so that t describes the scoring of t + 1; the last place
    # of a row has no next token and is filled with what trains nothing.
    logprobs_T = _shifted([np.where(row.trained, row.logprobs, 0) for row in packed], fill=0)
    temperatures_T = (
        _shifted([np.where(row.trained, row.temperatures, 1) for row in packed], fill=1)
        if temperature is None
        else np.full(sum(lengths), temperature)
    )
    return PackedBatch(
        token_ids_T=torch.from_numpy(np.concatenate([row.token_ids for row in packed]).astype(np.int64)),
        positions_T=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]).astype(np.int64)),
        row_T=torch.from_numpy(np.repeat(np.arange(len(packed)), lengths).astype(np.int64)),
        row_lengths=tuple(lengths),
        row_indices=tuple(members),
        trained_T=torch.from_numpy(_shifted([row.trained for row in packed], fill=False).astype(np.bool_)),
        targets_T=torch.from_numpy(_shifted([row.token_ids for row in packed], fill=0).astype(np.int64)),
        logprobs_T=torch.from_numpy(logprobs_T.astype(np.float32)),
        temperatures_T=torch.from_numpy(temperatures_T.astype(np.float32)),
        advantages_T=torch.from_numpy(_shifted([advantages[index] for index in members], fill=0)),
        weights_T=torch.from_numpy(np.repeat([weights_N[index] for index in members], lengths).astype(np.float32)),
    )


def _by_token(rows: Sequence[Row], advantages_N: ArrayLike | None) -> list[np.ndarray]:
    """Return (L,) float32 for each row: the advantage of each of its tokens."""
    if advantages_N is None:
        missing = [
            row.rollout_id for row in rows if row.advantages is None or row.advantages.shape != row.trained.shape
        ]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(rows)} rows carry no advantage for each token, one of rollout {missing[0]} among "
                "them: give them theirs by Row.with_advantages, or pass one a row"
            )
        found = [row.advantages for row in rows if row.advantages is not None]
    else:
        scalars_N = np.asarray(advantages_N, dtype=np.float32)
        if scalars_N.shape != (len(rows),):
            raise ValueError(f"advantages have shape {scalars_N.shape}, there are {len(rows)} rows: pass one per row")
        found = [np.full(len(row.token_ids), advantage) for row, advantage in zip(rows, scalars_N, strict=True)]
    for row, advantages in zip(rows, found, strict=True):
        if not np.isfinite(advantages).all():
            raise ValueError(
                f"rollout {row.rollout_id} has an advantage that is not finite: drop it before its group is compared"
            )
    return found


def _shifted(columns: Sequence[np.ndarray], fill: float) -> np.ndarray:
    return np.concatenate([part for column in columns for part in (column[1:], np.full(1, fill, column.dtype))])


def _check(row: Row, temperature: float | None) -> None:
    if row.trained[0] or not row.trained.any():
        what = "its first token" if row.trained[0] else "no token"
        raise ValueError(
            f"a row of rollout {row.rollout_id} attempt {row.attempt} trains {what}: a trained token needs "
            "a token before it, and a row that trains nothing is dropped before packing"
        )
    coldest = float(row.temperatures[row.trained].min()) if temperature is None else temperature
    if not coldest > 0:
        raise ValueError(
            f"rollout {row.rollout_id} attempt {row.attempt} was sampled at temperature {coldest}: "
            "greedy tokens have no log-prob to correct by. Sample above 0, or pass temperature=1 to supervise"
        )
