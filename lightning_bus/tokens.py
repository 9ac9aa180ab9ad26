"""The API key an agent is given: unforgeable, and good for one attempt only.

    base64url(MessagePack claims) "." base64url(HMAC-SHA256)

The broker mints it when it leases an attempt, the gateway checks it; both hold the run's secret, the agent and the
worker do not. It carries what the gateway must know about the rollout, so that a model call costs no look-up.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from typing import Any

import msgspec

SECRET_BYTES = 32


class Claims(msgspec.Struct, frozen=True, array_like=True):
    """What a token says about its holder."""

    rollout_id: str
    attempt: int
    model: str = ""  # the model to call, whatever the agent names; empty: as the agent asks
    overrides: dict[str, Any] = {}  # request fields to set, whatever the agent asks


class BadToken(ValueError):
    """The token was not minted with this secret."""


def mint(secret: bytes, claims: Claims) -> str:
    """Return the token for these claims."""
    body = msgspec.msgpack.encode(claims)
    return f"{_text(body)}.{_text(_mac(secret, body))}"


def check(secret: bytes, token: str) -> Claims:
    """Return what the token claims. Raises BadToken unless it was minted with this secret."""
    body_text, _, mac_text = token.partition(".")
    try:
        body, mac = _bytes(body_text), _bytes(mac_text)
    except (binascii.Error, ValueError) as exc:
        raise BadToken("not a lightning-bus token") from exc
    if not hmac.compare_digest(mac, _mac(secret, body)):
        raise BadToken("the token's signature does not match")
    try:
        return msgspec.msgpack.decode(body, type=Claims)
    except msgspec.DecodeError as exc:
        raise BadToken("the token's claims cannot be read") from exc


def _mac(secret: bytes, body: bytes) -> bytes:
    return hmac.new(secret, body, hashlib.sha256).digest()


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
