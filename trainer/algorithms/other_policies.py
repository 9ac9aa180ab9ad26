"""What other policies than the current one say of a step's rows, scored once a row before anything moves.

    reference   the policy as it was before its first step of reinforcement, frozen: what a KL term holds it near. Of a
                policy with an adapter it is the base, by itself
    proximal    the policy as it is before this step's first update, in the trainer's own numerics

What always holds: the same temperatures, the same dtype and the same code as for the policy itself, so that two equal
policies have a KL of exactly 0; no gradients. The reference lies in <run>/reference from before the first step on, so a
resumed run, whose weights have moved on, finds it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_bus.adapters import Row
from trainer.algorithms.base import Algorithm
from trainer.data.batch import PackedBatch, pack_rows
from trainer.optimize.following import reference_beside
from trainer.optimize.scoring import logprobs_of
from trainer.policy.model import has_adapter, load_tokenizer, save_policy
from trainer.session import Session

# L tokens of a row, K of them trained.

_Key = tuple[str, int, tuple[bytes, ...]]  # of a row: its rollout, attempt and calls


class OtherPolicies:
    """Those that an algorithm asks for; none is loaded or scored unless it does."""

    def __init__(self, session: Session, algorithm: Algorithm) -> None:
        self._session = session
        self._algorithm = algorithm
        self._reference = None
        if algorithm.wants_reference and not has_adapter(session.model):
            self._reference = _reference(session)

    def score(self, rows: Sequence[Row]) -> Scored:
        """Score the rows of a step. Called before the policy's first update of that step."""
        budget, model = self._session.train.token_budget, self._session.model
        proximal = row_logprobs(model, rows, budget) if self._algorithm.wants_proximal else None
        reference = None
        if self._reference is not None:
            reference = row_logprobs(self._reference, rows, budget)
        elif self._algorithm.wants_reference:
            reference = row_logprobs(model, rows, budget, with_adapter=False)
        return Scored({_key(row): at for at, row in enumerate(rows)}, reference, proximal)


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probs by row, (K,) each; None where nobody asked.

    at  which of them belongs to a row: updates may deal rows out with other advantages on them
    """

    at: dict[_Key, int]
    reference: list[Tensor] | None
    proximal: list[Tensor] | None

    def beside(self, packs: Sequence[PackedBatch], rows: Sequence[Row]) -> list[PackedBatch]:
        """Return the packs with these log-probs on them; `rows` are those that they were packed of."""
        return [
            pack.with_logprobs(
                reference_K=self._of(self.reference, pack, rows), proximal_K=self._of(self.proximal, pack, rows)
            )
            for pack in packs
        ]

    def _of(self, by_row: list[Tensor] | None, pack: PackedBatch, rows: Sequence[Row]) -> Tensor | None:
        if by_row is None or not pack.row_indices:
            return None
        return torch.cat([by_row[self.at[_key(rows[index])]] for index in pack.row_indices])


def row_logprobs(
    model: PreTrainedModel, rows: Sequence[Row], token_budget: int, *, with_adapter: bool = True
) -> list[Tensor]:
    """Return, for each row, (K,) float32 the log-probs of its trained tokens at their temperatures, on the CPU.

    with_adapter  False: without the adapter that the model has, as its base
    """
    found: list[Tensor] = [torch.zeros(0)] * len(rows)
    packs = pack_rows(rows, [0.0] * len(rows), token_budget=token_budget)
    for pack, pack_logprobs_K in zip(packs, logprobs_of(model, packs, with_adapter=with_adapter), strict=True):
        lengths = [int(rows[index].trained.sum()) for index in pack.row_indices]
        for index, logprobs_K in zip(pack.row_indices, pack_logprobs_K.split(lengths), strict=True):
            found[index] = logprobs_K
    return found


def _key(row: Row) -> _Key:
    return row.rollout_id, row.attempt, row.span_ids


def _reference(session: Session) -> PreTrainedModel:
    directory: Path = session.directory / "reference"
    if not directory.exists():
        save_policy(session.model, load_tokenizer(session.directory / "policy"), directory)
    return reference_beside(session.model, session.policy, directory)
