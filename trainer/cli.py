"""`lightning-bus train` and `lightning-bus serve`. torch is imported only when one of them runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from lightning_bus import (
    KEY_ENV,
    BrokerSection,
    ConfigError,
    GatewaySection,
    adopt_key,
    client_address,
    load_run,
    run_daemon,
)
from trainer.config import PolicySection, ServeSection

RunArgument = Annotated[
    Path | None, typer.Argument(metavar="RUN.toml", help="What to train; see examples/calc/run.toml.")
]
RunOption = Annotated[Path | None, typer.Option("--run", help="A run's RUN.toml, or its directory (runs/NAME).")]
BusOption = Annotated[str | None, typer.Option("--bus", help="Address of the broker.")]
KeyOption = Annotated[Path | None, typer.Option("--key", envvar=KEY_ENV, help="Key file, where the broker wants one.")]


def register(app: typer.Typer) -> None:
    """Add this package's commands."""
    app.command("train")(train)
    app.command("serve")(serve)


def train(
    run_toml: RunArgument = None,
    run: RunOption = None,
    bus: BusOption = None,
    key: KeyOption = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="Base URL of an engine to push weights to; repeatable.")
    ] = None,
) -> None:
    """Train the policy of a run: imitation of a teacher, reinforcement from its own rollouts, evaluation.

    Broker, gateway, engine and workers must be running; `lightning-bus up` starts them all. Killed, it goes on from its
    last checkpoint when it is started again.

    Example: lightning-bus train examples/calc/run.toml
    """
    path = run_toml or run
    if path is None:
        raise ConfigError("what to train? Give a RUN.toml, for example: lightning-bus train examples/calc/run.toml")
    file = load_run(path)
    bus_address = bus or client_address(file.section(BrokerSection).bind)
    engine_urls = engine or list(file.section(GatewaySection).upstreams)
    adopt_key("trainer", key, file)
    _log_to_stderr()
    from trainer.training import train as run_training

    async def main() -> None:
        await run_training(file, bus_address=bus_address, engine_urls=engine_urls)

    run_daemon(main)


def serve(
    model: Annotated[str | None, typer.Argument(help="A Hugging Face model directory.")] = None,
    engine: Annotated[str | None, typer.Option(help="Which engine: embedded.")] = None,
    bind: Annotated[str | None, typer.Option(help="Where to listen: HOST:PORT.")] = None,
    run: RunOption = None,
    bus: BusOption = None,
    key: KeyOption = None,
) -> None:
    """Serve a model over vLLM's HTTP surface, with weights that can be replaced while it runs.

    Example: lightning-bus serve runs/calc-seed0/checkpoint --bind 127.0.0.1:8000
    """
    if engine not in (None, "embedded"):
        raise ConfigError(f"--engine {engine!r} is not known. Use: embedded")
    file = None if run is None else load_run(run)
    if file is None and model is None:
        raise ConfigError("which model? Give a model directory, or --run RUN.toml")
    section = ServeSection() if file is None else file.section(ServeSection)
    policy = PolicySection(model=model or "") if file is None else file.section(PolicySection)
    seed = 0 if file is None else file.run.seed
    if file is not None and bus is None:
        bus = client_address(file.section(BrokerSection).bind)
    if bind is not None:
        section = msgspec.structs.replace(section, bind=bind)
    adopt_key("trainer", key, file)  # it only reads published versions, which every role may
    _log_to_stderr()
    from trainer.serving.serve import ensure_policy, serve_policy

    directory = ensure_policy(policy, file.directory, seed) if file is not None and model is None else Path(str(model))
    run_daemon(lambda: serve_policy(section, policy, directory, seed=seed, bus_address=bus))


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
