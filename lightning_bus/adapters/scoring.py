"""A finished rollout → everything that it earned: what was recorded, what rules give, what a hook says. Pure.

    rewards = rewards_of(rollout, RewardsSection(rules=[RuleSection(on="tool_error", value=-0.1)]))
    rewards.total, rewards.by_source(), rewards.of(call_ids)

Whatever ran when the rollout was recorded, it can be scored again, with other rules or another hook, any number of times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from lightning_bus.adapters.air import RuleSection, automatic_rewards
from lightning_bus.adapters.causes import Causes
from lightning_bus.adapters.rewards import FINAL, Reward, RolloutRewards, emitted_rewards, place
from lightning_bus.adapters.rollouts import FinishedRollout
from lightning_bus.config import Section
from lightning_bus.lifecycle import Status

HOOK = "hook"  # source of what a reward hook gave for the rollout


class RewardsSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[rewards]: what counts as reward beside what the agent returned. The default: what it emitted for spans."""

    # Of what agents emit: only the rollout's reward; also rewards for spans; also rewards for no span that came before
    # the last one, which then belong to the model call before them.
    emitted: Literal["final", "spans", "all"] = "spans"
    rules: list[RuleSection] = msgspec.field(default_factory=list[RuleSection])
    weight: float = 1.0  # multiplies what rules give
    cap: Annotated[float, msgspec.Meta(gt=0)] | None = None  # what rules give to one rollout stays within ±cap
    hook: str = ""  # MODULE:FUNCTION, called with each finished rollout
    hook_limit_s: Annotated[float, msgspec.Meta(gt=0)] = 10.0  # for one rollout; then its process is killed
    hook_processes: Annotated[int, msgspec.Meta(ge=1)] = 1
    hook_memory_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0  # address space of each hook process; 0: no limit

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"weight is a finite number, not {self.weight}")
        sources = [rule.source for rule in self.rules]
        twice = next((source for source in sources if sources.count(source) > 1), None)
        if twice is not None:
            raise ValueError(f"two rules are called {twice!r}: give one of them another name, so that reports can tell")


def rewards_of(
    rollout: FinishedRollout, section: RewardsSection, given: float | Sequence[Reward] | None = None
) -> RolloutRewards:
    """Return what a rollout earned.

    given  what a hook said, by default `rollout.judged`: a float is the rollout's reward instead of the recorded one; rewards are those of its spans
           instead of the emitted ones, and those whose span_id is b"" sum to the rollout's own. None: no hook was asked

    A rollout that did not succeed has no final reward, whatever its calls earned.
    """
    given = rollout.judged if given is None else given
    final, source = rollout.reward, FINAL
    succeeded = rollout.status is Status.SUCCEEDED
    if given is not None and not isinstance(given, (int, float)):
        own = [reward.value for reward in given if not reward.span_id]
        if own and succeeded:
            final, source = math.fsum(own), HOOK
        of_spans = [reward for reward in given if reward.span_id]
    else:
        if given is not None and succeeded:
            final, source = given, HOOK
        steps = section.emitted == "all"
        of_spans = (
            [] if section.emitted == "final" else emitted_rewards(rollout.spans, steps=steps, final=rollout.reward)
        )
    rewards = RolloutRewards(final=final, final_source=source)
    if not of_spans and not section.rules:
        return rewards
    causes = Causes(rollout.spans)
    for reward in of_spans:
        place(reward, causes, rewards)
    for call_id, reward in automatic_rewards(causes, section.rules, weight=section.weight, cap=section.cap):
        rewards.of_calls.setdefault(call_id, []).append(reward)
    order = {call.span_id: at for at, call in enumerate(causes.calls)}
    in_order = sorted(rewards.of_calls.items(), key=lambda item: order[item[0]])
    return RolloutRewards(final, dict(in_order), source, rewards.unplaced)
