"""Named, versioned, immutable things: weight versions, prompt templates, model endpoints.

Once a (name, version) is published its content never changes, so whoever holds a version number holds the thing. To
change something, publish the next version. The content is opaque to the broker; the one kind that the whole ring
agrees on, a weight version, is spelled out here.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

POLICY = "policy"  # what the only policy of a run is called here, whatever agents call it
POLICY_WEIGHTS = f"weights/{POLICY}"  # the resource whose versions the engine serves and the trainer publishes
POLICY_PINS = f"pins/{POLICY}"  # which of them are kept; each version is the whole list


class Resource(msgspec.Struct, frozen=True, array_like=True):
    """One published version of a named thing. `body` is MessagePack."""

    name: str
    version: int
    body: bytes


class TrainedRollout(msgspec.Struct, frozen=True, array_like=True):
    """What one rollout gave to an update: the model-call spans whose tokens were trained on."""

    rollout_id: str
    attempt: int
    span_ids: list[bytes]


class WeightVersion(msgspec.Struct, frozen=True, kw_only=True):
    """The record of one set of policy weights: where they are, and which recorded calls made them.

    `trained` is what lets `lightning-bus verify` prove from the log alone that every transition trained on exists.
    The record is published only after the checkpoint that can reproduce it is on disk.
    """

    version: int
    parent: int | None
    phase: str  # "init", "sft" or "rl"
    step: int
    path: str  # where this version stays readable: a checkpoint's file, or a model directory
    checksum: str
    trained: list[TrainedRollout] = []
    metrics: dict[str, float] = {}
    created_ns: int = 0


class Pins(msgspec.Struct, frozen=True):
    """The weight versions whose files stay, however old they get."""

    versions: list[int] = []


def weights_of(policy: str) -> str:
    """Return the resource that holds a policy's weight versions: each of several policies numbers its own."""
    return f"weights/{policy}"


def pins_of(policy: str) -> str:
    """Return the resource that says which of a policy's versions are kept."""
    return f"pins/{policy}"


def policy_of(resource: str) -> str | None:
    """Return the policy whose weight versions a resource holds; None for any other resource."""
    kind, _, policy = resource.partition("/")
    return policy if kind == "weights" and policy else None


def encode(value: msgspec.Struct) -> bytes:
    """Return the MessagePack body of a resource."""
    return msgspec.msgpack.encode(value)


def decode(resource: Resource, kind: type[T]) -> T:
    """Return the typed content of a resource. Raises msgspec.ValidationError, which names the field."""
    return msgspec.msgpack.decode(resource.body, type=kind)


def to_builtins(value: msgspec.Struct) -> dict[str, Any]:
    """Return the content as plain dicts and lists, for printing."""
    return msgspec.to_builtins(value, builtin_types=(bytes,))
