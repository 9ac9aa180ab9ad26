"""Records and spans as people and programs read them: one line, or plain facts for JSON. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from lightning_bus.cli_shared import named
from lightning_bus.log.codec import decode_event
from lightning_bus.records import Kind, Record
from lightning_bus.resources import Resource
from lightning_bus.spans import Span, decode_spans, is_model_call, model_call


def record_facts(record: Record) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "offset": record.offset, "kind": record.kind.name.lower(), "rollout_id": record.rollout_id,
        "attempt": record.attempt, "producer": record.producer, "epoch": record.epoch, "seq": record.seq,
        "count": record.span_count, "bytes": len(record.body), "wall_ns": record.wall_ns,
    }  # fmt: skip
    if record.kind is Kind.ROLLOUT:
        event = named(decode_event(record))
        event["task"] = len(event["task"])  # opaque bytes: only how many
        facts["event"] = event
    elif record.kind is Kind.RESOURCE:
        resource = msgspec.msgpack.decode(record.body, type=Resource)
        facts["resource"] = {"name": resource.name, "version": resource.version}
    return facts


def record_line(record: Record) -> str:
    where = f"{record.rollout_id}/{record.attempt}" if record.rollout_id else "-"
    head = f"{record.offset:>8}  {record.kind.name.lower():<8}  {where:<24}  "
    if record.kind is Kind.ROLLOUT:
        event = decode_event(record)
        reward = "" if event.reward is None else f"  reward {event.reward:g}"
        error = event.error.strip().splitlines()[-1:]
        return f"{head}{event.what} → {event.status}{reward}" + "".join(f"  {text}" for text in error)
    if record.kind is Kind.RESOURCE:
        resource = msgspec.msgpack.decode(record.body, type=Resource)
        return f"{head}{resource.name} version {resource.version}"
    names = ", ".join(span.name for span in decode_spans(record.body))
    return f"{head}{names}  from {record.producer}"


def span_facts(span: Span) -> dict[str, Any]:
    """Return a span with every field readable: ids as hex, token ids and log-probs as lists."""
    facts = named(span)
    for key in ("span_id", "trace_id", "parent_id"):
        facts[key] = facts[key].hex() if facts[key] else None
    if is_model_call(span):
        call = model_call(span)
        facts["attributes"] = {
            **{key: value for key, value in span.attributes.items() if not isinstance(value, bytes)},
            "prompt_token_ids": call.prompt_ids_P.tolist(),
            "response_token_ids": call.response_ids_R.tolist(),
            "response_logprobs": call.logprobs_R.tolist(),
        }
    facts["attributes"] = {
        key: value.hex() if isinstance(value, bytes) else value for key, value in facts["attributes"].items()
    }
    return facts
