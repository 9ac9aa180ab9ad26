"""Workers run agents: lease an attempt, call the agent, report what came of it.

An agent is any function. By naming parameters it says what it wants: `task`, `base_url` and `api_key` of the model,
or `rollout`, a `RolloutContext` with the rest. It returns its reward, a number, or None.

    def agent(task, *, base_url, api_key):
        client = OpenAI(base_url=base_url, api_key=api_key)
        ...
        return 1.0
"""

from workers.context import RolloutContext

__all__ = ["RolloutContext"]
