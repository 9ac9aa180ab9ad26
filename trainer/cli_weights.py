"""`lightning-bus weights`: what a run has made, which of it is kept, and the way back.

Thin doors to `registry` and `rollback`. A run is found by its directory: what it published is read from its log, also
when nothing runs, and what its replicas serve is asked of them. Pins are kept by the broker, so they need one that runs.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio
import typer
from rich.console import Console
from rich.table import Table

from lightning_bus import (
    KEY_ENV,
    POLICY,
    BrokenError,
    BrokerSection,
    Client,
    ConfigError,
    RunFile,
    WeightVersion,
    adopt_key,
    client_address,
    load_run,
    wall_ns,
)
from trainer.config import ServeSection, replica_urls
from trainer.registry import Registry, find_file, pin, published_as, read_bus, read_log, unpin
from trainer.replicas import Replica, ask_replicas, compare_replicas

T = TypeVar("T")

BUS = BrokerSection().bind
LAST = 20  # versions that `list` shows unless asked for more
BUS_LIMIT_S = 5.0  # a person is waiting

weights = typer.Typer(
    no_args_is_help=True,
    help="Weight versions of a run: list, pin, unpin, roll back, check what replicas serve, export.",
)
RunOption = Annotated[Path | None, typer.Option("--run", help="The run's directory (runs/NAME), or its RUN.toml.")]
ThisRun = Annotated[
    Path, typer.Option("--run", help="The run's directory (runs/NAME), or its RUN.toml.", show_default=False)
]
BusOption = Annotated[
    str | None, typer.Option("--bus", help=f"Address of a broker, without --run. Default: {BUS}", show_default=False)
]
KeyOption = Annotated[
    Path | None, typer.Option("--key", envvar=KEY_ENV, help="Key file, where the broker wants one.", show_default=False)
]
EngineOption = Annotated[
    list[str] | None,
    typer.Option(help="Base URL of a replica; repeatable. Default: those of the run's serve.bind.", show_default=False),
]
PolicyOption = Annotated[
    str | None,
    typer.Option(help="Which of several policies of one log. Default: the run's own.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
NumberArgument = Annotated[int, typer.Argument(metavar="VERSION", help="A version's number.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.add_typer(weights, name="weights")


@weights.command(name="list")
def list_(
    run: RunOption = None,
    bus: BusOption = None,
    key: KeyOption = None,
    policy: PolicyOption = None,
    engine: EngineOption = None,
    last: Annotated[
        int, typer.Option("--last", "-n", min=1, help="How many of the newest; pinned ones always.")
    ] = LAST,
    all_: Annotated[bool, typer.Option("--all", help="Every version.")] = False,
    json_: JsonOption = False,
) -> None:
    """List the weight versions of a run, newest first: what made them, how good they are, where they lie, who serves them.

    With --run they are read from the run's log, so it works while the run goes on and when nothing runs; else they are
    asked of a broker. Replicas are asked what they serve. Several policies of one log have versions of their own.

    Example: lightning-bus weights list --run runs/calc-seed0
    """
    file = None if run is None else load_run(run)
    whose = policy or (POLICY if file is None else published_as(file))
    if file is not None and bus is None and (file.directory / "log").is_dir():
        registry = read_log(file.directory, whose)
    else:
        limit = None if all_ else last
        registry = _with_bus(file, bus, key, lambda client: read_bus(client, last=limit, policy=whose))
    replicas = anyio.run(ask_replicas, _replica_urls(file, engine))
    seen = Seen(registry, replicas, None if file is None else file.directory)
    shown = [registry.versions[number] for number in _newest_first(registry, None if all_ else last)]
    if json_:
        said = [{name: getattr(one, name) for name in one.__slots__} for one in replicas]
        print(
            json.dumps(
                {"policy": whose, "versions": [seen.facts(version) for version in shown], "replicas": said}, indent=2
            )
        )
        return
    _print_versions(shown, seen)
    for one in replicas:
        if one.error:
            print(f"{one.url} did not say what it serves: {one.error.removeprefix(one.url)}")
    if len(shown) < len(registry.versions):
        print(f"{len(registry.versions) - len(shown)} older ones are not shown; --all shows them")


@weights.command(name="pin")
def pin_command(
    version: NumberArgument,
    run: RunOption = None,
    bus: BusOption = None,
    policy: PolicyOption = None,
    key: KeyOption = None,
    json_: JsonOption = False,
) -> None:
    """Keep a version's file, however old it gets. The run's broker must be up.

    Without pins a run keeps the newest few: train.keep_checkpoints. A pinned version can be served beside the newest:
    lightning-bus serve --run runs/NAME --version N

    Example: lightning-bus weights pin 12 --run runs/calc-seed0
    """
    file = None if run is None else load_run(run)
    directory = None if file is None else file.directory
    whose = policy or (POLICY if file is None else published_as(file))
    added = _with_bus(file, bus, key, lambda client: pin(client, version, directory, whose))
    _tell(json_, f"version {version} is pinned" + ("" if added else " already"), version=version, pinned=True)


@weights.command(name="unpin")
def unpin_command(
    version: NumberArgument,
    run: RunOption = None,
    bus: BusOption = None,
    policy: PolicyOption = None,
    key: KeyOption = None,
    json_: JsonOption = False,
) -> None:
    """Let a pinned version's file go when the run next drops old ones. The run's broker must be up.

    Example: lightning-bus weights unpin 12 --run runs/calc-seed0
    """
    file = None if run is None else load_run(run)
    whose = policy or (POLICY if file is None else published_as(file))
    removed = _with_bus(file, bus, key, lambda client: unpin(client, version, whose))
    _tell(json_, f"version {version} is not pinned" + (" any more" if removed else ""), version=version, pinned=False)


@weights.command()
def check(run: RunOption = None, engine: EngineOption = None, json_: JsonOption = False) -> None:
    """Compare the weights that replicas hold, tensor by tensor. Exit code 0 only when all answer and agree, 1 otherwise.

    Each replica sums up its own memory, and stands still for that moment.

    Example: lightning-bus weights check --run runs/calc-seed0
    """
    urls = _replica_urls(None if run is None else load_run(run), engine)
    if not urls:
        raise ConfigError("whose weights? Give --run RUN, or --engine URL for each replica.")
    held = anyio.run(compare_replicas, urls)
    if json_:
        print(json.dumps({"agree": held.agree, "versions": held.versions, "differing": held.differing,
                          "errors": held.errors}, indent=2))  # fmt: skip
    else:
        for url in urls:
            print(f"{url}  version {held.versions[url]}" if url in held.versions else f"{url}  {held.errors[url]}")
        print(held.verdict())
    raise typer.Exit(0 if held.agree else 1)


@weights.command()
def rollback(
    version: NumberArgument,
    run: ThisRun,
    key: KeyOption = None,
    engine: EngineOption = None,
    json_: JsonOption = False,
) -> None:
    """Go on from an earlier version: its weights and optimiser become the newest version, under the next number.

    The trainer must be stopped; broker and replicas may run. If they do, the new version is published and served at once,
    else when the run goes on. Nothing is lost: every version stays in the log, and no rollout is trained on twice. What
    versions that were given up sampled is left out.

    Example: lightning-bus weights rollback 12 --run runs/calc-seed0 && lightning-bus up runs/calc-seed0
    """
    file = load_run(run)
    adopt_key("trainer", key, file)
    from trainer.rollback import publish, roll_back, untrained

    with untrained(file):
        progress = roll_back(file.directory, _published(file, key), version)
        replicas = anyio.run(ask_replicas, _replica_urls(file, engine))
        ready = [one.url for one in replicas if one.healthy and one.version.isdecimal()]
        done = anyio.run(publish, file, client_address(file.section(BrokerSection).bind), ready, BUS_LIMIT_S)
    if done.served:
        then = f"it is published, and {done.served} of {len(replicas)} replicas serve it"
    elif done.recorded:
        then = f"it is published, and served when the run goes on: {done.reason}"
    else:
        then = f"it is published and served when the run goes on: {done.reason}"
    _tell(
        json_,
        f"version {progress.version} has the weights of version {version}, at step {progress.step}; {then}.\n"
        f"Go on with: lightning-bus up {file.directory}",
        version=progress.version, parent=version, step=progress.step, published=done.recorded, served=done.served,
        reason=done.reason,
    )  # fmt: skip


@weights.command()
def export(
    version: NumberArgument,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; it must be empty or new.")],
    run: ThisRun,
    adapter: Annotated[
        bool,
        typer.Option("--adapter", help="Of a run that trains one: the LoRA adapter alone, as peft and vLLM load it."),
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Write a version as a Hugging Face model directory, tokenizer included.

    Example: lightning-bus weights export 12 /models/calc-12 --run runs/calc-seed0
    """
    file = load_run(run)
    from trainer import rollback

    found = _published(file, None).get(version)
    if adapter:
        rollback.export_adapter(file, found, directory)
        _tell(
            json_, f"wrote the adapter of version {version} to {directory}; its base is {file.directory / 'policy'}",
            version=version, directory=str(directory),
        )  # fmt: skip
        return
    rollback.export(file, found, directory)
    _tell(
        json_, f"wrote version {version} to {directory}; try it: lightning-bus serve {directory}",
        version=version, directory=str(directory),
    )  # fmt: skip


# -- where to ask -------------------------------------------------------------------------------------------------


def _with_bus(file: RunFile | None, bus: str | None, key: Path | None, ask: Callable[[Client], Awaitable[T]]) -> T:
    """Return what `ask` is told by the broker of the run, or by that at `bus`. Raises BrokenError when it is silent."""
    adopt_key("trainer", key, file)
    address = bus or (BUS if file is None else client_address(file.section(BrokerSection).bind))

    async def main() -> T:
        async with Client(address, role="trainer", limit_s=BUS_LIMIT_S) as client:
            return await ask(client)

    try:
        return anyio.run(main)
    except BrokenError as exc:
        start = "lightning-bus broker --run RUN" if file is None else f"lightning-bus broker --run {file.directory}"
        raise BrokenError(
            f"no broker answers at {address}, and this needs one. Start the run, or only: {start}"
        ) from exc


def _published(file: RunFile, key: Path | None) -> Registry:
    """Return what a run published, from its log; from the broker where that log belongs to another run of the same agents."""
    if (file.directory / "log").is_dir():
        return read_log(file.directory, published_as(file))
    return _with_bus(file, None, key, lambda client: read_bus(client, policy=published_as(file)))


def _replica_urls(file: RunFile | None, engine: list[str] | None) -> list[str]:
    if engine or file is None:
        return [url.rstrip("/") for url in engine or ()]
    return replica_urls(file.section(ServeSection))


# -- how it is printed --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """Everything that is known when versions are listed."""

    registry: Registry
    replicas: Sequence[Replica]
    run_directory: Path | None

    def facts(self, version: WeightVersion) -> dict[str, Any]:
        path = find_file(version, self.run_directory)
        return {
            "version": version.version,
            "parent": version.parent,
            "phase": version.phase,
            "step": version.step,
            "reward_mean": version.metrics.get("reward_mean"),
            "held_out_success": _held_out(self.run_directory).get(version.version),
            "metrics": version.metrics,
            "rollouts_trained": len(version.trained),
            "age_s": (wall_ns() - version.created_ns) / 1e9 if version.created_ns else None,
            "checksum": version.checksum,
            "file": None if path is None else str(path),
            "pinned": version.version in self.registry.pins,
            "served_by": [one.url for one in self.replicas if one.version == str(version.version) and one.healthy],
        }


def _print_versions(shown: Sequence[WeightVersion], seen: Seen) -> None:
    table = Table(
        title=None if seen.registry.policy == POLICY else f"policy {seen.registry.policy}", title_justify="left"
    )
    for heading in ("version", "parent", "made by", "reward", "held out", "age", "checksum", "file", "", "served by"):
        table.add_column(heading, overflow="fold")
    for version in shown:
        facts = seen.facts(version)
        table.add_row(
            str(version.version),
            "-" if version.parent is None else str(version.parent),
            f"{version.phase} {version.step}",
            _number(facts["reward_mean"]),
            _number(facts["held_out_success"]),
            _age(facts["age_s"]),
            version.checksum,
            "gone" if facts["file"] is None else Path(facts["file"]).stem,
            "pinned" if facts["pinned"] else "",
            "\n".join(url.removeprefix("http://") for url in facts["served_by"]),
        )
    Console().print(table if shown else "no version is published yet")


def _newest_first(registry: Registry, last: int | None) -> list[int]:
    numbers = sorted(registry.versions, reverse=True)
    if last is None:
        return numbers
    return numbers[:last] + [number for number in numbers[last:] if number in registry.pins]


@cache
def _held_out(run_directory: Path | None) -> dict[int, float]:
    """Return the success of each version on held-out tasks, as far as metrics.jsonl tells."""
    try:
        whole = "" if run_directory is None else (run_directory / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = [json.loads(line) for line in whole[: whole.rfind("\n") + 1].splitlines()]
    return {line["version"]: line["held_out_success"] for line in lines if "held_out_success" in line}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, length_s in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _tell(json_: bool, text: str, **facts: Any) -> None:
    print(json.dumps(facts, indent=2) if json_ else text)
