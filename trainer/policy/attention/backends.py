"""The backends: what each needs, and its kernel behind transformers' attention interface.

    attention_interface(module, query_1HTE, key_1GTE, value_1GTE, mask, **what the layer says) → ((1, T, H, E), None)

Each kernel is a short function of (T, heads, E) tensors or (1, heads, T, E) ones, a RowLayout and what the layer asks
for; what a kernel cannot do is refused rather than left out.
"""

import functools
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from trainer.policy.attention.layout import RowLayout

log = logging.getLogger(__name__)

# T packed tokens, L tokens of one row, H query heads, G key/value heads, E width of a head. The leading 1 is
# transformers' batch dimension.

HALF = (torch.bfloat16, torch.float16)
# Rows up to here are computed in float32 on a CPU, whose backward pass in 16 bits is slow: 1.8 times as fast at 128 tokens,
# and gradients three times as exact. From about 400 tokens on 16 bits win.
WIDENED_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Asked:
    """What a layer asks of its attention. window: how many tokens a token sees, itself included; None: all of its row."""

    scale: float | None
    window: int | None
    softcap: float | None


Kernel = Callable[[Tensor, Tensor, Tensor, RowLayout, Asked], Tensor]  # (1, H, T, E), (1, G, T, E) twice → (1, T, H, E)


def choose_backend(
    name: str = "auto", *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> str:
    """The transformers attn_implementation for a backend; "auto" picks the best one that runs here and logs why.

    dtype  that the model computes in, which need not be that of its weights

    Raises ValueError for a name that is neither "auto" nor a backend, and for one that cannot run here: the message
    says what is missing.
    """
    device = torch.device(device)
    if name == "auto":
        reasons = {better: why_not(device, dtype) for better, (_, why_not) in _BACKENDS.items() if better != "sdpa"}
        chosen = next(better for better, reason in reasons.items() if not reason)
        passed_over = "; ".join(f"not {better}: {reason}" for better, reason in reasons.items() if reason)
        log.info("attention %s for %s on %s%s", chosen, dtype, device, f" ({passed_over})" if passed_over else "")
        return BACKENDS[chosen]
    if name not in _BACKENDS:
        raise ValueError(f"attention={name!r} is not known: use 'auto' or one of {', '.join(map(repr, _BACKENDS))}")
    if reason := _BACKENDS[name][1](device, dtype):
        raise ValueError(f"attention={name!r} cannot run here: {reason}. 'auto' takes the best that can")
    return BACKENDS[name]


@functools.cache
def hide_from_compiler() -> None:
    """Let torch.compile pass round attention. Compiled in, it would be compiled again for every layout of rows."""
    for name in BACKENDS.values():
        AttentionInterface.register(name, torch.compiler.disable(AttentionInterface()[name]))


# --- the kernels ---


def rows_kernel(query_1HTE: Tensor, key_1GTE: Tensor, value_1GTE: Tensor, layout: RowLayout, asked: Asked) -> Tensor:
    """One call per row."""
    _refuse_softcap(asked, "rows")
    outputs = []
    for query, key, value in zip(
        query_1HTE.split(layout.lengths, dim=2),
        key_1GTE.split(layout.lengths, dim=2),
        value_1GTE.split(layout.lengths, dim=2),
        strict=True,
    ):
        dtype, length = value.dtype, query.shape[2]
        if dtype in HALF and query.device.type == "cpu" and length <= WIDENED_TOKENS:
            query, key, value = query.float(), key.float(), value.float()
        band_LL = _band(length, asked.window, query.device)
        output = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=band_LL,
            is_causal=band_LL is None,
            scale=asked.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(output.to(dtype).transpose(1, 2))
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0].contiguous()


def sdpa_kernel(query_1HTE: Tensor, key_1GTE: Tensor, value_1GTE: Tensor, layout: RowLayout, asked: Asked) -> Tensor:
    """One call for the whole pack, under a mask that says who may look at whom."""
    _refuse_softcap(asked, "sdpa")
    output_1HTE = scaled_dot_product_attention(
        query_1HTE,
        key_1GTE,
        value_1GTE,
        attn_mask=layout.dense_mask(asked.window),
        scale=asked.scale,
        enable_gqa=query_1HTE.shape[1] != key_1GTE.shape[1],
    )
    return output_1HTE.transpose(1, 2).contiguous()


def flex_kernel(query_1HTE: Tensor, key_1GTE: Tensor, value_1GTE: Tensor, layout: RowLayout, asked: Asked) -> Tensor:
    """One compiled kernel that skips the blocks of the mask in which nothing is seen."""
    cap = asked.softcap or 1.0

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    output_1HTE = _flex(query_1HTE.device.type)(
        query_1HTE,
        key_1GTE,
        value_1GTE,
        score_mod=None if asked.softcap is None else capped,
        block_mask=layout.block_mask(asked.window),
        scale=asked.scale,
        enable_gqa=query_1HTE.shape[1] != key_1GTE.shape[1],
    )
    return output_1HTE.transpose(1, 2).contiguous()


def varlen_kernel(query_1HTE: Tensor, key_1GTE: Tensor, value_1GTE: Tensor, layout: RowLayout, asked: Asked) -> Tensor:
    """torch's varlen attention, by whichever of its signatures this torch has."""
    _refuse_softcap(asked, "varlen")
    query_THE, key_TGE, value_TGE = (part[0].transpose(0, 1) for part in (query_1HTE, key_1GTE, value_1GTE))
    varlen_attn, known = _varlen()
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (-1 if asked.window is None else asked.window - 1, 0)
    else:  # torch 2.10 and before
        if asked.window is not None and asked.window < layout.longest:
            raise ValueError(
                f"torch {torch.__version__}'s varlen attention has no sliding window, and this model's is "
                f"{asked.window}: install torch >= 2.11, or use attention 'rows'"
            )
        options["is_causal"] = True
    if "enable_gqa" in known:  # a check in Python, new in torch 2.12; the kernel has always grouped heads by itself
        options["enable_gqa"] = query_THE.shape[1] != key_TGE.shape[1]
    if "scale" in known:
        options["scale"] = asked.scale
    elif asked.scale is not None:  # the kernel divides by √E
        query_THE = query_THE * (asked.scale * query_THE.shape[-1] ** 0.5)
    starts, longest = layout.starts_N1, layout.longest
    return varlen_attn(query_THE, key_TGE, value_TGE, starts, starts, longest, longest, **options)[None]


def flash_kernel(query_1HTE: Tensor, key_1GTE: Tensor, value_1GTE: Tensor, layout: RowLayout, asked: Asked) -> Tensor:
    """flash-attn's flash_attn_varlen_func, of version 2 or 3."""
    query_THE, key_TGE, value_TGE = (part[0].transpose(0, 1) for part in (query_1HTE, key_1GTE, value_1GTE))
    flash_attn_varlen_func = _flash()
    assert flash_attn_varlen_func is not None, "choose_backend has seen it"
    output = flash_attn_varlen_func(
        query_THE,
        key_TGE,
        value_TGE,
        cu_seqlens_q=layout.starts_N1,
        cu_seqlens_k=layout.starts_N1,
        max_seqlen_q=layout.longest,
        max_seqlen_k=layout.longest,
        softmax_scale=asked.scale,
        causal=True,
        window_size=(-1, -1) if asked.window is None else (asked.window - 1, 0),
        softcap=asked.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return (output[0] if isinstance(output, tuple) else output)[None]  # early versions 3 also return the log-sum-exp


# --- what each needs ---


def _why_not_flash(device: torch.device, dtype: torch.dtype) -> str:
    if reason := _why_not_half_on_cuda(device, dtype):
        return reason
    return "" if _flash() is not None else "the package flash-attn is not installed: pip install flash-attn"


def _why_not_varlen(device: torch.device, dtype: torch.dtype) -> str:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no varlen attention: install torch >= 2.10"
    return _why_not_half_on_cuda(device, dtype)


def _why_not_flex(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return f"it has no backward pass on {device.type}: it needs a CUDA device"
    return "" if importlib.util.find_spec("triton") is not None else "it is compiled by triton: pip install triton"


def _why_not_half_on_cuda(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return f"its kernels need a CUDA device, and this is {device.type}"
    if dtype not in HALF:
        return f"its kernels compute in bfloat16 or float16, and this model in {dtype}: ask for compute_dtype bfloat16"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"its kernels need compute capability 8.0, and this device has {major}.{minor}"


def _runs_everywhere(device: torch.device, dtype: torch.dtype) -> str:
    return ""


@functools.cache
def _flash() -> Callable[..., Any] | None:
    """flash_attn_varlen_func: version 3 (for Hopper) where it is installed and fits, else version 2, else None."""
    names = ["flash_attn"]
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        names.insert(0, "flash_attn_interface")
    for name in names:
        try:
            return importlib.import_module(name).flash_attn_varlen_func
        except (ImportError, AttributeError) as exc:  # absent, or built against another torch
            if importlib.util.find_spec(name) is not None:
                log.warning("%s is installed and cannot be imported: %s", name, exc)
    return None


@functools.cache
def _varlen() -> tuple[Callable[..., Any], frozenset[str]]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


@functools.cache
def _flex(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """The causal band of a row longer than its model's window; None where plain causal is the same."""
    if window is None or length <= window:
        return None
    ages_LL = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (ages_LL >= 0) & (ages_LL < window)


def _refuse_softcap(asked: Asked, name: str) -> None:
    if asked.softcap is not None:
        raise ValueError(
            f"this model caps attention scores at {asked.softcap}, which attention {name!r} cannot: use 'flash' or 'flex'"
        )


# --- registration ---


def _interface(name: str, kernel: Kernel) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: torch.nn.Module,
        query_1HTE: Tensor,
        key_1GTE: Tensor,
        value_1GTE: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        row_layout: RowLayout | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Causal attention inside each row of a pack; row_layout reaches us as a keyword of the model's forward."""
        if row_layout is None or query_1HTE.shape[0] != 1 or row_layout.num_tokens != query_1HTE.shape[2]:
            raise ValueError(
                f"packed attention got row_layout={row_layout and row_layout.lengths} for queries of shape "
                f"{tuple(query_1HTE.shape)}: call the model through hidden_states(), one pack at a time and without a "
                "cache"
            )
        if dropout or s_aux is not None:
            what = f"drops {dropout:.0%} of its attention: call eval() on it" if dropout else "has attention sinks"
            raise ValueError(f"this model {what}; packed attention {name!r} has neither")
        dtype = value_1GTE.dtype
        asked = Asked(scaling, sliding_window, softcap)
        return kernel(query_1HTE.to(dtype), key_1GTE.to(dtype), value_1GTE, row_layout, asked), None

    return attention


_BACKENDS: dict[str, tuple[Kernel, Callable[[torch.device, torch.dtype], str]]] = {
    "flash": (flash_kernel, _why_not_flash),
    "varlen": (varlen_kernel, _why_not_varlen),
    "flex": (flex_kernel, _why_not_flex),
    "rows": (rows_kernel, _runs_everywhere),
    "sdpa": (sdpa_kernel, _runs_everywhere),
}
# As transformers knows them. It takes every name with "flash" in it for its own and goes looking for the package.
BACKENDS = {name: f"packed_{'fa' if name == 'flash' else name}" for name in _BACKENDS}

for _name, (_kernel, _) in _BACKENDS.items():
    AttentionInterface.register(BACKENDS[_name], _interface(_name, _kernel))
