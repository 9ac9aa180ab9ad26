"""`lightning-bus keys`: make, list and revoke what lets a process speak to a broker, and API keys for its gateway.

Thin doors to `keys` and `tokens`. They work on the broker's directory of keys, or on the run's secret, without the
broker; one that runs takes notice.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lightning_bus.cli_shared import JsonOption, RunOption, print_json, run_directory
from lightning_bus.clock import wall_ns
from lightning_bus.config import GatewaySection
from lightning_bus.daemon import client_address, load_run, run_secret
from lightning_bus.errors import ConfigError, NotFound
from lightning_bus.keys import KEY_ENV, ROLES, create_key, list_keys, revoke_key
from lightning_bus.tokens import Claims, mint

DIR = Path("keys")

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@-]{0,63}")

keys = typer.Typer(
    no_args_is_help=True,
    help="Keys: who may speak to a broker, and as what, and who may call a run's model. Create, list, revoke, api.",
)
DirOption = Annotated[
    Path | None,
    typer.Option(
        "--dir", help=f"The broker's directory of keys. Default: {DIR}, or those of --run.", show_default=False
    ),
]
NameArgument = Annotated[str, typer.Argument(help="Name of the key; its connections are named NAME/….")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.add_typer(keys, name="keys")


@keys.command()
def create(
    name: NameArgument,
    role: Annotated[str, typer.Option(help=f"What it may do: {', '.join(ROLES)}.")],
    dir_: DirOption = None,
    run: RunOption = None,
    json_: JsonOption = False,
) -> None:
    """Make a key and write what its holder needs to NAME.key. The broker's own key is made with the first.

    worker: leases tasks and reports them. agent: appends to the attempt its token names. gateway: records model calls.
    trainer: submits, reads, publishes. admin: everything.

    Example: lightning-bus keys create gpu-7 --role worker --dir /etc/lightning-bus/keys
    """
    directory = _directory(dir_, run)
    path = create_key(directory, name, role)
    if json_:
        print_json({"name": name, "role": role, "file": str(path), "directory": str(directory)})
        return
    print(
        f"wrote {path}\n"
        f"  Move it to the machine of the {role}, and there: export {KEY_ENV}={path.name}\n"
        f'  A broker with [broker] keys = "{directory}" accepts it from now on.'
    )


@keys.command(name="list")
def list_(dir_: DirOption = None, run: RunOption = None, json_: JsonOption = False) -> None:
    """List the keys that a broker accepts, and those that were revoked.

    Example: lightning-bus keys list --run runs/calc-1
    """
    found = list_keys(_directory(dir_, run))
    if json_:
        print_json(
            [
                {
                    "name": who.name, "role": who.role, "fingerprint": who.fingerprint, "public": who.public,
                    "created": who.created, "revoked": who.revoked,
                }
                for who in found
            ]
        )  # fmt: skip
        return
    table = Table()
    for heading in ("name", "role", "fingerprint", "created", ""):
        table.add_column(heading)
    for who in found:
        table.add_row(who.name, who.role, who.fingerprint, who.created, "[red]revoked[/red]" if who.revoked else "")
    Console().print(table)


@keys.command()
def revoke(name: NameArgument, dir_: DirOption = None, run: RunOption = None) -> None:
    """Revoke a key. A broker that runs cuts its connections off within a second; what they reported before stays.

    Example: lightning-bus keys revoke gpu-7 --dir /etc/lightning-bus/keys
    """
    identity = revoke_key(_directory(dir_, run), name)
    print(f"revoked {name} ({identity.role or 'unreadable'}, {identity.fingerprint})")


@keys.command()
def api(
    name: Annotated[str, typer.Argument(help="Who gets it. Recorded with each of its calls.")],
    run: Annotated[Path, typer.Option("--run", help="The run's directory (runs/NAME), or its RUN.toml.")],
    expires: Annotated[str, typer.Option(help="How long it is good: 30d, 12h, 90m, or never.")] = "30d",
    model: Annotated[str, typer.Option(help="The model it calls, whatever is asked for. Default: as asked.")] = "",
    json_: JsonOption = False,
) -> None:
    """Make an API key for a run's gateway, for anyone: the model that the run trains is then an OpenAI endpoint to them.

    It belongs to no rollout: its calls are recorded, under this name, and never trained on. It ends with its time. Before
    that it cannot be revoked alone: a new secret (delete secret in the run's directory, then start the run again) ends
    every key of the run, those of its attempts too.

    Example: lightning-bus keys api alice --run runs/calc-seed0 --expires 30d
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name for a key: 1 to 64 of A-Z a-z 0-9 . _ - @, the first no dot or hyphen.")
    expires_wall_s = _end_of(expires, wall_ns() / 1e9)
    file = load_run(run)
    if not (file.directory / "secret").exists():
        raise NotFound(f"{file.directory} has no secret yet. Start the run first: lightning-bus up {run}")
    key = mint(run_secret(file.directory), Claims("", 0, model, expires_wall_s=expires_wall_s, name=name))
    bind = file.section(GatewaySection).bind
    url = f"http://{client_address(bind)}/v1"
    until = datetime.fromtimestamp(expires_wall_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if expires_wall_s else ""
    if json_:
        print_json({"name": name, "api_key": key, "base_url": url, "expires": until})
        return
    print(f"OPENAI_BASE_URL={url}\nOPENAI_API_KEY={key}\n\ngood {f'until {until}' if until else 'for ever'}")
    if url.startswith("http://127."):
        others = (
            "elsewhere, put this machine's name there"
            if client_address(bind) != bind
            else (f'only from this machine, as gateway.bind = {bind!r}; "0.0.0.0:PORT" opens it')
        )
        print(f"127.0.0.1 is this machine: {others}")


def _end_of(text: str, now_wall_s: float) -> float:
    """Return the Unix time at which "30d" from now is over; 0 for "never"."""
    if text == "never":
        return 0.0
    number, unit = text[:-1], text[-1:]
    if unit not in UNITS_S or not number.isdecimal() or int(number) == 0 or len(number) > 6:
        raise ConfigError(f"--expires {text!r}: a number and a unit of s, m, h, d are due, such as 30d; or never.")
    return now_wall_s + int(number) * UNITS_S[unit]


def _directory(dir_: Path | None, run: Path | None) -> Path:
    return dir_ or (DIR if run is None else run_directory(run) / "keys")
