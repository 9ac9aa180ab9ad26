"""Commands on rollouts: submit, wait, cancel, the dead letters, drain and resume.

Thin doors to `Client`. Ids are printed one a line, so that commands feed each other:

    lightning-bus submit --file tasks.jsonl | lightning-bus wait -
"""

from __future__ import annotations

import json
import secrets
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from lightning_bus.cli_shared import (
    BusOption,
    IdsArgument,
    JsonOption,
    KeyOption,
    RunOption,
    connect,
    ids_of,
    print_json,
)
from lightning_bus.errors import ConfigError, NotFound
from lightning_bus.lifecycle import Status
from lightning_bus.messages import End, Rollout, Submission

SUBMIT_LIMIT_S = 60.0  # of one message: a busy broker is waited for

dead = typer.Typer(no_args_is_help=True, help="Dead letters: rollouts that failed for good. List, show, replay, purge.")
AllOption = Annotated[bool, typer.Option("--all", help="Every dead letter there is.")]
SomeIds = Annotated[
    list[str] | None, typer.Argument(metavar="ID...", help="Ids of dead letters; - reads them from stdin.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (submit, wait, cancel, drain, resume):
        app.command()(command)
    app.add_typer(dead, name="dead")


def submit(
    task: Annotated[list[str] | None, typer.Option(help="A task, as JSON. Repeatable.")] = None,
    file: Annotated[Path | None, typer.Option(help="Tasks as JSON Lines, one a line; - is stdin.")] = None,
    id_: Annotated[
        str | None, typer.Option("--id", help="Id of the rollout; of several: ID-0, ID-1, … Default: a random one.")
    ] = None,
    group: Annotated[str, typer.Option(help="Rollouts of one group are compared with each other.")] = "",
    model: Annotated[str, typer.Option(help="Model that the gateway calls, whatever the agent asks for.")] = "",
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Label. Repeatable.")] = None,
    priority: Annotated[int, typer.Option(help="Higher goes first; waiting raises it.")] = 0,
    delay: Annotated[float, typer.Option(metavar="S", help="Not before this many seconds from now.")] = 0.0,
    timeout: Annotated[float, typer.Option(metavar="S", help="An attempt may take this long; 0: no limit.")] = 0.0,
    lease: Annotated[float, typer.Option(metavar="S", help="Silence that ends an attempt; 0: the broker's.")] = 0.0,
    max_attempts: Annotated[int, typer.Option(help="0: as the broker is configured.")] = 0,
    idempotency_key: Annotated[
        str, typer.Option(help="Submitted again with the same key, it is the same rollout; of several: KEY-0, KEY-1, …")
    ] = "",
    run: RunOption = None,
    bus: BusOption = None,
    key: KeyOption = None,
    json_: JsonOption = False,
) -> None:
    """Submit tasks and print the ids of their rollouts. They are durable when this returns.

    Example: lightning-bus submit --task '{"question": "2 + 3"}' --group sums --priority 5
    """
    tasks = [*_tasks_given(task or []), *(_tasks_of(file) if file is not None else ())]
    if not tasks:
        raise ConfigError("""there is nothing to submit. Give --task '{"question": "2 + 3"}' or --file tasks.jsonl.""")
    stem = id_ or f"task-{secrets.token_hex(4)}"
    labels = _labels(label or [])
    alone = len(tasks) == 1
    submissions = [
        Submission(
            stem if alone else f"{stem}-{number}", msgspec.msgpack.encode(value), group=group, model=model,
            labels=labels, max_attempts=max_attempts, priority=priority, timeout_s=timeout, lease_s=lease,
            delay_s=delay, key=idempotency_key if alone or not idempotency_key else f"{idempotency_key}-{number}",
        )
        for number, value in enumerate(tasks)
    ]  # fmt: skip
    with connect(bus, key, run=run, limit_s=SUBMIT_LIMIT_S) as client:
        submitted = client.submit(submissions)
    if json_:
        return print_json({"fresh": submitted.fresh, "rollout_ids": submitted.rollout_ids})
    for rollout_id in submitted.rollout_ids:
        print(rollout_id)


def wait(
    ids: IdsArgument,
    limit: Annotated[float | None, typer.Option(metavar="S", help="Give up after this many seconds.")] = None,
    run: RunOption = None,
    bus: BusOption = None,
    key: KeyOption = None,
    json_: JsonOption = False,
) -> None:
    """Wait until rollouts have ended and print how each did, as it happens. Exit code 0 when all succeeded, else 1.

    Example: lightning-bus wait task-1f2e3d4c-0 task-1f2e3d4c-1 --limit 60
    """
    all_succeeded = True
    with connect(bus, key, run=run) as client:
        for end in client.ended(ids_of(ids), limit_s=limit):
            print(json.dumps(_end_facts(end)) if json_ else _end_line(end), flush=True)
            all_succeeded &= end.status is Status.SUCCEEDED
    raise typer.Exit(0 if all_succeeded else 1)


def cancel(
    ids: IdsArgument, run: RunOption = None, bus: BusOption = None, key: KeyOption = None, json_: JsonOption = False
) -> None:
    """End rollouts that nobody wants any more; an agent that is at one is cancelled.

    Example: lightning-bus cancel task-1f2e3d4c
    """
    with connect(bus, key, run=run) as client:
        _print_count("cancelled", client.cancel(ids_of(ids)), json_)


def drain(run: RunOption = None, bus: BusOption = None, key: KeyOption = None, json_: JsonOption = False) -> None:
    """Have the broker hand out nothing more, until `resume`. What workers hold goes on, and so does everything else.

    Example: lightning-bus drain && lightning-bus status
    """
    with connect(bus, key, run=run) as client:
        client.drain()
        held = client.status().held
    print_json({"draining": True, "held": held}) if json_ else print(f"draining; {held} attempts are under way")


def resume(run: RunOption = None, bus: BusOption = None, key: KeyOption = None, json_: JsonOption = False) -> None:
    """Let a broker that drains hand out tasks again.

    Example: lightning-bus resume
    """
    with connect(bus, key, run=run) as client:
        client.resume()
    print_json({"draining": False}) if json_ else print("resumed")


# -- dead letters -------------------------------------------------------------------------------------------------


@dead.command("list")
def dead_list(run: RunOption = None, bus: BusOption = None, key: KeyOption = None, json_: JsonOption = False) -> None:
    """List the dead letters, oldest first, with the last line of what went wrong.

    Example: lightning-bus dead list
    """
    table = Table("rollout", "group", "attempts", "error")
    with connect(bus, key, run=run) as client:
        for rollout in client.dead():
            if json_:
                print(json.dumps(_rollout_facts(rollout)), flush=True)
            reason = (rollout.error.strip().splitlines() or [""])[-1]
            submission = rollout.submission
            table.add_row(submission.rollout_id, submission.group, str(rollout.attempt), reason.replace("[", r"\["))
    if not json_:
        Console().print(table if table.row_count else "no dead letters")


@dead.command("show")
def dead_show(
    rollout_id: Annotated[str, typer.Argument(metavar="ID", help="Id of a dead letter.")],
    run: RunOption = None,
    bus: BusOption = None,
    key: KeyOption = None,
    json_: JsonOption = False,
) -> None:
    """Show one with its task and the traceback of its last attempt.

    Example: lightning-bus dead show task-1f2e3d4c
    """
    with connect(bus, key, run=run) as client:
        found = client.query([rollout_id])
    if not found:
        raise NotFound(f"the broker knows no rollout {rollout_id!r}. See: lightning-bus dead list")
    facts = _rollout_facts(found[0])
    if json_:
        return print_json(facts)
    error = facts.pop("error")
    for name, value in facts.items():
        print(f"{name:<12}  {json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value}")
    print(textwrap.indent(error.rstrip(), "  "))


@dead.command("replay")
def dead_replay(
    ids: SomeIds = None, all_: AllOption = False, run: RunOption = None, bus: BusOption = None, key: KeyOption = None,
    json_: JsonOption = False,
) -> None:  # fmt: skip
    """Submit dead letters anew, once what they failed of is mended, and print the new ids.

    Example: lightning-bus dead replay --all | lightning-bus wait -
    """
    with connect(bus, key, run=run) as client:
        given = _letters(ids, all_, client.dead)
        replayed = client.replay(given) if given else []
    if json_:
        return print_json({"replayed": dict(zip(given, replayed, strict=True))})
    for rollout_id in replayed:
        print(rollout_id)


@dead.command("purge")
def dead_purge(
    ids: SomeIds = None, all_: AllOption = False, run: RunOption = None, bus: BusOption = None, key: KeyOption = None,
    json_: JsonOption = False,
) -> None:  # fmt: skip
    """Take dead letters off the list for good. What they did stays in the log.

    Example: lightning-bus dead purge task-1f2e3d4c
    """
    with connect(bus, key, run=run) as client:
        given = _letters(ids, all_, client.dead)
        _print_count("purged", client.purge(given) if given else 0, json_)


# -- how it is done -----------------------------------------------------------------------------------------------


def _letters(ids: list[str] | None, all_: bool, dead: Any) -> list[str]:
    if bool(ids) == all_:
        raise ConfigError("say which dead letters: their ids, or --all. `lightning-bus dead list` shows them.")
    return [rollout.submission.rollout_id for rollout in dead()] if all_ else ids_of(ids or [])


def _tasks_given(texts: list[str]) -> Iterator[Any]:
    for text in texts:
        try:
            yield json.loads(text)
        except ValueError as exc:
            raise ConfigError(
                f"""--task {text[:80]}: this is not JSON ({exc}). Strings need quotes: '"2 + 3"'."""
            ) from exc


def _tasks_of(path: Path) -> Iterator[Any]:
    try:
        text = typer.get_text_stream("stdin").read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read {path}: {exc}") from exc
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as exc:
            raise ConfigError(f"{path}: line {number} is not JSON ({exc}). Write one task a line.") from exc


def _labels(assignments: list[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not (name and equals):
            raise ConfigError(f"--label {assignment}: write key=value, such as split=held-out.")
        labels[name] = value
    return labels


def _end_facts(end: End) -> dict[str, Any]:
    return {"rollout_id": end.rollout_id, "status": end.status.value, "attempt": end.attempt, "reward": end.reward,
            "error": end.error}  # fmt: skip


def _end_line(end: End) -> str:
    reward = "" if end.reward is None else f"  reward {end.reward:g}"
    reason = "".join(f"  {line}" for line in end.error.strip().splitlines()[-1:])
    return f"{end.rollout_id}  {end.status.value}  attempt {end.attempt}{reward}{reason}"


def _rollout_facts(rollout: Rollout) -> dict[str, Any]:
    submission = rollout.submission
    try:
        task = msgspec.msgpack.decode(submission.task) if submission.task else None
        json.dumps(task)
    except (msgspec.DecodeError, TypeError, ValueError):
        task = submission.task.hex()  # no JSON says it better
    return {
        "rollout_id": submission.rollout_id, "status": rollout.status.value, "attempts": rollout.attempt,
        "group": submission.group, "labels": submission.labels, "worker": rollout.worker,
        "replayed_as": rollout.replayed_as, "task": task, "error": rollout.error,
    }  # fmt: skip


def _print_count(what: str, count: int, json_: bool) -> None:
    print_json({what: count}) if json_ else print(f"{count} {what}")
