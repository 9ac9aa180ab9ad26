"""docs/metrics.md explains every name that a line of metrics.jsonl can hold, and none that no line holds."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_bus.adapters import Row
from tests.reference.rows import tiny_llama
from tests.unit.trainer.test_loop import a_world
from tests.unit.trainer.test_rl import StubEnded, group, rows_of
from tests.unit.trainer.test_sft import Life, Teacher
from trainer.algorithms import lines, rl
from trainer.algorithms.evaluate import evaluate
from trainer.algorithms.ppo import PPO
from trainer.algorithms.sft import imitate
from trainer.config import EvalSection, TrainSection
from trainer.data.batch import pack_rows
from trainer.optimize.losses import Kl, compose, grpo, icepop
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.step import StepMetrics, train_step
from trainer.session import Session
from trainer.sinks import PHASES, flattened

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[3]
VARIES = re.compile(r"\b[A-Z]+\b|(?<=_)[A-Z]+\b")  # REASON, and the S of kl_k2_staleness_S


def table() -> dict[str, tuple[str, set[str]]]:
    """Return name → (unit, phases) of the table under "## Names"."""
    section = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").split("\n## Names\n")[1].split("\n## ")[0]
    found: dict[str, tuple[str, set[str]]] = {}
    for row in re.findall(r"^\| (`.*) \|$", section, re.MULTILINE):
        names, unit, phases, meaning = re.split(r"\s*(?<!\\)\|\s*", row, maxsplit=3)
        assert meaning.strip(), names
        where = set(PHASES) if phases == "all" else set(phases.split(", "))
        assert where <= set(PHASES), phases
        for name in re.findall(r"`([^`]+)`", names):
            assert name not in found, f"{name} stands there twice"
            found[name] = (unit.strip(), where)
    return found


def row_of(name: str) -> str | None:
    """Return the name in the table that stands for a key."""
    if name in TABLE:
        return name
    return next((one for one in TABLE if VARIES.search(one) and re.fullmatch(VARIES.sub(".+", one), name)), None)


TABLE = table()


def unexplained(written: list[dict[str, Any]]) -> set[str]:
    """Return the keys, behind their phases, that the table does not have for that phase."""
    missing: set[str] = set()
    for line in written:
        for key in [*flattened(line), f"{line['phase']}/phase"]:
            phase, _, name = key.partition("/")
            row = row_of(name)
            if row is None or phase not in TABLE[row][1]:
                missing.add(key)
    return missing


def a_step() -> StepMetrics:
    """A step whose loss has everything, on rows of all ages."""
    groups = [group(f"g{age}", 0.0, 1.0, version=age) for age in range(6)]
    rows: list[Row] = [row for one in rows_of(*groups) for row in one.rows]
    model = tiny_llama(vocab_size=64)
    packs = pack_rows(rows, [1.0] * len(rows), token_budget=64, version=5)
    scored = [pack.with_logprobs(reference_K=pack.logprobs_T[pack.trained_T]) for pack in packs]
    loss = compose(grpo(), corrections=[icepop()], kl=Kl(coefficient=0.1, kind="k3"), entropy_bonus=0.1)
    return train_step(model, Optimizer(model, lr=1e-3), scored, loss)


async def test_every_key_of_every_phase_is_explained(tmp_path: Path) -> None:
    session, world = a_world(tmp_path, PPO(), steps_max=4, curriculum=True)
    session.train = replace_section(session.train, every_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "evaluate", lambda *_: nothing())
        await rl.reinforce(session, world, ["task"], [], PPO(minibatches=2, critic_epochs=2))  # pyright: ignore[reportArgumentType]
    assert {"value_loss", "evaluate_s", "task_pools", "updates"} <= set().union(*session.line)
    session.train = TrainSection(tasks="", held_out="", eval=EvalSection(tasks=1, samples=2))
    await evaluate(session, StubEnded(0.0, 1.0), ["a"])  # pyright: ignore[reportArgumentType]
    life = Life(tmp_path / "sft")
    await imitate(life, Teacher(), list(range(4)))  # pyright: ignore[reportArgumentType]
    written = [*session.line, *life.metrics.lines()]
    assert {line["phase"] for line in written} == set(PHASES)
    assert not unexplained(written)


def test_every_key_of_a_step_is_explained_whatever_its_loss_and_device() -> None:
    step = a_step()
    assert {f"kl_k2_staleness_{age}" for age in ("0", "1", "2", "3", "4_up")} <= step.means.keys()
    on_gpu = replace(step, peak_bytes=1, peak_flops_per_s=1e12, flops=1e9)
    written = lines.steps_line([on_gpu, on_gpu]) | {"reward_shares": {"final": 1.0}}
    assert not unexplained([{"phase": "rl", **written}])
    pushed = set(re.findall(r"(\w+)=times\.", inspect.getsource(Session.publish)))
    assert "push_s" in pushed and not pushed - TABLE.keys()


def test_the_table_explains_nothing_that_the_code_does_not_write() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "trainer").rglob("*.py")]
    code = "\n".join(sources)
    parts = {name: [part for part in VARIES.split(name) if part.strip("_/")] for name in TABLE}
    gone = {name for name, words in parts.items() for word in words if word.strip("/").removesuffix("_") not in code}
    assert not {name for name in gone if "_staleness_" not in name}


def test_updates_of_a_step_are_put_together_by_what_their_names_say() -> None:
    step = a_step()
    old = replace(
        step, means={"kl_k2": 1.0, "ratio_max": 2.0, "share_staleness_3": 0.5, "kl_k2_staleness_3": 4.0}, grad_norm=1.0
    )
    new = replace(step, means={"kl_k2": 3.0, "ratio_max": 5.0}, grad_norm=3.0, applied=False)
    line = lines.steps_line([old, new])
    expected = {
        "kl_k2": 2.0, "ratio_max": 5.0, "share_staleness_3": 0.25, "kl_k2_staleness_3": 4.0, "grad_norm": 2.0,
        "skipped_updates": 1, "updates": 2, "num_tokens": 2 * step.num_tokens,
    }  # fmt: skip
    assert {name: line[name] for name in expected} == expected
    assert line["tokens_per_s"] == pytest.approx(step.tokens_per_s)


async def nothing() -> None: ...


def replace_section(train: TrainSection, every_steps: int) -> TrainSection:
    return TrainSection(tasks="", held_out="", rl=train.rl, eval=EvalSection(every_steps=every_steps))
