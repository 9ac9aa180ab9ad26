"""The command line. Every command is a thin door to a function that can be called without it.

The bus brings the broker, the gateway and the operator's tools; other packages bring theirs through the entry-point
group `lightning_bus.commands`: each entry is called with the app and adds its commands. An error of ours leaves as
one clear message on stderr and the exit code of its class (errors.py), without a traceback unless --debug asks.

Commands import what they run when they run: a worker should not pay for the gateway's web server.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
import tomllib
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import anyio
import msgspec
import typer
from rich.console import Console
from rich.table import Table

from lightning_bus.client import BlockingClient
from lightning_bus.config import BrokerSection, GatewaySection, RunFile, load
from lightning_bus.daemon import client_address, load_run, run_daemon, run_secret, sections
from lightning_bus.errors import ConfigError, LightningBusError, first_error
from lightning_bus.log.codec import decode_event
from lightning_bus.log.store import LogReader
from lightning_bus.log.verify import Report, verify
from lightning_bus.records import Kind, Record
from lightning_bus.resources import Resource
from lightning_bus.spans import Span, decode_spans, is_model_call, model_call, reward_of

COMMANDS_GROUP = "lightning_bus.commands"
DEBUG = "LIGHTNING_BUS_DEBUG"
BUS = BrokerSection().bind
FOLLOW_S = 0.2  # how often `tail --follow` looks at a log on disk

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # main() prints errors
    rich_markup_mode="rich",
    help="Train the model behind your agents. Start with: [bold]lightning-bus demo[/bold]",
)

RunOption = Annotated[Path | None, typer.Option("--run", help="A run's RUN.toml, or its directory (runs/NAME).")]
BusOption = Annotated[str, typer.Option("--bus", help="Address of a broker.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change a key of the run file: --set train.steps=5. Repeatable.")
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
        raise typer.Exit(_up(load_run(run_toml, overrides), resume=True))
    if seed is not None:
        overrides.setdefault("run", {})["seed"] = seed
    if name is not None:
        overrides.setdefault("run", {})["name"] = name
    raise typer.Exit(_up(load(run_toml, sections(), overrides), force=force))


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Another seed is another run.")] = 0,
    name: Annotated[
        str | None, typer.Option(help="Where the files go: runs/NAME. Default: the next free calc-seedN.")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Train the bundled calculator agent from random weights; minutes on two CPU cores.

    Example: lightning-bus demo --seed 1
    """
    run_toml = Path(__file__).resolve().parent.parent / "examples" / "calc" / "run.toml"
    if not run_toml.exists():
        raise ConfigError(
            f"{run_toml} is missing: the demo needs a checkout of lightning-bus. Clone it and run: make demo"
        )
    overrides = parse_settings(set_ or [])
    runs = load(run_toml, sections(), overrides).run.directory
    overrides["run"] = {
        **overrides.get("run", {}),
        "seed": seed,
        "name": name or free_name(Path(runs), f"calc-seed{seed}"),
    }
    raise typer.Exit(_up(load(run_toml, sections(), overrides)))


def _up(file: RunFile, *, force: bool = False, resume: bool = False) -> int:
    from lightning_bus.display import Display
    from lightning_bus.supervisor import Supervisor, daemons, prepare

    directory = prepare(file, force=force, resume=resume)
    console = Console()
    bus = client_address(file.section(BrokerSection).bind)
    engine = file.section(GatewaySection).upstreams[0]
    display = Display(file.run.name, directory, bus=bus, engine=engine, console=console)
    console.print(f"run {file.run.name}: logs in {directory / 'logs'}", markup=False, highlight=False, soft_wrap=True)

    async def supervise() -> int:
        supervisor = Supervisor(daemons(file, directory), directory, display.event)
        code = 1
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(display.run)
            try:
                code = await supervisor.run()
            finally:
                tasks.cancel_scope.cancel()
        return code

    code = anyio.run(supervise)
    if code == 0:
        display.finish()
    return code


# -- daemons ------------------------------------------------------------------------------------------------------


@app.command()
def broker(
    run: RunOption = None,
    bind: Annotated[str | None, typer.Option(help="Where to listen: tcp://HOST:PORT or ipc://PATH.")] = None,
    log: Annotated[Path | None, typer.Option(help="Directory of the log.")] = None,
) -> None:
    """Run a broker: the log's only writer.

    Example: lightning-bus broker --log /var/lib/lightning-bus/log --bind tcp://127.0.0.1:4750
    """
    from lightning_bus.broker.server import serve_broker

    section, directory = BrokerSection(), None
    if run is not None:
        file = load_run(run)
        section, directory = file.section(BrokerSection), file.directory
    if bind is not None:
        section = msgspec.structs.replace(section, bind=bind)
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
) -> None:
    """Run a gateway: the OpenAI-compatible door through which agents call the model.

    Example: lightning-bus gateway --upstream http://127.0.0.1:8000 --secret /var/lib/lightning-bus/secret
    """
    from lightning_bus.gateway.app import serve_gateway

    section, address, directory = GatewaySection(), BUS, None
    if run is not None:
        file = load_run(run)
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
    key = run_secret(directory)
    run_daemon(lambda: serve_gateway(section, bus_address=bus or address, secret=key))


# -- the operator's tools -----------------------------------------------------------------------------------------


@app.command()
def status(run: RunOption = None, bus: BusOption = BUS, json_: JsonOption = False) -> None:
    """Count rollouts, workers and records: of a running broker, or with --run of a log on this disk.

    Example: lightning-bus status --run runs/calc-seed0
    """
    if run is not None:
        facts = _status_of_log(_run_directory(run))
    else:
        with BlockingClient(bus, role="admin", limit_s=5.0) as client:
            facts: dict[str, Any] = msgspec.to_builtins(_named(client.status()))
    if json_:
        return _print_json(facts)
    table = Table(show_header=False)
    for key, value in {**facts.pop("rollouts"), **facts}.items():
        table.add_row(key.replace("_", " "), str(value))
    Console().print(table)


@app.command()
def tail(
    run: RunOption = None,
    bus: BusOption = BUS,
    lines: Annotated[int, typer.Option("--lines", "-n", help="How many of the newest records to show first.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as records arrive, until Ctrl-C.")] = False,
    json_: JsonOption = False,
) -> None:
    """Show the newest records of the log, one a line.

    Example: lightning-bus tail --follow
    """
    for record in _records(run, bus, lines=lines, follow=follow):
        if json_:
            print(json.dumps(_record_facts(record)), flush=True)
        else:
            print(_record_line(record), flush=True)


@app.command()
def spans(
    rollout: Annotated[str, typer.Argument(help="Id of a rollout.")],
    run: RunOption = None,
    bus: BusOption = BUS,
    json_: JsonOption = False,
) -> None:
    """Show everything that a rollout did: its events and spans, in order.

    Example: lightning-bus spans rl-0-3 --run runs/calc-seed0
    """
    found = [record for record in _records(run, bus) if record.rollout_id == rollout]
    if not found:
        raise ConfigError(f"the log knows no rollout {rollout!r}. `lightning-bus tail` shows ids.")
    for record in found:
        if record.kind is not Kind.SPANS:
            print(json.dumps(_record_facts(record)) if json_ else _record_line(record))
            if not json_ and record.kind is Kind.ROLLOUT and (error := decode_event(record).error.rstrip()):
                print(textwrap.indent(error, f"{'':>10}"))
            continue
        for span in decode_spans(record.body):
            print(json.dumps(_span_facts(span)) if json_ else _span_line(span))


@app.command(name="verify")
def verify_command(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's directory, such as runs/calc-seed0.")],
    json_: JsonOption = False,
) -> None:
    """Prove from the log alone that the promises were kept. Exit code 0 only when all is proved, 1 otherwise.

    Example: lightning-bus verify runs/calc-seed0
    """
    report = verify(_run_directory(run))
    if json_:
        _print_json(report.to_builtins())
    else:
        _print_report(report)
    raise typer.Exit(0 if report.proved else 1)


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
            raise ConfigError(f"--set {assignment}: write section.key=value, such as train.steps=5.")
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


def _run_directory(run: Path) -> Path:
    """Return the directory that holds a run's log, given that directory, its run.toml or any RUN.toml."""
    if run.is_dir():
        return run
    return run.parent if (run.parent / "log").is_dir() else load_run(run).directory


def _records(run: Path | None, bus: str, *, lines: int | None = None, follow: bool = False) -> Iterator[Record]:
    """Yield records of a log on this disk or of a broker: all, or the newest `lines`, and then what comes."""
    if run is not None:
        with LogReader(_run_directory(run) / "log") as reader:
            offset = 0 if lines is None else max(0, reader.end_offset - lines)
            while True:
                for record in reader.records(offset):
                    offset = record.offset + 1
                    yield record
                if not follow:
                    return
                time.sleep(FOLLOW_S)
    with BlockingClient(bus, role="admin", limit_s=5.0) as client:
        _, _, end = client.fetch(0, bytes_max=1)
        offset = 0 if lines is None else max(0, end - lines)
        while follow or offset < end:
            records, offset, _ = client.fetch(offset, bytes_max=4 << 20, wait_s=10.0 if follow else 0.0)
            yield from records


def _status_of_log(directory: Path) -> dict[str, Any]:
    with LogReader(directory / "log") as reader:
        counts: dict[str, int] = {}
        for rollout in reader.rollouts():
            counts[rollout.status.value] = counts.get(rollout.status.value, 0) + 1
        newest: dict[str, int] = {}
        for resource in reader.resources():
            newest[resource.name] = max(resource.version, newest.get(resource.name, 0))
        return {"rollouts": counts, "next_offset": reader.end_offset, **newest}


def _named(body: msgspec.Struct) -> dict[str, Any]:
    """Return a message's fields by name; on the wire they are an array."""
    return {name: getattr(body, name) for name in body.__struct_fields__}


def _record_facts(record: Record) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "offset": record.offset, "kind": record.kind.name.lower(), "rollout_id": record.rollout_id,
        "attempt": record.attempt, "producer": record.producer, "epoch": record.epoch, "seq": record.seq,
        "count": record.span_count, "bytes": len(record.body), "wall_ns": record.wall_ns,
    }  # fmt: skip
    if record.kind is Kind.ROLLOUT:
        event = _named(decode_event(record))
        event["task"] = len(event["task"])  # opaque bytes: only how many
        facts["event"] = event
    elif record.kind is Kind.RESOURCE:
        resource = msgspec.msgpack.decode(record.body, type=Resource)
        facts["resource"] = {"name": resource.name, "version": resource.version}
    return facts


def _record_line(record: Record) -> str:
    where = f"{record.rollout_id}/{record.attempt}" if record.rollout_id else "-"
    head = f"{record.offset:>8}  {record.kind.name.lower():<8}  {where:<24}  "
    if record.kind is Kind.ROLLOUT:
        event = decode_event(record)
        reward = "" if event.reward is None else f"  reward {event.reward:g}"
        error = event.error.strip().splitlines()[-1:]
        return f"{head}{event.what} → {event.status}{reward}" + "".join(f"  {text}" for text in error)
    if record.kind is Kind.RESOURCE:
        resource = msgspec.msgpack.decode(record.body, type=Resource)
        return f"{head}{resource.name} version {resource.version}"
    names = ", ".join(span.name for span in decode_spans(record.body))
    return f"{head}{names}  from {record.producer}"


def _span_facts(span: Span) -> dict[str, Any]:
    """Return a span with every field readable: ids as hex, token ids and log-probs as lists."""
    facts = _named(span)
    for key in ("span_id", "trace_id", "parent_id"):
        facts[key] = facts[key].hex() if facts[key] else None
    if is_model_call(span):
        call = model_call(span)
        facts["attributes"] = {
            **{key: value for key, value in span.attributes.items() if not isinstance(value, bytes)},
            "prompt_token_ids": call.prompt_ids_P.tolist(),
            "response_token_ids": call.response_ids_R.tolist(),
            "response_logprobs": call.logprobs_R.tolist(),
        }
    facts["attributes"] = {
        key: value.hex() if isinstance(value, bytes) else value for key, value in facts["attributes"].items()
    }
    return facts


def _span_line(span: Span) -> str:
    text = f"{'':>8}  {span.name:<8}  {(span.end_ns - span.start_ns) / 1e6:>9.1f} ms"
    if is_model_call(span):
        call = model_call(span)
        versions = ",".join(version for version, _, _ in call.weight_versions)
        text += f"  {len(call.prompt_ids_P)} + {len(call.response_ids_R)} tokens  version {versions or '–'}"
        text += f"  untrainable: {call.untrainable}" if call.untrainable else ""
    reward = reward_of(span)
    text += "" if reward is None else f"  reward {reward:g}"
    return text + (f"  error: {span.error.strip().splitlines()[-1]}" if span.error.strip() else "")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _print_report(report: Report) -> None:
    table = Table(title=report.log, title_justify="left")
    for heading in ("", "promise", "looked at", "offenders"):
        table.add_column(heading, justify="right" if heading == "offenders" else "left")
    for check in report.checks:
        proved = "[green]proved[/green]" if check.looked_at else "[yellow]nothing[/yellow]"
        mark = proved if check.proved else "[red]broken[/red]"
        text = "\n".join([check.promise, *([check.note] if check.note else []), *(f"  {what}" for what in check.first)])
        table.add_row(mark, text.replace("[", r"\["), f"{check.looked_at} {check.unit}", str(check.offenders))
    Console().print(table)


if __name__ == "__main__":
    main()
