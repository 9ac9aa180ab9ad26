"""What a reward hook may answer, as it travels from its process."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from lightning_bus.adapters import Reward

LENGTH = struct.Struct("<I")  # of the frame that follows


class Given(msgspec.Struct, frozen=True, tag=True):
    """A rollout's reward, or rewards for its spans (span_id b"": for the rollout itself)."""

    value: float | None
    rewards: list[Reward] = []

    @property
    def given(self) -> float | list[Reward]:
        return self.rewards if self.value is None else self.value


class Dropped(msgspec.Struct, frozen=True, tag=True):
    """No reward, and why: the rollout is left out of what follows, which is not a reward of 0."""

    reason: str
    detail: str = ""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The hook is loaded. code: a digest of the file that it stands in."""

    code: str = ""


class NotLoaded(msgspec.Struct, frozen=True, tag=True):
    """The hook cannot be loaded."""

    error: str


Answer = Given | Dropped


def answer_from(value: Any) -> Answer:
    """Return what a hook's return value means. What is neither a finite number nor a list of rewards is a drop."""
    if value is None:
        return Dropped("hook returned None")
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return _answer_from_list(cast("Sequence[Any]", value))
    number = _finite(value)
    if number is None:
        return Dropped("hook returned no finite number", repr(value)[:500])
    return Given(number)


def _answer_from_list(values: Sequence[Any]) -> Answer:
    rewards: list[Reward] = []
    for item in values:
        try:
            span_id, value, source = item
        except (TypeError, ValueError):
            span_id, value, source = None, None, None
        number = _finite(value)
        if not isinstance(span_id, bytes) or number is None or not isinstance(source, str):
            return Dropped("hook returned a list of something else than rewards", repr(item)[:500])
        rewards.append(Reward(span_id, number, source))
    return Given(None, rewards)


def _finite(value: Any) -> float | None:
    """Return a number of Python's, numpy's or torch's as a float; None for anything else, and for NaN."""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
