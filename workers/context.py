"""What an agent may know of the attempt that it carries out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RolloutContext:
    """One attempt, as the agent sees it.

    base_url  OpenAI-compatible endpoint of the model; it names the attempt, so calls are recorded under it
    api_key   good for this attempt only; once the attempt is over, calls are answered 409
    """

    rollout_id: str
    attempt: int  # from 1; above 1 an earlier attempt failed or was lost
    base_url: str
    api_key: str = field(repr=False)  # a traceback or a log line must not give it away
    group: str = ""  # rollouts of the same task share it
    labels: Mapping[str, str] = field(default_factory=dict[str, str])  # phase, split, step … as submitted


def model_url(gateway: str, rollout_id: str, attempt: int) -> str:
    """Return the address of an attempt below the gateway's; SDKs of OpenAI's kind want "/v1" after it."""
    return f"{gateway.rstrip('/')}/rollout/{rollout_id}/attempt/{attempt}"
