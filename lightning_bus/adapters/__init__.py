"""From recorded spans to training rows: pure functions over the log, replayable without touching an agent."""

from lightning_bus.adapters.advantages import Gae, gae, gae_batch, rollout_advantages
from lightning_bus.adapters.air import RuleSection, automatic_rewards
from lightning_bus.adapters.causes import Causes
from lightning_bus.adapters.credit import Episode, call_advantages
from lightning_bus.adapters.groups import Cursor, Group, Groups
from lightning_bus.adapters.rewards import FINAL, Reward, RolloutRewards, SourceReport
from lightning_bus.adapters.rollouts import Assembler, FinishedRollout
from lightning_bus.adapters.rows import MergeStats, Row
from lightning_bus.adapters.scoring import RewardsSection, rewards_of
from lightning_bus.adapters.selection import Caller, Callers, Selection
from lightning_bus.adapters.streams import ScoredGroup, ScoredRollout, TransitionStream, scored
from lightning_bus.adapters.transitions import Transition, Transitions, transitions_of

__all__ = [
    "FINAL", "Assembler", "Caller", "Callers", "Causes", "Cursor", "Episode", "FinishedRollout", "Gae", "Group",
    "Groups", "MergeStats", "Reward", "RewardsSection", "RolloutRewards", "Row", "RuleSection", "ScoredGroup",
    "ScoredRollout", "Selection", "SourceReport", "Transition", "TransitionStream", "Transitions",
    "automatic_rewards", "call_advantages", "gae", "gae_batch", "rewards_of", "rollout_advantages", "scored",
    "transitions_of",
]  # fmt: skip
