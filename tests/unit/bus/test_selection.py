"""Whose calls train which policy."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bus import ConfigError
from lightning_bus import spans as s
from lightning_bus.adapters.selection import Caller, Callers, Selection
from tests.bus_fixtures import span


def under(parent: s.Span | None, name: str, **attributes: object) -> s.Span:
    made = span(name, "r-1", 1, **attributes)
    return msgspec.structs.replace(made, parent_id=None if parent is None else parent.span_id)


def test_the_agent_of_a_call_is_its_own_or_the_nearest_above_that_has_a_name() -> None:
    top = under(None, "pipeline")
    writer = under(top, "invoke_agent writer", **{s.AGENT_NAME: "writer"})
    step = under(writer, "step")
    by_writer, by_checker = under(step, "chat"), under(step, "chat", **{s.AGENT_NAME: "checker"})
    by_nobody, lost = under(top, "chat"), under(span("never sent"), "chat")
    callers = Callers([top, writer, step, by_writer, by_checker, by_nobody, lost])
    assert callers.of(by_writer) == Caller("writer", ("pipeline", "writer", "step"))
    assert callers.of(by_checker) == Caller("checker", ("pipeline", "writer", "step", "checker"))
    assert callers.of(by_nobody) == Caller("", ("pipeline",))
    assert callers.of(lost) == Caller("", ())


@pytest.mark.parametrize("name", ["agent.name", "recipient_agent_type", "langchain.chain.type"])
def test_names_that_frameworks_write_are_read(name: str) -> None:
    above = under(None, "x", **{name: "writer"})
    assert Callers([above]).of(under(above, "chat")).agent == "writer"


def test_a_name_that_is_no_text_is_none() -> None:
    above = under(None, "x", **{s.AGENT_NAME: 7})
    assert Callers([above]).of(under(above, "chat", **{s.AGENT_NAME: ["a"]})) == Caller("", ("x",))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_whatever_ids_claim_looking_up_ends(edges: list[tuple[int, int]]) -> None:
    """Circles, spans that are their own parents, ids used twice."""
    spans = [msgspec.structs.replace(span(f"s{a}"), span_id=bytes([a] * 8), parent_id=bytes([b] * 8)) for a, b in edges]
    callers = Callers(spans)
    assert all(len(callers.of(one).path) <= len(spans) for one in spans)


WRITER = Caller("writer", ("pipeline", "writer", "step 1"))
REWRITER = Caller("rewriter", ("pipeline", "repair", "rewriter"))
NAMELESS = Caller("", ("pipeline",))


@pytest.mark.parametrize(
    ("pattern", "selected"),
    [
        ("writer", [WRITER]),
        ("*writer", [WRITER, REWRITER]),
        ("write", []),
        ("*", [WRITER, REWRITER, NAMELESS]),
        ("/write/", [WRITER, REWRITER]),
        ("/^(re)?writer$/", [WRITER, REWRITER]),
        ("/^w/", [WRITER]),
        ("pipeline/writer", [WRITER]),
        ("pipeline/rewriter", []),
        ("pipeline/*/rewriter", [REWRITER]),
        ("writer/step *", [WRITER]),
        ("w.iter", []),
    ],
)
def test_patterns(pattern: str, selected: list[Caller]) -> None:
    selection = Selection.of([pattern])
    assert [one for one in (WRITER, REWRITER, NAMELESS) if selection.policy_of(one) is not None] == selected


def test_the_first_pattern_that_matches_decides_the_policy() -> None:
    selection = Selection.of({"rewriter": "second", "*writer": "first"})
    assert [selection.policy_of(one) for one in (WRITER, REWRITER, NAMELESS)] == ["first", "second", None]
    assert Selection.of([]).policy_of(NAMELESS) == "", "no patterns: everybody"


@pytest.mark.parametrize("bad", ["/(/", "a//b", "/", "//", "", "/a", "a/"])
def test_what_is_no_pattern_is_refused_with_what_one_looks_like(bad: str) -> None:
    with pytest.raises(ConfigError, match="credit.agents: "):
        Selection.of([bad])


def test_patterns_that_select_nobody_are_told_with_who_was_there() -> None:
    with pytest.raises(ConfigError) as caught:
        Selection.of(["wrter"]).check({WRITER, REWRITER, NAMELESS})
    for words in ("'wrter'", "writer", "rewriter", "(no agent named)", "pipeline/repair/rewriter"):
        assert words in str(caught.value)
    Selection.of(["wrter"]).check(set())  # nobody called: nothing to say
    Selection.of(["wrter", "writer"]).check({WRITER, REWRITER})
