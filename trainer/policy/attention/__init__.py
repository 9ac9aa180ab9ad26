"""Attention over packed rows: every row attends to itself, causally, and cannot be touched by its neighbours.

Backends, registered under transformers' attention interface, so that any of its models with a causal language head
can use them. Listed best first, as "auto" tries them:

    flash   flash-attn's varlen kernel, version 3 on Hopper, else 2. An optional package; CUDA, 16 bits.
    varlen  torch's own varlen attention, the same algorithm without a package. CUDA, 16 bits.
    flex    torch's compiled flex attention under a block mask. CUDA, any precision; the only fast one with score caps
            where flash-attn is not installed. On a CPU it has no backward pass (torch 2.13).
    rows    one causal kernel call per row. No mask exists, nothing is padded, cost is Σ L² rather than (Σ L)²;
            a neighbour full of NaN changes not one bit. Everywhere; the default on a CPU. On a GPU it is for packs of few
            long rows: there SDPA may take cuDNN's kernel (Hopper), the fastest, which is planned anew for each length.
    sdpa    one kernel call under a T x T mask: a second opinion for tests. A NaN in one row does reach the others
            here, because -inf + NaN and 0 · NaN are NaN. Never chosen by "auto".

What all of them need to know of a pack is a RowLayout, made once and handed to every layer. Queries and keys may come
in float32 beside 16-bit values, where RoPE ran in float32: they are rounded to the values' precision here.

On one CPU core, 64 rows of about 100 tokens (4 layers, width 128): rows is 1.9 x as fast as sdpa in packs of
1,000 tokens and 2.9 x in packs of 2,000.
"""

from trainer.policy.attention.backends import BACKENDS, choose_backend
from trainer.policy.attention.layout import RowLayout

__all__ = ["BACKENDS", "RowLayout", "choose_backend"]
