"""`lightning-bus train` and `lightning-bus serve`; `cli_weights` brings the registry's commands. torch is imported only when one of them runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from lightning_bus import (
    KEY_ENV,
    POLICY,
    BrokerSection,
    ConfigError,
    GatewaySection,
    RunFile,
    adopt_key,
    client_address,
    load_run,
    run_daemon,
)
from trainer import cli_weights
from trainer.config import PolicySection, ServeSection, TrainSection, replica_binds, replica_urls, scripted_bind
from trainer.registry import published_as

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
    cli_weights.register(app)


def train(
    run_toml: RunArgument = None,
    run: RunOption = None,
    bus: BusOption = None,
    key: KeyOption = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="Base URL of an engine to push weights to; repeatable. Default: the replicas of serve.bind."),
    ] = None,
) -> None:
    """Train the policy of a run: imitation of a teacher, reinforcement from its own rollouts, evaluation.

    Broker, gateway, engine and workers must be running; `lightning-bus up` starts them all. Killed, it goes on from its
    last checkpoint when it is started again.

    What it learns by is train.rl.algorithm in RUN.toml: grpo, dr_grpo, dapo, gspo, cispo, reinforce, dppo, ppo (with a
    critic), or a class of your own as module:Class; its options are train.rl.options. train.rl.staleness_max says how many
    versions rollouts may be behind; 0 is on-policy. From Python: from trainer import Trainer. More: docs/training.md

    Example: lightning-bus train examples/calc/run.toml
    """
    path = run_toml or run
    if path is None:
        raise ConfigError("what to train? Give a RUN.toml, for example: lightning-bus train examples/calc/run.toml")
    file = load_run(path)
    bus_address = bus or client_address(file.section(BrokerSection).bind)
    engine_urls = engine or replica_urls(file.section(ServeSection))
    adopt_key("trainer", key, file)
    _log_to_stderr()
    from trainer.training import train as run_training

    async def main() -> None:
        await run_training(file, bus_address=bus_address, engine_urls=engine_urls)

    run_daemon(main)


def serve(
    model: Annotated[
        str | None, typer.Argument(help="A Hugging Face model directory. Without one, --run's own policy.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="embedded: small, on the CPU, nothing to install. vllm: wants `make vllm` first.")
    ] = None,
    bind: Annotated[
        str | None, typer.Option(help="Where to listen: HOST:PORT; further replicas take the ports that follow.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What callers name the model. Default: policy.")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="How many vLLMs with the same weights.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: float32, bfloat16 or float16 (vllm).")] = None,
    vllm_argument: Annotated[
        list[str] | None,
        typer.Option(help="Passed on to vLLM, such as --vllm-argument=--gpu-memory-utilization=0.8; repeatable."),
    ] = None,
    run: RunOption = None,
    version: Annotated[
        int | None, typer.Option(help="Serve this version of the run as policy@N, whatever is trained meanwhile.")
    ] = None,
    bus: BusOption = None,
    key: KeyOption = None,
) -> None:
    """Serve a model as an OpenAI-compatible endpoint, with weights that can be replaced while it runs.

    Give a model directory, and it is served as it is. Give a run, and its RUN.toml says how; the newest published
    weights are served from the start and the trainer pushes what follows. Engines that die are started again, and
    answer only once they are current.

    A version beside the newest, for evaluation: lightning-bus serve --run runs/calc --version 12 --bind 127.0.0.1:4760,
    with that address among the gateway's upstreams; agents ask for the model policy@12.

    Example: lightning-bus serve runs/calc-seed0/checkpoint --engine vllm --bind 127.0.0.1:8000
    """
    file = None if run is None else load_run(run)
    if file is None and model is None:
        raise ConfigError("which model? Give a model directory, or --run RUN.toml")
    policy = PolicySection(model=model or "") if file is None else file.section(PolicySection)
    section = ServeSection() if file is None else file.section(ServeSection)
    if version is not None:
        section = _beside(section, file, model, version, bind)
    changes = {"engine": engine, "bind": bind, "replicas": replicas, "dtype": dtype}
    section = _changed(section, {key: value for key, value in changes.items() if value is not None})
    section = msgspec.structs.replace(section, arguments=[*section.arguments, *(vllm_argument or [])])
    pinned_name = None if version is None else f"{policy.name}@{version}"
    follows = bus is not None or (file is not None and model is None)
    # A version for good needs no broker: the log tells where it is, of a run that is over as well.
    if file is not None and bus is None and not (version is not None and (file.directory / "log").is_dir()):
        bus = client_address(file.section(BrokerSection).bind)
    adopt_key("trainer", key, file)  # it only reads published versions, which every role may
    _log_to_stderr()
    from trainer.policy.build import serves_adapters
    from trainer.serving.current import ServedAdapter, Weights
    from trainer.serving.serve import Serving, check_serving, ensure_policy, serve_policy

    # A run's own engines must be where its gateway looks for them; who serves something else knows what for.
    own = file is not None and model is None and version is None and bind is None
    check_serving(section, file.section(GatewaySection).upstreams if own and file is not None else None)
    seed = 0 if file is None else file.run.seed
    directory = ensure_policy(policy, file.directory, seed) if file is not None and model is None else Path(str(model))
    home, published = (Path(), POLICY) if file is None else (file.directory, published_as(file))
    name = name or pinned_name or policy.name
    adapter = None
    if serves_adapters(section, policy.lora_rank):
        adapter = ServedAdapter(name, policy.lora_rank, policy.lora_alpha or None, policy.lora_targets)
    what = Serving(
        directory=directory,
        name=name,
        weights=Weights(bus, home, version, policy=published, adapter=adapter) if follows else None,
        seed=seed,
        logs=None if file is None else file.directory / "logs",
        push_limit_s=60.0 if file is None else file.section(TrainSection).push_limit_s,
    )
    run_daemon(lambda: serve_policy(section, what))


def _beside(
    section: ServeSection, file: RunFile | None, model: str | None, version: int, bind: str | None
) -> ServeSection:
    """Return [serve] for one engine with a pinned version beside the run's own."""
    if file is None or model is not None:
        raise ConfigError(f"--version {version} is a version of which run? Give --run RUN, and no model directory.")
    taken = [*replica_binds(section), scripted_bind(section)]
    if bind is None or bind in taken:
        raise ConfigError(
            f"--version {version} needs an address of its own: --bind HOST:PORT, not one of the run's engines "
            f"({', '.join(taken)}). Add it to [gateway] upstreams, and agents can ask for that version by name."
        )
    return msgspec.structs.replace(section, replicas=1, scripted={}, scripted_bind="")


def _changed(section: ServeSection, changes: dict[str, Any]) -> ServeSection:
    """Return the section with some keys replaced, as strictly checked as when they come from RUN.toml."""
    try:
        return msgspec.convert({**msgspec.to_builtins(section), **changes}, ServeSection)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"serve: {exc}") from exc


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
