"""`lightning-bus worker`: the command that this package adds to the bus's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from lightning_bus import (
    BrokerSection,
    ConfigError,
    GatewaySection,
    adopt_key,
    client_address,
    load_run,
    run_daemon,
)
from workers.agent import load_agent
from workers.config import WorkerSection
from workers.pool import run_pool
from workers.runtime import serve_worker


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("worker")(worker)


def worker(
    agent: Annotated[
        str | None, typer.Argument(metavar="MODULE:AGENT", help="The agent: a function, by name.", show_default=False)
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="RUN.toml, or a run's directory: takes what is not given here from it.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Attempts at a time in each process.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes; each has its own Python.")] = None,
    bus: Annotated[str | None, typer.Option(help="Address of the broker.")] = None,
    gateway: Annotated[str | None, typer.Option(help="URL of the gateway, as this machine reaches it.")] = None,
    key: Annotated[
        Path | None, typer.Option(envvar="LIGHTNING_BUS_KEY", help="This worker's key, where the broker wants one.")
    ] = None,
) -> None:
    """Run an agent: take tasks from the bus, carry them out, report what came of them.

    The agent is any function, sync or async. It is given what it names among task, base_url, api_key and rollout, and
    returns its reward or None. Raising makes the attempt fail, and the rollout is tried again. Raising workers.Nack(30)
    puts it off for 30 s; raising workers.NonRetryable makes the rollout fail for good.

    SIGTERM or Ctrl-C: takes no more tasks, lets what runs finish for grace_s and hands the rest back. Again: ends at once.

    Agents that take no base_url find it in OPENAI_BASE_URL and OPENAI_API_KEY, but only with --concurrency 1: the
    environment belongs to the whole process. Use --processes for more of them.

    Example: lightning-bus worker examples.calc.agent:agent --concurrency 16
    """
    # Only our own news: at INFO the agent's HTTP client would report every model call.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("workers").setLevel(logging.INFO)
    file = None if run is None else load_run(run)
    given: dict[str, Any] = {"agent": agent, "concurrency": concurrency, "processes": processes}
    section = WorkerSection() if file is None else file.section(WorkerSection)
    section = msgspec.structs.replace(section, **{name: value for name, value in given.items() if value is not None})
    if not section.agent:
        raise ConfigError("no agent is named. Give one, as in: lightning-bus worker examples.calc.agent:agent")
    loaded = load_agent(section.agent)  # before anything is started, so that a typo is told at once
    bus = bus or client_address((BrokerSection() if file is None else file.section(BrokerSection)).bind)
    gateway = gateway or "http://" + client_address(
        (GatewaySection() if file is None else file.section(GatewaySection)).bind
    )

    adopt_key("worker", key, file)
    if section.processes == 1:

        async def main() -> None:
            await serve_worker(loaded, section, bus_address=bus, gateway_url=gateway)

    else:
        arguments = ["worker", section.agent, "--concurrency", str(section.concurrency), "--bus", bus]
        arguments += ["--gateway", gateway]
        if run is not None:
            arguments += ["--run", str(run)]

        async def main() -> None:
            await run_pool(arguments, section.processes, grace_s=section.grace_s)

    run_daemon(main)
