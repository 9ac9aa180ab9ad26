"""Model calls hang from the span that made them.

The gateway files a call under the request's `traceparent`, and under the attempt's root without one. So requests to the
attempt's own gateway, and to nobody else, are sent with it: whichever SDK makes them, as far as it uses httpx.
"""

from __future__ import annotations

import functools
import threading
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from lightning_bus.otel.context import parent_of, place
from lightning_bus.otel.traceparent import format_traceparent

_MODULES = ("httpx", "httpx2")  # the second is what newer SDKs use
_HEADER = "traceparent"

_lock = threading.Lock()
_done = False


def send_traceparent() -> None:
    """Have httpx name the span that a call to the gateway is made in. Doing it again changes nothing."""
    global _done
    with _lock:
        if _done:
            return
        _done = True
        for name in _MODULES:
            if find_spec(name) is not None:
                module: Any = import_module(name)
                _wrap(module.Client)
                _wrap(module.AsyncClient)


def _wrap(client: Any) -> None:
    send = client.send

    @functools.wraps(send)
    def named(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        now = place.get()
        if now is not None and now.attempt.address and _HEADER not in request.headers:
            if str(request.url).startswith(now.attempt.address.rstrip("/") + "/"):
                request.headers[_HEADER] = format_traceparent(*parent_of(now))
        return send(self, request, *args, **kwargs)  # a coroutine, of the asynchronous client

    client.send = named
