"""Workers run agents: lease an attempt, call the agent, report what came of it.

An agent is any function. By naming parameters it says what it wants: `task`, `base_url` and `api_key` of the model,
or `rollout`, a `RolloutContext` with the rest. It returns its reward, a number, or None.

    def agent(task, *, base_url, api_key):
        client = OpenAI(base_url=base_url, api_key=api_key)
        ...
        return 1.0

An agent that raises is tried again while attempts remain. It may raise `Nack(delay_s)` to say "not now", which is tried
again after that time, and `NonRetryable(message)` for what no other attempt would mend.
"""

from workers.context import RolloutContext
from workers.outcomes import Nack, NonRetryable

__all__ = ["Nack", "NonRetryable", "RolloutContext"]
