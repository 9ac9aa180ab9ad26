"""One policy on several devices: FSDP2 under torchrun, and nothing of it on one.

    world = join()                         # reads what torchrun put into the environment
    shard(model, world)                    # every rank keeps 1/size of each weight, gradient and moment
    run(model, token_scores, model, pack)  # a forward pass that gathers weights layer by layer

What always holds: all ranks make the same collective calls in the same order, so each computes equally many packs; the
master weights are float32 whatever the layers compute in, and gradients are reduced in float32; tied embeddings are one
parameter of one unit, the model's own, beside one unit for each decoder layer. FSDP averages gradients over ranks, and
`train_step` multiplies by their number, once. It runs on CPUs over gloo as it does on GPUs over nccl.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from trainer.data.batch import PackedBatch
from trainer.policy.precision import decoder_layers
from trainer.ranks import World

P = ParamSpec("P")
R = TypeVar("R")


def shard(
    model: torch.nn.Module,
    world: World,
    *,
    backbone: PreTrainedModel | None = None,
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Cut every weight of the model into one part for each rank, in place; build the optimiser afterwards.

    backbone       the part of it with the decoder layers, where it is not a causal LM itself: of a critic
    compute_dtype  what the layers compute in, bfloat16 for instance, from casts of the float32 master weights: then 16
                   bits are gathered. None: the weights' own

    Every rank must have loaded the same weights.
    """
    if not dist.is_initialized():  # a world of one
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("nccl" if world.device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    mesh = init_device_mesh(world.device.type, (world.size,))
    # Inputs are not cast: transformers computes rotary angles in float32 from positions, and positions stay integers.
    mixed = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32 if compute_dtype else None, cast_forward_inputs=False
    )
    for layer in decoder_layers(backbone or cast(PreTrainedModel, model)):
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    fully_shard(model, mesh=mesh, mp_policy=mixed)
    # The head runs in chunks, outside of the model's forward. Through this method what computes with it counts as one,
    # and finds its weight gathered.
    setattr(model, "_through", _through.__get__(model))  # noqa: B010 - a module's attributes are typed as its parts
    register_fsdp_forward_method(model, "_through")


def run(model: torch.nn.Module, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Return function(*args, **kwargs), which computes with the model's weights, sharded or not.

    For what goes round the model's own forward: `token_scores`, which wants hidden states and the head's weight. What
    it returns must be tensors, or a tuple of them, for the backward pass to be seen coming.
    """
    through = getattr(model, "_through", None)
    return function(*args, **kwargs) if through is None else through(function, *args, **kwargs)


def loss_name(loss: Callable[..., Any]) -> str:
    """What a loss is called in an order: the same on every rank, for all run the same code."""
    of = loss if hasattr(loss, "__qualname__") else type(loss)  # a function or method; else an object that is called
    return f"{of.__module__}.{of.__qualname__}"


def packed(pack: PackedBatch) -> dict[str, Any]:
    """Return a pack as msgpack can say it."""
    return {field.name: said_tensor(getattr(pack, field.name)) for field in fields(pack)}


def unpacked(said: dict[str, Any]) -> PackedBatch:
    """Return the pack that `packed` said."""
    return PackedBatch(**{name: unsaid_tensor(value) for name, value in said.items()})


def said_tensor(value: Any) -> Any:
    """Return a tensor of one axis as msgpack can say it; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return {"tensor": [str(value.dtype).removeprefix("torch."), value.cpu().numpy().tobytes()]}


def unsaid_tensor(value: Any) -> Any:
    """Return what `said_tensor` said, on the CPU; lists as tuples."""
    if not isinstance(value, dict):
        return tuple(value) if isinstance(value, list) else value
    dtype, raw = value["tensor"]
    if not raw:
        return torch.zeros(0, dtype=getattr(torch, dtype))
    return torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype))


def _through(self: torch.nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)
