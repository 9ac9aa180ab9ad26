"""An API key that belongs to no rollout: the model as a plain OpenAI endpoint, off loopback too."""

from __future__ import annotations

import time
from collections.abc import Iterator

import openai
import pytest

from lightning_bus import spans as s
from lightning_bus import tokens
from tests.gateway_fixtures import QUESTION, SECRET, World, open_world


@pytest.fixture
def world() -> Iterator[World]:
    with open_world(bind="0.0.0.0:4751") as opened:  # what is bound decides who must show a key
        yield opened


def client(world: World, key: str) -> openai.OpenAI:
    one = openai.OpenAI(base_url=f"{world.url}/v1", api_key=key, max_retries=0)
    world.closing.callback(one.close)
    return one


def key(**claims: object) -> str:
    return tokens.mint(SECRET, tokens.Claims("", 0, name="alice", **claims))  # pyright: ignore[reportArgumentType]


def test_anyone_with_a_key_may_call_the_model_and_is_named_in_the_record(world: World) -> None:
    with client(world, key(expires_wall_s=time.time() + 60)) as alice:
        assert [model.id for model in alice.models.list()] == ["policy"]
        completion = alice.chat.completions.create(
            model="policy", messages=QUESTION, extra_headers={"x-agent-name": "not alice"}
        )
    assert completion.choices[0].message.content == "answer 0"
    [(rollout_id, attempt, [span])] = world.bus.appended
    assert (rollout_id, attempt, span.rollout_id) == ("", 0, "")
    assert span.attributes[s.AGENT_NAME] == "alice"


def test_a_key_may_be_for_one_model_only(world: World) -> None:
    client(world, key(model="policy@3")).chat.completions.create(model="anything", messages=QUESTION)
    assert world.engine.requests[-1]["model"] == "policy@3"


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (key(expires_wall_s=1.0), "the token of alice expired"),
        (tokens.mint(b"t" * 32, tokens.Claims("", 0, name="alice")), "signature"),
        ("sk-1", "signature"),
    ],
)
def test_a_key_that_is_over_or_of_another_run_opens_nothing_beyond_this_machine(
    world: World, bad: str, why: str
) -> None:
    with pytest.raises(openai.AuthenticationError, match=f"{why}.*keys api NAME"):
        client(world, bad).chat.completions.create(model="policy", messages=QUESTION)
    assert not world.engine.requests
    assert not world.bus.appended


def test_a_key_of_no_rollout_cannot_speak_for_one(world: World) -> None:
    one = openai.OpenAI(base_url=f"{world.url}/rollout/r-1/attempt/1/v1", api_key=key(), max_retries=0)
    with one, pytest.raises(openai.AuthenticationError, match="the address for rollout r-1 attempt 1"):
        one.chat.completions.create(model="policy", messages=QUESTION)
    assert not world.bus.appended
