"""Attributes, from what an agent has to what OpenTelemetry carries to what the log keeps. Pure.

    to_plain    any Python values → what every OpenTelemetry SDK takes: text, numbers, and lists of one kind of them
    to_record   what came from OpenTelemetry, or from `to_plain` → the log's form

Both tracers go through both, so the same agent leaves the same records under either. What has no plain form becomes
JSON, and what has none of that either becomes its repr: tracing never fails because of a value.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from lightning_bus.otel import names as n
from lightning_bus.spans import pack_ids, pack_logprobs

_SCALARS = frozenset({str, bool, int, float})
_INT_MAX = 2**63  # an OpenTelemetry integer has 64 bits and a sign
_PACKED = {n.PROMPT_IDS: (pack_ids, "<u4"), n.RESPONSE_IDS: (pack_ids, "<u4"), n.LOGPROBS: (pack_logprobs, "<f4")}
_OURS = ("lightning.", "agentlightning.")
_THEIR_REWARD = "agentlightning.reward."


def to_plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes that every OpenTelemetry SDK takes. None is left out, mappings become dotted names."""
    plain: dict[str, Any] = {}
    for name, value in attributes.items():
        if type(value) in (str, bool, float):
            plain[name] = value
        else:
            _add(plain, name, value)
    return plain


def to_record(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain attributes as the log keeps them: token ids packed, names of Agent Lightning 0.3 translated."""
    record: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    for name, value in attributes.items():
        if type(value) is tuple:
            value = list(cast("tuple[Any, ...]", value))
        if not name.startswith(_OURS):
            record[name] = value
        elif name.startswith(_THEIR_REWARD):
            theirs[name[len(_THEIR_REWARD) :]] = value
        else:
            name = n.translate(name)
            record[name] = _packed(name, value) if name in _PACKED else value
    if n.WEIGHT_VERSIONS in record:
        record[n.WEIGHT_VERSIONS] = _versions(record[n.WEIGHT_VERSIONS])
    if theirs:
        _add_their_rewards(record, theirs)
    if n.REWARD in record:
        _check_reward(record)
    return record


def exception_attributes(exc: BaseException, stacktrace: str) -> dict[str, Any]:
    """Return an exception by OpenTelemetry's names."""
    return {n.EXCEPTION_TYPE: type_name(type(exc)), n.EXCEPTION_MESSAGE: str(exc), n.EXCEPTION_STACKTRACE: stacktrace}


def type_name(kind: type) -> str:
    """Return a type's name as OpenTelemetry writes it: with its module, but for built-in ones."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def as_json(value: Any) -> str:
    """Return a value as JSON; what JSON has no form for is written as its repr."""
    try:
        return json.dumps(value, default=repr, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # keys that are no strings, circles
        return repr(value)


def encodable(value: Any) -> Any:
    """Return a value that the record's encoding takes: the slow way, for what it has just refused."""
    if value is None or isinstance(value, bool | float | bytes):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, int):
        return value if -_INT_MAX <= value < _INT_MAX else str(value)
    if isinstance(value, list | tuple):
        return [encodable(item) for item in cast("list[Any] | tuple[Any, ...]", value)]
    if isinstance(value, Mapping):
        return {encodable(str(key)): encodable(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    return encodable(repr(value))


def _add(plain: dict[str, Any], name: str, value: Any) -> None:
    if value is None:
        return
    if hasattr(value, "tolist"):  # an array or a number of numpy's or torch's
        value = value.tolist()
    if isinstance(value, Mapping) and value and all(isinstance(key, str) for key in cast("Mapping[Any, Any]", value)):
        for key, inner in cast("Mapping[str, Any]", value).items():
            _add(plain, f"{name}.{key}", inner)
    else:
        plain[name] = _plain(name, value)


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, str | bool | float):
        return value if type(value) in _SCALARS else _base(value)
    if isinstance(value, int):
        return int(value) if -_INT_MAX <= value < _INT_MAX else str(value)
    if isinstance(value, bytes | bytearray):
        raw = bytes(value)
        if name in _PACKED and len(raw) % 4 == 0:
            return np.frombuffer(raw, _PACKED[name][1]).tolist()
        return base64.b64encode(raw).decode()
    if isinstance(value, list | tuple):
        items = list(cast("list[Any] | tuple[Any, ...]", value))
        kinds: set[type] = {type(item) for item in items}
        if kinds == {int, float}:
            return [float(item) for item in items]
        if len(kinds) <= 1 and kinds <= _SCALARS and not (kinds == {int} and not _fit(items)):
            return items
    return as_json(value)


def _base(value: str | bool | float) -> Any:
    """A str or float of a subclass (an enum's member, numpy's float) as the plain one."""
    return str.__str__(value) if isinstance(value, str) else float(value)


def _fit(items: list[int]) -> bool:
    return all(-_INT_MAX <= item < _INT_MAX for item in items)


def _packed(name: str, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    try:
        return _PACKED[name][0](cast("list[Any]", value))
    except (TypeError, ValueError, OverflowError):
        return cast("list[Any]", value)  # as it came: the call is then untrainable, and says that this is malformed


def _versions(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        versions = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return encodable(versions) if isinstance(versions, list) else value


def _add_their_rewards(record: dict[str, Any], theirs: dict[str, Any]) -> None:
    """`agentlightning.reward.0.name`, `.0.value` and so on: the first is the reward, the others are its dimensions."""
    at = 0
    while f"{at}.value" in theirs:
        name, value = str(theirs.pop(f"{at}.name", "primary")), theirs.pop(f"{at}.value")
        if at == 0:
            record[n.REWARD], record[n.REWARD_NAME] = value, name
        else:
            record[n.REWARD_DIMENSION + name] = value
        at += 1
    for name, value in theirs.items():
        record[f"{n.REWARD}.{name}"] = value


def _check_reward(record: dict[str, Any]) -> None:
    """A reward is a finite number or it is none: readers of the log need not ask again."""
    value = record[n.REWARD]
    if isinstance(value, int | float) and math.isfinite(value):
        record[n.REWARD] = float(value)
    else:
        record[n.REWARD_MALFORMED] = str(record.pop(n.REWARD))
