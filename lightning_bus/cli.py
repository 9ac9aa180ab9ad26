"""The command line. Every command is a thin door to a function that can be called without it.

Here are a whole run and the bus's daemons; `cli_tools` brings the operator's tools and `cli_queue` the commands on
rollouts. Other packages bring theirs through the entry-point group `lightning_bus.commands`: each entry is called with
the app and adds its commands. An error of ours leaves as one clear message on stderr and the exit code of its class
(errors.py), without a traceback unless --debug asks.

Commands import what they run when they run: a worker should not pay for the gateway's web server.
"""

from __future__ import annotations

import os
import signal
import sys
import tomllib
import traceback
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import anyio
import msgspec
import typer
from rich.console import Console

from lightning_bus import cli_keys, cli_queue, cli_replay, cli_tools
from lightning_bus.cli_shared import BUS, KeyOption, RunOption
from lightning_bus.config import BrokerSection, GatewaySection, RunFile, load
from lightning_bus.daemon import client_address, load_run, run_daemon, run_secret, sections, wait_lifeline_cut
from lightning_bus.errors import ConfigError, LightningBusError, first_error
from lightning_bus.keys import adopt_key, keys_directory

COMMANDS_GROUP = "lightning_bus.commands"
DEBUG = "LIGHTNING_BUS_DEBUG"
DEMO_FILES = {"embedded": "run.toml", "vllm": "vllm.toml"}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # main() prints errors
    rich_markup_mode="rich",
    help="Train the model behind your agents. Start with: [bold]lightning-bus demo[/bold]",
)

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key of the run file: --set train.rl.steps_max=5. Repeatable."),
]


@app.callback()
def _common(  # pyright: ignore[reportUnusedFunction] - typer calls it
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"


# -- a whole run --------------------------------------------------------------------------------------------------


@app.command()
def up(
    run_toml: Annotated[
        Path,
        typer.Argument(
            metavar="RUN.toml", help="What to run (see examples/calc/run.toml), or runs/NAME to go on with."
        ),
    ],
    seed: Annotated[int | None, typer.Option(help="Overrides run.seed.")] = None,
    name: Annotated[str | None, typer.Option(help="Overrides run.name; files go to runs/NAME.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run of that name.")] = False,
    trainer: Annotated[
        bool, typer.Option("--trainer/--no-trainer", help="Without it, the rest runs until stopped: train elsewhere.")
    ] = True,
    set_: SetOption = None,
) -> None:
    """Run everything on this machine: broker, gateway, engine, workers and trainer, supervised.

    Stopped or cut off, a run goes on where it was: lightning-bus up runs/calc-1

    Example: lightning-bus up examples/calc/run.toml --seed 1 --name calc-1
    """
    overrides = parse_settings(set_ or [])
    if run_toml.is_dir():
        if seed is not None or name is not None or force:
            raise ConfigError(f"{run_toml} is a run to go on with: it keeps its seed, its name and its files.")
        raise typer.Exit(_up(load_run(run_toml, overrides), resume=True, trainer=trainer))
    if seed is not None:
        overrides.setdefault("run", {})["seed"] = seed
    if name is not None:
        overrides.setdefault("run", {})["name"] = name
    raise typer.Exit(_up(load(run_toml, sections(), overrides), force=force, trainer=trainer))


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Another seed is another run.")] = 0,
    engine: Annotated[
        str, typer.Option(help="What serves the policy: embedded, or vllm (wants `make vllm` first).")
    ] = "embedded",
    name: Annotated[
        str | None, typer.Option(help="Where the files go: runs/NAME. Default: the next free calc-seedN.")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Train the bundled calculator agent from random weights; minutes on two CPU cores.

    Example: lightning-bus demo --seed 1
    """
    if engine not in DEMO_FILES:
        raise ConfigError(f"--engine {engine!r} is not known. Use: {', '.join(DEMO_FILES)}")
    run_toml = Path(__file__).resolve().parent.parent / "examples" / "calc" / DEMO_FILES[engine]
    if not run_toml.exists():
        raise ConfigError(
            f"{run_toml} is missing: the demo needs a checkout of lightning-bus. Clone it and run: make demo"
        )
    overrides = parse_settings(set_ or [])
    runs = load(run_toml, sections(), overrides).run.directory
    overrides["run"] = {
        **overrides.get("run", {}),
        "seed": seed,
        "name": name
        or free_name(Path(runs), f"calc-seed{seed}" if engine == "embedded" else f"calc-{engine}-seed{seed}"),
    }
    raise typer.Exit(_up(load(run_toml, sections(), overrides)))


def _up(file: RunFile, *, force: bool = False, resume: bool = False, trainer: bool = True) -> int:
    from lightning_bus.display import Display
    from lightning_bus.supervisor import Supervisor, daemons, prepare

    directory = prepare(file, force=force, resume=resume)
    console = Console()
    bus = client_address(file.section(BrokerSection).bind)
    engine = file.section(GatewaySection).upstreams[0]
    keys = keys_directory(file.section(BrokerSection).keys, directory)
    key = None if keys is None else keys / "admin.key"
    display = Display(file.run.name, directory, bus=bus, engine=engine, console=console, key=key)
    console.print(f"run {file.run.name}: logs in {directory / 'logs'}", markup=False, highlight=False, soft_wrap=True)

    async def end_with_whoever_trains() -> None:
        await wait_lifeline_cut()
        os.kill(os.getpid(), signal.SIGTERM)

    async def supervise() -> int:
        wanted = [daemon for daemon in daemons(file, directory) if trainer or daemon.stage != "train"]
        supervisor = Supervisor(wanted, directory, display.event)
        code = 1
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(display.run)
            tasks.start_soon(end_with_whoever_trains)
            try:
                code = await supervisor.run()
            finally:
                tasks.cancel_scope.cancel()
        return code

    code = anyio.run(supervise)
    if code == 0:
        display.finish()
    elif trainer:  # else whoever trains says it
        console.print(
            f"stopped; go on with: lightning-bus up {directory}", markup=False, highlight=False, soft_wrap=True
        )
    return code


# -- daemons ------------------------------------------------------------------------------------------------------


@app.command()
def broker(
    run: RunOption = None,
    bind: Annotated[str | None, typer.Option(help="Where to listen: tcp://HOST:PORT or ipc://PATH.")] = None,
    log: Annotated[Path | None, typer.Option(help="Directory of the log.")] = None,
    keys: Annotated[
        Path | None, typer.Option(help="Directory of keys: encrypts, and lets in only who holds one.")
    ] = None,
) -> None:
    """Run a broker: the log's only writer. Beyond this machine it wants keys (see: lightning-bus keys).

    Example: lightning-bus broker --log /var/lib/lightning-bus/log --bind tcp://127.0.0.1:4750
    """
    from lightning_bus.broker.server import serve_broker

    section, directory = BrokerSection(), None
    if run is not None:
        file = load_run(run)
        section, directory = file.section(BrokerSection), file.directory
    if bind is not None:
        section = msgspec.structs.replace(section, bind=bind)
    if keys is not None:
        section = msgspec.structs.replace(section, keys=str(keys))
    if log is None:
        if directory is None:
            raise ConfigError("a broker needs a place for its log. Give --run RUN.toml or --log DIRECTORY.")
        log = directory / "log"
    secret = run_secret(directory or log.parent)
    run_daemon(lambda: serve_broker(section, log, secret))


@app.command()
def gateway(
    run: RunOption = None,
    bind: Annotated[str | None, typer.Option(help="Where to listen: HOST:PORT.")] = None,
    upstream: Annotated[list[str] | None, typer.Option(help="Base URL of an engine; repeatable.")] = None,
    bus: Annotated[str | None, typer.Option(help="Address of the broker.")] = None,
    secret: Annotated[
        Path | None, typer.Option(help="The broker's secret file, where there is no run directory.")
    ] = None,
    key: KeyOption = None,
) -> None:
    """Run a gateway: the OpenAI-compatible door through which agents call the model.

    Example: lightning-bus gateway --upstream http://127.0.0.1:8000 --secret /var/lib/lightning-bus/secret
    """
    from lightning_bus.gateway.daemon import serve_gateway

    section, address, directory = GatewaySection(), BUS, None
    file = None if run is None else load_run(run)
    if file is not None:
        section, directory = file.section(GatewaySection), file.directory
        address = client_address(file.section(BrokerSection).bind)
    section = msgspec.structs.replace(section, bind=bind or section.bind, upstreams=upstream or section.upstreams)
    if secret is not None:
        directory = secret.parent
        if secret.name != "secret" or not secret.exists():
            raise ConfigError(f"{secret}: no such secret. It is the file named `secret` beside the broker's log.")
    if directory is None:
        raise ConfigError(
            "a gateway needs the broker's secret to check API keys. Give --run RUN.toml or --secret FILE."
        )
    adopt_key("gateway", key, file)
    token_secret = run_secret(directory)
    run_daemon(lambda: serve_gateway(section, bus_address=bus or address, secret=token_secret))


# -- how it is done -----------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    try:
        for entry in entry_points(group=COMMANDS_GROUP):
            _register(entry.name, entry.load)
        app(args=list(argv) if argv is not None else None, prog_name="lightning-bus")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `lightning-bus tail | head` is not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as exc:
        cause = first_error(exc)
        if not isinstance(cause, LightningBusError):
            raise
        if os.environ.get(DEBUG):
            traceback.print_exception(exc)
        try:
            print(f"lightning-bus: {cause}", file=sys.stderr)
        except OSError:  # stderr is a log on the very disk that is full; then the code alone must tell
            os._exit(cause.exit_code)
        sys.exit(cause.exit_code)


def _register(name: str, load_entry: Any) -> None:
    """Let a package add its commands. One that cannot be imported must not take the operator's tools with it."""
    try:
        load_entry()(app)
    except ImportError as exc:
        print(f"lightning-bus: the commands of {name!r} are not available: {exc}", file=sys.stderr)


def parse_settings(assignments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return section → key → value of `section.key=value` assignments; values are TOML, or else plain strings."""
    overrides: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        section, dot, key = path.partition(".")
        if not (section and dot and key and equals):
            raise ConfigError(f"--set {assignment}: write section.key=value, such as train.rl.steps_max=5.")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        table = overrides.setdefault(section, {})
        *parents, last = key.split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
        table[last] = value
    return overrides


def free_name(runs: Path, name: str) -> str:
    """Return `name`, or name-2, name-3, … : the first that no run has."""
    candidate, n = name, 1
    while (runs / candidate).exists():
        n += 1
        candidate = f"{name}-{n}"
    return candidate


cli_tools.register(app)
cli_queue.register(app)
cli_keys.register(app)
cli_replay.register(app)

if __name__ == "__main__":
    main()
