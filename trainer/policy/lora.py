"""LoRA: a policy of which only low-rank additions to its matrices are trained (arXiv 2106.09685), through peft.

    add_adapter(model, 16)               in place; from here on only the adapter is trained
    with without_adapter(model): …       the policy as it was: the reference, without a copy of the model
    adapter_weights(model)               megabytes, by the names that peft and vLLM know
    merged_weights(model)                the whole model by its own names, for who takes no adapters

What always holds: the base is never changed; a new adapter adds nothing, so training begins at the base; adapters are
float32 whatever the base is. `named_weights` of such a model are its adapter's, so a checkpoint holds the adapter alone
and its base is the run's first policy.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from trainer.policy.model import (
    gathered_weights,
    has_adapter,
    is_adapter_weight,
    load_policy,
    move_into_place,
    named_weights,
    save_policy,
    sync,
    whole,
)
from trainer.ranks import lead

# W = W_base + alpha / rank · B · A, of shapes (out, in), (out, rank), (rank, in).

ADAPTER = "default"  # peft's name for the only one
PREFIX = "base_model.model."  # what peft puts before the names of a model that it wraps
ALL_LINEAR = "all-linear"  # peft's name for every matrix but the head

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def add_adapter(
    model: PreTrainedModel, rank: int, *, alpha: float | None = None, targets: str | Sequence[str] = ALL_LINEAR
) -> PreTrainedModel:
    """Put an adapter onto the model, freeze everything else, and return the model.

    alpha    the additions are scaled by alpha / rank; 2 · rank unless given
    targets  names of the matrices that get one ("q_proj", …), or "all-linear". RL learns as well from rank 1 on all
             of them as from full weights (Schulman et al., "LoRA Without Regret", 2025); attention alone learns less

    Call it before `forward_precision`. Raises ModuleNotFoundError without peft, and ValueError for a rank below 1, for
    targets that the model does not have, and for a model that has an adapter.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError("LoRA needs the package peft: pip install 'lightning-bus[lora]'") from exc
    if rank < 1:
        raise ValueError(f"rank={rank}: an adapter has at least rank 1")
    if has_adapter(model):
        raise ValueError("this model has an adapter already: load the base again for another one")
    names = targets if isinstance(targets, str) and targets == ALL_LINEAR else _known(model, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # pyright: ignore[reportArgumentType] - peft takes floats
        target_modules=names,
        lora_dropout=0.0,  # the server has none
        bias="none",
        base_model_name_or_path=str(model.name_or_path),
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter_weight(name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


@contextmanager
def without_adapter(model: PreTrainedModel) -> Generator[None]:
    """Compute as the base while the context lasts."""
    layers = list(_layers(model).values())
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


# --- its weights ---


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter's matrices, whole, by the names that peft writes and vLLM reads."""
    return peft_names(gathered_weights(model))


def peft_names(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`named_weights` of a model with an adapter, as peft calls them."""
    return {f"{PREFIX}{name.replace(f'.{ADAPTER}.', '.')}": tensor for name, tensor in named.items()}


def base_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The frozen model's weights, whole, by the names that they have without an adapter, tied ones once.

    All ranks must call it.
    """
    lead(model, "base")
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not is_adapter_weight(name) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name.replace(".base_layer.", ".")] = whole(tensor.detach())
    return found


def served_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """What an engine that takes whole models is pushed: `merged_weights` where there is an adapter, else its own."""
    return merged_weights(model) if has_adapter(model) else gathered_weights(model)


def merged_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's weights with the adapter added, by the names that they have without one, tied ones once.

    All ranks must call it. The base's tensors are the live ones, those with an adapter are new.
    """
    return merge(base_weights(model), adapter_weights(model), scale_of(adapter_config(model)))


def merge(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """W + scale · B · A for every matrix that the adapter has a part for, summed in float32, in the base's precision.

    adapter  by peft's names

    Raises ValueError for an adapter of another model.
    """
    merged = dict(base)
    for name, down in adapter.items():
        if ".lora_A." not in name:
            continue
        target = f"{name.removeprefix(PREFIX).partition('.lora_A.')[0]}.weight"
        up = adapter.get(name.replace(".lora_A.", ".lora_B."))
        weight = base.get(target)
        if weight is None or up is None or weight.shape != (up.shape[0], down.shape[1]):
            raise ValueError(f"the adapter is of another model: {name} does not fit any weight called {target}")
        change = (up.float() @ down.float()).to(weight.device)
        merged[target] = torch.add(weight.float(), change, alpha=scale).to(weight.dtype)
    return merged


# --- as a directory ---


def adapter_config(model: PreTrainedModel) -> dict[str, Any]:
    """What peft's adapter_config.json says of the model's adapter."""
    config: Any = getattr(model, "peft_config")[ADAPTER]  # noqa: B009 - peft sets it where transformers declares none
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": int(config.r),
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in _layers(model)}),
        "bias": "none",
        "base_model_name_or_path": config.base_model_name_or_path,
    }


def scale_of(config: Mapping[str, Any]) -> float:
    """alpha / rank."""
    return float(config["lora_alpha"]) / int(config["r"])


def save_adapter(model: PreTrainedModel, directory: Path) -> None:
    """Write a directory that peft, vLLM and `load_adapter` load, durably, replacing an old one."""
    write_adapter(directory, adapter_config(model), adapter_weights(model))


def export_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a whole model, with the adapter in it where there is one, as `save_policy` does."""
    save_policy(model, tokenizer, directory, weights=merged_weights(model) if has_adapter(model) else None)


def write_adapter(directory: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """As `save_adapter`, from its parts; weights by peft's names."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, partial / WEIGHTS_FILE)
    (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    for path in (partial / WEIGHTS_FILE, partial / CONFIG_FILE, partial):
        sync(path)
    move_into_place(partial, directory)


def zero_adapter(
    base: Path, rank: int, *, alpha: float | None = None, targets: str | Sequence[str] = ALL_LINEAR
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the weights, by peft's names, of an adapter that adds nothing to the model of a directory.

    Reads the directory's config.json only. Raises as `add_adapter`.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
        add_adapter(model, rank, alpha=alpha, targets=targets)
    weights = {name: torch.zeros(tensor.shape) for name, tensor in adapter_weights(model).items()}
    return {**adapter_config(model), "base_model_name_or_path": str(base)}, weights


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Say beside checkpoints of an adapter what it is: they hold its matrices only."""
    path = directory / CONFIG_FILE
    text = json.dumps(config, indent=2, sort_keys=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        partial = directory / f".{CONFIG_FILE}.partial"
        directory.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.rename(path)
        sync(directory)


def read_config(directory: Path) -> dict[str, Any]:
    """What `write_config` wrote. Raises OSError where it did not."""
    return json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))


def merged_from(stored: Mapping[str, Tensor], config: Mapping[str, Any], base_directory: Path) -> dict[str, Tensor]:
    """The whole model that an adapter, by `named_weights`, makes with the base in a directory, in the base's precision.

    Raises ValueError for an adapter of another model.
    """
    return merge(dict(named_weights(load_policy(base_directory))), peft_names(stored), scale_of(config))


def load_adapter(model: PreTrainedModel, directory: Path) -> None:
    """Overwrite the model's adapter with the one in a directory.

    Raises ValueError, having changed nothing, for one of another shape, scale or model, and OSError where there is none.
    """
    stored = read_config(directory)
    mine = adapter_config(model)
    for key in ("r", "lora_alpha"):
        if stored.get(key) != mine[key]:
            raise ValueError(f"{directory} holds an adapter with {key} {stored.get(key)}, this model's has {mine[key]}")
    weights, live = load_file(directory / WEIGHTS_FILE), adapter_weights(model)
    odd = sorted(name for name in weights.keys() | live.keys() if _shape(weights, name) != _shape(live, name))
    if odd:
        raise ValueError(f"{directory} holds an adapter of another model: {', '.join(odd[:3])} differ")
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(weights[name])


# --- helpers ---


def _layers(model: PreTrainedModel) -> dict[str, Any]:
    """The model's layers with an adapter, by name."""
    if not has_adapter(model):
        raise ValueError(f"this {type(model).__name__} has no adapter: add_adapter() comes first")
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _known(model: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    asked = [targets] if isinstance(targets, str) else list(targets)
    unknown = sorted(set(asked) - linear)
    if unknown or not asked:
        raise ValueError(
            f"this {type(model).__name__} has no matrices called {', '.join(unknown) or 'nothing'}: choose from "
            f"{', '.join(sorted(linear))}, or {ALL_LINEAR!r}"
        )
    return sorted(asked)


def _shape(weights: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None
