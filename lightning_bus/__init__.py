"""lightning-bus: train any AI agent with reinforcement learning, from a log that forgets nothing.

The bus, which this package is, carries three things: tasks to workers, spans to the log, and the record of every
weight version. It knows nothing of torch, of agents' frameworks, or of how one trains.

    from lightning_bus import Client, Submission

    async with Client("tcp://127.0.0.1:4750") as bus:
        await bus.submit([Submission("r-1", task)])      # durable when this returns
        (end,) = await bus.wait(["r-1"])                 # told by the broker, not polled
        async for record in bus.follow():                # everything that happened, in one order
            ...

What other packages may use is exported here and in `lightning_bus.adapters`; the rest may change.
"""

from lightning_bus.client import BlockingClient, Client, Leases, Submitted
from lightning_bus.clock import monotonic_s, wall_ns
from lightning_bus.config import BrokerSection, CreditSection, GatewaySection, RunFile, RunSection, Section
from lightning_bus.daemon import LIFELINE, client_address, load_run, run_daemon
from lightning_bus.errors import (
    AccessDenied,
    AgentError,
    BrokenError,
    BusyError,
    CallError,
    ConfigError,
    Conflict,
    FencedError,
    LightningBusError,
    NotFound,
    RetiredError,
    StopProcess,
    StorageError,
)
from lightning_bus.gateway.embedded import EmbeddedBus, embedded_bus
from lightning_bus.http import serve_http
from lightning_bus.keys import KEY_ENV, adopt_key
from lightning_bus.lifecycle import Status
from lightning_bus.log.codec import decode_event
from lightning_bus.log.reader import LogReader
from lightning_bus.messages import End, Rollout, StatusIs, Submission, Task
from lightning_bus.otel.traceparent import root_of_attempt
from lightning_bus.records import Kind, Record, RolloutEvent
from lightning_bus.rescoring import HookPool, Verdicts, reward_hooks
from lightning_bus.resources import (
    POLICY,
    POLICY_PINS,
    POLICY_WEIGHTS,
    Pins,
    Resource,
    TrainedRollout,
    WeightVersion,
    pins_of,
    policy_of,
    weights_of,
)
from lightning_bus.spans import (
    REQUEST_MODEL,
    REWARD,
    REWARD_NAME,
    REWARD_SPAN_NAME,
    ModelCall,
    Span,
    decode_spans,
    is_model_call,
    model_call,
    reward_of,
)

__all__ = [
    "KEY_ENV", "LIFELINE", "POLICY", "POLICY_PINS", "POLICY_WEIGHTS", "REQUEST_MODEL", "REWARD", "REWARD_NAME",
    "REWARD_SPAN_NAME", "AccessDenied", "AgentError", "BlockingClient", "BrokenError", "BrokerSection", "BusyError",
    "CallError", "Client", "ConfigError", "Conflict", "CreditSection", "EmbeddedBus", "End", "FencedError",
    "GatewaySection", "HookPool", "Kind", "Leases", "LightningBusError", "LogReader", "ModelCall", "NotFound", "Pins",
    "Record", "Resource", "RetiredError", "Rollout", "RolloutEvent", "RunFile", "RunSection", "Section", "Span",
    "Status", "StatusIs", "StopProcess", "StorageError", "Submission", "Submitted", "Task", "TrainedRollout",
    "Verdicts", "WeightVersion", "adopt_key", "client_address", "decode_event", "decode_spans", "embedded_bus",
    "is_model_call", "load_run", "model_call", "monotonic_s", "pins_of", "policy_of", "reward_hooks", "reward_of",
    "root_of_attempt", "run_daemon", "serve_http", "wall_ns", "weights_of",
]  # fmt: skip
