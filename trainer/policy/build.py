"""The policy as [policy] of RUN.toml asks for it: one place that knows the order in which its parts go together."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from trainer.config import PolicySection, ServeSection
from trainer.policy.logprob import head_precision
from trainer.policy.lora import ALL_LINEAR, add_adapter
from trainer.policy.model import load_policy
from trainer.policy.precision import checkpoint_activations, compile_layers, forward_precision


def build_policy(section: PolicySection, directory: Path, *, device: str = "cpu") -> PreTrainedModel:
    """Load the model of a directory, ready to be trained as the section says; shard it afterwards, if at all.

    Raises ValueError for what the directory, the model or this device does not have, saying what is missing, and
    ModuleNotFoundError where an adapter is asked for without peft.
    """
    compute_dtype: torch.dtype = getattr(torch, section.compute_dtype)
    model = load_policy(directory, attention=section.attention, compute_dtype=compute_dtype, device=device)
    if section.lora_rank:
        # Before the precision: it rounds for good what is not trained.
        add_adapter(
            model,
            section.lora_rank,
            alpha=section.lora_alpha or None,
            targets=section.lora_targets or ALL_LINEAR,
        )
    forward_precision(model, compute_dtype)
    if section.head_dtype != "float32":
        head_precision(model, getattr(torch, section.head_dtype))
    if section.compile:
        compile_layers(model)
    if section.recompute:
        checkpoint_activations(model, keep_attention=not section.recompute_attention)
    return model


def serves_adapters(section: ServeSection, rank: int) -> bool:
    """Whether the engines take adapters of this rank by themselves, so that the base need never be pushed."""
    return section.engine == "vllm" and 0 < rank <= section.lora_rank_max
