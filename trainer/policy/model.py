"""The policy as a directory and as a module: a Hugging Face causal LM and its tokenizer, in and out.

A directory that `save_policy` has returned from is complete and survives power loss; one that it has not is
not there. Weights have one name each, the model's own: tied embeddings count once, on disk, in a checkpoint
and on the wire.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trainer.policy.attention import choose_backend


def load_policy(
    directory: Path, *, attention: str = "auto", dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> PreTrainedModel:
    """Load a causal LM from a directory (config.json, safetensors), ready for packed rows.

    The model stays in eval mode while it trains: dropout would make its log-probs differ from those that the
    serving engine recorded. Raises ValueError when the directory holds no model.
    """
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} has no config.json: name a directory that a Hugging Face model was saved to")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation=choose_backend(attention),
        local_files_only=True,
        use_safetensors=True,
    )
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer, chat template included, that lies beside the model."""
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a directory that `load_policy`, the serving engine and vLLM load, replacing an old one.

    Everything is written beside it, made durable, and moved into place, so that a crash leaves the old
    directory, the new one, or (between the two moves) the old one under its backup name.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for path in sorted(partial.rglob("*")):
        sync(path)
    sync(partial)
    move_into_place(partial, directory)


def named_weights(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight once, by its own name, detached and contiguous, in the model's order.

    A tied tensor appears under the first of its names only. The tensors are the live ones where they already
    were contiguous: copy before the next step, or send before it.
    """
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach().contiguous()


def gathered_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every weight as `named_weights` has it, whole: what FSDP keeps in shards is put together.

    All ranks must call it, because gathering is something that they do together; all of it is done when it returns,
    so a rank that goes on to send never waits for another in between.
    """
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in named_weights(model)
    }


def move_into_place(partial: Path, directory: Path) -> None:
    """Rename a finished directory to its final name, durably, putting an older one aside and then away."""
    aside = directory.with_name(f".{directory.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if directory.exists():
        directory.rename(aside)
    partial.rename(directory)
    sync(directory.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Return once a file's bytes, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
