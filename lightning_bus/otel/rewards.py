"""Rewards, as spans carry them. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_bus.otel import names as n
from lightning_bus.spans import Span, reward_of


def final_reward(spans: Iterable[Span]) -> float | None:
    """Return the last reward emitted for the rollout itself, rather than for one span of it; None without one."""
    final: float | None = None
    for span in spans:
        value = reward_of(span)
        if value is not None and n.REWARD_SPAN not in span.attributes:
            final = value
    return final


def rewards_by_span(spans: Iterable[Span]) -> dict[bytes, list[float]]:
    """Return the rewards emitted for single spans, by the span's id, in log order."""
    found: dict[bytes, list[float]] = {}
    for span in spans:
        value, target = reward_of(span), span.attributes.get(n.REWARD_SPAN)
        if value is not None and isinstance(target, str):
            found.setdefault(bytes.fromhex(target), []).append(value)
    return found
