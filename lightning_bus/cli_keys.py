"""`lightning-bus keys`: make, list and revoke what lets a process speak to a broker.

Thin doors to `keys`. They work on the broker's directory of keys, without the broker; one that runs takes notice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lightning_bus.cli_shared import JsonOption, RunOption, print_json, run_directory
from lightning_bus.keys import KEY_ENV, ROLES, create_key, list_keys, revoke_key

DIR = Path("keys")

keys = typer.Typer(no_args_is_help=True, help="Keys: who may speak to a broker, and as what. Create, list, revoke.")
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


def _directory(dir_: Path | None, run: Path | None) -> Path:
    return dir_ or (DIR if run is None else run_directory(run) / "keys")
