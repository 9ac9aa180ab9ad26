"""Threads that an agent starts belong to its rollout.

Python gives a new thread an empty context (before 3.14), so an emitter in one would not know its attempt. Once a
rollout is traced here, `threading.Thread.start` and `ThreadPoolExecutor.submit` take the place along, ours and
OpenTelemetry's, and nothing else. Work that is submitted from nowhere runs nowhere, whichever rollout its pool's thread
was started in. Other pools hand work to threads that live for long: run it by `carry(function)`.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from lightning_bus.otel.context import Place, place

R = TypeVar("R")

_lock = threading.Lock()
_done = False


def carry(function: Callable[..., R]) -> Callable[..., R]:
    """Return a function that runs at the place where `carry` was called, in whatever thread it is called."""
    return _carry(function, place.get())


def carry_into_threads() -> None:
    """Have threads and thread pools take the place along. Doing it again changes nothing."""
    global _done
    with _lock:
        if _done:
            return
        _done = True
        start, submit = threading.Thread.start, ThreadPoolExecutor.submit

        @functools.wraps(start)
        def start_here(self: threading.Thread) -> None:
            if place.get() is not None:
                self.run = carry(self.run)
            start(self)

        @functools.wraps(submit)
        def submit_here(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            return submit(self, carry(fn), *args, **kwargs)

        threading.Thread.start = start_here
        ThreadPoolExecutor.submit = submit_here


def _carry(function: Callable[..., R], now: Place | None) -> Callable[..., R]:
    otel: Any = sys.modules.get("opentelemetry.context", None)  # only where somebody else has imported it
    context: Any = otel.get_current() if otel and now is not None else None

    @functools.wraps(function)
    def carried(*args: Any, **kwargs: Any) -> R:
        before = place.set(now)
        attached = None if context is None else otel.attach(context)
        try:
            return function(*args, **kwargs)
        finally:
            if attached is not None:
                otel.detach(attached)
            place.reset(before)

    return carried
