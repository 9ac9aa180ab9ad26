"""What a user can set reaches what computes, by the same keys from RUN.toml and from Python, and what cannot work is told by its key."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_bus import ConfigError, load_run
from tests.reference.rows import make_rows, tiny_model
from tests.unit.trainer.serving_fixtures import build_tokenizer
from tests.unit.trainer.test_algorithms import Half
from tests.unit.trainer.test_loop import a_world
from tests.unit.trainer.test_sft import Life, Teacher
from trainer import DAPO, GRPO, Trainer, training
from trainer.algorithms import rl
from trainer.algorithms.sft import imitate
from trainer.beside import QUIET_S, Watch
from trainer.config import PolicySection, RlSection, SftSection, TrainSection
from trainer.data.batch import pack_rows
from trainer.optimize.optimizer import Optimizer
from trainer.policy.build import build_policy
from trainer.policy.logprob import chunked_logprobs, head_weight, hidden_states, token_scores
from trainer.policy.model import save_policy

MINIMAL = """
run.name = "mini"
policy.model = "model"
train.tasks = "my:tasks"
train.held_out = "my:held_out"
"""


# -- what computes -------------------------------------------------------------------------------------------------


def test_every_argument_of_the_optimiser_is_a_key_of_both_stages() -> None:
    called = {"kind": "optimizer", "total_updates": "schedule_updates"}
    arguments = set(inspect.signature(Optimizer).parameters) - {"model"}
    keys = {called.get(name, name) for name in arguments}
    for section in (RlSection, SftSection):
        assert keys <= set(section.__struct_fields__), section


CHOSEN: dict[str, Any] = {
    "lr": 1e-3, "optimizer": "muon", "betas": (0.8, 0.9), "momentum": 0.7, "weight_decay": 0.3, "warmup_updates": 2,
    "schedule": "cosine", "schedule_updates": 9, "grad_norm_max": 0.25,
}  # fmt: skip


def check_chosen(optimizer: Optimizer) -> None:
    """Check that torch's own optimisers have what the section says."""
    assert set(optimizer.kinds.values()) == {"adamw", "muon"}
    for kind, one in optimizer._optimizers.items():
        matrices = one.param_groups[0]
        assert matrices["weight_decay"] == 0.3
        assert (matrices["betas"] == (0.8, 0.9)) if kind == "adamw" else (matrices["momentum"] == 0.7)
    assert (optimizer.lr_peak, optimizer.warmup_updates, optimizer.grad_norm_max) == (1e-3, 2, 0.25)
    assert (optimizer.schedule, optimizer.total_updates) == ("cosine", 9)


def test_reinforcement_is_optimised_as_its_section_says(tmp_path: Path) -> None:
    session, _ = a_world(tmp_path, Half(), **CHOSEN)
    check_chosen(rl.Learner(session, Half()).optimizer)


@pytest.mark.anyio
async def test_imitation_is_optimised_as_its_section_says(tmp_path: Path) -> None:
    life, seen = Life(tmp_path), list[Optimizer]()
    life.train = TrainSection(tasks="", held_out="", sft=SftSection(rollouts=4, epochs=1, batch_rollouts=2, **CHOSEN))
    life.restore_optimizer = seen.append
    await imitate(life, Teacher(), list(range(4)))  # pyright: ignore[reportArgumentType]
    check_chosen(seen[0])


@pytest.mark.anyio
async def test_a_schedule_of_imitation_ends_with_its_last_epoch(tmp_path: Path) -> None:
    life = Life(tmp_path)
    how: Any = {"rollouts": 4, "epochs": 3, "batch_rollouts": 3, "lr": 1e-2, "warmup_updates": 0, "schedule": "linear"}
    life.train = TrainSection(tasks="", held_out="", sft=SftSection(**how))
    await imitate(life, Teacher(), list(range(4)))  # pyright: ignore[reportArgumentType]
    # Four rows are two updates an epoch; a line says the rate of its epoch's last one.
    assert [line["lr"] for line in life.metrics.lines() if line["phase"] == "sft"] == pytest.approx(
        [1e-2 * left / 6 for left in (5, 3, 1)], rel=1e-5
    )
    late = Life(tmp_path / "late")
    late.train = TrainSection(tasks="", held_out="", sft=SftSection(**{**how, "warmup_updates": 6}))
    with pytest.raises(
        ConfigError, match=r"train\.sft: schedule = 'linear' .* 6 \(warmup_updates\) to 6 \(updates of all"
    ):
        await imitate(late, Teacher(), list(range(4)))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_the_head_rounds_what_it_multiplies_and_nothing_else(tmp_path: Path, compute_dtype: Any) -> None:
    save_policy(tiny_model("qwen3"), build_tokenizer(), tmp_path / "model")
    rows = make_rows(3, [9, 17])
    (pack,) = pack_rows(rows, [1.0, 1.0], token_budget=64)
    scores: dict[str, Any] = {}
    for head_dtype in ("float32", "bfloat16"):
        section = PolicySection(model="", compute_dtype=compute_dtype, head_dtype=head_dtype)
        model = build_policy(section, tmp_path / "model")
        scores[head_dtype] = token_scores(model, pack)
        scores[head_dtype].logprobs_K.sum().backward()
        assert head_weight(model).dtype == torch.float32 and head_weight(model).grad is not None
        with torch.no_grad():
            by_hand = chunked_logprobs(
                hidden_states(model, pack)[pack.trained_T], head_weight(model), pack.targets_T[pack.trained_T],
                pack.temperatures_T[pack.trained_T], head_dtype=getattr(torch, head_dtype),
            )  # fmt: skip
        assert torch.equal(scores[head_dtype].logprobs_K, by_hand[0]) and torch.equal(
            scores[head_dtype].entropies_K, by_hand[1]
        )
    off = (scores["float32"].logprobs_K - scores["bfloat16"].logprobs_K).abs()
    assert 1e-5 < off.max() < 0.05


def test_products_have_the_precision_that_is_asked_for() -> None:
    train = TrainSection(tasks="", held_out="", matmul_precision="high")
    run: Any = SimpleNamespace(
        section=lambda kind: train if kind is TrainSection else kind(), run=SimpleNamespace(seed=0)
    )
    before = torch.get_float32_matmul_precision()
    try:
        training._set_torch(run)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


# -- what is refused, by its key -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ('policy.head_dtype = "float16"', "policy.head_dtype"),
        ('train.matmul_precision = "tf32"', "train.matmul_precision"),
        ("train.rl.betas = [0.9, 1.0]", "train.rl.betas"),
        ("train.rl.betas = [0.9]", "train.rl.betas"),
        ("train.sft.momentum = -0.1", "train.sft.momentum"),
        ("train.sft.weight_decay = -1.0", "train.sft.weight_decay"),
        ('train.rl = { schedule = "cosine", warmup_updates = 9, schedule_updates = 9 }', r"9 \(schedule_updates\)"),
        (
            'train.sft = { schedule = "linear", schedule_updates = 10 }',
            r"10 \(warmup_updates\) to 10 \(schedule_updates\)",
        ),
    ],
)
def test_what_cannot_work_is_refused_when_the_file_is_read(tmp_path: Path, said: str, words: str) -> None:
    (tmp_path / "run.toml").write_text(MINIMAL + said, encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        load_run(tmp_path / "run.toml")


# -- from Python ---------------------------------------------------------------------------------------------------


def agent(task: Any) -> float:
    return 1.0


def prepared(directory: Path, *, resume: bool = False, **how: Any) -> TrainSection:
    """Return [train] of the run file that fit would train by."""
    trainer = Trainer(policy="examples.calc.policy:build", directory=directory, **how)
    return trainer._prepared(agent, [{}], [{}], here=True, resume=resume).section(TrainSection)


def test_settings_may_be_dotted_or_tables_and_leave_the_rest_as_it_is(tmp_path: Path) -> None:
    dotted = prepared(
        tmp_path / "a", settings={"train.rl.lr": 1e-5, "train.rl.steps_max": 7, "train.sft.betas": (0.8, 0.9)}
    )
    nested = prepared(
        tmp_path / "b", settings={"train": {"rl": {"lr": 1e-5}, "sft.betas": [0.8, 0.9]}, "train.rl": {"steps_max": 7}}
    )
    assert (dotted.rl, dotted.sft) == (nested.rl, nested.sft)
    assert (dotted.rl.lr, dotted.rl.steps_max, dotted.sft.betas) == (1e-5, 7, (0.8, 0.9))
    options = prepared(
        tmp_path / "c",
        algorithm="grpo",
        settings={"train.rl.options": {"kl": {"coefficient": 0.1}}, "train.rl.lr": 2e-5},
    )
    assert (options.rl.algorithm, options.rl.options, options.rl.lr) == ("grpo", {"kl": {"coefficient": 0.1}}, 2e-5)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"n_workers": 0}, "n_workers is 0"),
        ({"settings": {"run.seed": 3}}, r"'run\.seed'\] is 3: say it by Trainer\(seed=…\)"),
        ({"settings": {"train": {"tasks": "my:tasks"}}}, r"say it by fit\(train_tasks=…\)"),
        ({"settings": {"policy.model": "other"}}, r"say it by Trainer\(policy=…\)"),
        ({"algorithm": "grpo", "settings": {"train.rl.algorithm": "ppo"}}, r"say it by Trainer\(algorithm=…\)"),
        ({"algorithm": GRPO(), "settings": {"train.rl.options.clip_high": 0.3}}, r"say it by GRPO\(…\)"),
    ],
)
def test_a_setting_that_an_argument_decides_is_refused_rather_than_ignored(how: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Trainer(**{"policy": "examples.calc.policy:build", **how})


def test_a_run_that_goes_on_takes_over_what_is_given_now_and_keeps_the_rest(tmp_path: Path) -> None:
    first = prepared(tmp_path, algorithm=GRPO(clip_high=0.3), settings={"train.rl.lr": 1e-5, "train.rl.steps_max": 7})
    assert (first.rl.algorithm, first.rl.options) == ("grpo", {"clip_high": 0.3})
    assert prepared(tmp_path, resume=True) == first
    longer = prepared(tmp_path, resume=True, settings={"train.rl.steps_max": 9})
    assert (longer.rl.steps_max, longer.rl.lr, longer.rl.options) == (9, 1e-5, {"clip_high": 0.3})
    other = prepared(tmp_path, resume=True, algorithm=DAPO(tis=2.0))
    assert (other.rl.algorithm, other.rl.options, other.rl.steps_max) == ("dapo", {"tis": 2.0}, 9)
    named = prepared(tmp_path, resume=True, algorithm="grpo", settings={"train.rl.options.clip_low": 0.1})
    assert (named.rl.algorithm, named.rl.options) == ("grpo", {"clip_low": 0.1})


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"policy": ""}, "which model"),
        ({"policy": "Qwen/Qwen3-0.6B"}, "hf download"),
        ({"algorithm": "grpo", "settings": {"train.rl.options": {"clip_hig": 1.0}}}, "clip_hig is no option of grpo"),
        ({"settings": {"train.sft.files": ["nowhere.jsonl"]}}, r"nowhere\.jsonl cannot be read from /.*No such file"),
        ({"settings": {"credit.rule": "value"}}, "needs a critic"),
        ({"settings": {"credit.agents": ["/(/"]}}, "credit.agents"),
        (
            {"settings": {"train.rl.schedule": "linear", "train.rl.steps_max": 5, "train.rl.warmup_updates": 5}},
            r"train\.rl: schedule = 'linear' .* to 5 \(updates of all steps\)",
        ),
    ],
)
def test_fit_starts_nothing_and_leaves_nothing_of_a_run_that_cannot_work(
    tmp_path: Path, how: dict[str, Any], words: str
) -> None:
    trainer = Trainer(**{"policy": "examples.calc.policy:build", "directory": tmp_path, **how})
    with pytest.raises(ConfigError, match=words):
        trainer.fit(agent, [{}], [{}], progress=None)
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_keeps_its_file_where_what_is_given_now_cannot_work(tmp_path: Path) -> None:
    first = prepared(tmp_path, algorithm="grpo")
    with pytest.raises(ConfigError, match="clip_hig is no option"):
        prepared(tmp_path, resume=True, settings={"train.rl.options.clip_hig": 1.0})
    assert prepared(tmp_path, resume=True) == first


def test_progress_is_said_of_each_line_and_of_a_long_silence(tmp_path: Path) -> None:
    metrics, daemons, now_s, said = tmp_path / "metrics.jsonl", tmp_path / "logs" / "up.log", [0.0], list[str]()
    daemons.parent.mkdir()
    daemons.write_text("of an earlier life\n", encoding="utf-8")
    watch = Watch(tmp_path, said.append, now_s=lambda: now_s[0])

    def looked(at_s: float) -> list[str]:
        now_s[0] = at_s
        said.clear()
        watch.look()
        return [one.strip() for one in said]

    assert looked(QUIET_S) == [], "nothing was said anew"
    with daemons.open("a", encoding="utf-8") as file:
        file.write("serve is up\n12 done, 3 queued\nhalf a li")
    assert looked(QUIET_S + 1) == []
    assert looked(2 * QUIET_S) == ["... 12 done, 3 queued"]
    assert looked(3 * QUIET_S) == [], "the same again"
    line = {"phase": "rl", "step": 2, "version": 1, "rows": 0, "dropped": {"zero_variance_group": 4}}
    metrics.write_text(json.dumps(line) + "\n{", encoding="utf-8")
    (told,) = looked(3 * QUIET_S + 1)
    assert told.startswith("rl step 2") and told.endswith("nothing to learn from, left out: zero_variance_group 4")
