"""Writes trl.npz: what TRL's GRPOTrainer computes on fixed rows with a fixed model, for each loss that both of us have.

    python -m bench.install                                        # TRL in an environment of its own, .bench/trl
    OMP_NUM_THREADS=1 .bench/trl/bin/python -m tests.reference.trl.make

Made with trl 1.16.0, torch 2.13.0 (CPU), transformers 5.23.0, accelerate 1.15.0, numpy 2.4.6, in float32. The rows go
through GRPOTrainer.compute_loss as it is, padded as it pads; nothing in TRL is patched. Old and reference log-probs are
the model's own with noise, so that ratios are clipped on both sides; some completions hold tokens that are not trained,
as tool answers are.

In the file: `weights` and, for each case, `<case>`: all weights or their gradients in one vector, in the order of
named_parameters(); `about`, a JSON string: the versions, the temperature, the rows as `bench.trl_step.padded` takes them
with the log-probs and entropies that TRL computed, the model's config, and for each case TRL's options and its loss.
"""

import json
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.trl_step import grpo_trainer, padded

FIXTURES = Path(__file__).with_name("trl.npz")
VOCABULARY = 23
TEMPERATURE = 0.7
PROMPT_LENGTHS = [3, 1, 9, 5, 2, 7]
COMPLETION_LENGTHS = [8, 3, 14, 1, 20, 6]
ADVANTAGES = [1.0, -0.5, 0.75, -1.5, 2.0, -0.25]

# TRL's options. epsilon and epsilon_high clip the ratio to [1 - epsilon, 1 + epsilon_high]; for cispo alone epsilon_high
# is the greatest ratio itself.
PPO = {"epsilon": 0.2, "epsilon_high": 0.28}
POLICY_TERMS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", **PPO},
    "bnpo": {"loss_type": "bnpo", **PPO},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 24, **PPO},
    "dapo": {"loss_type": "dapo", **PPO},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.06},
}
KL = {"beta": 0.05, "use_bias_correction_kl": False}
CASES = {
    **POLICY_TERMS,
    **{f"{name}_kl": {**options, **KL} for name, options in POLICY_TERMS.items()},
    "dapo_kl_weighted": {**POLICY_TERMS["dapo"], "beta": 0.05, "use_bias_correction_kl": True},
    "dapo_dual": {**POLICY_TERMS["dapo"], "delta": 1.6},
    "dapo_masked_kl": {**POLICY_TERMS["dapo"], "off_policy_mask_threshold": 0.05, **KL},
    "dapo_entropy": {**POLICY_TERMS["dapo"], "entropy_coef": 0.02},
}
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,  # log-probs far enough from uniform that a mistake shows
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).float()


def make_rows() -> list[dict[str, Any]]:
    rng = np.random.default_rng(7)
    rows = []
    for prompt, completion, advantage in zip(PROMPT_LENGTHS, COMPLETION_LENGTHS, ADVANTAGES, strict=True):
        tool_mask = np.ones(completion, np.int64)
        if completion >= 8:
            tool_mask[completion // 4 : completion // 2] = 0
        rows.append(
            {
                "prompt": rng.integers(1, VOCABULARY, prompt).tolist(),
                "completion": rng.integers(1, VOCABULARY, completion).tolist(),
                "tool_mask": tool_mask.tolist(),
                "advantage": advantage,
                "old": [0.0] * completion,
            }
        )
    return rows


def main() -> None:
    torch.set_num_threads(1)
    arrays = {"weights": flat(weight.detach() for weight in make_model().parameters())}
    rows, results = make_rows(), {}
    for case, options in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            model = make_model()
            trainer = grpo_trainer(model, Path(scratch), temperature=TEMPERATURE, **options)
            model.train()
            if "current" not in rows[0]:
                score(trainer, model, rows)
            loss = trainer.compute_loss(model, padded(rows))
            loss.backward()
        results[case] = {"options": options, "loss": float(loss.detach())}
        arrays[case] = flat(weight.grad for weight in model.parameters())
        print(f"{case:18} {float(loss.detach()): .7f}")
    about = {
        "versions": {name: version(name) for name in ("trl", "torch", "transformers", "accelerate", "numpy")},
        "temperature": TEMPERATURE,
        "rows": rows,
        "config": CONFIG,
        "cases": results,
    }
    np.savez_compressed(FIXTURES, about=json.dumps(about), **arrays)
    print(f"{FIXTURES}: {FIXTURES.stat().st_size} bytes, {about['versions']}")


def flat(tensors: Iterable[torch.Tensor]) -> np.ndarray:
    return torch.cat([tensor.flatten() for tensor in tensors]).numpy()


def score(trainer: Any, model: LlamaForCausalLM, rows: list[dict[str, Any]]) -> None:
    """Add what TRL computes, and old and reference log-probs near it."""
    batch = padded(rows)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logprobs, entropies, _ = trainer._get_per_token_logps_and_entropies(
            model, ids, mask, batch["completion_ids"].size(1), compute_entropy=True
        )
    rng = np.random.default_rng(8)
    for at, row in enumerate(rows):
        length = len(row["completion"])
        row["current"] = logprobs[at, :length].tolist()
        row["entropies"] = entropies[at, :length].tolist()
        # An offset for the row too: else the mean ratio of a row, which GSPO clips, is always near 1.
        noise = rng.normal(0, 0.4, length) + rng.normal(0, 0.1)
        row["old"] = (logprobs[at, :length].numpy() + noise).astype(np.float32).tolist()
        noise = rng.normal(0, 0.3, length)
        row["reference"] = (logprobs[at, :length].numpy() + noise).astype(np.float32).tolist()


if __name__ == "__main__":
    main()
