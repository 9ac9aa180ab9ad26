"""Two processes over gloo compute what one does: loss, gradients, weights, checkpoints, with FSDP2 as on GPUs."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from tests.reference.rows import make_rows, tiny_llama
from tests.unit.trainer import ranks
from trainer.data.batch import pack_rows
from trainer.optimize import checkpoint
from trainer.optimize.losses import cispo
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.parallel import packed, run, unpacked
from trainer.optimize.step import train_step
from trainer.policy.logprob import token_scores
from trainer.ranks import World, everyone

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.timeout(1200)  # the first of these tests waits for both processes


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, dict]:
    """What two processes found, scenario by scenario."""
    out = tmp_path_factory.mktemp("ranks") / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    ended = subprocess.run(
        [*command, "-m", "tests.unit.trainer.ranks", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stderr
    return msgspec.msgpack.decode(out.read_bytes())


def assert_same(found, expected, *, rtol=1e-9, atol=1e-11):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(np.array(found[name]), np.array(value), rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.slow
def test_loss_gradients_and_metrics_are_those_of_one_process(two_ranks, tmp_path):
    two = two_ranks["invariance"]
    one = ranks.invariance(World(), tmp_path / "one")
    for name, expected in one.items():
        assert two[name]["loss"] == pytest.approx(expected["loss"], rel=1e-9), name
        assert_same(two[name]["gradients"], expected["gradients"])
        assert_same(two[name]["means"], expected["means"], rtol=1e-6)
        for count in ("rows", "tokens", "trained", "flops"):
            assert two[name][count] == expected[count], (name, count)
    assert_same(one["small packs"]["gradients"], one["cispo"]["gradients"])


@pytest.mark.slow
def test_steps_and_checkpoints_are_those_of_one_process_and_either_resumes_the_other(two_ranks, tmp_path):
    two = two_ranks["steps"]
    one = ranks.steps(World(), tmp_path / "one")
    # Muon orthogonalises in bfloat16, which turns a last bit of the gradient into its own rounding.
    for kind, rtol, atol in (("adamw", 1e-7, 1e-7), ("muon", 2e-2, 2e-3)):
        assert two[kind]["resumed"] == two[kind]["losses"][2]
        assert two[kind]["same"] and one[kind]["same"]
        assert two[kind]["losses"][:2] == pytest.approx(one[kind]["losses"][:2], rel=1e-3)
        assert_same(two[kind]["weights"], one[kind]["weights"], rtol=rtol, atol=atol)
        # A world of another size goes on from the file: weights and moments of one are what those of two amount to.
        for there, here in ((two, one), (one, two)):
            model = tiny_llama(5).double()
            optimizer = Optimizer(model, lr=1e-2, kind=kind, weight_decay=0.1)
            checkpoint.load(Path(there[kind]["path"]), model, optimizer)
            rows, advantages = ranks.rows_of_a_step()
            loss = train_step(model, optimizer, pack_rows(rows, advantages, token_budget=40), cispo()).loss
            assert loss == pytest.approx(here[kind]["losses"][2], rel=rtol * 10)


@pytest.mark.slow
def test_layers_compute_in_bfloat16_from_float32_masters(two_ranks):
    two = two_ranks["mixed"]
    model = tiny_llama(0)
    rows, advantages = ranks.rows_of_a_step()
    exact = train_step(model, Optimizer(model, lr=1e-3), pack_rows(rows, advantages, token_budget=40), cispo())
    assert two["masters"] == ["torch.float32"]
    assert two["loss"] == pytest.approx(exact.loss, abs=0.05)
    assert two["loss"] != exact.loss
    assert two["grad_norm"] == pytest.approx(exact.grad_norm, rel=0.1)


@pytest.mark.slow
def test_a_loop_of_one_process_leads_the_others_by_itself(two_ranks, tmp_path):
    two = two_ranks["led"]
    one = ranks.led(World(), tmp_path / "one")
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-7)
    assert two["lr"] == one["lr"]
    assert two["exported"] and one["exported"]


@pytest.mark.slow
def test_an_adapter_its_base_and_a_reference_say_and_learn_what_they_do_in_one_process(two_ranks, tmp_path):
    two, one = two_ranks["adapter"], ranks.adapter(World(), tmp_path / "one")
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-9)
    assert two["kept"] == one["kept"]
    for name in ("adapted", "base"):
        np.testing.assert_allclose(two["scores"][name], one["scores"][name], rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(two["scores"]["reference"], one["scores"]["reference"], rtol=1e-5)
    assert np.abs(np.subtract(one["scores"]["adapted"], one["scores"]["base"])).max() > 0.01
    # The adapter's update is added in float32.
    assert_same(two["merged"], one["merged"], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_the_steps_of_a_critic_are_those_of_one_process(two_ranks, tmp_path):
    two, one = two_ranks["value_steps"], ranks.value_steps(World(), tmp_path / "one")
    np.testing.assert_allclose(two["lines"], one["lines"], rtol=1e-9)
    assert_same(two["gradients"], one["gradients"])
    assert_same(two["weights"], one["weights"], rtol=1e-7, atol=1e-7)


@pytest.mark.slow
def test_ppo_on_two_ranks_learns_and_resumes_as_in_one_process(two_ranks, tmp_path):
    two, one = two_ranks["critic"], ranks.critic(World(), tmp_path / "one")
    assert two["lines"] == pytest.approx(one["lines"], rel=1e-5)
    assert two["lines"][6:] == two["lines"][4:6]
    assert two["kept"] == one["kept"]


def test_a_pack_survives_the_way_to_another_rank():
    (pack,) = pack_rows(make_rows(1, [9, 5]), [1.0, -1.0], token_budget=20, version=3)
    pack = pack.with_logprobs(reference_K=pack.logprobs_T[pack.trained_T])
    arrived = unpacked(msgspec.msgpack.decode(msgspec.msgpack.encode(packed(pack))))
    for field in dataclasses.fields(pack):
        ours, theirs = getattr(pack, field.name), getattr(arrived, field.name)
        same = torch.equal(ours, theirs) and ours.dtype == theirs.dtype if torch.is_tensor(ours) else ours == theirs
        assert same, field.name


def test_alone_nothing_is_sharded_or_sent():
    model = tiny_llama()
    (pack,) = pack_rows(make_rows(1, [9, 5]), [1.0, -1.0], token_budget=20)
    expected = token_scores(model, pack).logprobs_K
    assert torch.equal(run(model, token_scores, model, pack).logprobs_K, expected)
    assert everyone({"a": 1}) == [{"a": 1}]
    assert (World().leads, World().size) == (True, 1)
