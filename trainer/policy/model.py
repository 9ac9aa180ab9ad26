"""The policy as a directory and as a module: a Hugging Face causal LM and its tokenizer, in and out.

A directory that `save_policy` has returned from is complete and survives power loss; one that it has not is
not there. Weights have one name each, the model's own: tied embeddings count once, on disk, in a checkpoint
and on the wire.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trainer.policy.attention import choose_backend
from trainer.ranks import lead


def load_policy(
    directory: Path,
    *,
    attention: str = "auto",
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> PreTrainedModel:
    """Load a causal LM from a directory (config.json, safetensors), ready for packed rows.

    dtype          of the weights that training changes
    compute_dtype  what it will compute in (`trainer.policy.precision.forward_precision`), which decides which attention
                   runs; dtype unless given

    The model stays in eval mode while it trains: dropout would make its log-probs differ from those that the
    serving engine recorded. Raises ValueError when the directory holds no whole model (`check_weights`), when a weight
    that the model has is not in it, or when the attention asked for cannot run here.
    """
    check_weights(directory)
    # transformers would draw random numbers for what is missing, and only warn.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation=choose_backend(attention, device=device, dtype=compute_dtype or dtype),
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{directory} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]} among them: its files are "
            "of another model than its config.json. Save or download it again"
        )
    return model.to(device).eval()


def check_weights(directory: Path) -> None:
    """Raise ValueError, saying what is missing, unless the directory holds a config and whole weight files.

    Reads headers only, so that a model of any size is refused in milliseconds.
    """
    way_out = "Save or download the model again, or name another directory"
    config = _read_json(directory / "config.json")
    if config is None:
        raise ValueError(f"{directory} has no config.json: name a directory that a Hugging Face model was saved to")
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{directory}/config.json names no model_type, so nobody knows what model it is. {way_out}")
    index = _read_json(directory / "model.safetensors.index.json")
    names = {"model.safetensors"} if index is None else set(index.get("weight_map", {}).values())
    absent = sorted(name for name in names if not (directory / name).is_file())
    if absent or not names:
        kind = (
            f"{len(absent)} of its {len(names)} weight files, {', '.join(absent[:3])}" if names else "every weight file"
        )
        raise ValueError(f"{directory} lacks {kind}. {way_out}")
    for name in sorted(names):
        try:
            with safe_open(directory / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as exc:
            raise ValueError(f"{directory / name} is not a whole safetensors file: {exc}. {way_out}") from exc


def check_tokenizer(directory: Path) -> None:
    """Raise ValueError unless the directory holds a tokenizer whose ids the model beside it has room for."""
    try:
        tokenizer = load_tokenizer(directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as exc:
        reason = " ".join(str(exc).split())[:160] or type(exc).__name__
        raise ValueError(
            f"{directory} holds no tokenizer that can be loaded ({reason}): save or copy the model's own "
            "(tokenizer.json, tokenizer_config.json) into it"
        ) from exc
    config = _read_json(directory / "config.json") or {}
    size = (config.get("text_config") or config).get("vocab_size")
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if isinstance(size, int) and largest >= size:
        raise ValueError(
            f"{directory}: its tokenizer knows token id {largest} and its model {size} ids: they are of two models. Copy "
            "the model's own tokenizer into it"
        )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer, chat template included, that lies beside the model."""
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a directory that `load_policy`, the serving engine and vLLM load, replacing an old one.

    weights  to write instead of the model's own, by the names that it loads; a model with an adapter needs them, see
             `trainer.policy.lora.export_policy`; one that is kept in shards is put together

    Everything is written beside it, made durable, and moved into place, so that a crash leaves the old
    directory, the new one, or (between the two moves) the old one under its backup name.
    """
    if weights is None and has_adapter(model):
        raise ValueError(
            "this model has an adapter, whose names nobody else loads: export_policy() writes a whole model"
        )
    if weights is None and any(isinstance(weight, DTensor) for weight in model.parameters()):
        weights = gathered_weights(model)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _save_model(model, partial, weights)
    tokenizer.save_pretrained(partial)
    for path in sorted(partial.rglob("*")):
        sync(path)
    sync(partial)
    move_into_place(partial, directory)


def named_weights(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight once, by its own name, detached and contiguous, in the model's order.

    Of a model with an adapter the adapter's only: the rest is the base, which nobody changes. A tied tensor appears
    under the first of its names only. The tensors are the live ones where they already were contiguous: copy before
    the next step, or send before it.
    """
    seen: set[int] = set()
    adapted = has_adapter(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and (not adapted or is_adapter_weight(name)):
            seen.add(id(tensor))
            yield name, tensor.detach().contiguous()


def gathered_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every weight as `named_weights` has it, whole: what FSDP keeps in shards is put together.

    All ranks must call it, because gathering is something that they do together; all of it is done when it returns,
    so a rank that goes on to send never waits for another in between.
    """
    lead(model, "weights")
    return {name: whole(tensor) for name, tensor in named_weights(model)}


def whole(tensor: Tensor) -> Tensor:
    """The tensor, put together where FSDP keeps it in shards; all ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether the model is a frozen base with a LoRA adapter (`trainer.policy.lora`)."""
    return any(is_adapter_weight(name) for name, _ in model.named_parameters())


def is_adapter_weight(name: str) -> bool:
    """Whether a parameter of this name is an adapter's, as peft calls them."""
    return ".lora_A." in name or ".lora_B." in name


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


def _save_model(model: PreTrainedModel, directory: Path, weights: Mapping[str, Tensor] | None) -> None:
    if weights is None:
        model.save_pretrained(directory)
        return
    whole_weights = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    save_file(whole_weights, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)


def _read_json(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds; None where there is no such file. Raises ValueError for one that is no JSON object."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise ValueError(f"{path} cannot be read as JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__} where a JSON object belongs")
    return found
