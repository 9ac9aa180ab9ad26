"""The log-prob and entropy of each trained token, without a [tokens x vocabulary] matrix.

Hidden states are taken at scoring positions only; the head then runs block by block, a chunk of tokens times a block of
the vocabulary, with float32 logits (or wider), each token divided by the temperature it was sampled with. The head is
never widened as a whole: at 150,000 x 4,096 a float32 copy would be 2.5 GB. The backward pass computes the logits
once more instead of keeping them, at one further product in four: they would be larger than everything else together.

liger-kernel's fused linear losses are not used: they know one temperature a call and no entropy, while a pack holds rows
of several temperatures, and every loss here reports entropy.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainer.data.batch import PackedBatch
from trainer.policy.attention import RowLayout

# T packed tokens, K scored tokens, C of them in one chunk, V vocabulary, W of it in one block, D model width.

CHUNK_TOKENS = 1024
CHUNK_VOCABULARY = 32_768  # x 1,024 float32 logits: 128 MiB, and large enough to keep matrix units busy


@dataclass(frozen=True, slots=True)
class TokenScores:
    """logprobs_K (K,) and entropies_K (K,), both with grad, in nats, float32, in the order of the pack."""

    logprobs_K: Tensor
    entropies_K: Tensor


def token_scores(
    model: PreTrainedModel,
    pack: PackedBatch,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    head_dtype: torch.dtype | None = None,
) -> TokenScores:
    """Score the trained tokens of a pack under the model's current weights, each at its own temperature.

    head_dtype  see `chunked_logprobs`; unless given the model's own, see `head_precision`
    """
    head_dtype = head_dtype or getattr(model, "_head_dtype", None)
    return TokenScores(
        *chunked_logprobs(
            pack.scored(hidden_states(model, pack)),
            head_weight(model),
            pack.scored(pack.targets_T),
            pack.scored(pack.temperatures_T),
            chunk_tokens=chunk_tokens,
            head_dtype=head_dtype,
        )
    )


def head_precision(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Make `token_scores` of this model round hidden states and head to `dtype` before they meet; return the model.

    The head's weights stay what they are. Sums, log-probs and entropies are float32 or wider in any case.
    """
    setattr(model, "_head_dtype", dtype)  # noqa: B010 - a module's attributes are typed as its parts
    return model


def hidden_states(model: PreTrainedModel, pack: PackedBatch) -> Tensor:
    """The (T, D) output of the last layer, every row computed as if it were alone."""
    output = model.base_model(
        input_ids=pack.token_ids_T[None],
        position_ids=pack.positions_T[None],
        use_cache=False,
        row_layout=RowLayout(pack.row_lengths, pack.token_ids_T.device),
    )
    return output.last_hidden_state[0]


def head_weight(model: PreTrainedModel) -> Tensor:
    """The (V, D) matrix that turns hidden states into logits.

    Raises ValueError for a model that does more on the way: its log-probs would come out wrong.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise ValueError(f"the head of {type(model).__name__} is {head}: only a linear head without bias is supported")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise ValueError(
                f"{type(model).__name__} has {name}={getattr(model.config, name)}: "
                "only a head that leaves its logits as they are is supported"
            )
    return head.weight


def chunked_logprobs(
    hidden_KD: Tensor,
    weight_VD: Tensor,
    targets_K: Tensor,
    temperatures_K: Tensor,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    chunk_vocabulary: int = CHUNK_VOCABULARY,
    head_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden · weightᵀ / temperature) at the targets, and the entropy of that softmax.

    hidden_KD       (K, D) any float  gradient flows
    weight_VD       (V, D) any float  gradient flows
    targets_K       (K,)   int64      in 0..V-1
    temperatures_K  (K,)   float32    above 0
    head_dtype      what hidden states and head are rounded or widened to before they meet, block by block; the wider of
                    the two unless given
    returns         (K,) log-probs, (K,) entropies in nats, both with grad; float32, from float64 float64

    Logits are summed in float32 whatever the operands are: products of bfloat16 numbers are exact in it, and a GPU takes
    them at the speed of its matrix units. No tensor is larger than chunk_tokens x chunk_vocabulary,
    chunk_vocabulary x D, or one of the arguments.
    """
    if chunk_tokens < 1 or chunk_vocabulary < 1:
        raise ValueError(
            f"chunk_tokens={chunk_tokens}, chunk_vocabulary={chunk_vocabulary}: a chunk holds at least one of each"
        )
    head_dtype = head_dtype or torch.promote_types(hidden_KD.dtype, weight_VD.dtype)
    return _ChunkedLogprobs.apply(
        hidden_KD, weight_VD, targets_K, temperatures_K, head_dtype, chunk_tokens, chunk_vocabulary
    )  # pyright: ignore[reportReturnType]


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KD: Tensor,
        weight_VD: Tensor,
        targets_K: Tensor,
        temperatures_K: Tensor,
        head_dtype: torch.dtype,
        chunk_tokens: int,
        chunk_vocabulary: int,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(head_dtype, torch.float32)
        temperatures_K = temperatures_K.to(wide)
        chosen_K = hidden_KD.new_zeros(len(hidden_KD), dtype=wide)  # the logits of the targets
        # Running over the blocks of the vocabulary (Milakov and Gimelshein, arXiv 1805.02867), relative to the largest
        # logit so far: totals of exp(logit - peak), and of that times (logit - peak), which is what entropy needs.
        peaks_K = torch.full_like(chosen_K, -torch.inf)
        totals_K, moments_K = torch.zeros_like(chosen_K), torch.zeros_like(chosen_K)
        for block in _chunks(len(weight_VD), chunk_vocabulary):
            block_WD = weight_VD[block].to(head_dtype)
            for chunk in _chunks(len(hidden_KD), chunk_tokens):
                logits_CW = _logits(hidden_KD[chunk], block_WD, temperatures_K[chunk])
                here_C, columns_C1 = _targets_in(block, targets_K[chunk])
                chosen_K[chunk] += torch.where(here_C, logits_CW.gather(-1, columns_C1).squeeze(-1), 0)
                old_peaks_C, old_totals_C = peaks_K[chunk], totals_K[chunk]
                peaks_C = torch.maximum(old_peaks_C, logits_CW.amax(-1))
                # Before the first block there is nothing to shrink, and its -inf must not meet a 0.
                falls_C = (old_peaks_C - peaks_C).nan_to_num(neginf=0.0)
                logits_CW -= peaks_C[:, None]
                exps_CW = logits_CW.exp()
                shrink_C = falls_C.exp()
                moments_K[chunk] = (moments_K[chunk] + falls_C * old_totals_C) * shrink_C
                moments_K[chunk] += logits_CW.mul_(exps_CW).sum(-1)
                totals_K[chunk] = old_totals_C * shrink_C + exps_CW.sum(-1)
                peaks_K[chunk] = peaks_C
        log_totals_K = totals_K.log()
        entropies_K = log_totals_K - moments_K / totals_K
        ctx.save_for_backward(hidden_KD, weight_VD, targets_K, temperatures_K, peaks_K + log_totals_K, entropies_K)
        ctx.head_dtype, ctx.chunk_tokens, ctx.chunk_vocabulary = head_dtype, chunk_tokens, chunk_vocabulary
        ctx.set_materialize_grads(False)  # an entropy that no loss asks for costs nothing in the backward pass
        return chosen_K - peaks_K - log_totals_K, entropies_K

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_KD, weight_VD, targets_K, temperatures_K, log_totals_K, entropies_K = ctx.saved_tensors
        head_dtype = ctx.head_dtype
        of_hidden, of_weight = ctx.needs_input_grad[:2]  # the head of a policy with an adapter is frozen
        scaled_grads_K = torch.zeros_like(log_totals_K) if grads[0] is None else grads[0] / temperatures_K
        entropy_grads_K = None if grads[1] is None else grads[1] / temperatures_K
        hidden_grads_KD = torch.zeros_like(hidden_KD, dtype=log_totals_K.dtype) if of_hidden else None
        weight_grads_VD = torch.empty_like(weight_VD) if of_weight else None
        for block in _chunks(len(weight_VD), ctx.chunk_vocabulary):
            block_WD = weight_VD[block].to(head_dtype)
            block_grads_WD = torch.zeros_like(block_WD, dtype=log_totals_K.dtype) if of_weight else None
            for chunk in _chunks(len(hidden_KD), ctx.chunk_tokens):
                # d log p(target) / d logits = (onehot(target) - softmax) / temperature
                logits_CW = _logits(hidden_KD[chunk], block_WD, temperatures_K[chunk])
                logits_CW -= log_totals_K[chunk, None]
                if entropy_grads_K is None:
                    grads_CW = logits_CW.exp_().mul_(-scaled_grads_K[chunk, None])
                else:
                    # d entropy / d logits = -softmax * (log softmax + entropy) / temperature
                    grads_CW = logits_CW.exp()
                    logits_CW.add_(entropies_K[chunk, None]).mul_(entropy_grads_K[chunk, None])
                    grads_CW.mul_(logits_CW.add_(scaled_grads_K[chunk, None]).neg_())
                here_C, columns_C1 = _targets_in(block, targets_K[chunk])
                grads_CW.scatter_add_(-1, columns_C1, torch.where(here_C, scaled_grads_K[chunk], 0)[:, None])
                # Rounded to what the operands are, as any layer's gradient is.
                grads_CW = grads_CW.to(block_WD.dtype)
                if hidden_grads_KD is not None:
                    hidden_grads_KD[chunk] += _product(grads_CW, block_WD)
                if block_grads_WD is not None:
                    block_grads_WD += _product(grads_CW.T, hidden_KD[chunk].to(block_WD.dtype))
            if weight_grads_VD is not None and block_grads_WD is not None:
                weight_grads_VD[block] = block_grads_WD
        hidden_grads = None if hidden_grads_KD is None else hidden_grads_KD.to(hidden_KD.dtype)
        return hidden_grads, weight_grads_VD, None, None, None, None, None


def _logits(hidden_CD: Tensor, block_WD: Tensor, temperatures_C: Tensor) -> Tensor:
    return _product(hidden_CD.to(block_WD.dtype), block_WD.T).div_(temperatures_C[:, None])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left · right, summed and returned in float32 or wider."""
    if left.dtype.itemsize >= 4:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _targets_in(block: slice, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) whether the target lies in this block of the vocabulary, and (C, 1) its column there, or 0."""
    here_C = (targets_C >= block.start) & (targets_C < block.stop)
    return here_C, torch.where(here_C, targets_C - block.start, 0)[:, None]


def _chunks(size: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, size)) for start in range(0, size, chunk)]
