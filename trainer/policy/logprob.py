"""The log-prob and entropy of each trained token, without a [tokens x vocabulary] matrix.

Hidden states are taken at scoring positions only; the head then runs in chunks, in float32 (or wider), each
token divided by the temperature it was sampled with. The backward pass computes a chunk's logits once more
instead of keeping them: at a vocabulary of 150,000 they would be larger than everything else together.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainer.data.batch import PackedBatch

# T packed tokens, K scored tokens, C scored tokens of one chunk, V vocabulary, D model width.

CHUNK_TOKENS = 1024  # 150,000 float32 logits each: 0.6 GB, and long enough to keep a matrix unit busy


@dataclass(frozen=True, slots=True)
class TokenScores:
    """logprobs_K (K,) with grad and entropies_K (K,) without, in nats, float32, in the order of the pack."""

    logprobs_K: Tensor
    entropies_K: Tensor


def token_scores(model: PreTrainedModel, pack: PackedBatch, *, chunk_tokens: int = CHUNK_TOKENS) -> TokenScores:
    """Score the trained tokens of a pack under the model's current weights, each at its own temperature."""
    hidden_KD = hidden_states(model, pack)[pack.trained_T]
    return TokenScores(
        *chunked_logprobs(
            hidden_KD,
            head_weight(model),
            pack.targets_T[pack.trained_T],
            pack.temperatures_T[pack.trained_T],
            chunk_tokens=chunk_tokens,
        )
    )


def hidden_states(model: PreTrainedModel, pack: PackedBatch) -> Tensor:
    """The (T, D) output of the last layer, every row computed as if it were alone."""
    # attention_mask stays None: the sdpa backend then makes its document mask from positions that restart.
    output = model.base_model(
        input_ids=pack.token_ids_T[None],
        position_ids=pack.positions_T[None],
        use_cache=False,
        row_lengths=pack.row_lengths,
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
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden · weightᵀ / temperature) at the targets, and the entropy of that softmax.

    hidden_KD       (K, D) any float  gradient flows
    weight_VD       (V, D) any float  gradient flows
    targets_K       (K,)   int64      in 0..V-1
    temperatures_K  (K,)   float32    above 0
    returns         (K,) log-probs with grad, (K,) entropies in nats without; float32, from float64 float64
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens}: a chunk holds at least one token")
    return _ChunkedLogprobs.apply(hidden_KD, weight_VD, targets_K, temperatures_K, chunk_tokens)  # pyright: ignore[reportReturnType]


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KD: Tensor,
        weight_VD: Tensor,
        targets_K: Tensor,
        temperatures_K: Tensor,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_KD.dtype, torch.float32)
        wide_weight_VD = weight_VD.to(wide)
        logprobs_K = hidden_KD.new_empty(len(hidden_KD), dtype=wide)
        entropies_K = torch.empty_like(logprobs_K)
        log_totals_K = torch.empty_like(logprobs_K)
        for chunk in _chunks(len(hidden_KD), chunk_tokens):
            logits_CV = _logits(hidden_KD[chunk], wide_weight_VD, temperatures_K[chunk])
            log_totals_K[chunk] = torch.logsumexp(logits_CV, -1)
            logprobs_K[chunk] = logits_CV.gather(-1, targets_K[chunk, None]).squeeze(-1) - log_totals_K[chunk]
            logits_CV -= log_totals_K[chunk, None]
            entropies_K[chunk] = -(logits_CV * logits_CV.exp()).sum(-1)
        ctx.save_for_backward(hidden_KD, weight_VD, targets_K, temperatures_K, log_totals_K)
        ctx.chunk_tokens = chunk_tokens
        ctx.mark_non_differentiable(entropies_K)
        return logprobs_K, entropies_K

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_KD, weight_VD, targets_K, temperatures_K, log_totals_K = ctx.saved_tensors
        wide_weight_VD = weight_VD.to(log_totals_K.dtype)
        scaled_grads_K = grads[0] / temperatures_K.to(log_totals_K.dtype)
        hidden_grads_KD = torch.empty_like(hidden_KD)
        weight_grads_VD = torch.zeros_like(wide_weight_VD)
        for chunk in _chunks(len(hidden_KD), ctx.chunk_tokens):
            # d log p(target) / d logits = (onehot(target) - softmax) / temperature
            logits_CV = _logits(hidden_KD[chunk], wide_weight_VD, temperatures_K[chunk])
            logits_CV -= log_totals_K[chunk, None]
            logit_grads_CV = logits_CV.exp_().mul_(-scaled_grads_K[chunk, None])
            logit_grads_CV.scatter_add_(-1, targets_K[chunk, None], scaled_grads_K[chunk, None])
            hidden_grads_KD[chunk] = (logit_grads_CV @ wide_weight_VD).to(hidden_KD.dtype)
            weight_grads_VD.addmm_(logit_grads_CV.T, hidden_KD[chunk].to(wide_weight_VD.dtype))
        return hidden_grads_KD, weight_grads_VD.to(weight_VD.dtype), None, None, None


def _logits(hidden_CD: Tensor, wide_weight_VD: Tensor, temperatures_C: Tensor) -> Tensor:
    logits_CV = hidden_CD.to(wide_weight_VD.dtype) @ wide_weight_VD.T
    return logits_CV.div_(temperatures_C.to(wide_weight_VD.dtype)[:, None])


def _chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    return [slice(start, start + chunk_tokens) for start in range(0, num_tokens, chunk_tokens)]
