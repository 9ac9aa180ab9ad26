"""Spans of one attempt → rows to train on.

Model calls merge into one row only when the next prompt starts exactly with the previous prompt + response token
ids; otherwise they fork into rows of their own. Either way each sampled token is trained exactly once. Nothing is
ever re-tokenised, and every call left out has a counted reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lightning_bus.spans import CHOICE, RETRY_COUNT, ModelCall, Span, is_model_call, model_call


@dataclass(frozen=True, slots=True)
class Row:
    """One training row: model calls of one attempt, merged by exact token-id prefix. L tokens."""

    rollout_id: str
    attempt: int
    group: str
    token_ids: NDArray[np.int32]  # (L,)
    trained: NDArray[np.bool_]  # (L,) True where the policy sampled this token
    logprobs: NDArray[np.float32]  # (L,) behaviour log-prob from the engine; 0 where not trained
    temperatures: NDArray[np.float32]  # (L,) sampling temperature; 1 where not trained
    version_oldest: int  # of the weight versions that sampled the trained tokens; -1: not a numbered policy
    version_newest: int
    span_ids: tuple[bytes, ...]  # the model calls in it, in order


@dataclass(slots=True)
class Transitions:
    """Rows of one attempt and why anything else is not among them."""

    rows: list[Row]
    calls: int
    dropped: Counter[str] = field(default_factory=Counter[str])


def transitions_of(rollout_id: str, attempt: int, group: str, spans: Iterable[Span]) -> Transitions:
    """Return the training rows of one attempt's spans, given in log order.

    Left out, with the reason counted: calls that are untrainable, and calls whose client sent the same request
    again because it never saw the answer (the agent acted on the later one).
    """
    calls = [model_call(span) for span in spans if is_model_call(span)]
    result = Transitions(rows=[], calls=len(calls))
    open_rows: list[_Merging] = []
    for call in _without_superseded(calls, result.dropped):
        if call.untrainable:
            result.dropped[call.untrainable] += 1
            continue
        for row in reversed(open_rows):  # the newest conversation that this call continues
            if row.extends(call):
                row.append(call)
                break
        else:
            open_rows.append(_Merging(call))
    result.rows = [row.finish(rollout_id, attempt, group) for row in open_rows]
    return result


def _without_superseded(calls: list[ModelCall], dropped: Counter[str]) -> list[ModelCall]:
    """Drop the call that a client's SDK sent again: of two with the same prompt, the one before the marked retry."""
    kept: list[ModelCall | None] = []
    newest: dict[tuple[bytes, int], int] = {}
    for call in calls:
        prompt = call.prompt_ids_P.tobytes(), call.span.attributes.get(CHOICE, 0)
        if call.span.attributes.get(RETRY_COUNT, 0) > 0 and prompt in newest:
            kept[newest[prompt]] = None
            dropped["superseded by the client's retry"] += 1
        newest[prompt] = len(kept)
        kept.append(call)
    return [call for call in kept if call is not None]


class _Merging:
    """A row that may still grow."""

    def __init__(self, call: ModelCall) -> None:
        self.calls = [call]
        self.token_ids = np.concatenate([call.prompt_ids_P, call.response_ids_R])

    def extends(self, call: ModelCall) -> bool:
        length = len(self.token_ids)
        return len(call.prompt_ids_P) >= length and bool((call.prompt_ids_P[:length] == self.token_ids).all())

    def append(self, call: ModelCall) -> None:
        self.calls.append(call)
        self.token_ids = np.concatenate([call.prompt_ids_P, call.response_ids_R])

    def finish(self, rollout_id: str, attempt: int, group: str) -> Row:
        length = len(self.token_ids)
        trained = np.zeros(length, np.bool_)
        logprobs = np.zeros(length, np.float32)
        temperatures = np.ones(length, np.float32)
        versions: list[int] = []
        for call in self.calls:
            start = len(call.prompt_ids_P)
            sampled = slice(start, start + len(call.response_ids_R))
            assert not trained[sampled].any()
            trained[sampled] = True
            logprobs[sampled] = call.logprobs_R
            temperatures[sampled] = call.temperature
            versions += [_number(version) for version, _, _ in call.weight_versions]
        return Row(
            rollout_id=rollout_id,
            attempt=attempt,
            group=group,
            token_ids=self.token_ids.astype(np.int32, copy=False),
            trained=trained,
            logprobs=logprobs,
            temperatures=temperatures,
            version_oldest=min(versions, default=-1),
            version_newest=max(versions, default=-1),
            span_ids=tuple(call.span.span_id for call in self.calls),
        )


def _number(version: str) -> int:
    return int(version) if version.isdecimal() else -1
