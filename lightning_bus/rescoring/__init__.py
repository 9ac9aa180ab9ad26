"""Recorded runs, scored again and put to other uses. Nothing here runs an agent, an engine or a broker.

hooks     a reward function of the user's, in processes that can be killed
verdicts  what it said, kept in the log so that it is asked once
replay    a whole log through rules, hook and credit once more; what changed, as a table
exports   the same spans as data sets: conversations for SFT, pairs for DPO
"""

from lightning_bus.rescoring.answers import Answer, Dropped, Given
from lightning_bus.rescoring.exports import (
    ExportedRows,
    Returns,
    export_chat,
    export_preferences,
    returns_by,
    returns_from,
)
from lightning_bus.rescoring.hooks import HookPool, reward_hooks
from lightning_bus.rescoring.replay import Replayed, Rescoring, read_scores, replay
from lightning_bus.rescoring.runs import finished_groups, finished_rollouts
from lightning_bus.rescoring.verdicts import Verdicts, read_verdicts

__all__ = [
    "Answer", "Dropped", "ExportedRows", "Given", "HookPool", "Replayed", "Rescoring", "Returns", "Verdicts", "export_chat",
    "export_preferences", "finished_groups", "finished_rollouts", "read_scores", "replay", "returns_by", "returns_from",
    "read_verdicts", "reward_hooks",
]  # fmt: skip
