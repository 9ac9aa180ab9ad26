"""Named, versioned, immutable things."""

from __future__ import annotations

import json

import msgspec
import pytest

from lightning_bus.resources import POLICY_WEIGHTS, Resource, TrainedRollout, WeightVersion, decode, encode, to_builtins

WEIGHTS = WeightVersion(
    version=3, parent=2, phase="rl", step=1, path="w.safetensors", checksum="abc",
    trained=[TrainedRollout("r-1", 1, [b"12345678"])], metrics={"loss": 0.5},
)  # fmt: skip


def test_a_weight_version_comes_back_whole() -> None:
    assert decode(Resource(POLICY_WEIGHTS, 3, encode(WEIGHTS)), WeightVersion) == WEIGHTS


def test_a_wrong_content_names_the_field() -> None:
    body = msgspec.msgpack.encode({**msgspec.to_builtins(WEIGHTS), "step": "one"})
    with pytest.raises(msgspec.ValidationError, match=r"\$\.step"):
        decode(Resource(POLICY_WEIGHTS, 3, body), WeightVersion)


def test_fields_that_came_later_have_defaults() -> None:
    old = {"version": 0, "parent": None, "phase": "init", "step": 0, "path": "w", "checksum": "c"}
    assert decode(Resource(POLICY_WEIGHTS, 0, msgspec.msgpack.encode(old)), WeightVersion).trained == []


def test_it_prints_as_plain_values() -> None:
    plain = to_builtins(WEIGHTS)
    assert plain["trained"] == [["r-1", 1, [b"12345678"]]]
    json.dumps(plain["metrics"])
