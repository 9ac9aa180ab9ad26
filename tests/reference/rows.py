"""Rows and tiny models for the trainer's tests: seeded, small, awkward on purpose (unequal lengths, gaps)."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_bus.adapters import Row

VOCABULARY = 37


def make_row(
    rng: np.random.Generator, length: int, *, rollout_id: str = "r-0", group: str = "g-0", version: int = 0
) -> Row:
    """A row of `length` tokens: a prompt, then two sampled stretches with a tool's answer between them."""
    trained = np.zeros(length, dtype=np.bool_)
    trained[max(1, length // 4) : max(2, length // 2)] = True
    trained[max(1, 3 * length // 4) :] = True
    logprobs = np.where(trained, -rng.exponential(2.0, length), 0).astype(np.float32)
    temperatures = np.where(trained, rng.choice([0.5, 1.0, 1.5], length), 1).astype(np.float32)
    return Row(
        rollout_id=rollout_id,
        attempt=1,
        group=group,
        token_ids=rng.integers(0, VOCABULARY, length).astype(np.int32),
        trained=trained,
        logprobs=logprobs,
        temperatures=temperatures,
        version_oldest=version,
        version_newest=version,
        span_ids=(bytes(8),),
    )


def make_rows(seed: int, lengths: list[int]) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [make_row(rng, length, rollout_id=f"r-{index}") for index, length in enumerate(lengths)]


def tiny_llama(
    seed: int = 0, *, attention: str = "packed_rows", tied: bool = True, **overrides: int
) -> LlamaForCausalLM:
    """A float32 Llama of two layers with grouped-query attention, in eval mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": tied,
            "initializer_range": 0.2,  # log-probs far enough from uniform that a mistake shows
            **overrides,
        }
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
