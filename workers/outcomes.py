"""What an agent may raise to say more than that it failed.

    raise Nack(30.0, "the search API is rate limited")      not now: the rollout is tried again after 30 s
    raise NonRetryable("the task names no such table")      never: the rollout has failed, whatever attempts remain

Anything else that an agent raises is a failure that may pass, and the rollout is tried again while attempts remain.
"""

from __future__ import annotations

import math
from typing import cast


class Nack(Exception):
    """Not now. The attempt counts as one, so a rollout that is only ever put off fails in the end.

    Raises ValueError when delay_s is not a time one can wait.
    """

    def __init__(self, delay_s: float, reason: str = "") -> None:
        if not (math.isfinite(delay_s) and delay_s >= 0):
            raise ValueError(f"Nack(delay_s={delay_s!r}): a delay is a number of seconds from 0 on")
        super().__init__(reason or f"the agent asked to be tried again in {delay_s:g} s")
        self.delay_s = float(delay_s)


class NonRetryable(Exception):
    """Trying again would only repeat it. The rollout has failed and becomes a dead letter; the message says why."""


def said_by(exc: BaseException) -> Nack | NonRetryable | None:
    """Return which of the two an exception is, or holds where an agent's task group raised it; None when neither."""
    if isinstance(exc, BaseExceptionGroup):
        inner = cast("BaseExceptionGroup[BaseException]", exc).exceptions
        return next((said for said in map(said_by, inner) if said is not None), None)
    return exc if isinstance(exc, (Nack, NonRetryable)) else None
