"""What bench.step's own members do, and the rows and the model that all its members read.

What always holds: a member computes what the others compute, one whole step at each call; see bench/step.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bench import common
from bench.resident import peak_bytes, reset_peak, resident_bytes
from lightning_bus.adapters import Row
from trainer.data.batch import PackedBatch, pack_rows
from trainer.optimize.losses import LossInputs, dapo
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.step import train_step
from trainer.policy.attention import choose_backend
from trainer.policy.logprob import CHUNK_TOKENS, chunked_logprobs, head_weight

# N rows, B rows of a micro-batch, L the longest of them, T packed tokens, K scored tokens, V vocabulary, D model width.


@dataclass(frozen=True)
class Size:
    """A Llama and a step for it. scale shortens the rows, for a step of the larger model to end soon."""

    vocabulary: int
    width: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    rows: int
    scale: float


SIZES = {
    "1M": Size(1024, 128, 384, 4, 4, 4, rows=32, scale=1.0),
    "135M": Size(49152, 576, 1536, 30, 9, 3, rows=8, scale=0.3),  # SmolLM2-135M's shape
}
TOKEN_BUDGET = 4096
MICRO_BATCH_ROWS = 8  # TRL's default per_device_train_batch_size
HEAD_TOKENS = 4096
LR = 1e-6
PHASES = ("forward_s", "backward_s", "update_s")
LAYOUTS = ("packed", "padded")
HEADS = ("head_chunked", "head_full")


# -- rows and model ---------------------------------------------------------------------------------------------------


def make_rows(size: Size, count: int, *, even: bool = False) -> list[Row]:
    """Rows of `count` rollouts, four to a task: a prompt, then what was sampled with a tool's answer in it.

    even  all of one length, so that there is nothing to pad
    """
    rng = np.random.default_rng(0)
    made = []
    for at in range(count):
        prompt = int(np.clip(size.scale * rng.lognormal(np.log(120), 0.6), 8, size.scale * 600))
        completion = int(np.clip(size.scale * rng.lognormal(np.log(150), 0.8), 10, size.scale * 1024))
        if even:
            prompt, completion = int(size.scale * 120), int(size.scale * 150)
        length = prompt + completion
        trained = np.arange(length) >= prompt
        trained[prompt + 2 * completion // 5 : prompt + 3 * completion // 5] = False
        # Near what a model with random weights says, so that ratios lie around 1 as they do in training.
        logprobs = np.where(trained, rng.normal(-np.log(size.vocabulary), 0.1, length), 0)
        made.append(
            Row(
                rollout_id=f"r-{at}",
                attempt=1,
                group=f"g-{at // 4}",
                token_ids=rng.integers(1, size.vocabulary, length).astype(np.int32),
                trained=trained,
                logprobs=logprobs.astype(np.float32),
                temperatures=np.ones(length, np.float32),
                version_oldest=0,
                version_newest=0,
                span_ids=(bytes(8),),
                advantages=np.full(length, rng.normal(), np.float32),
            )
        )
    return made


def write_inputs(directory: Path, size: Size, rows: Sequence[Row], threads: int) -> int:
    """Write what all parties read, and return how many parameters the model has."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory / "model")
    (directory / "rows.json").write_text(json.dumps([for_trl(row) for row in rows]))
    options = {"threads": threads, "micro_batch_rows": MICRO_BATCH_ROWS, "lr": LR}
    (directory / "options.json").write_text(json.dumps(options))
    return sum(weight.numel() for weight in model.parameters())


def for_trl(row: Row) -> dict[str, Any]:
    start = int(row.trained.argmax())
    assert row.advantages is not None
    return {
        "prompt": row.token_ids[:start].tolist(),
        "completion": row.token_ids[start:].tolist(),
        "tool_mask": row.trained[start:].astype(int).tolist(),
        "old": row.logprobs[start:].tolist(),
        "advantage": float(row.advantages[0]),
    }


def from_trl(at: int, given: dict[str, Any]) -> Row:
    prompt, mask = given["prompt"], given["tool_mask"]
    trained = np.array([False] * len(prompt) + [bool(flag) for flag in mask])
    logprobs = np.array([0.0] * len(prompt) + given["old"], np.float32)
    return Row(
        rollout_id=f"r-{at}",
        attempt=1,
        group=f"g-{at}",
        token_ids=np.array(prompt + given["completion"], np.int32),
        trained=trained,
        logprobs=np.where(trained, logprobs, 0).astype(np.float32),
        temperatures=np.ones(len(trained), np.float32),
        version_oldest=0,
        version_newest=0,
        span_ids=(bytes(8),),
        advantages=np.full(len(trained), given["advantage"], np.float32),
    )


# -- the members ------------------------------------------------------------------------------------------------------


def run_member(member: str, directory: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    before = resident_bytes()
    work = MEMBERS[member](directory)
    if member in HEADS:
        before = resident_bytes()
    print("ready", flush=True)
    for _ in sys.stdin:
        reset_peak()
        began, began_cpu = time.perf_counter(), time.process_time()
        said = work()
        took = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - began_cpu}
        common.report({**said, **took, "peak_bytes": peak_bytes() - before})


def packed_member(directory: Path) -> Callable[[], dict[str, float]]:
    model, rows = load(directory, choose_backend())
    optimizer = Optimizer(model, lr=LR, weight_decay=0.0)
    packs = pack_rows(rows, token_budget=TOKEN_BUDGET)

    def step() -> dict[str, float]:
        metrics = train_step(model, optimizer, packs, dapo())
        phases = {name: getattr(metrics, name) for name in PHASES}
        return {"loss": metrics.loss, "grad_norm": metrics.grad_norm, **phases}

    return step


def padded_member(directory: Path) -> Callable[[], dict[str, float]]:
    """The step as it would be without packing: one row a line, filled up to the longest of its micro-batch."""
    model, rows = load(directory, "sdpa")
    optimizer = Optimizer(model, lr=LR, weight_decay=0.0)
    packs = [pack_rows([row], token_budget=len(row.token_ids))[0] for row in rows]
    micro_batches = [packs[at : at + MICRO_BATCH_ROWS] for at in range(0, len(packs), MICRO_BATCH_ROWS)]
    denominator = float(sum(pack.trained_T.sum() for pack in packs))
    loss = dapo()

    def step() -> dict[str, float]:
        total = 0.0
        for micro_batch in micro_batches:
            hidden_KD = torch.cat(padded_hidden(model, micro_batch))
            scored = {
                name: torch.cat([getattr(pack, name)[pack.trained_T] for pack in micro_batch])
                for name in ("targets_T", "temperatures_T", "logprobs_T", "advantages_T")
            }
            logprobs_K, entropies_K = chunked_logprobs(
                hidden_KD, head_weight(model), scored["targets_T"], scored["temperatures_T"]
            )
            inputs = LossInputs(
                logprobs_K=logprobs_K,
                behaviour_logprobs_K=scored["logprobs_T"],
                advantages_K=scored["advantages_T"],
                entropies_K=entropies_K,
                row_K=torch.cat([pack.row_T[pack.trained_T] + at for at, pack in enumerate(micro_batch)]),
                num_rows=len(micro_batch),
            )
            batch_loss = loss(inputs)[0].sum() / denominator
            batch_loss.backward()
            total += float(batch_loss.detach())
        norm = optimizer.clip()
        optimizer.step()
        return {"loss": total, "grad_norm": norm}

    return step


def padded_hidden(model: PreTrainedModel, rows: Sequence[PackedBatch]) -> list[torch.Tensor]:
    """The hidden states (K, D) of each row's scoring positions."""
    ids_BL = torch.nn.utils.rnn.pad_sequence([row.token_ids_T for row in rows], batch_first=True)
    mask_BL = torch.nn.utils.rnn.pad_sequence([torch.ones(row.num_tokens) for row in rows], batch_first=True)
    hidden_BLD = model.base_model(input_ids=ids_BL, attention_mask=mask_BL.long(), use_cache=False).last_hidden_state
    return [hidden_BLD[at, : row.num_tokens][row.trained_T] for at, row in enumerate(rows)]


def head_member(directory: Path, *, chunked: bool) -> Callable[[], dict[str, float]]:
    """Forward and backward of the head alone, on as many tokens as a pack may hold."""
    model, _ = load(directory, "sdpa")
    weight_VD = head_weight(model).detach().clone().requires_grad_()
    del model
    rng = torch.Generator().manual_seed(0)
    hidden_KD = torch.randn(HEAD_TOKENS, weight_VD.shape[1], generator=rng).requires_grad_()
    targets_K = torch.randint(weight_VD.shape[0], (HEAD_TOKENS,), generator=rng)
    temperatures_K = torch.full((HEAD_TOKENS,), 0.7)

    def step() -> dict[str, float]:
        if chunked:
            logprobs_K, _ = chunked_logprobs(hidden_KD, weight_VD, targets_K, temperatures_K, chunk_tokens=CHUNK_TOKENS)
        else:
            logits_KV = hidden_KD @ weight_VD.T / temperatures_K[:, None]
            logprobs_K = logits_KV.log_softmax(-1).gather(-1, targets_K[:, None]).squeeze(-1)
        loss = -logprobs_K.mean()
        loss.backward()
        return {"loss": float(loss.detach()), "grad_norm": float(weight_VD.grad.norm())}  # type: ignore[union-attr]

    return step


MEMBERS: dict[str, Callable[[Path], Callable[[], dict[str, float]]]] = {
    "packed": packed_member,
    "padded": padded_member,
    "head_chunked": lambda directory: head_member(directory, chunked=True),
    "head_full": lambda directory: head_member(directory, chunked=False),
}


def load(directory: Path, attention: str) -> tuple[PreTrainedModel, list[Row]]:
    model = LlamaForCausalLM.from_pretrained(directory / "model", dtype=torch.float32, attn_implementation=attention)
    return model.eval(), load_rows(directory)


def load_rows(directory: Path) -> list[Row]:
    return [from_trl(at, row) for at, row in enumerate(json.loads((directory / "rows.json").read_text()))]
