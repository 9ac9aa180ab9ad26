"""Agents inside the caller's process: for trying one out, and for one that no other process can import.

Announced to other packages in the entry-point group `lightning_bus.agents`, so that they need not import this one. An
agent that hangs or exits takes its process with it here, and threads share one Python; in earnest, agents run in
processes of their own: `lightning-bus worker`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workers.agent import Agent, agent_of, load_agent
from workers.config import WorkerSection
from workers.runtime import serve_worker


def check_agent(agent: Callable[..., Any] | str) -> Agent:
    """Return the agent. Raises AgentError for a name that cannot be imported and for parameters that nobody can fill."""
    return load_agent(agent) if isinstance(agent, str) else agent_of(agent)


async def run_agent(
    agent: Callable[..., Any] | str, *, bus_address: str, gateway_url: str, concurrency: int, attempt_limit_s: float
) -> None:
    """Carry out rollouts with this agent, so many at a time, until cancelled. Raises as `check_agent`."""
    section = WorkerSection(concurrency=concurrency, attempt_limit_s=attempt_limit_s, grace_s=1.0)
    await serve_worker(check_agent(agent), section, bus_address=bus_address, gateway_url=gateway_url)
