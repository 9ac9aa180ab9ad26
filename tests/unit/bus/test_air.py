"""Rules over spans → rewards with their provenance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider

from lightning_bus import spans as s
from lightning_bus.adapters.air import RuleSection, automatic_rewards
from lightning_bus.adapters.causes import Causes
from lightning_bus.adapters.rewards import Reward
from lightning_bus.clock import wall_ns
from lightning_bus.otel import OtelTracer, Tracer
from lightning_bus.otel import names as n
from lightning_bus.spans import Span
from tests.recorded_agent import TRACED, Play
from tests.unit.otel.collected import Collected


def earned(play: Play, *rules: RuleSection, **whole: Any) -> list[tuple[bytes, Reward]]:
    return [tuple(caused) for caused in automatic_rewards(Causes(play.spans), rules, **whole)]


def rule(on: Any, value: float = -1.0, **more: Any) -> RuleSection:
    return RuleSection(on=on, value=value, **more)


@pytest.mark.parametrize("traced", list(TRACED))
def test_a_tool_that_failed_costs_the_call_that_asked_for_it(traced: str) -> None:
    play = Play()
    first = play.say("", ("calc", '{"expression": "1 / 0"}'))
    tool = play.tool("", traced=traced, error="ZeroDivisionError: division by zero")
    play.say("no idea")
    assert tool is not None
    assert earned(play, rule("tool_error")) == [(first.span_id, Reward(tool.span_id, -1.0, "tool_error"))]
    assert earned(play, rule("tool_ok")) == []


@pytest.mark.parametrize("traced", ["", *TRACED])
@pytest.mark.parametrize(
    ("result", "failed"),
    [
        ("2", False), ("Error: no such page", True), ("Traceback (most recent call last):\n  …", True),
        ("ValueError: no", True), ('{"isError": true, "content": []}', True), ('{"error": "no"}', True),
        ('{"error": null, "hits": 3}', False), ("the error was found", False), ("errors: 0", False), ("", False),
        ("[error] refused", True), ("{not json", False), ("[" * 100_000, False),
    ],
)  # fmt: skip
def test_a_result_tells_whether_its_tool_failed_whoever_traces(traced: str, result: str, failed: bool) -> None:
    play = Play()
    first = play.say("", ("search", "{}"))
    tool = play.tool(result, traced=traced)
    second = play.say("done")
    shown = (tool or second).span_id
    bad, good = earned(play, rule("tool_error")), earned(play, rule("tool_ok", 1.0))
    expected = [(first.span_id, Reward(shown, -1.0 if failed else 1.0, "tool_error" if failed else "tool_ok"))]
    assert (bad, good) == ((expected, []) if failed else ([], expected))


def test_an_agent_that_speaks_anthropics_api_says_itself_what_failed() -> None:
    play = Play()
    first = play.say("", ("calc", "{}"), ("calc", "{}"))
    play.tool("nothing there", nth=0)
    play.tool("nothing there", nth=1)
    blocks = [
        {"type": "tool_result", "tool_use_id": call["id"], "is_error": at == 1} for at, call in enumerate(play.asked)
    ]
    original = msgspec.json.encode(
        {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": blocks}]}
    )
    second = play.say("done")
    more = {n.ROUTE: "/v1/messages", n.ORIGINAL_REQUEST: original.decode()}
    play.spans[-1] = msgspec.structs.replace(second, attributes=second.attributes | more)
    assert earned(play, rule("tool_error")) == [(first.span_id, Reward(second.span_id, -1.0, "tool_error"))]
    play.spans[-1] = msgspec.structs.replace(second, attributes=second.attributes | more | {n.ORIGINAL_REQUEST: "["})
    assert earned(play, rule("tool_error")) == []


def test_what_another_agent_called_is_no_repetition() -> None:
    play = Play()
    for agent in ("writer", "judge", "writer"):
        play.say("", ("search", "{}"), agent=agent)
        play.tool("Error: no")
    last = play.spans[-1].span_id
    play.say("done")
    assert [call for call, _ in earned(play, rule("tool_repeat"))] == [last]
    assert [call for call, _ in earned(play, rule("tool_retry"))] == [last]


def test_a_pattern_of_ones_own_tells_failure() -> None:
    play = Play()
    play.say("", ("search", "{}"))
    play.tool("0 hits")
    play.say("done")
    assert earned(play, rule("tool_error")) == []
    assert len(earned(play, rule("tool_error", pattern="0 hits"))) == 1


def test_several_tools_of_one_answer_are_told_apart() -> None:
    play = Play()
    first = play.say("", ("calc", '{"expression": "1"}'), ("search", "{}"), ("calc", '{"expression": "2"}'))
    failed = play.tool("boom", nth=2, traced="openinference", error="boom")
    play.tool("1", nth=0, traced="openinference")
    play.tool("Error: away", nth=1)
    second = play.say("done")
    assert failed is not None
    assert earned(play, rule("tool_error")) == [
        (first.span_id, Reward(second.span_id, -1.0, "tool_error")),
        (first.span_id, Reward(failed.span_id, -1.0, "tool_error")),
    ]
    assert len(earned(play, rule("tool_error", tools="calc"))) == 1


def test_ids_that_are_used_again_are_matched_in_order() -> None:
    play = Play()
    for result in ("1", "Error: no"):
        play.say("", ("calc", f'{{"expression": "{result}"}}'))
        play.messages[-1]["tool_calls"][0]["id"] = play.asked[0]["id"] = "call_0"
        span = play.spans[-1]
        answer = span.attributes[s.RESPONSE_BODY].replace("call-1", "call_0")
        answer = msgspec.json.encode({**msgspec.json.decode(answer), "tool_calls": play.asked}).decode()
        play.spans[-1] = msgspec.structs.replace(span, attributes=span.attributes | {s.RESPONSE_BODY: answer})
        play.tool(result)
    play.say("done")
    assert [call for call, _ in earned(play, rule("tool_error"))] == [play.spans[1].span_id]


def test_calling_a_failed_tool_again_is_a_retry_and_calling_alike_is_a_repetition() -> None:
    play = Play()
    play.say("", ("search", '{"q": "a", "k": 1}'))
    play.tool("Error: away")
    again = play.say("", ("search", '{ "k":1, "q":"a" }'))
    play.tool("found")
    other = play.say("", ("search", '{"q": "b"}'))
    play.tool("found")
    play.say("done")
    assert [call for call, _ in earned(play, rule("tool_retry"))] == [again.span_id]
    assert [call for call, _ in earned(play, rule("tool_repeat"))] == [again.span_id]
    assert other.span_id not in {call for call, _ in earned(play, rule("tool_retry"), rule("tool_repeat"))}


def test_an_answer_that_its_client_never_saw_repeats_nothing() -> None:
    play = Play()
    asked = play.messages
    play.say("", ("search", "{}"))
    play.messages, play._tokens = asked, play._tokens[:1]
    play.say("", ("search", "{}"), retry=1)
    play.tool("found")
    play.say("done")
    assert earned(play, rule("tool_repeat"), rule("turns", over=2)) == []


def test_arguments_and_names_are_checked_against_what_was_offered() -> None:
    play = Play()
    play.say("", ("calc", "{'single': quotes}"), ("calc", "[1]"), ("calc", "{}"), ("teleport", "{}"))
    calls = [play.spans[0].span_id]
    assert [call for call, _ in earned(play, rule("bad_arguments"))] == calls * 2
    assert [call for call, _ in earned(play, rule("unknown_tool"))] == calls


def test_a_tool_that_is_called_by_text_belongs_to_the_call_before_it() -> None:
    play = Play(tools=[])
    play.say("thinking")
    second = play.say("Action: search[x]")
    tool = play.span("search", attributes=TRACED["openinference"]("search", "x", "Error: no", ""))
    play.say("done")
    assert earned(play, rule("tool_error")) == [(second.span_id, Reward(tool.span_id, -1.0, "tool_error"))]
    assert earned(play, rule("bad_arguments")) == []


@pytest.mark.parametrize("make", [Tracer, lambda: OtelTracer(provider=TracerProvider())], ids=["light", "otel"])
def test_a_traced_function_of_a_tools_name_is_that_tool(make: Callable[[], Any]) -> None:
    play = Play(now_ns=wall_ns() - 1_000_000)
    call = play.say("", ("calc", '{"expression": "1 / 0"}'), took_s=0)
    store, tracer = Collected(), make()

    @tracer.operation
    def calc(expression: str) -> float:
        raise ZeroDivisionError(expression)

    with tracer.trace_context("solve", store=store, rollout_id="r-1", attempt_id=1):
        with pytest.raises(ZeroDivisionError):
            calc(expression="1 / 0")
    play.spans += store.spans
    tool = store.named("calc")
    assert earned(play, rule("tool_error")) == [(call.span_id, Reward(tool.span_id, -1.0, "tool_error"))]
    assert earned(play, rule("exception")) == []


def test_two_instrumentations_of_one_tool_make_one_use() -> None:
    play = Play()
    play.say("", ("calc", "{}"))
    outer = play.tool("Error: no", traced="gen_ai")
    assert outer is not None
    play.span("calc", attributes=TRACED["mcp"]("calc", "{}", "Error: no", ""), parent=outer)
    play.say("done")
    assert len(earned(play, rule("tool_error"))) == 1


def exception(kind: str, message: str) -> dict[str, Any]:
    return {n.EXCEPTION_TYPE: kind, n.EXCEPTION_MESSAGE: message}


def test_an_exception_counts_once_where_it_was_raised() -> None:
    play = Play()
    call = play.say("garbage")
    outer = play.span("solve", attributes=exception("ValueError", "no number"), error="ValueError: no number")
    inner = play.span(
        "parse", attributes=exception("ValueError", "no number"), error="ValueError: no number", parent=outer
    )
    assert earned(play, rule("exception")) == [(call.span_id, Reward(inner.span_id, -1.0, "exception"))]


def test_neither_tools_nor_the_model_client_raise_for_the_agent() -> None:
    play = Play()
    play.say("", ("calc", "{}"))
    play.tool("", traced="gen_ai", error="ValueError: no")
    play.span("solve", attributes=exception("openai.APITimeoutError", "timed out"), error="openai.APITimeoutError: …")
    play.span("chat policy", attributes={s.OPERATION: "chat"}, error="500")
    assert earned(play, rule("exception")) == []


def test_formats_are_asked_of_answers_and_not_of_tool_calls() -> None:
    play = Play()
    play.say("", ("calc", "{}"))
    play.tool()
    first, last = play.say("<a>1</a>"), play.say("2")
    pattern = {"pattern": "(?s)<a>.*</a>"}
    assert [call for call, _ in earned(play, rule("format_error", **pattern))] == [last.span_id]
    assert [call for call, _ in earned(play, rule("format_ok", **pattern))] == [first.span_id]
    assert earned(play, rule("format_ok", of="rollout", **pattern)) == []
    assert [call for call, _ in earned(play, rule("format_error", json=True))] == [first.span_id]


def test_budgets_are_of_a_call_or_of_the_rollout() -> None:
    play = Play()
    calls = [play.say("x", took_s=took_s, tokens=tokens) for took_s, tokens in ((1.0, 100), (3.0, 10), (2.0, 200))]
    ids = [call.span_id for call in calls]

    def of(on: Any, **more: Any) -> dict[int, float]:
        return {ids.index(call): round(reward.value, 9) for call, reward in earned(play, rule(on, **more))}

    assert of("tokens", over=50) == {0: -1, 2: -1}
    assert of("tokens", over=50, per=100) == {0: -0.5, 2: -1.5}
    assert of("tokens", over=105, of="rollout") == {1: -1}
    assert of("tokens", over=105, of="rollout", per=100) == {1: -0.05, 2: -2}
    assert of("latency", over=1.5, per=1) == {1: -1.5, 2: -0.5}
    assert of("latency", over=3.5, of="rollout", per=1) == {1: -0.5, 2: -2}
    assert of("turns", over=1) == {1: -1, 2: -1}
    assert of("tokens", over=1000) == {}


def test_a_cut_off_answer_is_seen() -> None:
    play = Play()
    call = play.say("and so", finish="length")
    assert [caused for caused, _ in earned(play, rule("truncated"))] == [call.span_id]


def test_a_rule_may_be_for_some_agents_only() -> None:
    play = Play()
    play.say("x", agent="writer")
    judge = play.say("x", agent="judge")
    got = earned(play, rule("format_error", pattern="y", agents=["jud*"]))
    assert [call for call, _ in got] == [judge.span_id]


def test_caps_and_weights() -> None:
    play = Play()
    for _ in range(4):
        play.say("x")
    one = rule("format_error", -0.4, pattern="y", cap=-1.0, name="style")
    assert [round(reward.value, 9) for _, reward in earned(play, one)] == [-0.4, -0.4, -0.2]
    assert [round(reward.value, 9) for _, reward in earned(play, one, weight=0.5)] == [-0.2, -0.2, -0.1]
    assert [round(reward.value, 9) for _, reward in earned(play, one, cap=0.6)] == [-0.4, -0.2]
    assert {reward.source for _, reward in earned(play, one)} == {"style"}


@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), max_size=8),
    st.floats(0.01, 1), st.floats(0.01, 2), st.floats(0.01, 2), st.floats(-2, 2),
)  # fmt: skip
def test_rewards_stay_within_every_cap_and_sit_on_calls(
    turns: list[tuple[bool, bool]], value: float, rule_cap: float, cap: float, weight: float
) -> None:
    play = Play()
    for fails, traced in turns:
        play.say("", ("calc", "{}"))
        play.tool("Error: no" if fails else "1", traced="gen_ai" if traced else "")
    play.say("done")
    rules = [
        rule("tool_error", -value, cap=-rule_cap),
        rule("tool_ok", value, cap=rule_cap),
        rule("tool_repeat", -value),
    ]
    got = earned(play, *rules, weight=weight, cap=cap)
    sums = {
        source: sum(reward.value for _, reward in got if reward.source == source)
        for source in ("tool_error", "tool_ok")
    }
    assert abs(sum(reward.value for _, reward in got)) <= cap + 1e-9
    uncapped = earned(play, *rules[:2], weight=weight)
    assert all(
        abs(sum(reward.value for _, reward in uncapped if reward.source == source)) <= rule_cap * abs(weight) + 1e-9
        for source in sums
    )
    calls = [span.span_id for span in play.spans if s.PROMPT_IDS in span.attributes]
    assert [calls.index(call) for call, _ in got] == sorted(calls.index(call) for call, _ in got)
    assert got == earned(play, *rules, weight=weight, cap=cap)


TURNS = st.lists(
    st.tuples(st.sampled_from(["calc", "search"]), st.integers(0, 1), st.booleans()), min_size=1, max_size=3
)


@given(st.lists(TURNS, max_size=5))
def test_who_traces_makes_no_difference(turns: list[list[tuple[str, int, bool]]]) -> None:
    """The gateway alone sees what every way of tracing sees; only the span that shows it is another."""
    rules = [rule("tool_error"), rule("tool_ok"), rule("tool_repeat"), rule("tool_retry"), rule("turns", over=2)]
    seen: list[list[tuple[int, float, str]]] = []
    for traced in ("", *TRACED):
        play = Play()
        for tools in turns:
            play.say("", *((name, f'{{"n": {number}}}') for name, number, _ in tools))
            for nth, (_, _, fails) in enumerate(tools):
                play.tool("Error: no" if fails else "1", nth=nth, traced=traced)
        play.say("done")
        calls = [span.span_id for span in play.spans if s.PROMPT_IDS in span.attributes]
        seen.append([(calls.index(call), one.value, one.source) for call, one in earned(play, *rules)])
    assert all(other == seen[0] for other in seen)


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"on": "tool_error", "value": 0.0}, "other than 0"),
        ({"on": "tool_error", "value": float("nan")}, "finite"),
        ({"on": "tool_error", "value": -1.0, "cap": 1.0}, "sign"),
        ({"on": "format_ok", "value": 1.0}, "pattern"),
        ({"on": "format_ok", "value": 1.0, "pattern": "("}, "no regular expression"),
        ({"on": "tool_ok", "value": 1.0, "over": 2.0}, "over means nothing"),
        ({"on": "tool_ok", "value": 1.0, "agents": ["/(/"]}, "not a regular expression"),
        ({"on": "tokens", "value": -1.0, "over": -2.0}, "negative"),
        ({"on": "tool_eror", "value": -1.0}, "tool_eror"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(fields: dict[str, Any], wrong: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=wrong):
        msgspec.convert(fields, RuleSection)


def test_spans_that_hold_rubbish_give_nothing_and_raise_nothing() -> None:
    rubbish: list[Any] = [None, 7, "{", "[]", '{"tool_calls": 3}', '{"messages": [7]}', b"\xff", [1], {"a": 1}]
    rules = [rule(on, over=0.0) if on in ("tokens", "turns") else rule(on) for on in ("tool_error", "tool_repeat", "turns",
             "tokens", "bad_arguments", "unknown_tool", "exception", "truncated")]  # fmt: skip
    for value in rubbish:
        attributes = dict.fromkeys((s.REQUEST_BODY, s.RESPONSE_BODY, s.FINISH_REASONS, s.RESPONSE_IDS, s.OUTPUT_TOKENS,
                                    n.EXCEPTION_MESSAGE, "gen_ai.tool.name"), value)  # fmt: skip
        call = Span(
            b"1" * 8, b"t" * 16, b"1" * 8, "chat", 1, 2, {**attributes, s.OPERATION: "chat", s.UNTRAINABLE: "x"}
        )
        tool = Span(b"2" * 8, b"t" * 16, b"3" * 8, "t", 3, 4, {**attributes, s.OPERATION: "execute_tool"})
        automatic_rewards(Causes([call, tool, tool]), rules)
