"""Model calls → rows to train on, merged by exact token-id prefix. Pure.

Calls merge into one row only where the next prompt starts exactly with the previous prompt + response; otherwise they
fork into rows of their own. A fork's prompt may hold tokens that another row trains, and holds them as context: each
sampled token is trained exactly once. Nothing is ever re-tokenised. Comparing is one memcmp a call, so merging a
conversation takes time in proportion to what the log has of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lightning_bus.spans import ModelCall


@dataclass(frozen=True, slots=True)
class Row:
    """One training row: model calls of one attempt and one policy, merged by exact token-id prefix. L tokens, C calls."""

    rollout_id: str
    attempt: int
    group: str
    token_ids: NDArray[np.int32]  # (L,)
    trained: NDArray[np.bool_]  # (L,) True where the policy sampled this token
    logprobs: NDArray[np.float32]  # (L,) behaviour log-prob from the engine; 0 where not trained
    temperatures: NDArray[np.float32]  # (L,) sampling temperature; 1 where not trained
    version_oldest: int  # of the weight versions that sampled the trained tokens; -1: not a numbered policy
    version_newest: int
    span_ids: tuple[bytes, ...]  # (C,) the model calls in it, in order
    sampled: tuple[tuple[int, int], ...] = ()  # (C,) from where to where each call's response lies
    versions: tuple[int, ...] = ()  # (C,) the oldest weights that sampled from each call's response; -1: not numbered
    policy: str = ""  # which policy it trains, where several are trained; "": the one
    advantages: NDArray[np.float32] | None = (
        None  # (L,) of the call that a token is of, 0 elsewhere; None: not known yet
    )

    def with_advantages(self, advantage_of: Mapping[bytes, float]) -> Row:
        """Return the row with every sampled token carrying the advantage of its call.

        advantage_of  by the call's span id. Raises ValueError when a call has none.
        """
        if len(self.sampled) != len(self.span_ids):
            raise ValueError(
                f"a row of rollout {self.rollout_id} names {len(self.span_ids)} calls and the places of "
                f"{len(self.sampled)}: only rows made from spans can be given advantages by call"
            )
        advantages = np.zeros(len(self.token_ids), np.float32)
        for span_id, (start, end) in zip(self.span_ids, self.sampled, strict=True):
            if span_id not in advantage_of:
                raise ValueError(f"call {span_id.hex()} of rollout {self.rollout_id} was given no advantage")
            advantages[start:end] = advantage_of[span_id]
        return replace(self, advantages=advantages)


@dataclass(frozen=True, slots=True)
class MergeStats:
    """What merging saved. Add those of several rollouts."""

    rollouts: int = 0
    calls: int = 0  # that are trained
    rows: int = 0
    tokens: int = 0  # of the rows
    call_tokens: int = 0  # of one row for each call

    def __add__(self, other: MergeStats) -> MergeStats:
        return MergeStats(
            self.rollouts + other.rollouts,
            self.calls + other.calls,
            self.rows + other.rows,
            self.tokens + other.tokens,
            self.call_tokens + other.call_tokens,
        )

    @property
    def rows_per_rollout(self) -> float:
        return self.rows / self.rollouts if self.rollouts else 0.0

    @property
    def tokens_saved(self) -> int:
        return self.call_tokens - self.tokens

    @property
    def merge_ratio(self) -> float:
        """How many times as many tokens a row for each call would have."""
        return self.call_tokens / self.tokens if self.tokens else 1.0


def conversations(calls: Sequence[ModelCall], policies: Sequence[str], trained: Sequence[int]) -> list[list[int]]:
    """Return which calls make up each row, as indices in order: first the rows that began first.

    calls     in order of time
    policies  what each of them trains; calls of different policies do not merge
    trained   which of them are trainable, in order: the others are in no row

    A call goes on the newest row that it continues exactly.
    """
    rows: list[list[int]] = []
    # Of each row its last call: policy, prompt, response, and their lengths in bytes.
    ends: list[tuple[str, bytes, bytes, int, int]] = []
    for at in trained:
        known, policy = calls[at].attributes, policies[at]
        prompt, response = known.prompt or b"", known.response
        length = len(prompt)
        end = (policy, prompt, response, length, length + len(response))
        for k in range(len(ends) - 1, -1, -1):
            their_policy, their_prompt, their_response, their_start, their_length = ends[k]
            # The response first: it is what tells branches of one history apart, so most comparisons end at once.
            if (
                their_length <= length
                and prompt.startswith(their_response, their_start)
                and prompt.startswith(their_prompt)
                and policy == their_policy
            ):
                rows[k].append(at)
                ends[k] = end
                break
        else:
            rows.append([at])
            ends.append(end)
    return rows


def row_of(calls: Sequence[ModelCall], *, rollout_id: str, attempt: int, group: str, policy: str) -> Row:
    """Return the row of calls that continue one another."""
    last = calls[-1]
    token_ids = np.concatenate((last.prompt_ids_P, last.response_ids_R)).astype(np.int32, copy=False)
    length = len(token_ids)
    trained = np.zeros(length, np.bool_)
    logprobs = np.zeros(length, np.float32)
    temperatures = np.ones(length, np.float32)
    oldest: list[int] = []
    newest: list[int] = []
    sampled: list[tuple[int, int]] = []
    for call in calls:
        end = call.tokens
        start = end - len(call.attributes.response) // 4
        trained[start:end] = True
        logprobs[start:end] = call.logprobs_R
        temperatures[start:end] = call.temperature
        sampled.append((start, end))
        # A call that does not say which weights sampled it makes the row one of unknown age.
        # A part without tokens, of an answer that was begun and asked for again, sampled nothing.
        versions = [_number(version) for version, first, past in call.weight_versions if first < past] or (-1,)
        oldest.append(min(versions))
        newest.append(max(versions))
    return Row(
        rollout_id, attempt, group, token_ids, trained, logprobs, temperatures, min(oldest), max(newest),
        tuple(call.span_id for call in calls), tuple(sampled), tuple(oldest), policy,
    )  # fmt: skip


def _number(version: str) -> int:
    return int(version) if version.isdecimal() else -1
