"""One token for every row of a batch, each row by its own rules, and the log-prob the trainer will divide by.

Always holds: the log-prob belongs to the distribution that was really sampled (temperature, top_k and top_p
applied; of the plain softmax for a greedy row), in float32; a row's draw depends on its own generator and logits
alone, so who shares the batch changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.serving.errors import BadRequestError

# B rows, V vocabulary, K top log-probs asked for.

TOP_LOGPROBS_MAX = 20  # the same limit as OpenAI's and vLLM's


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one completion is sampled. Raises BadRequestError when a value is outside its range.

    temperature   0 is greedy; otherwise logits are divided by it
    top_p, top_k  keep the smallest set of tokens with that mass / that many tokens; 1.0 and 0 (or -1) keep all
    max_tokens    the end token counts; None is as many as the context still holds
    stop          strings that end the text; the ids that spelled them stay in token_ids
    stop_token_ids  besides the model's own end tokens, which ignore_eos turns off
    top_logprobs  also report this many of the likeliest tokens at each position
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_k", self.top_k, -1, 1 << 30)
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 1, 1 << 30)
        _within("top_logprobs", self.top_logprobs, 0, TOP_LOGPROBS_MAX)
        if not 0.0 < self.top_p <= 1.0:
            raise BadRequestError(f"top_p is {self.top_p}; it must be above 0 and at most 1", param="top_p")
        if not all(self.stop):
            raise BadRequestError("stop holds an empty string, which would end every text at once", param="stop")


@dataclass(frozen=True, slots=True)
class Sampled:
    """token_ids (B,), their logprobs (B,), and per row the likeliest (id, logprob) pairs where any were asked for."""

    token_ids: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]] | None


class BatchSampler:
    """The sampling rules of B rows as tensors; build a new one when the rows of the batch change."""

    def __init__(self, rows: Sequence[tuple[SamplingParams, random.Random]], device: torch.device) -> None:
        params = [row[0] for row in rows]
        self._generators = [row[1] for row in rows]
        self._greedy = [p.temperature == 0.0 for p in params]
        self._any_sampled = not all(self._greedy)
        self._greedy_B = torch.tensor(self._greedy, device=device)
        self._any_greedy = any(self._greedy)
        temperatures = [p.temperature or 1.0 for p in params]
        self._scaled = any(t != 1.0 for t in temperatures)
        self._temperatures_B1 = torch.tensor(temperatures, dtype=torch.float32, device=device)[:, None]
        # A greedy row takes the likeliest token of the plain softmax: cutting its tail would only distort the log-prob.
        top_ks = [0 if greedy else max(p.top_k, 0) for p, greedy in zip(params, self._greedy, strict=True)]
        top_ps = [1.0 if greedy else p.top_p for p, greedy in zip(params, self._greedy, strict=True)]
        self._truncated = any(top_ks) or any(p < 1.0 for p in top_ps)
        self._top_k_B1 = torch.tensor([k or 1 << 30 for k in top_ks], device=device)[:, None]
        self._top_p_B1 = torch.tensor(top_ps, dtype=torch.float32, device=device)[:, None]
        self._top_logprobs = [p.top_logprobs for p in params]

    def sample(self, logits_BV: Tensor) -> Sampled:
        """Draw one token per row from logits (B, V)."""
        logits_BV = logits_BV.float()
        if self._scaled:
            logits_BV = logits_BV / self._temperatures_B1
        if self._truncated:
            logits_BV = self._truncate(logits_BV)
        logprobs_BV = logits_BV.log_softmax(-1)
        if self._any_sampled:
            ids_B = self._draw(logprobs_BV)
            if self._any_greedy:
                ids_B = torch.where(self._greedy_B, logits_BV.argmax(-1), ids_B)
        else:
            ids_B = logits_BV.argmax(-1)
        chosen_B = logprobs_BV.gather(-1, ids_B[:, None]).squeeze(-1)
        return Sampled(ids_B.tolist(), chosen_B.tolist(), self._likeliest(logprobs_BV))

    def _draw(self, logprobs_BV: Tensor) -> Tensor:
        # Inverse of the cumulative distribution: one uniform number per row from that row's own generator, where
        # the Gumbel trick would need V of them. In float64 a sum over a large vocabulary keeps its tail.
        uniform_B1 = torch.tensor([[generator.random()] for generator in self._generators], dtype=torch.float64)
        cumulative_BV = logprobs_BV.double().exp_().cumsum(-1)
        target_B1 = uniform_B1.to(logprobs_BV.device) * cumulative_BV[:, -1:]
        ids_B = torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1)
        return ids_B.clamp_(max=logprobs_BV.shape[-1] - 1)

    def _truncate(self, logits_BV: Tensor) -> Tensor:
        sorted_BV, order_BV = torch.sort(logits_BV, stable=True, dim=-1, descending=True)
        rank_V = torch.arange(logits_BV.shape[-1], device=logits_BV.device)
        cut_BV = rank_V >= self._top_k_B1
        probs_BV = sorted_BV.masked_fill(cut_BV, -torch.inf).softmax(-1)
        # A token goes when the mass before it already reaches top_p, so the first one always stays.
        cut_BV |= (probs_BV.cumsum(-1) - probs_BV >= self._top_p_B1) & (self._top_p_B1 < 1.0)
        return logits_BV.masked_fill(torch.zeros_like(cut_BV).scatter_(-1, order_BV, cut_BV), -torch.inf)

    def _likeliest(self, logprobs_BV: Tensor) -> list[list[tuple[int, float]]] | None:
        most = min(max(self._top_logprobs), logprobs_BV.shape[-1])
        if most == 0:
            return None
        values_BK, ids_BK = logprobs_BV.topk(most, -1)
        rows = zip(ids_BK.tolist(), values_BK.tolist(), self._top_logprobs, strict=True)
        return [list(zip(ids, values, strict=True))[:count] for ids, values, count in rows]


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadRequestError(f"{name} is {value}; it must lie between {low} and {high}", param=name)
