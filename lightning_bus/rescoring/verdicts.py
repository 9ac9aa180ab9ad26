"""What reward hooks have said, kept in the log: who reads it again does not ask again.

    verdicts = Verdicts("my_rewards:reward")
    for record in reader.records():
        verdicts.feed(record)
    verdicts.of(rollout)                      # what the hook said of it; None: it was not asked, or failed

A verdict is a reward span that names its hook, and the code that the hook had. It stands in the log on its own, not in its
rollout's attempt: a hook judges rollouts that have ended, and what has ended takes no more spans. Only what was said is kept.
That a hook raised or hung is no verdict: whoever comes after asks anew, because what stood in its way may be gone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

from lightning_bus.adapters import FinishedRollout, Reward
from lightning_bus.clock import wall_ns
from lightning_bus.errors import RemoteProtocolError
from lightning_bus.lifecycle import Status
from lightning_bus.otel import names as n
from lightning_bus.otel.traceparent import root_of_attempt
from lightning_bus.records import Kind, Record
from lightning_bus.spans import Span, decode_spans, reward_of

Given = float | Sequence[Reward]
_MARK = n.VERDICT.encode()


class Verdicts:
    """The verdicts of one hook, by rollout and attempt. Feed it every record, in order; the newest counts."""

    def __init__(self, hook: str, *, code: str | None = None) -> None:
        """hook  MODULE:FUNCTION
        code  only verdicts of this code, see `HookPool.code`: a hook that was changed since is asked anew. None: of any
        """
        self._hook = hook
        self._code = code
        self._found: dict[tuple[str, int], Given] = {}

    def feed(self, record: Record) -> None:
        """Take one record."""
        if record.kind is Kind.SPANS and not record.rollout_id and _MARK in record.body:
            for span in decode_spans(record.body):
                attributes = span.attributes
                if attributes.get(n.REWARD_NAME) != self._hook or n.VERDICT not in attributes:
                    continue
                if self._code in (None, attributes[n.VERDICT]):
                    self._found[span.rollout_id, span.attempt] = _given(span)

    def of(self, rollout: FinishedRollout) -> Given | None:
        """Return what the hook said of this rollout; None: nothing that is known."""
        return self._found.get((rollout.rollout_id, rollout.attempt))

    def apply(self, rollout: FinishedRollout) -> FinishedRollout:
        """Return the rollout with what the hook said of it; as it is where nothing is known."""
        given = self.of(rollout) if rollout.status is Status.SUCCEEDED else None
        return rollout if given is None else judged(rollout, given)

    def forget(self, rollout: FinishedRollout) -> None:
        """Let go of a verdict that nobody will ask for again."""
        self._found.pop((rollout.rollout_id, rollout.attempt), None)


def judged(rollout: FinishedRollout, given: float | Sequence[Reward]) -> FinishedRollout:
    """Return the rollout with a hook's verdict as its reward, or as rewards of its spans."""
    if not isinstance(given, Sequence):
        return replace(rollout, reward=given, judged=given)
    own = [reward.value for reward in given if not reward.span_id]
    return replace(rollout, reward=math.fsum(own) if own else rollout.reward, judged=list(given))


def read_verdicts(records: Iterable[Record], *wanted: Verdicts) -> None:
    """Have these take what a log holds of their hooks."""
    for record in records:
        for verdicts in wanted:
            verdicts.feed(record)


def verdict_span(rollout: FinishedRollout, given: Given, *, hook: str, code: str) -> Span:
    """Return the span that keeps a verdict: to be appended under no rollout, `append("", 0, spans)`."""
    trace_id, root_id = root_of_attempt(rollout.rollout_id, rollout.attempt)
    attributes: dict[str, Any] = {n.REWARD_NAME: hook, n.VERDICT: code}
    if isinstance(given, Sequence):
        attributes[n.VERDICT_REWARDS] = [[one.span_id, one.value, one.source] for one in given]
    else:
        attributes[n.REWARD] = given
    now_ns = wall_ns()
    return Span(
        os.urandom(8), trace_id, root_id, n.REWARD_SPAN_NAME, now_ns, now_ns, attributes, rollout.rollout_id,
        rollout.attempt,
    )  # fmt: skip


def _given(span: Span) -> Given:
    rewards = span.attributes.get(n.VERDICT_REWARDS)
    if rewards is None:
        value = reward_of(span)
        if value is None:
            raise RemoteProtocolError(
                f"the verdict on rollout {span.rollout_id} in span {span.span_id.hex()} has no reward"
            )
        return value
    return [Reward(bytes(span_id), float(value), str(source)) for span_id, value, source in cast("list[Any]", rewards)]
