"""Attributes on their way from any value to the log."""

from __future__ import annotations

import enum
from typing import Any

import msgspec
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_bus import spans as s
from lightning_bus.otel import names as n
from lightning_bus.otel.attributes import encodable, to_plain, to_record
from lightning_bus.otel.rewards import final_reward, rewards_by_span
from lightning_bus.spans import reward_of
from tests.bus_fixtures import span

ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.just(object()), st.complex_numbers()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.tuples(inner, inner), st.dictionaries(st.one_of(st.text(), st.integers()), inner, max_size=3)
    ),
    max_leaves=10,
)  # fmt: skip


@example({s.LOGPROBS: [3.4028235677973366e38]})
@given(
    st.dictionaries(
        st.one_of(
            st.text(),
            st.sampled_from([s.PROMPT_IDS, s.LOGPROBS, s.REWARD, s.WEIGHT_VERSIONS, "agentlightning.reward.0.value"]),
        ),
        ANYTHING,
    )
)
def test_any_value_has_a_form_that_is_recorded_and_read(attributes: dict[str, Any]) -> None:
    plain = to_plain(attributes)
    for value in plain.values():
        items = value if isinstance(value, list) else [value]
        assert {type(item) for item in items} <= {str, bool, int, float}
        assert len({type(item) for item in items}) <= 1
    record = to_record(plain)
    msgspec.msgpack.encode(record)
    one = msgspec.structs.replace(span(), attributes=record)
    reward_of(one)
    s.model_call(one)


def test_mappings_become_dotted_names_and_odd_values_text() -> None:
    class Colour(enum.StrEnum):
        RED = "red"

    given_ = {"a": {"b": 1, "c": {"d": None, "e": (1, 2.5)}}, "f": {}, "g": np.float32(0.5), "h": Colour.RED,
              "i": np.array([1, 2]), "j": {1: 2}, "k": [[1], 2], "l": 2**64}  # fmt: skip
    assert to_plain(given_) == {
        "a.b": 1, "a.c.e": [1.0, 2.5], "f": "{}", "g": 0.5, "h": "red", "i": [1, 2], "j": '{"1": 2}', "k": "[[1], 2]",
        "l": str(2**64),
    }  # fmt: skip


def test_token_ids_are_packed_however_they_come() -> None:
    for ids in ([1, 70_000], (1, 70_000), s.pack_ids([1, 70_000]), np.array([1, 70_000])):
        assert to_record(to_plain({s.PROMPT_IDS: ids}))[s.PROMPT_IDS] == s.pack_ids([1, 70_000])
    assert to_record(to_plain({s.LOGPROBS: [-0.5, -1]}))[s.LOGPROBS] == s.pack_logprobs([-0.5, -1.0])
    assert to_record(to_plain({s.PROMPT_IDS: [-1]}))[s.PROMPT_IDS] == [-1]  # told as malformed, not guessed
    assert to_record(to_plain({s.WEIGHT_VERSIONS: [["7", 0, 2]]}))[s.WEIGHT_VERSIONS] == [["7", 0, 2]]


def test_names_of_agent_lightning_are_understood() -> None:
    record = to_record(
        {
            "agentlightning.reward.0.name": "task", "agentlightning.reward.0.value": 1,
            "agentlightning.reward.1.name": "speed", "agentlightning.reward.1.value": 0.5,
            "agentlightning.message.body": "hi", "agentlightning.tag.0": "fast",
        }
    )  # fmt: skip
    assert record == {
        n.REWARD: 1.0, n.REWARD_NAME: "task", n.REWARD_DIMENSION + "speed": 0.5, n.MESSAGE_BODY: "hi",
        "lightning.tag.0": "fast",
    }  # fmt: skip
    assert n.translate("agentlightning.annotation") == n.ANNOTATION_SPAN_NAME
    assert n.translate("agentlightning.attempt_id") == n.ATTEMPT


def test_a_reward_that_is_no_number_is_kept_beside_it() -> None:
    for odd in (float("nan"), "1", True):
        record = to_record({s.REWARD: odd})
        assert record == ({s.REWARD: 1.0} if odd is True else {n.REWARD_MALFORMED: str(odd)})


def test_the_last_reward_for_the_rollout_counts() -> None:
    spans = [
        span(**{s.REWARD: 0.5}), span(**{s.REWARD: 1.0}), span(),
        span(**{s.REWARD: 0.1, n.REWARD_SPAN: "00" * 8}), span(**{s.REWARD: 0.2, n.REWARD_SPAN: "00" * 8}),
    ]  # fmt: skip
    assert final_reward(spans) == 1.0
    assert final_reward(spans[3:]) is None
    assert rewards_by_span(spans) == {bytes(8): [0.1, 0.2]}


SURROGATES = st.text(st.characters(codec=None, categories=["Cs", "L"]))


@given(st.recursive(st.one_of(ANYTHING, SURROGATES), lambda inner: st.dictionaries(SURROGATES, inner, max_size=3)))
def test_what_an_sdk_let_through_can_be_written_all_the_same(value: Any) -> None:
    msgspec.msgpack.decode(msgspec.msgpack.encode(encodable(value)))


def test_text_that_is_no_unicode_is_kept_but_for_what_is_none() -> None:
    assert encodable({"a": "good \ud800", "b": [2**64, 1]}) == {"a": "good ?", "b": [str(2**64), 1]}
