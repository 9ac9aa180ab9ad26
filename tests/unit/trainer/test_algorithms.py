"""Algorithms: chosen by name, options or class; of one's own; and the other policies that they compare with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from hypothesis import given
from hypothesis import strategies as st

import trainer
from bench import learning
from lightning_bus import ConfigError, CreditSection, load_run
from lightning_bus.adapters import Row, ScoredRollout
from tests.reference.policy_step import as_float64
from tests.reference.policy_step import row_logprobs as by_themselves
from tests.reference.rows import make_rows, tiny_llama
from tests.unit.trainer.test_rl import a_session, rows_of
from tests.unit.trainer.test_rl import group as a_group
from trainer.algorithms.base import Algorithm
from trainer.algorithms.batches import Batch, rows_and_advantages
from trainer.algorithms.chosen import algorithm_of, described
from trainer.algorithms.other_policies import OtherPolicies, row_logprobs
from trainer.algorithms.policy_gradients import CISPO, DAPO, DPPO, GRPO, GSPO, DrGRPO, PolicyGradient, Reinforce
from trainer.config import ALGORITHMS, RlSection, TrainSection
from trainer.data.batch import pack_rows
from trainer.optimize import losses
from trainer.optimize.losses import Kl, KlShaping, LossInputs, LossOutputs
from trainer.policy.lora import add_adapter
from trainer.policy.model import is_adapter_weight

pytestmark = pytest.mark.anyio

CREDIT = CreditSection()


def inputs(k: int = 6, seed: int = 0) -> LossInputs:
    make = torch.Generator().manual_seed(seed)

    def numbers() -> torch.Tensor:
        return -torch.rand(k, generator=make, dtype=torch.float64) * 2

    return LossInputs(
        logprobs_K=numbers().requires_grad_(), behaviour_logprobs_K=numbers(), advantages_K=numbers() + 1,
        entropies_K=-numbers(), row_K=torch.tensor([0] * (k // 2) + [1] * (k - k // 2)), num_rows=2,
        reference_logprobs_K=numbers(),
    )  # fmt: skip


# -- which algorithm ----------------------------------------------------------------------------------------------


def test_every_name_makes_an_algorithm_and_the_face_has_it() -> None:
    for name, source in ALGORITHMS.items():
        made = algorithm_of(RlSection(algorithm=name), CREDIT)
        assert type(made) is getattr(trainer, source.partition(":")[2]), name


def test_the_face_and_the_help_cost_no_torch_and_the_help_names_every_algorithm() -> None:
    code = "import sys, trainer, trainer.cli; print(trainer.cli.train.__doc__); assert 'torch' not in sys.modules"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"{name}," in said or f"{name} " in said for name in ALGORITHMS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_learning_bench_makes_a_run_file_of_every_algorithm(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(learning.table_of(name, 4, 7, tmp_path, ["lr = 1e-4"])), encoding="utf-8")
    file = load_run(path)
    config = file.section(TrainSection).rl
    assert (config.staleness_max, config.lr, file.run.seed) == (4, 1e-4, 7)
    assert type(algorithm_of(config, file.section(CreditSection))).__name__ == ALGORITHMS[name].partition(":")[2]


def test_the_learning_table_keeps_failures() -> None:
    run = {"success_after_rl": 0.99, "success_before_rl": 0.5, "steps": 40, "seconds": 100.0, "idle_share": 0.25}
    runs = [{"algorithm": "grpo", "staleness": 1, **run}, {"algorithm": "grpo", "staleness": 1, "error": "no"}]
    last = learning.markdown(runs).splitlines()[-1]
    assert last == "| grpo | 1 | 0.990 failed | 0.990 | 0.500 | 40 | 100 | 0.25 |"


@pytest.mark.parametrize(
    ("name", "term"),
    [
        ("ppo_clip", losses.ppo_clip()),
        ("cispo", losses.cispo()),
        ("reinforce", losses.reinforce()),
    ],
)
def test_the_old_keys_minimise_what_they_did(name: Any, term: losses.PolicyTerm) -> None:
    credit = CreditSection(estimator="rloo")
    made = algorithm_of(RlSection(loss=name, scale="std", normalise="rollout"), credit)
    assert isinstance(made, PolicyGradient)
    assert (made.estimator, made.scale, made.normalise) == ("rloo", "std", "rollout")
    (ours_K, ours), (theirs_K, theirs) = made.loss(inputs()), term(inputs())
    assert torch.equal(ours_K, theirs_K)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_options_reach_what_is_minimised() -> None:
    options = {"clip_high": 1, "tis": 1.5, "proximal": True, "kl": {"coefficient": 0.1, "kind": "k3"}}
    with pytest.raises(ConfigError, match="2 corrections weigh by the same ratio"):
        algorithm_of(RlSection(algorithm="grpo", options={"tis": 1.5, "icepop": [0.5, 2.0]}), CREDIT)
    made = algorithm_of(RlSection(algorithm="grpo", options=options), CREDIT)
    assert made == GRPO(clip_high=1.0, tis=1.5, proximal=True, kl=Kl(coefficient=0.1, kind="k3"))
    assert made.wants_reference and made.wants_proximal
    assert not GRPO(kl_shaping=KlShaping(coefficient=0.1, to="behaviour")).wants_reference


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"algorithm": "grop"}, "choose from grpo"),
        ({"options": {"clip_high": 1.0}}, "none is named"),
        ({"algorithm": "grpo", "scale": "std"}, "which has its own"),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RlSection(**section)


@pytest.mark.parametrize(
    ("section", "credit", "said"),
    [
        ({"algorithm": "grpo", "options": {"clip_hig": 1.0}}, {}, "clip_hig is no option of grpo. Known: .*clip_high"),
        ({"algorithm": "grpo", "options": {"scale": "mad"}}, {}, "'mad'"),
        ({"algorithm": "dr_grpo", "options": {"normalise": "token"}}, {}, "they go together"),
        ({"algorithm": "grpo", "options": {"clip_low": 7.0}}, {}, r"clip_low=7.0 is outside"),
        ({"algorithm": "no_such_module:Mine"}, {}, "cannot import no_such_module"),
        ({"algorithm": "trainer.config:RlSection"}, {}, "no subclass of trainer.Algorithm"),
        ({"algorithm": "tests.unit.trainer.test_algorithms:Wants"}, {}, "raised TypeError.*nothing"),
        ({"algorithm": "grpo"}, {"estimator": "maxrl"}, "Say it in one place"),
        ({"algorithm": "gspo"}, {"rule": "value"}, "needs a critic, and GSPO trains none"),
    ],
)
def test_what_cannot_be_is_told_with_key_and_way_out(
    section: dict[str, Any], credit: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        algorithm_of(RlSection(**section), CreditSection(**credit))


@given(
    st.sampled_from([GRPO, DrGRPO, DAPO, GSPO, CISPO, DPPO, Reinforce]),
    st.fixed_dictionaries(
        {},
        optional={
            "scale": st.sampled_from(["none", "std"]),
            "geometric_mask": st.just((0.9, 1.1)),
            "kl": st.builds(Kl, coefficient=st.floats(0, 1)),
            "entropy_bonus": st.floats(0, 1),
        },
    ),
)
def test_what_is_written_down_of_an_algorithm_makes_the_same_one(kind: Any, options: dict[str, Any]) -> None:
    made = kind(**options)
    assert algorithm_of(RlSection(**described(made)), CREDIT) == made


def test_what_toml_or_another_process_cannot_say_is_never_taken_for_another_algorithm() -> None:
    class Local(Half): ...

    for algorithm in (Reinforce(ratio_max=None), Wants(1), Local()):
        said = described(algorithm)
        with pytest.raises(ConfigError, match=rf"an object, .*{type(algorithm).__name__}, .*fit\(resume=True\)"):
            algorithm_of(RlSection(**said), CREDIT)
    assert type(algorithm_of(RlSection(**described(Half())), CREDIT)) is Half, "made of nothing, so its name says all"


# -- of one's own ---------------------------------------------------------------------------------------------------


class Half(Algorithm):
    """REINFORCE against a fixed baseline, in two methods."""

    def advantages(self, batch: Sequence[ScoredRollout]) -> list[float]:
        return [(rollout.total or 0.0) - 0.5 for rollout in batch]

    def loss(self, inputs: LossInputs) -> LossOutputs:
        return -inputs.advantages_K * inputs.logprobs_K, {}


class Wants(Half):
    def __init__(self, nothing: int) -> None: ...


@dataclass(frozen=True)
class ByToken(Half):
    """An advantage for each token of each turn."""

    step: float = 0.25

    def advantages(self, batch: Sequence[ScoredRollout]) -> Any:
        turns = [one.transitions.turns for one in batch if one.transitions is not None]
        return [[np.arange(len(turn.action_R), dtype=np.float32) * self.step for turn in each] for each in turns]


def trained(algorithm: Algorithm, *groups: Any) -> list[Row]:
    return rows_and_advantages(Batch(rows_of(*groups)), algorithm, version=0, staleness_max=0, tokens_max=100)


def test_advantages_may_be_of_rollouts_turns_or_tokens() -> None:
    rows = trained(Half(), a_group("a", 0.0, 1.0))
    assert [row.advantages[row.trained].tolist() for row in rows if row.advantages is not None] == [
        [-0.5] * 2,
        [0.5] * 2,
    ]
    made = algorithm_of(RlSection(algorithm=f"{__name__}:ByToken", options={"step": 0.5}), CREDIT)
    (row,) = trained(made, a_group("a", 1.0, tokens=3))
    assert row.advantages is not None and row.advantages.tolist() == [0.0, 0.0, 0.5, 1.0]


def test_advantages_that_do_not_fit_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, said in (([0.5], "1 advantages for 2"), ([[0.1, 0.2], [0.3]], "1 turns and was given 2")):
        monkeypatch.setattr(Half, "advantages", lambda self, batch, wrong=wrong: wrong)
        with pytest.raises(ConfigError, match=f"Half cannot say.*{said}"):
            trained(Half(), a_group("a", 0.0, 1.0))


# -- other policies ---------------------------------------------------------------------------------------------------


def test_other_policies_score_a_token_at_the_temperature_at_which_it_was_sampled() -> None:
    model, rows = tiny_llama(), make_rows(5, [9, 14, 6])
    assert len({float(one) for row in rows for one in row.temperatures[row.trained]}) == 3
    for found_K, row in zip(row_logprobs(model, rows, 20), rows, strict=True):
        expected_K = [float(logprob.detach()) for logprob, _, _ in by_themselves(as_float64(model), row)]
        np.testing.assert_allclose(found_K.numpy(), expected_K, atol=1e-4)


def test_the_reference_is_the_policy_before_its_first_step_also_for_a_resumed_run(tmp_path: Path) -> None:
    session = a_session(tmp_path)
    session.model = tiny_llama(vocab_size=64)
    rows = trained(Half(), a_group("a", 0.0, 1.0), a_group("b", 0.0, 1.0, tokens=5))
    algorithm = CISPO(kl=Kl(coefficient=0.1), proximal=True)
    first = row_logprobs(session.model, rows, 100)
    session.model.save_pretrained(tmp_path / "reference")  # as `OtherPolicies` writes it, less the tokenizer
    with torch.no_grad():
        for weight in session.model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    packs = pack_rows(rows, token_budget=7)
    scored = OtherPolicies(session, algorithm).score(rows).beside(packs, rows)
    assert len(scored) > 1
    now = row_logprobs(session.model, rows, 100)
    for pack in scored:
        assert pack.reference_logprobs_T is not None and pack.proximal_logprobs_T is not None
        for found_T, expected in ((pack.reference_logprobs_T, first), (pack.proximal_logprobs_T, now)):
            expected_K = torch.cat([expected[index] for index in pack.row_indices])
            torch.testing.assert_close(found_T[pack.trained_T], expected_K, atol=1e-6, rtol=0)
    assert not torch.allclose(torch.cat(first), torch.cat(now))


def test_a_policy_with_an_adapter_is_its_own_reference_without_it(tmp_path: Path) -> None:
    session = a_session(tmp_path)
    rows = trained(Half(), a_group("a", 0.0, 1.0))
    before = torch.cat(row_logprobs(tiny_llama(vocab_size=64), rows, 100))
    session.model = add_adapter(tiny_llama(vocab_size=64), 2)
    with torch.no_grad():
        for name, weight in session.model.named_parameters():
            weight += 0.1 * (is_adapter_weight(name) and "lora_B" in name)
    packs = pack_rows(rows, token_budget=100)
    (pack,) = OtherPolicies(session, CISPO(kl=Kl(coefficient=0.1))).score(rows).beside(packs, rows)
    assert pack.reference_logprobs_T is not None
    found_K = pack.reference_logprobs_T[pack.trained_T]
    torch.testing.assert_close(found_K, torch.cat([before.view(2, 2)[index] for index in pack.row_indices]))
    assert not torch.allclose(torch.cat(row_logprobs(session.model, rows, 100)), before)
    assert not (tmp_path / "reference").exists(), "no copy is kept"
