"""An ASGI app as a daemon: bound before anything else is tried, ended in order, signals left to whoever runs it."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from typing import Any

import anyio
import uvicorn

from lightning_bus.errors import CallError, ConfigError

KEEP_ALIVE_S = 75
GRACE_S = 5  # for calls in flight once the end was asked for


async def serve_http(app: Any, bind: str, *, key: str, started: Callable[[str], None] | None = None) -> None:
    """Serve `app` on "host:port" until cancelled; calls in flight then have a few seconds to end.

    key      how RUN.toml names the address, for messages
    started  is called with the URL once connections are accepted

    Raises CallError when the address cannot be bound.
    """
    with bind_tcp(bind, key) as listener:
        async with http_server(app, listener, started):
            await anyio.sleep_forever()


@asynccontextmanager
async def http_server(
    app: Any, listener: socket.socket, started: Callable[[str], None] | None = None
) -> AsyncGenerator[None]:
    """Serve while the context is open. Leaving it, however it is left, lets calls in flight end first."""
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", ws="none", server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=GRACE_S,
    )  # fmt: skip
    server = _Server(config, lambda: started(url) if started is not None else None)
    ended = anyio.Event()

    async def run() -> None:
        with anyio.CancelScope(shield=True):
            try:
                await server.serve(sockets=[listener])
            finally:
                ended.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        try:
            yield
        finally:
            server.should_exit = True
            with anyio.CancelScope(shield=True):
                await ended.wait()


def bind_tcp(address: str, key: str) -> socket.socket:
    """Return a socket bound to "host:port". Raises CallError, naming the key and the way out, when that cannot be."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal():
        raise ConfigError(f"{key}: {address!r} is not host:port. Write it like 127.0.0.1:4751.")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, int(port)))
    except (OSError, OverflowError) as exc:
        listener.close()
        if isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE:
            raise CallError(f"{key}: {address} is in use by another process. Stop that one, or change {key}.") from exc
        raise CallError(f"{key}: cannot listen on {address}: {exc}. Change {key}.") from exc
    return listener


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: whoever runs the daemon decides when it stops."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    def capture_signals(self) -> AbstractContextManager[None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_started()
