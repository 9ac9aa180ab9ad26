"""The GSM8K example: its tasks, its reward, and the model that it starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.gsm8k import policy, tasks
from examples.gsm8k.agent import score
from lightning_bus import ConfigError


@pytest.fixture
def questions(tmp_path: Path) -> str:
    path = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"What is {a} times 1,000?", "answer": f"It is\n#### {a},000"} for a in range(1, 101)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_training_and_held_out_questions_share_none_and_leave_none_out(questions: str) -> None:
    sides = [{task["question"] for task in side(questions)} for side in (tasks.train, tasks.held_out)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {task["question"] for task in tasks.read(questions)}
    assert 2 <= len(sides[1]) <= 20


def test_training_tasks_come_shuffled_and_in_the_same_order_each_time(questions: str) -> None:
    trained = tasks.train(questions)
    assert trained == tasks.train(questions)
    assert trained != [task for task in tasks.read(questions) if task in trained]
    assert {"question": "What is 7 times 1,000?", "answer": 7000} in tasks.read(questions)


@pytest.mark.parametrize(
    ("content", "reward"),
    [
        ("12", 1.0),
        ("So 3 * 4 = 12.", 1.0),
        ("$12.00", 1.0),
        ("1,200", 0.2),
        ("-12", 0.2),
        (" $7. ", 0.2),
        ("It is 12, or rather 13", 0.1),
        ("twelve", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_tells_right_from_well_formed_from_nothing(content: str, reward: float) -> None:
    assert score(content, 12) == reward


def test_a_missing_package_is_said_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(policy, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match="make smollm"):
        policy.build(tmp_path, 0)


@pytest.mark.slow
def test_smollm2_becomes_an_ordinary_directory_that_reads_text_as_it_was_trained_and_answers(tmp_path: Path) -> None:
    policy.build(tmp_path / "policy", 0)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "policy", local_files_only=True)
    # Digits stand alone, and the spaces before them stay together.
    assert tokenizer.tokenize("  12\n 3") == ["ĠĠ", "1", "2", "ĊĠ", "3"]
    assert tokenizer.decode(tokenizer.encode("Zoë paid $1,234.50\n\n#### 7")) == "Zoë paid $1,234.50\n\n#### 7"

    with safe_open(tmp_path / "policy" / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert "quantization" not in (tmp_path / "policy" / "config.json").read_text(encoding="utf-8")

    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "policy", local_files_only=True, output_loading_info=True
    )
    assert not any(info.values())
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    assert tokenizer.decode(prompt["input_ids"][0]).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    said = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(said) == "The capital of France is Paris.<|im_end|>"
