"""Conversations in files train what the assistant says in them, token for token as it would be sampled, and nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_bus import ConfigError
from tests.chat_templates import TEMPLATES, tokenizer
from tests.unit.trainer.serving_fixtures import TEMPLATE, build_model, build_tokenizer
from tests.unit.trainer.test_sft import Life
from trainer.algorithms.sft import imitate, read_conversations
from trainer.config import SftSection, TrainSection
from trainer.data.batch import pack_rows
from trainer.data.chats import chat_rows, masked
from trainer.optimize import losses
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.step import train_step
from trainer.policy.model import load_policy, save_policy
from trainer.serving.chat import ChatFormat

pytestmark = pytest.mark.anyio

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "add"}}]
MARKED = TEMPLATE.replace(
    "<|im_start|>{{ m.role }}\n",
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{{ '\\n' }}{% else %}",
).replace("<|im_end|>\n{% endfor %}{% if add", "<|im_end|>\n{% endif %}{% endfor %}{% if add")

words = st.text("abc xyz", min_size=1, max_size=8).map(str.strip).filter(bool)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "call"]), words), min_size=1, max_size=5).map(
    lambda found: [("user", "go"), *found]
)


def messages_of(found: list[tuple[str, str]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for role, content in found:
        if role == "call":
            messages += [
                {"role": "assistant", "content": content, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "1", "content": "2"},
            ]
        else:
            messages.append({"role": role, "content": content})
    return messages


def format_of(name: str) -> tuple[ChatFormat, int]:
    made = tokenizer(name)
    end = int(made.convert_tokens_to_ids(TEMPLATES[name][1]))  # pyright: ignore[reportArgumentType]
    return ChatFormat(made, frozenset({end})), end


def parts(token_ids: list[int], trained: list[bool]) -> list[list[int]]:
    """The runs of trained tokens."""
    found: list[list[int]] = []
    for at, one in enumerate(trained):
        if one and (at == 0 or not trained[at - 1]):
            found.append([])
        if one:
            found[-1].append(token_ids[at])
    return found


@given(st.sampled_from(["chatml", "default system", "llama3"]), turns)
def test_what_is_trained_is_each_answer_up_to_its_end_and_what_is_before_it_is_its_prompt(
    name: str, found: list[tuple[str, str]]
) -> None:
    chat, end = format_of(name)
    messages = messages_of(found)
    token_ids, trained = masked(chat, messages, TOOLS)
    answers = [at for at, one in enumerate(messages) if one["role"] == "assistant"]
    said = parts(token_ids, trained)
    assert len(said) == len(answers)
    starts = [at for at, one in enumerate(trained) if one and not trained[at - 1]]
    for at, start, part in zip(answers, starts, said, strict=True):
        assert token_ids[:start] == chat.prompt_ids(messages[:at], TOOLS), "as the engine renders it"
        assert part[-1] == end and end not in part[:-1]
        text = chat.decode(part[:-1], with_special=True)
        assert text.startswith(messages[at]["content"]) and ("add" in text) == ("tool_calls" in messages[at])


@given(turns)
def test_a_template_that_marks_what_is_generated_is_believed_and_says_the_same(found: list[tuple[str, str]]) -> None:
    messages = [one for one in messages_of(found) if "tool_calls" not in one and one["role"] != "tool"]
    marks, plain = build_tokenizer(), build_tokenizer()
    marks.chat_template = MARKED
    ends = frozenset({257})
    ours, theirs = (masked(ChatFormat(one, ends), messages, None) for one in (marks, plain))
    assert ours == theirs


def test_a_template_that_shows_history_differently_is_refused() -> None:
    chat, _ = format_of("thinking")
    first = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    masked(chat, first, None)
    with pytest.raises(ValueError, match="shows message 1, the assistant's, differently once more follows"):
        masked(chat, [*first, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}], None)


GOOD = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", 'no object with "messages"'),
        ('{"messages": []}', 'no object with "messages"'),
        ('{"messages": ["hello"]}', 'no object with "messages"'),
        ('{"messages": [{"content": "no role"}]}', "every message needs a role"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of it is the assistant's"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "nothing was asked"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content is a int"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "add"}', '"tools" are no list'),
    ],
)
def test_a_bad_line_is_refused_with_file_and_number(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(ConfigError, match=rf"chat.jsonl:3: .*{reason}"):
        chat_rows([str(path)], ChatFormat(build_tokenizer(), frozenset({257})))


def test_a_file_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    chat = ChatFormat(build_tokenizer(), frozenset({257}))
    with pytest.raises(ConfigError, match="none.jsonl cannot be read"):
        chat_rows([str(tmp_path / "none.jsonl")], chat)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="empty.jsonl holds no conversation"):
        chat_rows([str(tmp_path / "empty.jsonl")], chat)


def write(path: Path, *answers: str) -> str:
    lines = [{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": a}]} for a in answers]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_the_loss_is_the_mean_over_trained_tokens_of_all_rows_as_a_loop_in_float64_has_it(tmp_path: Path) -> None:
    rows = chat_rows(
        [write(tmp_path / "chat.jsonl", "4", "it is four", "let me see: 4")],
        ChatFormat(build_tokenizer(), frozenset({257})),
    )
    save_policy(build_model(), build_tokenizer(), tmp_path / "policy")
    model, exact = load_policy(tmp_path / "policy"), build_model().double()
    total, count = 0.0, 0
    for row in rows:
        logits = exact(torch.from_numpy(row.token_ids.astype("int64"))[None]).logits[0]
        for at in range(1, len(row.token_ids)):
            if row.trained[at]:
                total -= logits[at - 1].log_softmax(-1)[int(row.token_ids[at])].item()
                count += 1
    packs = pack_rows(rows, [1.0] * len(rows), token_budget=64, temperature=1.0)
    assert len(packs) > 1
    step = train_step(model, Optimizer(model, lr=1e-3), packs, losses.sft)
    assert step.trained_tokens == count
    assert math.isclose(step.loss, total / count, rel_tol=1e-5)


async def test_files_alone_are_imitated_without_a_bus_and_long_rows_counted(tmp_path: Path) -> None:
    life: Any = Life(tmp_path)
    save_policy(life.model, build_tokenizer(), tmp_path / "policy")
    sft = SftSection(files=[write(tmp_path / "chat.jsonl", "4", "5", "x" * 300)], epochs=3, batch_rollouts=2, lr=1e-2)
    life.train = TrainSection(tasks="", held_out="", sft=sft, token_budget=128)
    stream: Any = SimpleNamespace(saved_state=dict)
    await imitate(life, stream, [], read_conversations(life))
    lines = list(life.metrics.lines())
    assert [(line["phase"], line["rows"], line["dropped"]) for line in lines] == [("sft", 2, {"too_long": 1})] * 3
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert life.published == [1] and life.progress.trained == []


async def test_files_of_which_no_conversation_fits_are_refused(tmp_path: Path) -> None:
    life: Any = Life(tmp_path)
    save_policy(life.model, build_tokenizer(), tmp_path / "policy")
    sft = SftSection(files=[write(tmp_path / "chat.jsonl", "4", "5")])
    life.train = TrainSection(tasks="", held_out="", sft=sft, token_budget=8)
    with pytest.raises(ConfigError, match=r"all 2 rows .* token_budget = 8, the longest \d+ tokens"):
        await imitate(life, SimpleNamespace(), [], read_conversations(life))  # pyright: ignore[reportArgumentType]
