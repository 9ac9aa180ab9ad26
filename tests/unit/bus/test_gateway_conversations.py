"""What is remembered of conversations, how much of it, and where recorded ids meet rendered ones."""

from __future__ import annotations

from array import array
from typing import Any

from lightning_bus.gateway.conversations import Chain, Conversations, Turn, context_of
from lightning_bus.gateway.seams import closing_id, suffix_after, suffix_by_example

END, NL = 2, 3
ONE = ("r", 1)


def request(*contents: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "assistant" if at % 2 else "user", "content": text} for at, text in enumerate(contents)]
    return {"model": "policy", "messages": messages, **more}


def answered(
    memory: Conversations, attempt: tuple[str, int], asked: dict[str, Any], answer: str, ids: list[int]
) -> None:
    found = memory.find(attempt, asked, chain := Chain(asked))
    memory.remember(
        attempt, chain, found.new if found else asked["messages"], {"content": answer}, prompt_ids=ids,
        response_ids=[9, END], stop_id=END, ends={END: 0}, parent=found.turn if found else None,
    )  # fmt: skip


def test_the_longest_conversation_is_found_and_it_takes_memory_once() -> None:
    memory = Conversations()
    said, ids = ["question"], [1]
    sizes: list[int] = []
    for turn in range(30):
        before = memory.bytes
        answered(memory, ONE, request(*said), f"answer {turn:02}", ids)
        sizes.append(memory.bytes - before)
        said += [f"answer {turn:02}", f"question {turn:02}"]
        ids = [*ids, 9, END, NL, 7]
    assert max(sizes[1:]) == min(sizes[1:])
    found = memory.find(ONE, request(*said), Chain(request(*said)))
    assert found is not None
    assert found.turn.all_ids() == ids[:-2] and found.turn.length == len(ids) - 2
    assert found.messages == request(*said)["messages"][:-1] and found.new == request(*said)["messages"][-1:]


def test_the_attempt_that_called_longest_ago_is_forgotten_first() -> None:
    memory = Conversations(bytes_max=2200)
    for number in (1, 2, 3):
        answered(memory, ("r", number), request("x" * 100), "y", [1])
    again = request("x" * 100, "y", "more")
    assert memory.find(("r", 1), again, Chain(again)) is not None
    for number in (4, 5):
        answered(memory, ("r", number), request("x" * 100), "y", [1])
    left = [number for number in range(1, 6) if memory.find(("r", number), again, Chain(again))]
    assert 1 in left and 2 not in left and 5 in left
    assert memory.bytes <= 2200
    memory.is_over(("r", 5))
    assert memory.find(("r", 5), again, Chain(again)) is None


def test_an_attempt_that_says_too_much_begins_anew() -> None:
    memory = Conversations(attempt_bytes_max=5000)
    for number in range(100):
        answered(memory, ONE, request(f"question {number} {'x' * 500}"), "y", [1])
        assert memory.bytes <= 7000
    assert len(memory) == 1


def test_equal_answers_to_one_question_are_kept_up_to_a_few() -> None:
    memory = Conversations()
    for number in range(10):
        answered(memory, ONE, request("q"), "a", [number])
    asked = request("q", "a", "more")
    found = memory.find(ONE, asked, Chain(asked))
    assert found is not None and found.turn.all_ids()[0] == 9


def test_what_a_template_is_not_given_does_not_part_conversations() -> None:
    plain = context_of(request("q"))
    assert plain == {"model": "policy"}
    assert context_of(request("q", temperature=0.1, max_tokens=3, seed=1, stream=True, tool_choice="auto")) == plain
    assert context_of(request("q", chat_template_kwargs={"enable_thinking": False})) != plain
    assert context_of(request("q", tool_choice="none")) != plain


# -- seams: prompt, header 5 6, answer, END, NL


def turn(ids: list[int], stop_id: int | None = END, ends: dict[int, int] | None = None) -> Turn:
    return Turn(None, b"[]", array("I", ids), len(ids), (), stop_id, {END: 1} if ends is None else ends)


def test_what_closes_an_answer_is_not_put_there_twice() -> None:
    history = [1, END, NL, 5, 6, 40, END, NL]
    full = [*history, 8, END, NL, 5, 6]
    assert suffix_after(turn([1, END, NL, 5, 6, 4, 0, END]), history, full, ()) == [NL, 8, END, NL, 5, 6]
    cut_off = turn([1, END, NL, 5, 6, 4, 0], stop_id=None)
    assert suffix_after(cut_off, history, full, (END,)) == [END, NL, 8, END, NL, 5, 6]
    assert suffix_after(cut_off, history, full, ()) is None


def test_an_end_that_the_template_does_not_write_is_closed_with_the_one_that_it_does() -> None:
    history = [1, END, NL, 5, 6, 40, END, NL]
    full = [*history, 8]
    other = turn([1, END, NL, 5, 6, 4, 99], stop_id=99)
    assert suffix_after(other, history, full, (99, END)) == [END, NL, 8]


def test_an_end_that_closes_an_earlier_message_is_not_taken_for_the_answers() -> None:
    history = [1, END, NL, 5, 6, 40, NL]  # this template does not close answers
    assert suffix_after(turn([1, END, NL, 5, 6, 4, END]), history, [*history, 8], (END,)) is None


def test_a_history_that_is_written_otherwise_is_no_seam() -> None:
    history = [1, END, NL, 5, 6, 77, 40, END, NL]
    full = [1, END, NL, 5, 6, 40, END, NL, 8]
    said = turn([1, END, NL, 5, 6, 77, 40, END])
    assert suffix_after(said, history, full, ()) is None
    assert suffix_by_example(said, history, full, ()) == [NL, 8]  # one piece less: 77
    assert suffix_by_example(said, history, [1, END, NL, 55, 6, 41, END, NL, 8], ()) is None
    assert suffix_by_example(said, history, [1, 8], ()) is None


def test_a_template_tells_how_it_closes_answers() -> None:
    assert closing_id([1, END, 5, 40, END, NL], [1, END, 5, 41, END, NL]) == END
    assert closing_id([1, 40], [1, 41]) is None
    assert closing_id([1, 40, NL, 7, NL], [1, 41, NL, 7, NL]) is None  # which of the two, nobody could tell
    assert closing_id([], []) is None
