"""Computing in 16 bits beside weights in 32, and recomputing activations instead of keeping them.

    forward_precision(model, torch.bfloat16)
    checkpoint_activations(model)

What always holds under forward_precision: the optimiser's weights stay what they were (float32 masters); every matrix
product inside the layers reads weights and inputs rounded to compute_dtype, and so does the residual stream; RoPE, norms
and the head read float32. Autocast is not used: it would keep the residual stream in float32, and so neither match a
server that holds 16-bit weights nor save the memory. Both functions change how modules run and not what they are
called, so checkpoints, pushes and exports see the same names and tensors as before.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


def forward_precision(model: PreTrainedModel, compute_dtype: torch.dtype) -> PreTrainedModel:
    """Make the model compute in this precision and return it. float32 (or what its weights are) changes nothing.

    Weights that are trained keep their precision and are rounded each time they are used; frozen matrices (an
    adapter's base) are rounded once and for all, which halves them. Call it once, after adapters are in place and
    before the model is sharded. Under FSDP2 pass MixedPrecisionPolicy(cast_forward_inputs=False), with param_dtype to
    gather 16 bits instead of 32: what arrives rounded is not rounded again, but norms then are 16 bits, too.

    Raises ValueError for a precision that is no float.
    """
    if not compute_dtype.is_floating_point:
        raise ValueError(f"compute_dtype={compute_dtype} is not a floating point type: use bfloat16 or float32")
    if compute_dtype == next(model.parameters()).dtype:
        return model
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(compute_dtype)
            module.forward = functools.partial(_rounded_linear, module, compute_dtype)
        elif type(module).__name__.endswith("RotaryEmbedding"):
            module.register_forward_pre_hook(_in_float32)
    model.get_input_embeddings().register_forward_hook(functools.partial(_rounded_output, compute_dtype))
    return model


def checkpoint_activations(model: PreTrainedModel) -> PreTrainedModel:
    """Make each decoder layer keep its input only and run again in the backward pass; return the model.

    One forward pass more for a memory of T x D a layer. transformers' own switch acts in training mode only, and a
    policy stays in eval mode. Gradients are the same bits on a CPU. Call it before the model is sharded.

    Raises ValueError for a model whose layers are not found.
    """
    for layer in decoder_layers(model):
        layer.forward = functools.partial(
            checkpoint,
            layer.forward,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in an eval-mode layer draws numbers
        )
    return model


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The model's decoder layers in order. Raises ValueError where it keeps them elsewhere than in `base_model.layers`."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} keeps its decoder layers in no list called layers: it is not supported"
        )
    return list(layers)


def _rounded_linear(module: torch.nn.Linear, dtype: torch.dtype, input: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.to(dtype)
    return linear(input.to(dtype), module.weight.to(dtype), bias)


def _rounded_output(dtype: torch.dtype, module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.to(dtype)


def _in_float32(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A rotary embedding reads its first argument for device and precision alone: one column of it says both."""
    if not args or not isinstance(args[0], Tensor):
        return args
    return (args[0][..., :1].float(), *args[1:])
