"""What the commands share: the options that many take, where a run's files are, a connection, and how things are printed.

A command that asks a broker finds it by --bus, or by --run, which also says where the run's keys are; one that reads a
log finds it by --run. Every command prints for people, and with --json for programs.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from lightning_bus.client import BlockingClient
from lightning_bus.config import BrokerSection
from lightning_bus.daemon import client_address, load_run
from lightning_bus.keys import KEY_ENV, keys_directory

BUS = BrokerSection().bind
LIMIT_S = 5.0  # a person is waiting

RunOption = Annotated[Path | None, typer.Option("--run", help="A run's RUN.toml, or its directory (runs/NAME).")]
BusOption = Annotated[
    str | None, typer.Option("--bus", help=f"Address of a broker. Default: {BUS}", show_default=False)
]
KeyOption = Annotated[
    Path | None, typer.Option("--key", envvar=KEY_ENV, help="Key file, where the broker wants one.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
IdsArgument = Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of rollouts; - reads them from stdin.")]


@contextmanager
def connect(
    bus: str | None, key: Path | None, *, run: Path | None = None, limit_s: float = LIMIT_S
) -> Generator[BlockingClient]:
    """Give a client of the broker that the options name, with the operator's key."""
    if run is not None:
        file = load_run(run)
        section = file.section(BrokerSection)
        bus = bus or client_address(section.bind)
        keys = keys_directory(section.keys, file.directory)
        key = key or (None if keys is None else keys / "admin.key")
    with BlockingClient(bus or BUS, role="admin", key=key, limit_s=limit_s) as client:
        yield client


def run_directory(run: Path) -> Path:
    """Return the directory that holds a run's log, given that directory, its run.toml or any RUN.toml."""
    if run.is_dir():
        return run
    return run.parent if (run.parent / "log").is_dir() else load_run(run).directory


def ids_of(arguments: list[str]) -> list[str]:
    """Return the ids that were given, each once; "-" stands for the words on stdin."""
    ids: list[str] = []
    for argument in arguments:
        ids += typer.get_text_stream("stdin").read().split() if argument == "-" else [argument]
    return list(dict.fromkeys(ids))


def named(body: msgspec.Struct) -> dict[str, Any]:
    """Return a message's fields by name; on the wire they are an array."""
    return {name: getattr(body, name) for name in body.__struct_fields__}


def print_json(value: Any) -> None:
    """Print one JSON document over several lines."""
    print(json.dumps(value, indent=2))
