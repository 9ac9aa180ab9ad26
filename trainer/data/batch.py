"""PackedBatch, the only thing the optimiser sees: rows end to end, with all that a token needs beside it.

Always true: position t scores token t + 1 of the same row and never the first token of the next one;
positions restart at 0 in every row; a row lies in one pack. A step's loss is Σ weight · loss over the tokens of all its
packs, on all ranks, divided by the sum of all their denominators.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lightning_bus.adapters import Row
from trainer.data.packing import plan_packs

# N rows, T packed tokens, K positions that score a trained token (K <= T).

Normalise = Literal["token", "sequence", "rollout", "group", "fixed"]


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
    staleness_T     (T,) int64    versions between the weights that sampled token t + 1 and those being improved, for all
                                  tokens of a call those of its oldest; -1: not known
    reference_logprobs_T  (T,) float32  its log-prob under a reference policy, or None
    proximal_logprobs_T   (T,) float32  its log-prob under the trainer's weights before this batch, or None

    denominator     this pack's share of what the step's weighted sum is divided by
    places_K        (K,) int64 where trained_T is True; None: looked up each time, for which a GPU would be waited for
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
    staleness_T: Tensor
    denominator: float
    reference_logprobs_T: Tensor | None = None
    proximal_logprobs_T: Tensor | None = None
    places_K: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)

    def scored(self, values_T: Tensor) -> Tensor:
        """Return the (K, …) of (T, …) that belong to trained tokens."""
        places_K = self.trained_T.nonzero().squeeze(-1) if self.places_K is None else self.places_K
        return values_T.index_select(0, places_K)

    def with_logprobs(self, *, reference_K: Tensor | None = None, proximal_K: Tensor | None = None) -> "PackedBatch":
        """Return the pack with log-probs of its scored tokens (K,), as `token_scores` gives them, without gradient."""
        return replace(
            self,
            reference_logprobs_T=self.reference_logprobs_T if reference_K is None else self._placed(reference_K),
            proximal_logprobs_T=self.proximal_logprobs_T if proximal_K is None else self._placed(proximal_K),
        )

    def _placed(self, values_K: Tensor) -> Tensor:
        values_T = self.logprobs_T.new_zeros(self.num_tokens)
        values_T[self.trained_T] = values_K.detach().to(values_T.dtype)
        return values_T


def pack_rows(
    rows: Sequence[Row],
    advantages_N: ArrayLike | None = None,
    *,
    token_budget: int,
    normalise: Normalise = "token",
    fixed_length: int | None = None,
    version: int | None = None,
    temperature: float | None = None,
    ranks: int = 1,
) -> list[PackedBatch]:
    """Pack rows into batches of at most token_budget tokens; the packs together are one optimiser step.

    rows          all rows of the step, also those that other ranks will train: a rollout's rows count together

    advantages_N  (N,) the advantage of each row's rollout; ones for supervised training. None: rows carry their own,
                  token by token
    normalise     what the step's loss is:
                  "token"     a mean over all trained tokens (DAPO, arXiv 2503.14476); long rows weigh more
                  "sequence"  a mean over rows of the mean over each row's tokens (GRPO); short rows' tokens weigh more
                  "rollout"   the same with rollouts for rows: forks count once, however many rows and turns there are
                  "group"     the same with groups: every task weighs the same (ScaleRL, arXiv 2510.13786)
                  "fixed"     a mean over rollouts of the *sum* over each one's tokens, over fixed_length (Dr. GRPO,
                              arXiv 2503.20783): neither long nor short weighs more
    fixed_length  of "fixed": any constant of the order of a long response, for it only scales the loss
    version       of the weights that are being improved, which a token's staleness is counted to
    temperature   overrides the recorded ones: supervised training wants 1, whatever the teacher used
    ranks         how many processes share the step: as many packs for each, rank r's are packs[r::ranks]. Where there
                  are too few rows, a pack is `idle_pack()`

    Raises ValueError for lengths that differ, a row longer than the budget, a row that trains nothing or
    trains its first token, an advantage or a log-prob that is not finite, a temperature that is not positive, and a
    fixed_length with any normalise but "fixed", or none with it.
    """
    advantages = _by_token(rows, advantages_N)
    for row in rows:
        _check(row, temperature)
    weights_N, shares_N = _weights(rows, normalise, fixed_length)
    return [
        _pack(rows, members, advantages, weights_N, shares_N, version, temperature) if members else idle_pack()
        for members in plan_packs([len(row.token_ids) for row in rows], token_budget, ranks=ranks)
    ]


def idle_pack() -> PackedBatch:
    """A pack of one token that trains nothing and is of no row: for a rank that must compute because others do."""
    integers, floats = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    return PackedBatch(
        token_ids_T=integers,
        positions_T=integers,
        row_T=integers,
        row_lengths=(1,),
        row_indices=(),
        trained_T=torch.zeros(1, dtype=torch.bool),
        targets_T=integers,
        logprobs_T=floats,
        temperatures_T=torch.ones(1),
        advantages_T=floats,
        weights_T=floats,
        staleness_T=integers - 1,
        denominator=0.0,
    )


def _weights(rows: Sequence[Row], normalise: Normalise, fixed_length: int | None) -> tuple[list[float], list[float]]:
    """Return of each row the weight of its tokens, and its share of the denominator."""
    if normalise not in get_args(Normalise):
        raise ValueError(f"normalise={normalise!r} is not known: use one of {', '.join(get_args(Normalise))}")
    if (fixed_length is None) == (normalise == "fixed"):
        raise ValueError(
            f"fixed_length={fixed_length} with normalise={normalise!r}: give the length, a number of tokens, with 'fixed' "
            "and with nothing else"
        )
    if fixed_length is not None and fixed_length < 1:
        raise ValueError(f"fixed_length={fixed_length}: a length is at least one token")
    tokens_N = [int(row.trained.sum()) for row in rows]
    if normalise == "token":
        return [1.0] * len(rows), [float(tokens) for tokens in tokens_N]
    if normalise == "sequence":
        return [1.0 / tokens for tokens in tokens_N], [1.0] * len(rows)
    names_N = [row.group if normalise == "group" else row.rollout_id for row in rows]
    # A member's share of the denominator: all rows of one rollout, or group, together count 1.
    if normalise == "fixed":
        num_rows = Counter(names_N)
        return [1.0] * len(rows), [float(fixed_length or 0) / num_rows[name] for name in names_N]
    tokens_of: Counter[str] = Counter()
    for name, tokens in zip(names_N, tokens_N, strict=True):
        tokens_of[name] += tokens
    shares_N = [tokens / tokens_of[name] for name, tokens in zip(names_N, tokens_N, strict=True)]
    return [1.0 / tokens_of[name] for name in names_N], shares_N


def _pack(
    rows: Sequence[Row],
    members: Sequence[int],
    advantages: Sequence[np.ndarray],
    weights_N: Sequence[float],
    shares_N: Sequence[float],
    version: int | None,
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
        staleness_T=torch.from_numpy(_shifted([_staleness(row, version) for row in packed], fill=-1)),
        denominator=math.fsum(shares_N[index] for index in members),
    )


def _staleness(row: Row, version: int | None) -> np.ndarray:
    """Return (L,) how many versions ago each trained token was sampled; -1: not known.

    Where weights changed in the middle of an answer, the new ones sampled the rest of it from keys and values of the old:
    all of it counts as old, so that at 0 nothing but numerics can differ.
    """
    sampled_L = np.full(len(row.token_ids), row.version_oldest, np.int64)
    for oldest, (start, end) in zip(row.versions, row.sampled, strict=False):  # none in a row that no span is behind
        sampled_L[start:end] = oldest
    if version is None:
        return np.full_like(sampled_L, -1)
    return np.where(sampled_L < 0, -1, np.maximum(0, version - sampled_L))


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
    # A teacher's log-probs are not looked at (temperature is given then), so they may be anything.
    bad = 0 if temperature is not None else int((row.trained & ~np.isfinite(row.logprobs)).sum())
    if bad:
        raise ValueError(
            f"rollout {row.rollout_id} attempt {row.attempt} has {bad} trained tokens whose log-prob is not finite: "
            "leave them out (filters.drop_unscored)"
        )
    coldest = float(row.temperatures[row.trained].min()) if temperature is None else temperature
    if not coldest > 0:
        raise ValueError(
            f"rollout {row.rollout_id} attempt {row.attempt} was sampled at temperature {coldest}: "
            "greedy tokens have no log-prob to correct by. Sample above 0, or pass temperature=1 to supervise"
        )
