"""What a request says: whose it is, what it asks, and where in a trace it belongs.

Everything that a request may have wrong is found here, before an engine is asked or anything is recorded.
"""

from __future__ import annotations

import os
from typing import cast
from urllib.parse import unquote

import msgspec
from starlette.requests import Request

from lightning_bus import tokens
from lightning_bus.clock import wall_ns
from lightning_bus.gateway.dialects import Json
from lightning_bus.gateway.refusals import invalid, unauthorized
from lightning_bus.otel.traceparent import parse_traceparent, root_of_attempt
from lightning_bus.spans import AGENT_NAME

HEADER_CHARS_MAX = 200  # of a name that ends up in every span

_decode = msgspec.json.Decoder().decode


def claims_of(request: Request, secret: bytes, *, open_: bool) -> tokens.Claims:
    """Return whose call this is. Refuses a key that was not made for the rollout and attempt in the address.

    open_  calls of no rollout need no key (on loopback)
    """
    rollout_id: str = request.path_params.get("rollout_id", "")
    attempt: int = request.path_params.get("attempt", 0)
    try:
        claims = tokens.check(secret, _api_key(request), wall_ns() / 1e9)
    except tokens.BadToken as exc:
        if not rollout_id and open_:
            return tokens.Claims("", 0)
        way_out = "Use the api_key that the worker gave to this attempt."
        if not rollout_id:
            way_out = "A key of this run is made with: lightning-bus keys api NAME"
        raise unauthorized(f"{exc}. {way_out}") from exc
    if rollout_id and (claims.rollout_id, claims.attempt) != (rollout_id, attempt):
        raise unauthorized(
            f"The API key is for rollout {claims.rollout_id} attempt {claims.attempt}, the address for rollout "
            f"{rollout_id} attempt {attempt}. Use base_url and api_key of the same attempt."
        )
    return claims


def _api_key(request: Request) -> str:
    """The key, where OpenAI's clients put it or where Anthropic's do."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return token.strip()
    key = request.headers.get("x-api-key")
    if key is None:
        raise tokens.BadToken("no API key was sent")
    return key.strip()


async def body_of(request: Request, bytes_max: int) -> tuple[Json, bytes]:
    """Return the request's JSON object and its bytes. Refuses what is none, and what is longer than bytes_max."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise invalid(415, f"The content type is {kind or 'missing'}. Send application/json.")
    size = number(request.headers.get("content-length"))
    parts: list[bytes] = []
    if size <= bytes_max:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > bytes_max:
                break
    if size > bytes_max:
        raise invalid(413, f"The request exceeds {bytes_max} bytes. Send less, or raise [gateway] body_bytes_max.")
    raw = b"".join(parts)
    try:
        body = _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise invalid(400, f"The request is not JSON: {exc}.") from exc
    except RecursionError as exc:
        raise invalid(400, "The request is nested too deeply.") from exc
    if not isinstance(body, dict):
        raise invalid(400, f"The request is a JSON {type(body).__name__}. Send an object.")
    return cast(Json, body), raw


def parent_of(request: Request, claims: tokens.Claims) -> tuple[bytes, bytes | None]:
    """Trace and parent of a call: what the request's traceparent says, else the attempt's root span."""
    said = parse_traceparent(request.headers.get("traceparent", ""))
    if said is not None:
        return said
    if claims.rollout_id:
        return root_of_attempt(claims.rollout_id, claims.attempt)
    return os.urandom(16), None


def agent_name_of(request: Request) -> str:
    """Return the calling agent's name: the header x-agent-name, else what W3C baggage says; empty when neither does."""
    name = request.headers.get("x-agent-name", "")
    if not name:
        for member in request.headers.get("baggage", "").split(","):
            key, _, value = member.partition(";")[0].partition("=")
            if key.strip() == AGENT_NAME:
                name = unquote(value.strip())
    return name[:HEADER_CHARS_MAX]


def user_agent_of(request: Request) -> str:
    """Return the client's name for itself, such as "OpenAI/Python 2.0.0"."""
    return request.headers.get("user-agent", "")[:HEADER_CHARS_MAX]


def number(text: str | None) -> int:
    """Return a header's number; 0 for what is none."""
    return int(text) if text is not None and text.isdecimal() and len(text) < 20 else 0
