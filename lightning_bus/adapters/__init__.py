"""From recorded spans to training rows: pure functions over the log, replayable without touching an agent."""

from lightning_bus.adapters.rollouts import Assembler, FinishedRollout
from lightning_bus.adapters.transitions import Row, Transitions, transitions_of

__all__ = ["Assembler", "FinishedRollout", "Row", "Transitions", "transitions_of"]
