"""PPO learns, its critic with it; a resumed run goes on bit for bit; what does not go together is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_bus import ConfigError, CreditSection
from lightning_bus.adapters import Row, ScoredRollout, call_advantages
from tests.reference.rows import tiny_llama
from tests.reference.trajectories import Said, rollout_of, scored_rollouts
from tests.unit.trainer.test_loop import a_world
from trainer.algorithms import rl
from trainer.algorithms.base import Setting
from trainer.algorithms.chosen import algorithm_of
from trainer.algorithms.ppo import PPO
from trainer.config import RlSection, TrainSection
from trainer.data.batch import pack_rows
from trainer.optimize import checkpoint
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.step import train_step
from trainer.policy.critic import row_values

VOCABULARY, BUDGET = 12, 256
TRAIN = TrainSection(tasks="", held_out="", token_budget=BUDGET, rl=RlSection(grad_norm_max=1.0))


class Learning:
    """A policy that learns by PPO from a game of two calls, as the loop would have it, without bus or engine.

    Shown a token, say the same; then a tool's answer comes, and that is to be said. Each half earns 0.5: the first at
    once, as the call's own reward, the second as the rollout's.
    """

    def __init__(self, ppo: PPO, *, lr: float = 1e-2, seed: int = 0) -> None:
        self.model = tiny_llama(seed, attention="sdpa", vocab_size=VOCABULARY)
        self.ppo = ppo
        self.ppo.prepare(Setting(self.model, Path(), TRAIN, seed))
        self.optimizer = Optimizer(self.model, lr=lr)
        self.seed = seed
        self.step_number = 0

    def sampled(self, prompts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One token after each of the prompts, and its log-prob."""
        with torch.no_grad():
            logprobs_NV = self.model(input_ids=torch.tensor(prompts), use_cache=False).logits[:, -1].log_softmax(-1)
        shares = logprobs_NV.double().exp().numpy()
        said = np.array([rng.choice(VOCABULARY, p=one / one.sum()) for one in shares])
        return said, logprobs_NV.numpy()[np.arange(len(said)), said]

    def rollouts(self, count: int, rng: np.random.Generator) -> list[Any]:
        asked, told = rng.integers(1, 5, count), rng.integers(5, 9, count)
        first, first_logprobs = self.sampled(asked[:, None], rng)
        second, second_logprobs = self.sampled(np.stack([asked, first, told], 1), rng)
        return [
            rollout_of(
                f"r-{self.step_number}-{n}",
                [
                    Said([asked[n]], [first[n]], 0.5 * float(first[n] == asked[n]), logprobs=[first_logprobs[n]]),
                    Said([asked[n], first[n], told[n]], [second[n]], logprobs=[second_logprobs[n]]),
                ],
                0.5 * float(second[n] == told[n]),
            )
            for n in range(count)
        ]

    def step(self, count: int = 48) -> dict[str, float]:
        rng = np.random.default_rng((self.seed, self.step_number))
        batch = scored_rollouts(self.rollouts(count, rng))
        self.step_number += 1
        rows = with_advantages(batch, self.ppo)
        waits = self.ppo.policy_waits
        metrics = dict(self.ppo.learn(rows))
        for some in [] if waits else self.ppo.updates(rows):
            packs = pack_rows(some, token_budget=BUDGET, normalise=self.ppo.normalise)
            metrics |= train_step(self.model, self.optimizer, packs, self.ppo.loss).means
        return metrics | {"reward": float(np.mean([one.total or 0.0 for one in batch]))}


def with_advantages(batch: Sequence[ScoredRollout], ppo: PPO) -> list[Row]:
    rows: list[Row] = []
    for rollout, earned in zip(batch, ppo.advantages(batch), strict=True):
        assert rollout.transitions is not None
        assert not isinstance(earned, float)
        of_call = {turn.span_id: one for turn, one in zip(rollout.transitions.turns, earned, strict=True)}
        rows += [row.with_advantages(of_call) for row in rollout.rows]
    return rows


def weights(learning: Learning) -> dict[str, torch.Tensor]:
    critic, optimizer = learning.ppo.parts()["critic"]
    return {
        **{f"policy/{name}": tensor.clone() for name, tensor in learning.model.state_dict().items()},
        **{f"critic/{name}": tensor.clone() for name, tensor in critic.state_dict().items()},
        **{f"optimizer/{name}": tensor.clone() for name, tensor in optimizer.tensors().items()},
    }


def test_ppo_learns_and_its_critic_explains_more_and_more_of_what_comes() -> None:
    learning = Learning(PPO(critic_lr=3e-3, critic_warmup_steps=2))
    lines = [learning.step() for _ in range(45)]
    rewards = [line["reward"] for line in lines]
    assert np.mean(rewards[:3]) < 0.3
    assert np.mean(rewards[-5:]) >= 0.95, rewards
    assert lines[0]["explained_variance"] == 0.0
    assert np.mean([line["explained_variance"] for line in lines[-5:]]) > 0.8


def test_while_the_critic_warms_up_the_policy_does_not_move() -> None:
    learning = Learning(PPO(critic_lr=3e-3, critic_warmup_steps=2))
    seen = [weights(learning)]
    for waits in (True, True, False):
        assert learning.ppo.policy_waits == waits
        learning.step()
        seen.append(weights(learning))
    for n, (before, after) in enumerate(zip(seen, seen[1:], strict=False)):
        assert not torch.equal(before["critic/head.weight"], after["critic/head.weight"])
        moved = not torch.equal(before["policy/model.norm.weight"], after["policy/model.norm.weight"])
        assert moved == (n == 2)


@pytest.mark.parametrize("kind", ["own", "head"])
def test_a_resumed_run_goes_on_bit_for_bit(kind: Any, tmp_path: Path) -> None:
    def fresh() -> Learning:
        return Learning(
            PPO(critic=kind, critic_lr=3e-3, critic_warmup_steps=1, epochs=2, critic_epochs=3, minibatches=2)
        )

    unbroken = fresh()
    for _ in range(3):
        unbroken.step(8)
    extra = {"step": unbroken.step_number}
    path = checkpoint.save(tmp_path, 3, unbroken.model, unbroken.optimizer, extra, parts=unbroken.ppo.parts())
    resumed = fresh()
    # What a trainer finds that was killed: the first policy again, whatever the checkpoint then makes of it.
    found = checkpoint.load(path, resumed.model, resumed.optimizer, parts=resumed.ppo.parts())
    resumed.step_number = found.extra["step"]
    lines = [[one.step(8) for _ in range(2)] for one in (unbroken, resumed)]
    assert lines[0] == lines[1]
    ours, theirs = weights(unbroken), weights(resumed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_epoch_deals_every_row_to_one_minibatch_and_rollouts_stay_whole() -> None:
    learning = Learning(PPO(epochs=2, critic_epochs=4, minibatches=3, normalise="rollout"))
    rng = np.random.default_rng(0)
    calls = [Said([1, 2], [3, 4]), Said([5, 6], [7])]  # the second is not a continuation: two rows
    batch = scored_rollouts([rollout_of(f"r-{n}", calls, float(rng.normal())) for n in range(7)])
    rows = with_advantages(batch, learning.ppo)
    assert len(rows) == 14
    learning.ppo.learn(rows)
    dealt = learning.ppo.updates(rows)
    assert len(dealt) == 6
    assert learning.ppo.parts()["critic"][1].updates == 4 * 3
    every = sorted((row.rollout_id, row.span_ids) for row in rows)
    epochs = [dealt[:3], dealt[3:]]
    for parts in epochs:
        assert sorted((row.rollout_id, row.span_ids) for part in parts for row in part) == every
        owners = [{row.rollout_id for row in part} for part in parts]
        assert not any(owners[a] & owners[b] for a in range(3) for b in range(a))
    assert [len(part) for part in epochs[0]] != [0, 0, 14]
    assert dealt[0] != dealt[3], "dealt anew"
    whole = np.concatenate([row.advantages[row.trained] for part in dealt[:3] for row in part])  # pyright: ignore[reportOptionalSubscript]
    assert whole.mean() == pytest.approx(0, abs=1e-6)
    assert whole.std() == pytest.approx(1, abs=1e-4)


def test_credit_by_value_is_td_lambda_over_turns_with_the_critics_values_of_their_first_tokens() -> None:
    credit = CreditSection(rule="value", gamma=0.9, lambda_=0.7)
    learning = Learning(PPO(critic_lr=1e-2).credited(credit))
    for _ in range(3):
        learning.step(16)
    calls = [
        Said([1, 2], [3, 4], 0.5),
        Said([1, 2, 3, 4, 9], [5, 6, 7], trainable=False, reward=0.25),
        Said([1, 2, 3, 4, 9, 5], [8, 9]),
    ]
    batch = scored_rollouts([rollout_of("r-0", calls, 1.0)])
    earned = learning.ppo.advantages(batch)[0]
    (row,) = batch[0].rows
    critic = learning.ppo.parts()["critic"][0]
    packs = pack_rows([row], [0.0], token_budget=BUDGET)
    (values,) = row_values(critic, packs, 1)  # pyright: ignore[reportArgumentType]
    # The call that is not trained is no turn of the critic's; what it earned is the first one's.
    two = batch[0].episode
    assert two is not None
    two = type(two)(two.group, two.final, np.array([0.75, 0.0]))
    expected = call_advantages([two], rule="value", gamma=0.9, lambda_=0.7, values=[[values[1], values[5]]])[0]
    assert [np.asarray(one).tolist() for one in earned] == [  # pyright: ignore[reportGeneralTypeIssues]
        [expected[0]] * 2, 0.0, [expected[1]] * 2,
    ]  # fmt: skip


def test_metrics_compare_what_the_critic_said_before_each_trained_token_with_what_it_was_worth() -> None:
    learning = Learning(PPO(critic_lr=1e-2))
    for _ in range(3):
        learning.step(16)
    batch = scored_rollouts([rollout_of("r-0", [Said([1, 2, 3], [4, 5, 6, 7], finish="length")], 1.0)])
    rows = with_advantages(batch, learning.ppo)
    critic = learning.ppo.parts()["critic"][0]
    (values,) = row_values(critic, pack_rows(rows, token_budget=BUDGET), 1)  # pyright: ignore[reportArgumentType]
    metrics = learning.ppo.learn(rows)
    assert metrics["value_mean"] == pytest.approx(values[2:6].mean(), abs=1e-6)
    assert metrics["value_target_mean"] == pytest.approx(1.0 + values[6], abs=1e-6)
    assert metrics["cut_off_share"] == 1.0
    assert "explained_variance" not in metrics, "all targets are equal"


def test_a_row_that_the_critic_cannot_read_earns_nothing_and_disturbs_nobody() -> None:
    learning = Learning(PPO())
    long = rollout_of("long", [Said([1] * BUDGET, [2, 3])], 1.0)
    batch = scored_rollouts([long, rollout_of("r-1", [Said([1, 2], [3, 4])], 1.0)])
    earned = learning.ppo.advantages(batch)
    assert [list(map(np.ndim, one)) for one in earned] == [[0], [1]]  # pyright: ignore[reportArgumentType]


def test_groups_that_agree_teach_the_critic() -> None:
    batch = scored_rollouts([rollout_of(f"r-{n}", [Said([1, 2], [3, 4])], 1.0) for n in range(3)])
    assert PPO().informative(batch).items == batch
    assert PPO().informative(batch[:1]).items == batch[:1]


def test_ppo_is_chosen_by_name_with_its_options() -> None:
    found = algorithm_of(RlSection(algorithm="ppo", options={"epochs": 4, "gae_lambda": 0.95}), CreditSection())
    assert isinstance(found, PPO)
    assert (found.epochs, found.gae_lambda, found.critic) == (4, 0.95, "own")


@pytest.mark.parametrize(
    ("options", "credit", "message"),
    [
        ({"epochs": 0}, {}, "epochs is 0"),
        ({"gae_lambda": 1.5}, {}, "lies between 0 and 1"),
        ({"critic_lr": 0.0}, {}, "critic_lr"),
        ({"critic": "both"}, {}, "critic"),
        ({"critic_size": 3}, {}, "critic_size is no option"),
        ({}, {"rule": "turn"}, "does without a critic"),
        ({}, {"gamma": 0.9}, "gae_gamma"),
        ({}, {"estimator": "rloo"}, "compares none"),
        ({"gae_lambda": 0.9}, {"rule": "value"}, "credit.lambda"),
        ({"kl": {"coefficient": 0.01}, "kl_shaping": {"coefficient": 0.01}}, {}, "twice"),
    ],
)
def test_what_does_not_go_together_is_refused(options: Any, credit: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        algorithm_of(RlSection(algorithm="ppo", options=options), CreditSection(**credit))


def test_a_schedule_ends_with_the_last_update_however_many_a_step_makes(tmp_path: Path) -> None:
    """Not with as many updates as there are steps: from there on the rate would be 0."""
    ppo = PPO(epochs=2, minibatches=3, critic_warmup_steps=1)
    session, _ = a_world(tmp_path, ppo, steps_max=5, schedule="cosine")
    assert rl.Learner(session, ppo).optimizer.total_updates == (5 - 1) * 2 * 3
    session, _ = a_world(tmp_path, ppo, steps_max=5, schedule="cosine", schedule_updates=7)
    assert rl.Learner(session, ppo).optimizer.total_updates == 7


@pytest.mark.anyio
@pytest.mark.parametrize("rule", ["identical", "value"])
async def test_the_loop_trains_by_ppo_and_keeps_its_critic(rule: Any, tmp_path: Path) -> None:
    session, world = a_world(tmp_path, PPO(), steps_max=3, staleness_max=2)
    session.run.section = lambda kind: CreditSection(rule=rule) if kind is CreditSection else kind()
    kept: list[Any] = []
    session.checkpoint = lambda optimizer, parts: kept.append(int(parts["critic"][0].steps))
    await rl.reinforce(session, world, ["task"], [], PPO(critic_lr=1e-3, critic_warmup_steps=1))  # pyright: ignore[reportArgumentType]
    assert kept == [1, 2, 3, 3]
    assert session.progress.version == 2
    assert [("loss" in line, "value_loss" in line) for line in session.line] == [
        (False, True),
        (True, True),
        (True, True),
    ]
