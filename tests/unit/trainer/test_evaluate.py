"""Held-out tasks with several samples each: which rollouts, and pass@k against counting every choice."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.trainer.test_rl import StubEnded, a_session
from trainer.algorithms.evaluate import evaluate, pass_at, pass_rates
from trainer.config import EvalSection, RlSection, TrainSection

pytestmark = pytest.mark.anyio


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_with_a_pass_among_them(
    passed: list[bool], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(passed)))
    choices = list(combinations(passed, k))
    assert pass_at(len(passed), sum(passed), k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_rates_are_means_over_tasks_of_what_reaches_success_reward() -> None:
    assert pass_rates([[1.0, 0.2, 0.0], [0.5, 0.4, 0.9]], 0.5) == pytest.approx(
        {"pass_at_1": (1 / 3 + 2 / 3) / 2, "pass_at_2": (2 / 3 + 1) / 2, "pass_at_3": 1.0}
    )


async def test_every_task_is_tried_as_often_as_asked_and_the_line_says_mean_and_pass_at_k(tmp_path: Path) -> None:
    session, stream = a_session(tmp_path, version=3), StubEnded(1.0, None, 0.5, 0.0)
    session.train = TrainSection(
        tasks="", held_out="", eval=EvalSection(tasks=2, samples=2), rl=RlSection(success_reward=0.5)
    )
    assert await evaluate(session, stream, ["a", "b", "c"]) == 0.375  # pyright: ignore[reportArgumentType]
    assert stream.asked_for == ["eval-v3-0000-0", "eval-v3-0000-1", "eval-v3-0001-0", "eval-v3-0001-1"]
    (line,) = session.metrics.lines()
    found = {key: line[key] for key in ("held_out_success", "rollouts", "failed", "pass_at_1", "pass_at_2")}
    assert found == {"held_out_success": 0.375, "rollouts": 4, "failed": 1, "pass_at_1": 0.5, "pass_at_2": 1.0}


async def test_one_sample_a_task_is_named_and_grouped_as_ever(tmp_path: Path) -> None:
    session, stream = a_session(tmp_path, version=3), StubEnded(1.0, 0.0)
    await evaluate(session, stream, ["a", "b"])  # pyright: ignore[reportArgumentType]
    assert stream.asked_for == ["eval-v3-0000", "eval-v3-0001"]
    assert not [key for key in next(iter(session.metrics.lines())) if key.startswith("pass_at")]


def test_several_greedy_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="samples = 4 tries at temperature = 0 are the same one"):
        EvalSection(samples=4, temperature=0.0)
