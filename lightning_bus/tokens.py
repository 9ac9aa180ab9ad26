"""The API key of whoever calls the model: unforgeable. An agent's is good for one attempt only.

    base64url(MessagePack claims) "." base64url(HMAC-SHA256)

The broker mints it when it leases an attempt, the gateway checks it; both hold the run's secret, the agent and the
worker do not. It carries what the gateway must know about the rollout, so that a model call costs no look-up. The time
it carries is the wall clock's, because two machines have no other in common: it ends tokens after hours or days, while
a late attempt is found by its number.

A key that belongs to no rollout has an empty rollout_id and the name of whom it was given to. Nobody keeps a list of
them: one ends with its time, and all end with the run's secret.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from functools import lru_cache
from typing import Any

import msgspec

SECRET_BYTES = 32


class Claims(msgspec.Struct, frozen=True, array_like=True):
    """What a token says about its holder."""

    rollout_id: str
    attempt: int
    model: str = ""  # the model to call, whatever the agent names; empty: as the agent asks
    overrides: dict[str, Any] = {}  # request fields to set, whatever the agent asks
    expires_wall_s: float = 0.0  # Unix time from which the token is worth nothing; 0: never
    name: str = ""  # of whom a key that belongs to no rollout was given to; what is recorded of its calls bears it


class BadToken(ValueError):
    """The token was not minted with this secret, or its time is over."""


def mint(secret: bytes, claims: Claims) -> str:
    """Return the token for these claims."""
    body = msgspec.msgpack.encode(claims)
    return f"{_text(body)}.{_text(_mac(secret, body))}"


def check(secret: bytes, token: str, wall_s: float = 0.0) -> Claims:
    """Return what the token claims. Raises BadToken unless it was minted with this secret and has time left.

    wall_s  Unix time now; 0 where the caller knows by other means what is over, as the broker does
    """
    body_text, _, mac_text = token.partition(".")
    try:
        body, mac = _bytes(body_text), _bytes(mac_text)
    except (binascii.Error, ValueError) as exc:
        raise BadToken("not a lightning-bus token") from exc
    if not hmac.compare_digest(mac, _mac(secret, body)):
        raise BadToken("the token's signature does not match")
    try:
        claims = msgspec.msgpack.decode(body, type=Claims)
    except msgspec.DecodeError as exc:
        raise BadToken("the token's claims cannot be read") from exc
    if 0 < claims.expires_wall_s <= wall_s:
        whose = f"rollout {claims.rollout_id} attempt {claims.attempt}" if claims.rollout_id else claims.name
        raise BadToken(f"the token of {whose} expired {wall_s - claims.expires_wall_s:.0f} s ago")
    return claims


def _mac(secret: bytes, body: bytes) -> bytes:
    # Not hmac.digest: that lets go of the interpreter lock, and while the broker commits, getting it back costs ten times
    # what is computed.
    mac = _keyed(secret).copy()
    mac.update(body)
    return mac.digest()


@lru_cache(maxsize=8)
def _keyed(secret: bytes) -> hmac.HMAC:
    return hmac.new(secret, digestmod="sha256")


def _text(raw: bytes) -> str:
    # As base64.urlsafe_b64encode, which takes three times as long; a token is made for each lease.
    return binascii.b2a_base64(raw, newline=False).decode().rstrip("=").replace("+", "-").replace("/", "_")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
