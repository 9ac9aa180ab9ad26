"""One completion: as it is asked for, as it grows, and as it ends. The engine's records, with nothing that computes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trainer.serving.sampling import SamplingParams
from trainer.serving.text import Detokenizer, StopStrings


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens [start, end) of a completion were produced by weights `version`."""

    version: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Delta:
    """Tokens that one step, or a few, added to a completion. After a `last` one nothing but the Completion follows."""

    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    last: bool = False

    def followed_by(self, later: Delta) -> Delta:
        return Delta(
            self.token_ids + later.token_ids,
            self.logprobs + later.logprobs,
            self.top_logprobs + later.top_logprobs,
            later.last,
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished completion.

    token_ids      what the policy produced, the end token included when it produced one
    logprobs       of each id under the distribution it was drawn from
    top_logprobs   the likeliest (id, logprob) pairs at each position; empty lists unless asked for
    finish_reason  "stop", "length", or "abort" when a pause cut it short
    stop_reason    the stop string or stop_token_id that ended it; None for the model's own end token
    """

    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    finish_reason: str
    stop_reason: str | int | None
    weight_versions: list[VersionSpan]


@dataclass(slots=True, eq=False)
class Request:
    """One completion under way. `on_tokens` and `on_done` are called from the engine's thread and must return at once."""

    prompt_ids: NDArray[np.int32]
    params: SamplingParams
    tokens_max: int
    generator: random.Random
    on_tokens: Callable[[Delta], None] | None
    on_done: Callable[[Completion | Exception], None]
    cache_salt: str | None = None
    stop: StopStrings | None = None
    detokenizer: Detokenizer | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cancelled: bool = False
    _spans: list[tuple[str, int]] = field(default_factory=list)  # (version, first token)

    def take(self, token_id: int, logprob: float, top: list[tuple[int, float]], version: str) -> None:
        """Add one token and the version of the weights that produced it."""
        if not self._spans or self._spans[-1][0] != version:
            self._spans.append((version, len(self.token_ids)))
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self.top_logprobs.append(top)

    def completion(self) -> Completion:
        """What there is so far, as a finished completion; no spans when it never got a token."""
        ends = [start for _, start in self._spans[1:]] + [len(self.token_ids)]
        spans = [VersionSpan(version, start, end) for (version, start), end in zip(self._spans, ends, strict=False)]
        reason = self.finish_reason or "abort"
        return Completion(self.token_ids, self.logprobs, self.top_logprobs, reason, self.stop_reason, spans)
