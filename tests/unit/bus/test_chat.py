"""Spans → conversations and preference pairs, and both as files that Hugging Face's `datasets` reads."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bus import spans as s
from lightning_bus.adapters.chat import CHAT_COLUMNS, chat_rows, clean, conversations_of
from lightning_bus.adapters.preferences import PREFERENCE_COLUMNS, preference_rows
from lightning_bus.adapters.rollouts import FinishedRollout
from lightning_bus.lifecycle import Status
from lightning_bus.log.tables import Format, open_table
from tests.recorded_agent import TOOLS, Play

USER = {"role": "user", "content": "How much is 1 + 1?"}


def answer(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def test_a_conversation_is_told_once_with_tools_and_their_results() -> None:
    play = Play(agent="solver")
    play.say("", ("calc", '{"expression": "1 + 1"}'))
    play.tool("2")
    play.say("It is 2.")
    (row,) = chat_rows(play.finish(0.5), 0.75, Counter())
    assert list(row) == list(CHAT_COLUMNS)
    call = {"id": "call-1", "type": "function", "function": {"name": "calc", "arguments": '{"expression": "1 + 1"}'}}
    assert row == {
        "messages": [
            USER, {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "call-1"}, answer("It is 2."),
        ],
        "tools": TOOLS, "rollout_id": "r-1", "group": "g", "agent": "solver", "model": "policy", "reward": 0.75,
    }  # fmt: skip


def test_a_client_that_sends_an_answer_back_in_another_form_continues_its_conversation() -> None:
    play = Play()
    play.say("let me see", ("calc", '{"a": 1}'))
    sent = play.messages[-1]
    sent["content"] = [{"type": "text", "text": "let me "}, {"type": "text", "text": "see"}]
    sent["refusal"] = None
    sent["tool_calls"][0]["function"]["arguments"] = '{ "a":1 }'
    play.tool("2")
    play.say("done")
    assert len(conversations_of(play.spans)) == 1


def test_branches_samples_and_other_agents_are_conversations_of_their_own() -> None:
    play = Play()
    play.say("a")
    fork, tokens = list(play.messages), list(play._tokens)
    play.messages.append({"role": "user", "content": "go on"})
    play.say("b")
    play.messages, play._tokens = [*fork, {"role": "user", "content": "stop"}], tokens
    play.say("c")
    play.messages, play._tokens = [USER], [1]
    play.say("d", agent="judge")
    found = conversations_of(play.spans)
    assert [[message["content"] for message in one.messages[1:]] for one in found] == [
        ["a", "go on", "b"], ["a", "stop", "c"], ["d"],
    ]  # fmt: skip
    assert [one.opening for one in found] == [1, 1, 1]
    assert [one.agent for one in found] == ["", "", "judge"]


def test_what_teaches_the_wrong_thing_is_left_out_and_counted() -> None:
    play = Play()
    play.say("and so", finish="length")
    play.messages = [{"role": "user", "content": "again"}]
    play.say("fine")
    play.messages = [{"role": "user", "content": "third"}]
    broken = play.say("x")
    play.spans[-1] = msgspec.structs.replace(broken, attributes=broken.attributes | {s.REQUEST_BODY: "{"})
    dropped: Counter[str] = Counter()
    assert [row["messages"][-1] for row in chat_rows(play.finish(), 1.0, dropped)] == [answer("fine")]
    assert dropped == {"answer cut off": 1, "no readable messages": 1}
    assert chat_rows(play.finish(None, Status.FAILED), None, dropped) == []
    assert dropped["failed rollout"] == 1


@given(st.lists(st.sampled_from(["ask", "tool", "fork", "restart"]), max_size=12))
def test_every_answer_stands_in_some_conversation_and_no_conversation_begins_another(plan: list[str]) -> None:
    play = Play()
    said: list[str] = []
    saved: list[tuple[list[Any], list[int]]] = []
    for number, what in enumerate([*plan, "ask"]):
        if what == "fork" and saved:
            play.messages, play._tokens = saved[number % len(saved)]
        elif what == "restart":
            play.messages, play._tokens = [{"role": "user", "content": f"task {number}"}], [number]
        saved.append((list(play.messages), list(play._tokens)))
        said.append(f"answer {number}")
        play.say(said[-1], *([("calc", f'{{"n": {number}}}')] if what == "tool" else []))
        if what == "tool":
            play.tool(str(number))
        else:
            play.messages = [*play.messages, {"role": "user", "content": f"and {number}?"}]
    found = conversations_of(play.spans)
    texts = [json.dumps(one.messages, sort_keys=True) for one in found]
    assert {message["content"] for one in found for message in one.messages if message["role"] == "assistant"} == set(
        said
    )
    assert len(set(texts)) == len(texts)
    for a in found:
        assert a.messages[a.opening]["role"] == "assistant"
        assert all(a is b or a.messages != b.messages[: len(a.messages)] for b in found)


def scored(play: Play, reward: float | None) -> tuple[FinishedRollout, float | None]:
    return play.finish(reward), reward


def plays(*contents: str) -> list[Play]:
    made: list[Play] = []
    for number, content in enumerate(contents):
        play = Play(rollout_id=f"r-{number}")
        play.say("", ("calc", "{}"))
        play.tool(content)
        play.say(content)
        made.append(play)
    return made


def test_the_best_meets_the_worst_of_its_group() -> None:
    best, middle, worst = plays("2", "two", "3")
    rows = preference_rows([scored(middle, 0.5), scored(worst, -1.0), scored(best, 1.0)], Counter())
    (row,) = rows
    assert list(row) == list(PREFERENCE_COLUMNS)
    assert row["prompt"] == [USER]
    assert [row["chosen"][-1], row["rejected"][-1]] == [answer("2"), answer("3")]
    assert [message["role"] for message in row["chosen"]] == ["assistant", "tool", "assistant"]
    assert (row["chosen_rollout_id"], row["rejected_rollout_id"], row["margin"]) == ("r-0", "r-2", 2.0)
    assert (row["chosen_reward"], row["rejected_reward"], row["tools"]) == (1.0, -1.0, TOOLS)


def test_groups_that_give_no_pair_are_counted() -> None:
    one, two = plays("2", "3")
    same, again = plays("2", "2")
    other = Play(question="What is 2 + 2?")
    other.say("4")
    cut = Play()
    cut.say("and so", finish="length")
    dropped: Counter[str] = Counter()
    for group, margin in (
        ([scored(one, 1.0), scored(cut, 0.0)], 0.0),
        ([scored(one, 1.0), scored(two, None)], 0.0),
        ([scored(one, 1.0), scored(two, 1.0)], 0.0),
        ([scored(one, 1.0), scored(two, 0.75)], 0.5),
        ([scored(one, 1.0), scored(other, 0.0)], 0.0),
        ([scored(same, 1.0), scored(again, 0.0)], 0.0),
        ([], 0.0),
    ):
        assert preference_rows(group, dropped, margin_min=margin) == []
    assert dropped == {
        "fewer than two scored rollouts": 2, "margin too small": 2, "no common prompt": 1, "same answer": 1,
        "answers cut off": 1,
    }  # fmt: skip


def test_messages_keep_what_the_format_knows_and_no_more() -> None:
    message = {"role": "assistant", "content": None, "refusal": None, "audio": {}, "function_call": None, "name": "bob",
               "tool_calls": [{"index": 0, "function": {"name": "f", "arguments": {"a": 1}}}, "rubbish"]}  # fmt: skip
    assert clean(message) == {
        "role": "assistant", "content": "", "name": "bob",
        "tool_calls": [{"id": "", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}],
    }  # fmt: skip
    assert clean({}) == {"role": "", "content": ""}


def rows_of_both() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    best, worst = plays("2", "3")
    best.messages = worst.messages = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}
    ]
    best.tools = []
    best.say("a cat")
    chat = [row for play in (best, worst) for row in chat_rows(play.finish(), 1.0, Counter())]
    return chat, preference_rows([scored(best, 1.0), scored(worst, 0.0)], Counter())


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_files_are_what_arrow_reads(tmp_path: Path, form: Format) -> None:
    """`datasets` reads both through Arrow: a column must have one type over all rows, empty ones too."""
    pytest.importorskip("pyarrow", reason="pip install 'lightning-bus[parquet]'")
    import pyarrow.json
    import pyarrow.parquet

    chat, preferences = rows_of_both()
    chat = [row for row in chat if isinstance(row["messages"][0]["content"], str)] if form == "jsonl" else chat
    for name, columns, rows in (("chat", CHAT_COLUMNS, chat), ("preferences", PREFERENCE_COLUMNS, preferences)):
        assert rows
        with open_table(tmp_path, name, form, columns) as table:
            for row in rows:
                table.add(dict(row))
        path = tmp_path / f"{name}.{form}"
        read = (pyarrow.json.read_json if form == "jsonl" else pyarrow.parquet.read_table)(path)
        assert read.column_names == list(columns)
        for row, got in zip(rows, read.to_pylist(), strict=True):
            for column in ("messages", "prompt", "chosen", "rejected"):
                for message, told in zip(row.get(column, ()), got.get(column, ()), strict=True):
                    assert (told["role"], told.get("tool_call_id")) == (message["role"], message.get("tool_call_id"))
                    if isinstance(message["content"], str):
                        assert told["content"] == message["content"]
                    else:
                        assert json.loads(told["content"]) == message["content"]
                    calls = told.get("tool_calls") or []
                    assert [call["function"] for call in calls] == [
                        call["function"] for call in message.get("tool_calls", ())
                    ]
            if form == "parquet":
                assert json.loads(got["tools"]) == row["tools"]
