"""The gateway as a process: bound before anything else is tried, and the bus outlives the calls in flight."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable

import anyio

from lightning_bus.client import Client
from lightning_bus.config import GatewaySection
from lightning_bus.errors import first_error
from lightning_bus.gateway.app import Gateway
from lightning_bus.http import bind_tcp, http_server


async def serve_gateway(
    section: GatewaySection, *, bus_address: str, secret: bytes, started: Callable[[str], None] | None = None
) -> None:
    """Serve until cancelled; calls in flight then have a few seconds to end.

    `started` is called with the gateway's URL once it accepts connections. Raises CallError when the address cannot
    be bound, and StopProcess when the bus can no longer be used.
    """
    with bind_tcp(section.bind, "gateway.bind") as listener:
        stop = anyio.Event()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_set_when_cancelled, stop)
                await _serve_until(stop, section, bus_address, secret, listener, started)
                tasks.cancel_scope.cancel()
        except ExceptionGroup as exc:
            raise first_error(exc) from exc


async def _serve_until(
    stop: anyio.Event,
    section: GatewaySection,
    bus_address: str,
    secret: bytes,
    listener: socket.socket,
    started: Callable[[str], None] | None,
) -> None:
    """Serve until `stop`. Shielded from cancellation, because calls in flight need the bus a little longer than that."""
    connected = False

    with anyio.CancelScope(shield=True) as scope:
        async with anyio.create_task_group() as tasks:

            async def give_up() -> None:
                await stop.wait()
                if not connected:
                    scope.cancel()  # nobody waits for a bus that is not there yet

            tasks.start_soon(give_up)
            async with (
                Client(bus_address, role="gateway", limit_s=section.admission_wait_s) as bus,
                # Without a limit: what it gave up might still be recorded, and who sent it would send it again.
                Client(bus_address, role="gateway", limit_s=math.inf) as traces,
            ):
                connected = True
                gateway = Gateway(bus, section, secret, on_broken=stop.set, traces=traces)
                tasks.start_soon(gateway.upstreams.watch, section.health_check_s)
                async with http_server(gateway.app(), listener, started):
                    await stop.wait()
                await gateway.upstreams.aclose()
                if gateway.broken is not None:
                    raise gateway.broken
            tasks.cancel_scope.cancel()


async def _set_when_cancelled(event: anyio.Event) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        event.set()
