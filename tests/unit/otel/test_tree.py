"""The tree of an attempt's spans, whatever ids they claim."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_bus import spans as s
from lightning_bus.otel.traceparent import format_traceparent, parse_traceparent, root_of_attempt
from lightning_bus.otel.tree import Node, tree, tree_facts, tree_lines
from lightning_bus.spans import Span


def made(number: int, parent: int | None, name: str = "", start_ns: int = 0, **attributes: object) -> Span:
    above = None if parent is None else parent.to_bytes(8, "big")
    return Span(
        number.to_bytes(8, "big"), b"t" * 16, above, name or f"s{number}", start_ns, start_ns + 10**6, dict(attributes)
    )


def names(nodes: list[Node]) -> list[object]:
    return [(node.span.name, names(node.children)) if node.children else node.span.name for node in nodes]


def test_children_stand_under_their_parents_in_order_of_time() -> None:
    spans = [made(3, 1, start_ns=30), made(2, 1, start_ns=20), made(1, 9, start_ns=10), made(4, 3, start_ns=40)]
    assert names(tree(spans)) == [("s1", ["s2", ("s3", ["s4"])])]


@given(st.lists(st.tuples(st.integers(1, 6), st.one_of(st.none(), st.integers(1, 6)))))
def test_whatever_ids_claim_each_span_stands_once(links: list[tuple[int, int | None]]) -> None:
    def count(nodes: list[Node]) -> int:
        return sum(1 + count(node.children) for node in nodes)

    spans = [made(number, parent) for number, parent in links]
    assert count(tree(spans)) == len({span.span_id for span in spans})
    assert len(tree_lines(spans)) == len({span.span_id for span in spans})


def test_lines_tell_times_tokens_rewards_and_errors() -> None:
    call = {s.OPERATION: "chat", s.PROMPT_IDS: s.pack_ids([1, 2]), s.RESPONSE_IDS: s.pack_ids([3]),
            s.LOGPROBS: s.pack_logprobs([-1.0]), s.WEIGHT_VERSIONS: [["7", 0, 1]]}  # fmt: skip
    root = made(1, None, "rollout")
    spans = [
        root,
        made(2, 1, "chat\x1b[31m", 2 * 10**6, **call),
        made(3, 1, "lightning.reward", 5 * 10**6, **{s.REWARD: 0.5, s.REWARD_NAME: "exact"}),
    ]
    assert tree_lines(spans) == [
        "rollout                    +0.0 ms        1.0 ms",
        "├─ chat [31m               +2.0 ms        1.0 ms  2 + 1 tokens  version 7",
        "└─ lightning.reward        +5.0 ms        1.0 ms  reward 0.5 (exact)",
    ]
    assert tree_facts(spans, lambda span: {"name": span.name})[0]["children"][1] == {
        "name": "lightning.reward",
        "children": [],
    }
    assert tree_lines([]) == []


@given(st.binary(min_size=16, max_size=16).filter(any), st.binary(min_size=8, max_size=8).filter(any))
def test_a_traceparent_comes_back(trace_id: bytes, span_id: bytes) -> None:
    assert parse_traceparent(format_traceparent(trace_id, span_id)) == (trace_id, span_id)


@given(st.text())
def test_what_is_no_traceparent_is_ignored(text: str) -> None:
    assert parse_traceparent(text) is None


def test_a_traceparent_that_w3c_forbids_is_ignored() -> None:
    good = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    assert parse_traceparent(good) is not None
    assert parse_traceparent("cc" + good[2:] + "-later") is not None
    for bad in (
        "ff" + good[2:],
        good + "-more",
        good.upper(),
        "00-" + "0" * 32 + good[35:],
        good[:36] + "0" * 16 + "-01",
    ):
        assert parse_traceparent(bad) is None


def test_an_attempts_root_follows_from_its_name() -> None:
    assert root_of_attempt("r-1", 1) == root_of_attempt("r-1", 1) != root_of_attempt("r-1", 2)
