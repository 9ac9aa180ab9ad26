"""The quick start that agents in this field are written by, with only its imports changed.

    from lightning_bus.otel import LightningClient, OtelTracer

    client = LightningClient(server_url="http://127.0.0.1:4751", rollout_id="r-1")
    tracer = OtelTracer(enable_otel=True)
    async with tracer.trace_context(
        name="run", store=client.store, rollout_id=client.rollout_id, attempt_id=client.attempt_id
    ):
        ...
        tracer.emit_reward(reward=1.0)

Spans that carry `agentlightning.*` names, from code that was not changed at all, are understood where they come in.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from lightning_bus.errors import ConfigError
from lightning_bus.otel.context import ADDRESS_ENV, ATTEMPT_ENV, ROLLOUT_ENV, TOKEN_ENV
from lightning_bus.otel.exporter import LIMIT_S, SpanExporter
from lightning_bus.otel.tracer import attempt_number


class LightningClient:
    """One rollout's way to the log. What is not given is taken from the environment that a worker sets.

    server_url  of the gateway (http://) or the broker (tcp://)
    attempt_id  the attempt's number; None: what the environment says, or the first
    token       the attempt's API key; the gateway wants it
    """

    def __init__(
        self, server_url: str = "", rollout_id: str = "", *, attempt_id: int | str | None = None, token: str = "",
        key: Path | None = None, limit_s: float = LIMIT_S,
    ) -> None:  # fmt: skip
        address = server_url or os.environ.get(ADDRESS_ENV, "")
        self.rollout_id = rollout_id or os.environ.get(ROLLOUT_ENV, "")
        if not address or not self.rollout_id:
            raise ConfigError(
                f"LightningClient has server_url {address!r} and rollout_id {self.rollout_id!r}. Give both, or run in a "
                f"worker, which sets {ADDRESS_ENV} and {ROLLOUT_ENV}."
            )
        ours = self.rollout_id == os.environ.get(ROLLOUT_ENV)
        if ours:  # another rollout's token would be refused
            attempt_id = attempt_id or os.environ.get(ATTEMPT_ENV)
            token = token or os.environ.get(TOKEN_ENV, "")
        self.attempt_id = attempt_number(attempt_id)
        self.store = SpanExporter(address, token=token, key=key, limit_s=limit_s)

    def close(self) -> None:
        """Return once every span is durable. A process that ends does it by itself."""
        self.store.close()

    def __enter__(self) -> LightningClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> LightningClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.store.wait_flushed()
        self.close()
