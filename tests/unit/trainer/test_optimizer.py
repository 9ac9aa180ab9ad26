"""Muon on the matrices of the hidden layers and AdamW on the rest; and the same run twice, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.reference.rows import make_rows, tiny_llama
from tests.unit.trainer.test_checkpoint import seed_generators, step_on_random_rows
from trainer.data.batch import pack_rows
from trainer.optimize import checkpoint
from trainer.optimize.determinism import be_deterministic
from trainer.optimize.losses import cispo
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.step import train_step
from trainer.policy.model import named_weights


def test_muon_is_for_the_matrices_of_hidden_layers_and_moves_them_by_an_orthogonal_update():
    model = tiny_llama(tied=False)
    optimizer = Optimizer(model, lr=1e-2, kind="muon", grad_norm_max=float("inf"))
    of_muon = {name for name, kind in optimizer.kinds.items() if kind == "muon"}
    assert of_muon == {name for name in optimizer.kinds if name.endswith("_proj.weight")}
    assert len(of_muon) == 14
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    packs = pack_rows(make_rows(1, [20, 31]), [1.0, -1.0], token_budget=60)
    metrics = train_step(model, optimizer, packs, cispo())
    assert metrics.applied and metrics.lr == 1e-2
    for name, weight in model.named_parameters():
        update = (weight.detach() - before[name]) / metrics.lr
        if name in of_muon:
            # Newton–Schulz in bfloat16 leaves singular values near 1 (Jordan et al.: 0.7 … 1.2), times the RMS scale.
            singular = torch.linalg.svdvals(update) / (0.2 * max(update.shape) ** 0.5)
            assert 0.5 < singular.median() < 1.3, name
            assert singular.max() < 1.4, name
        else:
            assert update.abs().max() <= 1 + 1e-3, name  # Adam's first step


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_update_is_as_long_as_the_schedule_says(kind):
    """The first of four to a peak of 4e-2 is one of 1e-2, and not one of the peak."""
    moved = []
    for options in ({"lr": 4e-2, "warmup_updates": 4}, {"lr": 1e-2}):
        model = tiny_llama()
        optimizer = Optimizer(model, kind=kind, weight_decay=0.1, **options)
        for weight in model.parameters():
            weight.grad = torch.linspace(-1, 1, weight.numel()).reshape(weight.shape)
        optimizer.step()
        moved.append({name: weight.detach() for name, weight in model.named_parameters()})
    assert all(torch.equal(moved[0][name], weight) for name, weight in moved[1].items())


def test_a_resumed_run_under_muon_is_the_unbroken_one_bit_for_bit(tmp_path):
    def fresh(seed):
        model = tiny_llama(seed)
        return model, Optimizer(model, lr=1e-2, kind="muon", weight_decay=0.1, schedule="linear", total_updates=9)

    model, optimizer = fresh(0)
    seed_generators()
    step_on_random_rows(model, optimizer)
    path = checkpoint.save(tmp_path, 1, model, optimizer, {})
    unbroken = [step_on_random_rows(model, optimizer) for _ in range(2)]
    other_model, other = fresh(5)
    checkpoint.load(path, other_model, other)
    assert [step_on_random_rows(other_model, other) for _ in range(2)] == unbroken
    weights = dict(named_weights(model))
    assert all(torch.equal(weight, weights[name]) for name, weight in named_weights(other_model))

    wrong = Optimizer(other_model, lr=1e-2)
    with pytest.raises(ValueError, match="resume with the optimiser that the run began with"):
        checkpoint.load(path, other_model, wrong)
    checkpoint.load(path, other_model, None)  # the weights alone are nobody's


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(ValueError, match="optimizer='sgd' is not known"):
        Optimizer(tiny_llama(), lr=1e-3, kind="sgd")  # pyright: ignore[reportArgumentType]


def losses_of_a_run(seed):
    be_deterministic(seed)
    model = tiny_llama(int(torch.randint(1000, ())))
    optimizer = Optimizer(model, lr=1e-2)
    rows = make_rows(int(np.random.randint(1000)), [21, 13, 40, 8, 55])
    packs = pack_rows(rows, np.linspace(-1, 1, 5), token_budget=64)
    return [train_step(model, optimizer, packs, cispo()).loss.hex() for _ in range(3)]


def test_two_deterministic_runs_are_the_same_bit_for_bit_and_another_seed_is_another_run():
    """In processes of their own: the switch is the process's, and other tests are not to run under it."""
    source = (
        "import json, sys\nfrom tests.unit.trainer.test_optimizer import losses_of_a_run\n"
        "print(json.dumps([losses_of_a_run(int(seed)) for seed in sys.argv[1:]]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", source, "4", "4", "5"],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True, timeout=280,
    )  # fmt: skip
    first, again, other = json.loads(ended.stdout)
    assert first == again
    assert first != other
