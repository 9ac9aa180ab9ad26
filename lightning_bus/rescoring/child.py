"""A reward hook's own process: rollouts come in on stdin, one answer for each goes out on stdout.

    python -m lightning_bus.rescoring.child MODULE:FUNCTION MEMORY_BYTES

Frames are a u32 length and MessagePack; the first that goes out says whether the hook could be loaded. What the hook
prints goes to stderr. The process ends when its parent is gone, also while the hook is at work.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import inspect
import os
import queue
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from lightning_bus.adapters import FinishedRollout
from lightning_bus.rescoring.answers import LENGTH, Answer, Dropped, NotLoaded, Ready, answer_from

_decoder = msgspec.msgpack.Decoder(FinishedRollout)


def main(hook_path: str, memory_bytes: int) -> None:
    """Answer for every rollout that comes, until stdin ends."""
    rollouts, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    try:
        hook = load(hook_path)
    except Exception as exc:
        return write(answers, NotLoaded(f"{type(exc).__name__}: {exc}"))
    write(answers, Ready(code_of(hook)))
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(rollouts, inbox), daemon=True).start()
    with asyncio.Runner() as runner:
        if inspect.iscoroutinefunction(hook):
            runner.run(_answer_together(hook, inbox, answers))
        while True:
            write(answers, _ask(hook, _decoder.decode(inbox.get()), runner))


def load(path: str) -> Callable[[FinishedRollout], Any]:
    """Return the function that MODULE:FUNCTION names; modules are found from the working directory too."""
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ValueError(f"{path!r} is not of the form MODULE:FUNCTION")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{path} is a {type(found).__name__}, not a function")
    return found


def code_of(hook: Callable[..., Any]) -> str:
    """Return a digest of the file that a hook stands in, by which a hook that was changed is told from what it was."""
    whole = inspect.unwrap(hook)
    place: Any = whole if hasattr(whole, "__code__") or inspect.isclass(whole) else whole.__class__
    try:
        body = Path(inspect.getsourcefile(place) or "").read_bytes()
    except (TypeError, OSError):  # built in, or made at run time
        body = repr(hook).encode()
    return hashlib.blake2b(body, digest_size=8).hexdigest()


def write(file: BinaryIO, answer: Answer | Ready | NotLoaded) -> None:
    body = msgspec.msgpack.encode(answer)
    file.write(LENGTH.pack(len(body)) + body)
    file.flush()


def _ask(hook: Callable[[FinishedRollout], Any], rollout: FinishedRollout, runner: asyncio.Runner) -> Answer:
    try:
        given = hook(rollout)
        if inspect.isawaitable(given):
            given = runner.run(_wait_for(given))
    except Exception as exc:
        return _raised(exc)
    return answer_from(given)


async def _answer_together(hook: Callable[[Any], Any], inbox: queue.SimpleQueue[bytes], answers: BinaryIO) -> None:
    """Answer in order for ever, with all rollouts that were handed over in work: a hook that awaits a judge waits once."""
    working: asyncio.Queue[asyncio.Task[Answer]] = asyncio.Queue()

    async def ask(rollout: FinishedRollout) -> Answer:
        try:
            return answer_from(await hook(rollout))
        except Exception as exc:
            return _raised(exc)

    async def take() -> None:
        while True:
            rollout = _decoder.decode(await asyncio.to_thread(inbox.get))
            working.put_nowait(asyncio.create_task(ask(rollout)))

    taking = asyncio.create_task(take())
    while not taking.done():
        write(answers, await (await working.get()))


def _raised(exc: Exception) -> Dropped:
    return Dropped(f"hook raised {type(exc).__name__}", str(exc)[:500])


async def _wait_for(given: Any) -> Any:
    return await given


def _read(file: BinaryIO, inbox: queue.SimpleQueue[bytes]) -> None:
    while len(head := file.read(LENGTH.size)) == LENGTH.size:
        inbox.put(file.read(*LENGTH.unpack(head)))
    os._exit(0)  # nobody waits for what is still being worked on


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
