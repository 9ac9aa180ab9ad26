"""The trainer: spans in, weights out. The only place where torch lives; this face imports it when a name is asked for.

from trainer import GRPO, Trainer

result = Trainer(algorithm=GRPO(), policy="…").fit(agent, train_tasks, val_tasks)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.algorithms.base import Algorithm
    from trainer.algorithms.policy_gradients import CISPO, DAPO, DPPO, GRPO, GSPO, DrGRPO, PolicyGradient, Reinforce
    from trainer.algorithms.ppo import PPO
    from trainer.dev import DevReport
    from trainer.face import Result, Trainer
    from trainer.optimize.losses import Kl, KlShaping, LossInputs, LossOutputs

__all__ = [
    "CISPO", "DAPO", "DPPO", "GRPO", "GSPO", "PPO", "Algorithm", "DevReport", "DrGRPO", "Kl", "KlShaping",
    "LossInputs", "LossOutputs", "PolicyGradient", "Reinforce", "Result", "Trainer",
]  # fmt: skip

_FROM = {
    "Algorithm": "trainer.algorithms.base",
    **dict.fromkeys(
        ("CISPO", "DAPO", "DPPO", "GRPO", "GSPO", "DrGRPO", "PolicyGradient", "Reinforce"),
        "trainer.algorithms.policy_gradients",
    ),
    "PPO": "trainer.algorithms.ppo",
    "DevReport": "trainer.dev",
    **dict.fromkeys(("Result", "Trainer"), "trainer.face"),
    **dict.fromkeys(("Kl", "KlShaping", "LossInputs", "LossOutputs"), "trainer.optimize.losses"),
}


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FROM[name]), name)
