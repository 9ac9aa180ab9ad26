"""Tool calls and text in pieces: whatever the pieces, nothing is lost, doubled or shown half."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.trainer.serving_fixtures import build_tokenizer
from trainer.serving import hermes
from trainer.serving.text import Detokenizer, StopStrings

ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ü"}}\n</tool_call>'
TOKENIZER = build_tokenizer()


def test_a_call_and_what_comes_before_it_are_told_apart() -> None:
    content, calls = hermes.parse("Let me see. " + ADD)
    assert content == "Let me see. "
    assert calls[0]["function"] == {"name": "add", "arguments": '{"a": 1, "b": "ü"}'}
    assert hermes.parse(ADD + "\n" + ADD)[0] is None
    assert len(hermes.parse(ADD + "\n" + ADD)[1]) == 2


def test_a_last_call_may_lack_its_closing_tag() -> None:
    assert len(hermes.parse(ADD.removesuffix("</tool_call>"))[1]) == 1


def test_a_malformed_call_stays_content() -> None:
    for body in ('{"name": "add", "arguments": ', "[1]", '{"arguments": {}}', '{"name": "f", "arguments": 3}', ""):
        text = f"<tool_call>{body}</tool_call>"
        assert hermes.parse(text) == (text, [])
    assert hermes.parse(ADD + "<tool_call>oops</tool_call>")[1] == []


def test_rendering_a_parsed_call_gives_back_its_text() -> None:
    _, calls = hermes.parse(ADD)
    assert hermes.render_call(calls[0]["function"]) == ADD


@given(
    before=st.text(max_size=8),
    arguments=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9), max_size=3),
    cuts=st.lists(st.integers(0, 90), max_size=12),
)
def test_a_stream_in_any_pieces_says_what_the_whole_text_says(
    before: str, arguments: dict[str, object], cuts: list[int]
) -> None:
    text = before + f"<tool_call>{json.dumps({'name': 'f', 'arguments': arguments})}</tool_call>"
    stream = hermes.HermesStream()
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    results = [stream.push(text[low:high]) for low, high in zip(bounds, bounds[1:], strict=False)]
    results.append(stream.flush())
    assert "".join(content for content, _ in results) == before
    functions = [call["function"] for _, calls in results for call in calls]
    assert functions == [call["function"] for call in hermes.parse(text)[1]]


def test_a_stream_gives_back_an_unfinished_tag_and_a_malformed_call_as_content() -> None:
    for text in ("a <tool_ca", "<tool_call>{oops}</tool_call> b", "<tool_call>{"):
        stream = hermes.HermesStream()
        shown = "".join(stream.push(letter)[0] for letter in text)
        assert shown + stream.flush()[0] == text
        assert not stream.called


@given(st.text(max_size=40), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_pieces_of_text_join_to_the_whole_and_never_end_inside_a_character(text: str, steps: list[int]) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    detokenizer, pieces, at = Detokenizer(TOKENIZER), [], 0
    while at < len(ids):
        step = steps[len(pieces) % len(steps)]
        pieces.append(detokenizer.push(ids[at : at + step]))
        at += step
    pieces.append(detokenizer.push([], last=True))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_no_part_of_a_stop_string_is_ever_shown(text: str, stops: list[str]) -> None:
    watch = StopStrings(tuple(stops))
    shown = ""
    for letter in text:
        shown += watch.push(letter)
        assert text.startswith(shown)
        if watch.found:
            break
    shown += watch.flush()
    assert not any(stop in shown for stop in stops)
    assert shown == text or text[len(shown) :].startswith(watch.found or "?")
