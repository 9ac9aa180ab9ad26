"""What a rollout earned: which call a reward belongs to, and where a return came from."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bus.adapters import Causes, Reward, RewardsSection, RuleSection, SourceReport, rewards_of
from lightning_bus.adapters.rewards import emitted_rewards
from lightning_bus.lifecycle import Status
from lightning_bus.otel import names as n
from lightning_bus.spans import REWARD
from tests.recorded_agent import Play


def test_a_reward_may_sit_on_any_span_and_finds_the_call_that_led_to_it() -> None:
    play = Play()
    step = play.span("step", took_s=0)
    first = play.say("", ("calc", "{}"), parent=step)
    tool = play.tool("2", traced="gen_ai")
    assert tool is not None
    inside = play.span("sqrt", parent=tool)
    second = play.say("done")
    later = play.span("check")
    of = {"call": second, "step": step, "tool": tool, "inside": inside, "later": later}
    for name, span in of.items():
        play.reward(1.0, name, span)
    rewards = rewards_of(play.finish(), RewardsSection())
    named = {call: [reward.source for reward in each] for call, each in rewards.of_calls.items()}
    assert named == {first.span_id: ["step", "tool", "inside"], second.span_id: ["call", "later"]}
    assert [reward.span_id for reward in rewards.of([second.span_id, b"none"])[0]] == [second.span_id, later.span_id]
    assert rewards.of([b"none"]) == [[]]
    assert (rewards.final, rewards.total) == (1.0, 6.0)


def test_the_call_before_is_looked_for_among_those_of_the_same_agent() -> None:
    play = Play()
    writer = play.say("a", agent="writer")
    play.say("b", agent="judge")
    work = play.span("work", attributes={n.AGENT_NAME: "writer"}, took_s=1)
    own = play.span("count", parent=work)
    other = play.span("count")
    causes = Causes(play.spans)
    assert causes.call_of(own.span_id) == writer.span_id
    assert causes.call_of(other.span_id) == play.spans[1].span_id


def test_what_cannot_be_placed_is_counted() -> None:
    play = Play()
    early = play.span("set up")
    play.reward(1.0, span=early)
    play.say("done")
    gone = Play().say("elsewhere")
    play.reward(1.0, span=msgspec.structs.replace(gone, span_id=b"elsewher"))
    play.spans.append(play.reward(1.0, span=early))
    play.spans[-1] = msgspec.structs.replace(
        play.spans[-1], span_id=b"12345678", attributes={REWARD: 1.0, n.REWARD_SPAN: "no hex"}
    )
    rewards = rewards_of(play.finish(), RewardsSection())
    assert rewards.of_calls == {}
    assert rewards.unplaced == {
        "reward for what no model call led to": 2, "reward for a span that is not in the log": 2,
    }  # fmt: skip


@pytest.mark.parametrize("value", ["high", float("nan"), float("inf"), True, None, [1.0]])
def test_what_is_no_finite_number_is_no_reward(value: Any) -> None:
    play = Play()
    call = play.say("x")
    play.reward(value, span=call)
    assert rewards_of(play.finish(), RewardsSection()).of_calls == {}


def test_earlier_rewards_for_no_span_are_steps_where_the_run_says_so() -> None:
    play = Play()
    first = play.say("a")
    play.reward(0.25)
    second = play.say("b")
    play.reward(0.5, "style")
    play.reward(1.0)
    ended = play.finish(1.0)
    assert rewards_of(ended, RewardsSection()).total == 1.0
    rewards = rewards_of(ended, RewardsSection(emitted="all"))
    assert rewards.by_source() == {"final": 1.0, "emitted": 0.25, "style": 0.5}
    assert list(rewards.of_calls) == [first.span_id, second.span_id]
    # An agent that returns another reward than it emitted last has emitted steps only.
    assert [reward.value for reward in emitted_rewards(play.spans, steps=True, final=7.0)] == [0.25, 0.5, 1.0]


def test_rewards_for_spans_can_be_ignored() -> None:
    play = Play()
    play.reward(1.0, span=play.say("a"))
    assert rewards_of(play.finish(), RewardsSection(emitted="final")).total == 1.0
    assert rewards_of(play.finish(), RewardsSection()).total == 2.0


def test_a_hook_replaces_what_was_recorded_and_rules_still_count() -> None:
    play = Play()
    call = play.say("x")
    play.reward(0.5, span=call)
    rules = RewardsSection(rules=[RuleSection(on="format_error", value=-0.25, pattern="y")])
    ended = play.finish(1.0)
    assert rewards_of(ended, rules).by_source() == {"final": 1.0, "emitted": 0.5, "format_error": -0.25}
    assert rewards_of(ended, rules, 3.0).by_source() == {"hook": 3.0, "emitted": 0.5, "format_error": -0.25}
    given_ = [Reward(call.span_id, 0.125, "judge"), Reward(b"", 1.0, "a"), Reward(b"", 2.0, "b")]
    assert rewards_of(ended, rules, given_).by_source() == {"hook": 3.0, "judge": 0.125, "format_error": -0.25}
    assert rewards_of(ended, rules, given_[:1]).by_source() == {"final": 1.0, "judge": 0.125, "format_error": -0.25}


def test_a_failed_rollout_has_no_return_whatever_its_calls_earned() -> None:
    play = Play()
    play.reward(1.0, span=play.say("x"))
    ended = play.finish(None, Status.FAILED)
    for given_ in (None, 1.0, [Reward(b"", 1.0, "judge")]):
        rewards = rewards_of(ended, RewardsSection(), given_)
        assert (rewards.final, rewards.total) == (None, None)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.floats(-2, 2))), st.floats(-2, 2))
def test_sources_sum_to_the_return_and_shares_to_one(emitted: list[tuple[str, float]], final: float) -> None:
    play = Play()
    for name, value in emitted:
        play.reward(value, name, play.say("x"))
    rewards = rewards_of(play.finish(final), RewardsSection())
    assert rewards.total is not None
    assert sum(rewards.by_source().values()) == pytest.approx(rewards.total, abs=1e-9)
    assert sum(map(abs, rewards.shares().values())) == pytest.approx(1.0 if any(rewards.by_source().values()) else 0.0)


def test_a_report_tells_mean_and_share_of_each_source() -> None:
    report = SourceReport()
    report.add(1.0, {"final": 1.5, "rule": -0.5})
    report.add(0.0, {"final": 0.0})
    report.add(None, {"final": 9.0})
    assert (report.count, report.mean) == (2, 0.5)
    assert report.by_source() == {"final": (0.75, 0.75), "rule": (-0.25, -0.25)}


@pytest.mark.parametrize(
    ("table", "wrong"),
    [
        (
            {"rules": [{"on": "tool_ok", "value": 1.0}, {"on": "tool_ok", "value": 2.0}]},
            "two rules are called 'tool_ok'",
        ),
        ({"weight": float("inf")}, "finite"),
        ({"cap": 0.0}, "> 0"),
        ({"emitted": "most"}, "most"),
        ({"hook_limit_s": 0.0}, "> 0"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused(table: dict[str, Any], wrong: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=wrong):
        msgspec.convert(table, RewardsSection)


def test_rollouts_without_spans_and_spans_in_circles_are_scored() -> None:
    play = Play()
    assert rewards_of(play.finish(0.5), RewardsSection(rules=[RuleSection(on="exception", value=-1.0)])).total == 0.5
    span = play.span("loop", error="boom")
    play.spans = [msgspec.structs.replace(span, parent_id=span.span_id)]
    play.reward(1.0, span=span)
    assert rewards_of(play.finish(0.5), RewardsSection()).total == 0.5
