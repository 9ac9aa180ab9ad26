"""A recorded run of a writer, a rewriter and a checker: what it teaches, whoever is trained and however it is credited."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from lightning_bus import ConfigError, CreditSection
from lightning_bus.adapters import (
    FinishedRollout,
    RewardsSection,
    Selection,
    call_advantages,
    rewards_of,
    transitions_of,
)
from lightning_bus.adapters.credit import Episode
from lightning_bus.adapters.transitions import Transitions
from tests.golden import multi_agent
from tests.golden.multi_agent import TRAINED

RUN = multi_agent.load()


def learnt(rollout: FinishedRollout, agents: Any = TRAINED, **how: Any) -> Transitions:
    rewards = rewards_of(rollout, RewardsSection()).of_calls
    return transitions_of(
        rollout.rollout_id, 1, rollout.group, rollout.spans, selection=Selection.of(agents), rewards=rewards, **how
    )


def facts(transitions: Transitions) -> Any:
    turns = [(turn.agent, turn.policy, turn.reward, turn.left_out, turn.state_P.tolist(), turn.action_R.tolist()) for turn in transitions.turns]  # fmt: skip
    rows = [(row.token_ids.tolist(), row.trained.tolist(), row.logprobs.tolist()) for row in transitions.rows]
    return turns, rows, transitions.dropped


def test_what_is_recorded_today_teaches_what_the_recording_teaches() -> None:
    assert multi_agent.GOLDEN.stat().st_size < 100_000
    for recorded, today in zip(RUN, multi_agent.record(), strict=True):
        assert (today.rollout_id, today.status, today.reward) == (recorded.rollout_id, recorded.status, recorded.reward)
        assert facts(learnt(today)) == facts(learnt(recorded))


def test_two_agents_are_trained_and_the_fixed_one_is_left_out() -> None:
    made = [learnt(rollout) for rollout in RUN]
    dropped = sum((one.dropped for one in made), Counter[str]())
    assert dropped == {"other agent": 6, "superseded by the client's retry": 1, "token ids missing": 1}
    assert Counter(turn.agent for one in made for turn in one.turns) == {"writer": 8, "rewriter": 5}
    assert [len(one.rows) for one in made] == [1, 2, 1, 3, 1, 1]
    # count-0: the rewriter goes on in the writer's conversation, so both are one row; in count-1 it was rendered anew.
    assert [turn.agent for turn in made[0].members[0]] == ["writer", "rewriter"]
    assert [[turn.agent for turn in members] for members in made[1].members] == [["writer"], ["rewriter"]]
    assert made[0].merged.tokens_saved == 12


@pytest.mark.parametrize(
    ("agents", "trained"),
    [
        (["writer"], {"writer"}),
        (["/writer$/"], {"writer", "rewriter"}),
        (["pipeline/rewriter"], {"rewriter"}),
        (["pipeline/check"], {"checker"}),
        (["checker"], {"checker"}),
    ],
)
def test_agents_are_chosen_by_name_expression_or_path(agents: list[str], trained: set[str]) -> None:
    assert {turn.agent for rollout in RUN for turn in learnt(rollout, agents).turns} == trained


def test_everybody_is_trained_where_nobody_is_named() -> None:
    assert sum(len(learnt(rollout, []).turns) for rollout in RUN) == 19


def test_each_agent_may_have_a_policy_of_its_own() -> None:
    made = [learnt(rollout, {"writer": "policy", "checker": "fixed", "rewriter": "other"}) for rollout in RUN]
    rows = [row for one in made for row in one.rows]
    assert Counter(row.policy for row in rows) == {"policy": 7, "fixed": 6}
    foreign = sum(one.dropped["answered by another model than the policy"] for one in made)
    assert foreign == 5, "the rewriter's calls were answered by the policy, so they do not train the other"


def test_a_misspelt_agent_is_told_and_not_trained_around() -> None:
    made = [learnt(rollout, ["wrter"]) for rollout in RUN]
    assert not any(one.turns for one in made)
    with pytest.raises(ConfigError, match="Agents seen: checker, rewriter, writer"):
        Selection.of(["wrter"]).check(set().union(*[one.callers for one in made]))


def test_the_search_in_two_branches_trains_the_shared_draft_once() -> None:
    made = learnt(RUN[3])
    draft = made.turns[0].action_R.tolist()
    holding = [row for row in made.rows if draft == row.token_ids[len(made.turns[0].state_P) :][: len(draft)].tolist()]
    assert len(holding) == 3
    start = len(made.turns[0].state_P)
    assert sum(int(row.trained[start : start + len(draft)].all()) for row in holding) == 1


def test_cut_off_answers_follow_the_policy_for_them() -> None:
    assert learnt(RUN[4], truncated="mask").dropped["truncated"] == 1
    assert learnt(RUN[4], truncated="drop").rows == []


def test_rewards_of_spans_reach_the_calls_under_them() -> None:
    earned = [[turn.reward for turn in learnt(rollout).turns] for rollout in RUN]
    assert earned == [[0, 0.25], [0, 0.25], [0.1], [0, 0, 0, 0.25], [0, 0.25], [0, 0.25]]


@pytest.mark.parametrize("rule", ["identical", "turn", "leave_one_out"])
def test_credit_of_the_recorded_run(rule: Any) -> None:
    """Group count: finals 1, 0, 1; own rewards .25, .25, .1. The failed rollout of group join is out, not 0."""
    succeeded = [rollout for rollout in RUN if rollout.reward is not None]
    episodes = [Episode.of(learnt(rollout), float(rollout.reward or 0)) for rollout in succeeded]
    credit = CreditSection(rule=rule)
    found = [each.tolist() for each in call_advantages(episodes, rule=rule, relevance=credit.relevance)]
    expected = {
        "identical": [[0.3833] * 2, [-0.6167] * 2, [0.2333], [0.25] * 4, [-0.25] * 2],
        "turn": [
            [-0.1167 + 0.5 / 3, 0.1333 + 1 / 3],
            [-0.1167 - 1 / 3, 0.1333 - 2 / 3],
            [-0.0167 + 1 / 3],
            [-0.09375 + 0.125, -0.09375 + 0.125, -0.09375 + 0.125, 0.15625 + 0.25],
            [-0.09375 - 0.125, 0.15625 - 0.25],
        ],
        "leave_one_out": [[0.575] * 2, [-0.925] * 2, [0.35], [0.5] * 4, [-0.5] * 2],
    }[rule]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
