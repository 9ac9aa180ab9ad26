"""Computing in 16 bits beside weights in 32, and recomputing activations instead of keeping them.

    forward_precision(model, torch.bfloat16)
    compile_layers(model)          # on a GPU: fuses what lies between the matrix products
    checkpoint_activations(model)

What always holds under forward_precision: the optimiser's weights stay what they were (float32 masters); every matrix
product inside the layers reads weights and inputs rounded to compute_dtype, and so does the residual stream; RoPE, norms
and the head read float32. Autocast is not used: it would keep the residual stream in float32, and so neither match a
server that holds 16-bit weights nor save the memory. All of this changes how modules run and not what they are
called, so checkpoints, pushes and exports see the same names and tensors as before.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from trainer.policy.attention.backends import hide_from_compiler

# The kernels of packed attention by the names they are dispatched under; what a package lacks is never met.
ATTENTION_OPS = frozenset((
    "torch_attn._varlen_attn.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "flash_attn._flash_attn_varlen_forward.default",  # version 2
    "flash_attn_3._flash_attn_forward.default",  # version 3, and below it before it was wrapped
    "flash_attn_3.fwd.default",
))  # fmt: skip


def forward_precision(model: PreTrainedModel, compute_dtype: torch.dtype) -> PreTrainedModel:
    """Make the model compute in this precision and return it. float32 (or what its weights are) changes no layer.

    Weights that are trained keep their precision and are rounded each time they are used; frozen matrices (an
    adapter's base) are rounded once and for all, which halves them. Call it once, after adapters are in place and
    before the model is sharded. Under FSDP2 pass MixedPrecisionPolicy(cast_forward_inputs=False), with param_dtype to
    gather 16 bits instead of 32: what arrives rounded is not rounded again, but norms then are 16 bits, too.

    Raises ValueError for a precision that is no float.
    """
    if not compute_dtype.is_floating_point:
        raise ValueError(f"compute_dtype={compute_dtype} is not a floating point type: use bfloat16 or float32")
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            _mix(module, _ExactAngles, compute_dtype)
    if compute_dtype == next(model.parameters()).dtype:
        return model
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(compute_dtype)
            _mix(module, _RoundedLinear, compute_dtype)
    for layer in getattr(model.base_model, "layers", ()):
        for module in layer.children():
            if type(module).__name__.endswith("Norm"):
                # What it goes into rounds it anyway, each matrix for itself and each copy kept for the backward pass.
                _mix(module, _RoundedOutput, compute_dtype)
    model.get_input_embeddings().register_forward_hook(functools.partial(_rounded_output, compute_dtype))
    return model


def checkpoint_activations(model: PreTrainedModel, *, keep_attention: bool = False) -> PreTrainedModel:
    """Make each decoder layer keep its input only and run again in the backward pass; return the model.

    keep_attention  attention's output is kept, too, and its forward kernel does not run again: for 2 bytes x heads x
                    head width a token and layer it saves the part that grows with the square of a row. Not under
                    attention "flex". It costs Python time at every operation: for long rows, not for small packs

    One forward pass more for a memory of T x D a layer. transformers' own switch acts in training mode only, and a
    policy stays in eval mode. Gradients are the same bits on a CPU. Call it before the model is sharded.

    Raises ValueError for a model whose layers are not found.
    """
    kept: dict[str, Any] = {}
    if keep_attention:
        kept["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
    for layer in decoder_layers(model):
        layer.forward = functools.partial(
            checkpoint,
            layer.forward,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in an eval-mode layer draws numbers
            **kept,
        )
    return model


def compile_layers(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Make each decoder layer run compiled (torch.compile, to which options go), and return the model.

    Norms, rotary positions, activations and roundings become few kernels, and fewer of their results are kept for the
    backward pass. Attention stays the kernel that it is: one graph before it and one behind it serve all layers and all
    packs, whatever their rows are. Sums are taken in another order, so results move within their rounding. Call it after
    adapters and `forward_precision`, before `checkpoint_activations`.
    """
    hide_from_compiler()
    for layer in decoder_layers(model):
        layer.forward = torch.compile(layer.forward, dynamic=True, **options)
    return model


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The model's decoder layers in order. Raises ValueError where it keeps them elsewhere than in `base_model.layers`."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} keeps its decoder layers in no list called layers: it is not supported"
        )
    return list(layers)


class _RoundedLinear(torch.nn.Linear):
    compute_dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        dtype = self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return linear(input.to(dtype), self.weight.to(dtype), bias)


class _RoundedOutput(torch.nn.Module):
    compute_dtype: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs).to(self.compute_dtype)  # pyright: ignore[reportCallIssue]


class _ExactAngles(torch.nn.Module):
    """A rotary embedding multiplies frequencies by positions as matrices: under TF32 positions beyond 2,048 were rounded."""

    compute_dtype: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor) and self.compute_dtype.itemsize < 4:
            args = (args[0][..., :1].float(), *args[1:])  # read for device and precision alone: one column says both
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            return super().forward(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        finally:
            torch.set_float32_matmul_precision(precision)


def _mix(
    module: torch.nn.Module, how: type[_RoundedLinear | _RoundedOutput | _ExactAngles], dtype: torch.dtype
) -> None:
    """Let the module run that way. By its class, which all layers share: compiled code would be compiled for each layer
    where every one has a function of its own."""
    module.__class__ = _mixed(how, type(module))
    setattr(module, "compute_dtype", dtype)  # noqa: B010 - a module's attributes are typed as its parts


@functools.cache
def _mixed(how: type[torch.nn.Module], kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    return type(kind.__name__, (how, kind), {})


def _keep_attention(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(op) in ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def _rounded_output(dtype: torch.dtype, module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.to(dtype)
