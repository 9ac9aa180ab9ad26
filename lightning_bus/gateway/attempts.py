"""What the gateway remembers of attempts: how many calls each has under way, and which are over."""

from __future__ import annotations

from collections import Counter, OrderedDict

from lightning_bus.gateway.refusals import too_many, unauthorized
from lightning_bus.tokens import Claims

OVER_MAX = 10_000  # older ones are found out by the broker again


class Attempts:
    """The attempts that call one gateway. Memory is bounded by the calls under way and OVER_MAX."""

    def __init__(self, calls_max: int) -> None:
        self._calls_max = calls_max
        self._under_way: Counter[tuple[str, int]] = Counter()
        self._over: OrderedDict[tuple[str, int], str] = OrderedDict()  # and in which words the broker said so

    def is_over(self, rollout_id: str, attempt: int, message: str) -> None:
        """Remember that the broker fenced an attempt: its token is stale, so no engine need work for it."""
        self._over[rollout_id, attempt] = message
        if len(self._over) > OVER_MAX:
            self._over.popitem(last=False)

    def check(self, claims: Claims) -> None:
        """Refuse, with 401, a token whose attempt is over."""
        message = self._over.get((claims.rollout_id, claims.attempt))
        if message is not None:
            raise unauthorized(message, code="attempt_over")

    def begin(self, claims: Claims) -> None:
        """Count a call. Refuses, with 429, one too many of an attempt; calls of no rollout are not limited."""
        attempt = claims.rollout_id, claims.attempt
        if claims.rollout_id and self._under_way[attempt] >= self._calls_max:
            raise too_many(
                f"Rollout {claims.rollout_id} attempt {claims.attempt} has {self._calls_max} calls under way. Wait for one "
                "of them, or raise [gateway] calls_per_attempt_max."
            )
        self._under_way[attempt] += 1

    def end(self, claims: Claims) -> None:
        attempt = claims.rollout_id, claims.attempt
        self._under_way[attempt] -= 1
        if not self._under_way[attempt]:
            del self._under_way[attempt]
