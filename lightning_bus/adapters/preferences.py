"""Groups of rollouts → pairs of a better and a worse answer to the same prompt, for DPO (arXiv 2305.18290). Pure.

Of each group the rollout with the highest return meets the one with the lowest. Their conversations are paired by agent
and by what stood before the model's first answer; from there on they are `chosen` and `rejected`. What always holds:
both begin with the same prompt, and groups that give no pair are counted by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from lightning_bus.adapters.chat import Conversation, Json, conversations_of
from lightning_bus.adapters.rollouts import FinishedRollout

PREFERENCE_COLUMNS = {
    "prompt": "messages",
    "chosen": "messages",
    "rejected": "messages",
    "tools": "json",
    "group": "string",
    "agent": "string",
    "chosen_rollout_id": "string",
    "rejected_rollout_id": "string",
    "chosen_reward": "float64",
    "rejected_reward": "float64",
    "margin": "float64",  # chosen_reward - rejected_reward
}


def preference_rows(
    group: Sequence[tuple[FinishedRollout, float | None]], dropped: Counter[str], *, margin_min: float = 0.0
) -> list[Json]:
    """Return the rows of PREFERENCE_COLUMNS that one group gives: at most one for each agent and prompt.

    group       its rollouts and their returns; those without one take no part
    margin_min  the best and the worst return must differ by more than 0 and at least this much

    Of rollouts that earned the same the first counts. Reasons: `fewer than two scored rollouts`, `margin too small`,
    `no common prompt`, `same answer`, `answers cut off` (one of the two has no whole one).
    """
    known = [(total, rollout) for rollout, total in group if total is not None]
    if len(known) < 2:
        dropped["fewer than two scored rollouts"] += 1
        return []
    best_return, best = max(known, key=lambda one: one[0])
    worst_return, worst = min(known, key=lambda one: one[0])
    margin = best_return - worst_return
    if margin <= 0 or margin < margin_min:
        dropped["margin too small"] += 1
        return []
    ours, theirs = _by_opening(best), _by_opening(worst)
    rows: list[Json] = []
    pairs = [(chosen, theirs[key]) for key, chosen in ours.items() if key in theirs]
    for chosen, rejected in pairs:
        at = chosen.opening
        if chosen.messages[at:] == rejected.messages[at:]:
            dropped["same answer"] += 1
            continue
        rows.append(
            {
                "prompt": chosen.messages[:at], "chosen": chosen.messages[at:], "rejected": rejected.messages[at:],
                "tools": chosen.tools, "group": best.group, "agent": chosen.agent,
                "chosen_rollout_id": best.rollout_id, "rejected_rollout_id": worst.rollout_id,
                "chosen_reward": best_return, "rejected_reward": worst_return, "margin": margin,
            }
        )  # fmt: skip
    if not pairs:
        dropped["no common prompt" if ours and theirs else "answers cut off"] += 1
    return rows


def _by_opening(rollout: FinishedRollout) -> dict[Any, Conversation]:
    """Return the first conversation for each agent and opening."""
    found: dict[Any, Conversation] = {}
    for one in conversations_of(rollout.spans):
        opening = msgspec.json.encode(one.messages[: one.opening], order="deterministic")
        found.setdefault((one.agent, opening), one)
    return found
