"""The API key of an attempt."""

from __future__ import annotations

import base64

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bus.tokens import BadToken, Claims, _mac, _text, check, mint  # pyright: ignore[reportPrivateUsage]

SECRET = b"s" * 32
CLAIMS = Claims("r-1", 2, "policy", {"temperature": 0.5, "stop": ["x"]})


def test_what_was_minted_is_what_is_claimed() -> None:
    assert check(SECRET, mint(SECRET, CLAIMS)) == CLAIMS


def test_a_token_can_stand_in_a_header() -> None:
    assert all(c.isascii() and (c.isalnum() or c in "-_.") for c in mint(SECRET, CLAIMS))


def test_a_token_of_another_run_is_refused() -> None:
    with pytest.raises(BadToken, match="signature"):
        check(b"t" * 32, mint(SECRET, CLAIMS))


def test_the_claims_cannot_be_exchanged() -> None:
    mine, theirs = mint(SECRET, CLAIMS), mint(SECRET, Claims("r-2", 2, "policy"))
    with pytest.raises(BadToken, match="signature"):
        check(SECRET, theirs.split(".")[0] + "." + mine.split(".")[1])


def test_a_token_is_good_until_it_ends_and_not_from_then_on() -> None:
    ending = Claims("r-1", 2, expires_wall_s=100.0)
    token = mint(SECRET, ending)
    assert check(SECRET, token, 99.0) == check(SECRET, token) == ending
    with pytest.raises(BadToken, match="rollout r-1 attempt 2 expired 7 s ago"):
        check(SECRET, token, 107.0)
    with pytest.raises(BadToken, match="expired"):
        check(SECRET, token, 100.0)


def test_a_key_of_no_rollout_bears_a_name_and_ends_with_its_time() -> None:
    claims = Claims("", 0, expires_wall_s=100.0, name="alice")
    key = mint(SECRET, claims)
    assert check(SECRET, key, 99.0) == claims
    with pytest.raises(BadToken, match="the token of alice expired 1 s ago"):
        check(SECRET, key, 101.0)


def test_a_token_from_before_there_were_names_is_still_good() -> None:
    old = msgspec.msgpack.encode(["r-1", 2, "policy", {}, 0.0])
    token = mint(SECRET, Claims("r-1", 2, "policy"))
    assert check(SECRET, f"{_text(old)}.{_text(_mac(SECRET, old))}") == check(SECRET, token)


@given(st.data())
def test_no_changed_byte_passes(data: st.DataObject) -> None:
    parts = [bytearray(base64.urlsafe_b64decode(part + "==")) for part in mint(SECRET, CLAIMS).split(".")]
    part = data.draw(st.sampled_from(parts))
    part[data.draw(st.integers(0, len(part) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(BadToken):
        check(SECRET, ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts))


@given(st.text() | st.text(alphabet="aA0_-.=", max_size=40))
def test_any_text_is_refused_with_one_error(token: str) -> None:
    with pytest.raises(BadToken):
        check(SECRET, token)
