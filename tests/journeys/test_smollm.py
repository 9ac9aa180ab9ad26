"""A real instruct model learns from real questions: SmolLM2-135M on GSM8K, served by vLLM, three updates of a small batch.

GSM8K_JSONL names a file in GSM8K's format; without it a few questions of our own take its place. What is looked at:
versions advance, the log-probs of each version that answered whole conversations are those that the trainer computes from
that version's weights, nothing of a conversation is tokenised twice, and what the run leaves loads again and answers. Whether 135 million parameters learn
arithmetic from 48 rollouts is not.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_bus import Status
from lightning_bus.adapters import Assembler, Row, transitions_of
from lightning_bus.log.reader import LogReader
from tests.journeys.ring import Ring, cli
from trainer.data.batch import pack_rows
from trainer.policy.logprob import token_scores
from trainer.policy.model import load_policy
from trainer.registry import read_log, tensors_of

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(3600)]

STEPS = 3
ROWS_LOOKED_AT = 4  # of each version: a forward pass of the whole model for every one
GAP_MAX = 5e-5  # nats a token, on average, between the log-probs of vLLM and of the trainer; measured: 1e-5
CHARACTERS_MAX = 160  # of a question: two cores pay for every token
OWN = [
    ("Ann has 3 apples and buys 4 more. How many apples does she have?", "She has 3 + 4 = <<3+4=7>>7 apples.", 7),
    ("A box holds 6 eggs. How many eggs do 5 boxes hold?", "5 boxes hold 5 * 6 = <<5*6=30>>30 eggs.", 30),
    ("Tom had $20 and spent $8. How much is left?", "He has 20 - 8 = $<<20-8=12>>12 left.", 12),
    ("24 pens are shared by 4 friends. How many does each get?", "Each gets 24 / 4 = <<24/4=6>>6 pens.", 6),
    ("A train goes 60 miles an hour. How far does it go in 3 hours?", "It goes 60 * 3 = <<60*3=180>>180 miles.", 180),
    ("Eva is 12, and her brother is twice as old. How old is he?", "He is 12 * 2 = <<12*2=24>>24 years old.", 24),
    ("There are 7 days in a week. How many days are in 3 weeks?", "There are 7 * 3 = <<7*3=21>>21 days.", 21),
    ("Ben read 15 pages on Monday and 9 on Friday. How many in all?", "He read 15 + 9 = <<15+9=24>>24 pages.", 24),
    ("A farm has 1,000 hens and sells 250. How many are left?", "1000 - 250 = <<1000-250=750>>750 are left.", 750),
    ("Each of 8 tables has 4 legs. How many legs are there?", "There are 8 * 4 = <<8*4=32>>32 legs.", 32),
    ("Mia saves $5 a week. How much does she save in 10 weeks?", "She saves 5 * 10 = $<<5*10=50>>50.", 50),
    ("A rope of 18 feet is cut into 3 pieces. How long is one?", "One is 18 / 3 = <<18/3=6>>6 feet long.", 6),
]


def test_a_real_model_is_updated_three_times_on_vllm(ring: Ring) -> None:
    configure(ring)
    ring.on_vllm()
    ring.start()
    assert ring.wait(limit_s=3000.0) == 0, ring.said()
    assert_updated(ring)


def configure(ring: Ring) -> None:
    """Make the ring one of SmolLM2 on word problems, sized for two cores."""
    questions = write_questions(ring.cwd / "gsm8k.jsonl")
    ring.table["policy"]["model"] = "examples.gsm8k.policy:build"
    ring.table["worker"] |= {"agent": "examples.gsm8k.agent:agent", "concurrency": 16, "attempt_limit_s": 1500.0}
    ring.table["serve"] |= {"context_tokens": 512, "slots_max": 16}
    ring.table["train"] = {
        "tasks": f"examples.gsm8k.tasks:train {questions}",
        "held_out": f"examples.gsm8k.tasks:read {questions}",
        "token_budget": 1024,
        "keep_checkpoints": STEPS + 1,
        "rollout_limit_s": 1500.0,
        "rl": {"steps_max": STEPS, "group_size": 4, "groups_per_step": 4, "staleness_max": 1, "lr": 2e-6},
        "eval": {"tasks": 8},
    }


def write_questions(path: Path) -> Path:
    """Write the short questions of GSM8K_JSONL, or some of our own, in GSM8K's format."""
    real = os.environ.get("GSM8K_JSONL")
    if real:
        lines = Path(real).read_text(encoding="utf-8").splitlines()
        short = [line for line in lines if len(json.loads(line)["question"]) <= CHARACTERS_MAX][:256]
    else:
        short = [json.dumps({"question": text, "answer": f"{how}\n#### {answer:,}"}) for text, how, answer in OWN]
    path.write_text("\n".join(short) + "\n", encoding="utf-8")
    return path


def assert_updated(ring: Ring) -> None:
    """Check what the finished run must have."""
    summary = ring.assert_complete(steps=STEPS)
    assert summary["rollouts_failed"] == 0
    lines = ring.metrics("rl")
    assert [line["version"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0]["staleness_max"] == 0
    assert lines[0]["logprob_difference"] < GAP_MAX  # the first step learns from what its own weights have said
    assert all(line["grad_norm"] > 0 for line in lines)
    gaps = gaps_by_version(ring)
    print("mean |log-prob of the engine - of the trainer| by version:", gaps)
    # Between those that the first and the last judge, one may have come and gone while each conversation had begun before
    # it or ended after it: which do is a matter of how fast the trainer is and how fast the engine.
    assert {0, STEPS} <= gaps.keys() <= set(range(STEPS + 1)), gaps
    assert max(gaps.values()) < GAP_MAX, gaps
    exported = ring.run_dir / "checkpoint"
    assert answer(exported, "What is the capital of France?") == "The capital of France is Paris."
    known = cli("weights", "list", "--run", str(ring.run_dir), "--json", cwd=ring.cwd)
    assert {one["version"] for one in json.loads(known.stdout)["versions"]} == set(range(STEPS + 1)), known


def gaps_by_version(ring: Ring) -> dict[int, float]:
    """Return, for each version, how far its recorded log-probs are from the trainer's own, in nats a token."""
    policy = load_policy(ring.run_dir / "policy")
    live = policy.state_dict(keep_vars=True)
    by_version: dict[int, list[Row]] = defaultdict(list)
    for row in recorded_rows(ring):
        if row.version_oldest == row.version_newest:  # of one that spans two, the older keys are no longer to be had
            by_version[row.version_oldest].append(row)
    versions = read_log(ring.run_dir).versions
    gaps: dict[int, float] = {}
    for number, rows in sorted(by_version.items()):
        with torch.no_grad():
            for name, tensor in tensors_of(versions[number], ring.run_dir).items():
                live[name].copy_(tensor)
            looked_at = rows[:ROWS_LOOKED_AT]
            total, tokens = 0.0, 0
            for pack in pack_rows(looked_at, [1.0] * len(looked_at), token_budget=1024):
                said = pack.logprobs_T[pack.trained_T]
                total += float((token_scores(policy, pack).logprobs_K - said).abs().sum())
                tokens += len(said)
        gaps[number] = total / tokens
    return gaps


def recorded_rows(ring: Ring) -> Iterator[Row]:
    """Yield what the finished rollouts recorded, one row each: the second call of a conversation continues the first."""
    assembler = Assembler()
    with LogReader(ring.run_dir / "log") as reader:
        for record in reader.records():
            rollout = assembler.feed(record)
            if rollout is not None and rollout.status is Status.SUCCEEDED:
                made = transitions_of(rollout.rollout_id, rollout.attempt, rollout.group, rollout.spans)
                assert (len(made.rows), made.calls) == (1, 2), (
                    f"{rollout.rollout_id}: {len(made.rows)} rows of {made.calls} calls"
                )
                yield made.rows[0]


def answer(directory: Path, question: str) -> str:
    """Return a model directory's greedy answer, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(said[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
