"""Rows and tiny models for the trainer's tests: seeded, small, awkward on purpose (unequal lengths, gaps)."""

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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


def tiny_model(
    family: str, seed: int = 0, *, attention: str = "packed_rows", vocabulary: int = VOCABULARY
) -> PreTrainedModel:
    """A float32 model of two layers of a family: "llama", "qwen2" (biases), "qwen3" (norms of queries and keys), or
    "qwen3-window" (whose second layer looks back at 5 tokens only). All with grouped-query attention, in eval mode."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": family != "qwen2", "initializer_range": 0.2,
    }  # fmt: skip
    if family == "llama":
        config, kind = LlamaConfig(**shape), LlamaForCausalLM
    elif family == "qwen2":
        config, kind = Qwen2Config(**shape), Qwen2ForCausalLM
    else:
        window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
        config = Qwen3Config(**shape, head_dim=16, **(window if family == "qwen3-window" else {}))
        kind = Qwen3ForCausalLM
    model = kind._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # fresh ones are all 1 or all 0, which hides mistakes
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model
