"""What each process of test_parallel.py runs: `torchrun --nproc-per-node 2 -m tests.unit.trainer.ranks OUT`."""

import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import torch

from tests.reference.rows import VOCABULARY, make_rows, tiny_llama
from tests.reference.trajectories import Said, rollout_of, scored_rollouts
from tests.unit.trainer.test_checkpoint import small_tokenizer
from trainer.algorithms.base import Setting
from trainer.algorithms.other_policies import row_logprobs
from trainer.algorithms.ppo import PPO
from trainer.config import PolicySection, TrainSection
from trainer.data.batch import pack_rows
from trainer.optimize import checkpoint, losses
from trainer.optimize.following import follow, reference_beside
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.parallel import shard
from trainer.optimize.step import train_step
from trainer.policy.critic import Critic, value_step
from trainer.policy.lora import add_adapter, merged_weights
from trainer.policy.model import gathered_weights, is_adapter_weight, load_policy, save_policy, whole
from trainer.ranks import World, everyone, join, lead, leave, take_the_lead

LENGTHS = [11, 4, 27, 18, 2, 9, 33]
ADVANTAGES = np.linspace(-1.5, 2.0, len(LENGTHS), dtype=np.float32)
LOSSES = {"cispo": losses.cispo(), "gspo": losses.gspo(), "ppo_clip": losses.ppo_clip(), "sft": losses.sft}


def rows_of_a_step(order=None):
    rows = make_rows(3, LENGTHS)
    rows[5] = replace(rows[5], rollout_id=rows[0].rollout_id)  # a rollout whose rows land on different ranks
    order = range(len(rows)) if order is None else order
    return [rows[k] for k in order], ADVANTAGES[list(order)]


def model_of(world: World, *, tied=True, dtype=torch.float64):
    model = tiny_llama(0, tied=tied).to(dtype)
    if world.size > 1:
        shard(model, world)
    return model


def adapted(world: World):
    """A policy with an adapter that says something: a new one's B is zero."""
    model = add_adapter(tiny_llama(0), 2).double()
    generator = torch.Generator().manual_seed(4)
    for name, weight in model.named_parameters():
        if is_adapter_weight(name):
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    if world.size > 1:
        shard(model, world)
    return model


def one_step(world, loss, *, token_budget=40, normalise="token", tied=True, order=None, rows=None, model=None):
    """The loss, the metrics and every gradient of one step that changes nothing."""
    model = model_of(world, tied=tied) if model is None else model
    optimizer = Optimizer(model, lr=0.0, grad_norm_max=float("inf"))
    rows, advantages = rows_of_a_step(order) if rows is None else rows
    packs = pack_rows(rows, advantages, token_budget=token_budget, normalise=normalise, ranks=world.size)
    gradients = {}

    def keep():
        for name, weight in model.named_parameters():
            if weight.grad is not None:  # a frozen base has none
                gradients[name] = whole(weight.grad).tolist()
        return 1.0

    optimizer.clip = keep
    metrics = train_step(model, optimizer, packs[world.rank :: world.size], loss)
    return {
        "loss": metrics.loss, "means": metrics.means, "rows": metrics.num_rows, "tokens": metrics.num_tokens,
        "trained": metrics.trained_tokens, "flops": metrics.flops, "gradients": gradients,
    }  # fmt: skip


def invariance(world: World, out: Path) -> dict:
    found = {}
    for name, loss in LOSSES.items():
        found[name] = one_step(world, loss)
    found["rollout"] = one_step(world, LOSSES["cispo"], normalise="rollout", tied=False)
    found["small packs"] = one_step(world, LOSSES["cispo"], token_budget=34, order=[6, 2, 0, 5, 1, 4, 3])
    rows, advantages = rows_of_a_step()
    found["idle rank"] = one_step(world, LOSSES["gspo"], rows=(rows[2:3], advantages[2:3]))
    found["adapter"] = one_step(world, LOSSES["cispo"], model=adapted(world))
    found["adapter, idle rank"] = one_step(
        world, LOSSES["cispo"], rows=(rows[2:3], advantages[2:3]), model=adapted(world)
    )
    return found


def steps(world: World, out: Path) -> dict:
    """Three steps with each optimiser, a checkpoint after the second, and what it holds; losses and final weights."""
    found = {}
    for kind in ("adamw", "muon"):
        model = model_of(world)
        optimizer = Optimizer(model, lr=1e-2, kind=kind, weight_decay=0.1)
        rows, advantages = rows_of_a_step()
        packs = pack_rows(rows, advantages, token_budget=40, ranks=world.size)[world.rank :: world.size]
        made = []
        for step in range(3):
            made.append(train_step(model, optimizer, packs, LOSSES["cispo"]).loss)
            if step == 1:
                path = checkpoint.save(out.parent / f"{world.size}-{kind}", 2, model, optimizer, {"step": 2})
        everyone(None)  # rank 0 has written it
        other = model_of(world)
        again = Optimizer(other, lr=1e-2, kind=kind, weight_decay=0.1)
        assert checkpoint.load(path, other, again).extra == {"step": 2}
        resumed = train_step(other, again, packs, LOSSES["cispo"]).loss
        same = all(torch.equal(whole, gathered_weights(other)[name]) for name, whole in gathered_weights(model).items())
        weights = {name: whole.tolist() for name, whole in gathered_weights(model).items()}
        found[kind] = {"losses": made, "resumed": resumed, "same": same, "weights": weights, "path": str(path)}
    return found


def mixed(world: World, out: Path) -> dict:
    """One step in bfloat16 from float32 masters."""
    model = tiny_llama(0)
    shard(model, world, compute_dtype=torch.bfloat16)
    optimizer = Optimizer(model, lr=1e-3)
    rows, advantages = rows_of_a_step()
    packs = pack_rows(rows, advantages, token_budget=40, ranks=world.size)[world.rank :: world.size]
    metrics = train_step(model, optimizer, packs, LOSSES["cispo"])
    masters = {str(weight.dtype) for weight in model.parameters()}
    return {"loss": metrics.loss, "grad_norm": metrics.grad_norm, "masters": sorted(masters)}


def led(world: World, out: Path) -> dict:
    """What a loop of one process does, on the leader; the other rank does what it is told."""
    model = model_of(world)
    if not world.leads:
        follow(world, model, [losses.sft, LOSSES["cispo"]])
        return {}
    take_the_lead(model, world)
    optimizer = Optimizer(model, lr=1e-2, schedule="linear", total_updates=5)
    rows, advantages = rows_of_a_step()
    packs = pack_rows(rows, advantages, token_budget=40)  # three: one rank is padded
    made = [
        train_step(model, optimizer, packs, LOSSES["cispo"]).loss,
        train_step(model, optimizer, packs, losses.sft).loss,
    ]
    path = checkpoint.save(out.parent / f"led-{world.size}", 1, model, optimizer, {})
    train_step(model, optimizer, packs, LOSSES["cispo"])
    optimizer = Optimizer(model, lr=1e-2, schedule="linear", total_updates=5)
    checkpoint.load(path, model, optimizer)
    resumed = train_step(model, optimizer, packs, LOSSES["cispo"]).loss
    weights = gathered_weights(model)
    save_policy(model, small_tokenizer(), out.parent / f"exported-{world.size}")
    exported = load_policy(out.parent / f"exported-{world.size}", dtype=torch.float64)
    same = all(torch.equal(weights[name], whole) for name, whole in gathered_weights(exported).items())
    if world.size > 1:
        lead(model, "end")
    return {"losses": [*made, resumed], "lr": optimizer.lr, "exported": same}


def adapter(world: World, out: Path) -> dict:
    """Two steps of an adapter, a checkpoint, what goes to engines, and what adapter, base and a reference say of rows."""
    model = adapted(world)
    directory = out.parent / f"reference-{world.size}"
    if world.leads:
        save_policy(tiny_llama(7), small_tokenizer(), directory)
    if not world.leads:
        follow(world, model, [LOSSES["cispo"]])
        return {}
    take_the_lead(model, world)
    optimizer = Optimizer(model, lr=1e-2, weight_decay=0.1)
    rows, advantages = rows_of_a_step()
    packs = pack_rows(rows, advantages, token_budget=40)
    made = [train_step(model, optimizer, packs, LOSSES["cispo"]).loss for _ in range(2)]
    path = checkpoint.save(out.parent / f"adapter-{world.size}", 1, model, optimizer, {})
    kept = sorted(checkpoint.read(path).weights)
    said = {
        "adapted": row_logprobs(model, rows, 40),
        "base": row_logprobs(model, rows, 40, with_adapter=False),
        "reference": row_logprobs(reference_beside(model, PolicySection(model=""), directory), rows, 40),
    }
    train_step(model, optimizer, packs, LOSSES["cispo"])
    checkpoint.load(path, model, optimizer)
    made.append(train_step(model, optimizer, packs, LOSSES["cispo"]).loss)
    merged = {name: tensor.tolist() for name, tensor in merged_weights(model).items()}
    if world.size > 1:
        lead(model, "end")
    scores = {name: torch.cat(one).tolist() for name, one in said.items()}
    return {"losses": made, "kept": kept, "scores": scores, "merged": merged}


def value_steps(world: World, out: Path) -> dict:
    """Two steps of a critic in float64, with the gradients of the first: each rank with its packs."""
    model = Critic(tiny_llama(2).model).double()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(5))
    if world.size > 1:
        shard(model, world, backbone=model.backbone)
    optimizer = Optimizer(model, lr=1e-2, weight_decay=0.1)
    rows, _ = rows_of_a_step()
    packs = pack_rows(rows, np.zeros(len(rows)), token_budget=40, ranks=world.size)[world.rank :: world.size]
    rng = np.random.default_rng(6)
    targets, old = ([rng.normal(size=len(row.token_ids)) for row in rows] for _ in range(2))
    gradients, clip = {}, optimizer.clip

    def keep():
        gradients.update({name: whole(weight.grad).tolist() for name, weight in model.named_parameters()})
        return clip()

    optimizer.clip = keep
    made = [value_step(model, optimizer, packs, targets, old, clip=0.3)]
    optimizer.clip = clip
    made.append(value_step(model, optimizer, packs, targets, old, clip=0.3))
    weights = {name: tensor.tolist() for name, tensor in gathered_weights(model).items()}
    lines = [[one.loss, one.clip_share, one.grad_norm] for one in made]
    return {"lines": lines, "gradients": gradients, "weights": weights}


def critic(world: World, out: Path) -> dict:
    """PPO as the loop has it, on a policy that has moved since the run began: three steps, and a checkpoint taken up."""
    ppo = PPO(critic_lr=3e-3)
    model = tiny_llama(0)
    directory = out.parent / f"first-{world.size}"
    if world.leads:
        save_policy(tiny_llama(8), small_tokenizer(), directory)
    if world.size > 1:
        shard(model, world)
    if not world.leads:
        follow(world, model, [ppo.loss])
        return {}
    take_the_lead(model, world)
    optimizer = Optimizer(model, lr=1e-2)
    train = TrainSection(tasks="", held_out="", token_budget=40)
    ppo.prepare(Setting(model, directory, train, 0))
    rng = np.random.default_rng(0)
    said = [Said([1, 2, n], rng.integers(1, VOCABULARY, 4).tolist()) for n in range(9)]
    batch = scored_rollouts([rollout_of(f"r-{n}", [one], float(rng.normal())) for n, one in enumerate(said)])
    lines = []
    path = None
    for step in range(4):
        if step == 3:  # the third once more
            checkpoint.load(path, model, optimizer, parts=ppo.parts())
        if step == 2:
            parts = ppo.parts()
            path = checkpoint.save(out.parent / f"critic-{world.size}", 1, model, optimizer, {}, parts=parts)
        earned = zip(batch, ppo.advantages(batch), strict=True)
        rows = [
            row.with_advantages(dict(zip(row.span_ids, one, strict=True))) for who, one in earned for row in who.rows
        ]
        lines.append(ppo.learn(rows)["value_loss"])
        (even,) = ppo.updates(rows)
        lines.append(train_step(model, optimizer, pack_rows(even, token_budget=40), ppo.loss).loss)
    if world.size > 1:
        lead(model, "end")
    return {"lines": lines, "kept": len(checkpoint.read(path).parts["critic"].weights)}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    torch.set_num_threads(1)
    here = join("cpu")
    scenarios = (invariance, steps, mixed, led, adapter, value_steps, critic)
    answers = {scenario.__name__: scenario(here, target) for scenario in scenarios}
    if here.leads:
        target.write_bytes(msgspec.msgpack.encode(answers))
    leave()
