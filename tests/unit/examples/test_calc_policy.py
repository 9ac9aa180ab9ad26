"""The policy's directory: it loads anywhere, depends on its seed alone, and renders what it would generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.calc import policy, tasks, teacher
from examples.calc.agent import CALCULATOR

TOOLS = [CALCULATOR]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calc") / "policy"
    policy.build(path, 0)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


def test_a_seed_writes_the_same_bytes_and_another_seed_other_weights(directory: Path, tmp_path: Path) -> None:
    policy.build(tmp_path / "again", 0)
    policy.build(tmp_path / "other", 1)
    for file in directory.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
        same = file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()
        assert same is (file.name != "model.safetensors"), file.name


def test_transformers_loads_every_weight_and_computes_finite_logits(directory: Path, tokenizer: Any) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.tie_word_embeddings and model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id != model.config.pad_token_id
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([_prompt(tokenizer, "How many?")])).logits[0]
    assert logits_TV.isfinite().all()


def test_every_small_number_is_the_same_single_token_everywhere(tokenizer: Any) -> None:
    for number in range(tasks.NUMBER_MAX + 1):
        (token,) = tokenizer.encode(str(number))
        for text in (f'"{number}+', f" {number} eggs", f"\n{number}<|im_end|>", f"#{number}."):
            assert tokenizer.encode(text).count(token) == 1, text


@pytest.mark.parametrize("text", ["Zoë paid $1,234.50 – twice!\t\n\n", "日本語 🙂", '{"a": [1, {"b": null}]}', "  x  "])
def test_any_text_survives_encoding_and_decoding(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tool_tags_are_single_tokens_that_decoding_keeps(tokenizer: Any) -> None:
    ids = tokenizer.encode("<tool_call>\n</tool_call><|im_end|>")
    assert len(ids) == 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>\n</tool_call>"


def test_the_next_prompt_begins_with_the_ids_already_generated(tokenizer: Any) -> None:
    for task in tasks.train(0, 48):
        messages: list[dict[str, Any]] = [{"role": "user", "content": task["question"]}]
        prompt = _render(tokenizer, messages)
        messages.append(teacher.reply(messages, TOOLS))
        expression = messages[1]["tool_calls"][0]["function"]["arguments"]
        call = f'<tool_call>\n{{"name": "calculator", "arguments": {expression}}}\n</tool_call><|im_end|>'
        messages.append({"role": "tool", "tool_call_id": "x", "content": str(task["answer"])})
        second_prompt = _render(tokenizer, messages)
        generated = prompt + tokenizer.encode(call)
        assert second_prompt[: len(generated)] == generated
        messages.append(teacher.reply(messages, TOOLS))
        whole = _render(tokenizer, messages, add_generation_prompt=False)
        assert whole[: len(second_prompt)] == second_prompt


def test_arguments_render_the_same_as_a_string_and_as_an_object(tokenizer: Any) -> None:
    def rendered(arguments: Any) -> list[int]:
        call = {"id": "c", "type": "function", "function": {"name": "calculator", "arguments": arguments}}
        return _render(tokenizer, [{"role": "assistant", "content": "Let me see.", "tool_calls": [call, call]}])

    assert rendered('{"expression": "é+1"}') == rendered({"expression": "é+1"})


def test_a_system_message_stands_before_the_tools(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.decode(_render(tokenizer, messages))
    assert text == (
        "<|im_start|>system\nBe brief.\nTools: calculator(expression)<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    without = tokenizer.apply_chat_template(messages, tokenize=False)
    assert without == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


def test_a_rollout_stays_short(tokenizer: Any) -> None:
    longest = max(len(_prompt(tokenizer, task["question"])) for task in tasks.train(0, 500))
    assert longest <= 45  # tokens; every one is paid for in each of a rollout's model calls


def _prompt(tokenizer: Any, question: str) -> list[int]:
    return _render(tokenizer, [{"role": "user", "content": question}])


def _render(tokenizer: Any, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
    return tokenizer.apply_chat_template(
        messages, tools=TOOLS, add_generation_prompt=add_generation_prompt, return_dict=False
    )
