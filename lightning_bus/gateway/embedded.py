"""Broker and gateway inside the caller's process, for an hour of trying out: `async with embedded_bus(…) as bus`.

What always holds: everything is real, the log on disk included; ports are free ones of the loopback; when the context
is left, both have ended in order. For anything longer they are processes of their own: `lightning-bus up`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio.abc import TaskStatus

from lightning_bus.config import BrokerSection, GatewaySection
from lightning_bus.daemon import run_secret


@dataclass(frozen=True, slots=True)
class EmbeddedBus:
    """Where the two are reached. bus_address: of the broker; log: its directory."""

    bus_address: str
    gateway_url: str
    log: Path


@asynccontextmanager
async def embedded_bus(directory: Path, upstreams: Sequence[str]) -> AsyncGenerator[EmbeddedBus]:
    """Run a broker and a gateway in this event loop while the context lasts.

    directory  for log and secret
    upstreams  base URLs of the engines that the gateway asks
    """
    # Whoever has no web server of his own need not pay for one by importing this.
    from lightning_bus.broker.server import serve_broker
    from lightning_bus.gateway.daemon import serve_gateway

    secret = run_secret(directory)
    gateway = GatewaySection(bind="127.0.0.1:0", upstreams=list(upstreams))

    async def run_broker(*, task_status: TaskStatus[str]) -> None:
        broker = BrokerSection(bind="tcp://127.0.0.1:*")
        await serve_broker(broker, directory / "log", secret, started=task_status.started)

    async def run_gateway(address: str, *, task_status: TaskStatus[str]) -> None:
        await serve_gateway(gateway, bus_address=address, secret=secret, started=task_status.started)

    async with anyio.create_task_group() as brokers:
        address = await brokers.start(run_broker)
        async with anyio.create_task_group() as gateways:
            url = await gateways.start(run_gateway, address)
            try:
                yield EmbeddedBus(address, url, directory / "log")
            finally:
                gateways.cancel_scope.cancel()  # first, while there is a bus for what it still has to record
        brokers.cancel_scope.cancel()
