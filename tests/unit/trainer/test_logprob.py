"""Chunked log-probs and their gradients against the plain formula, and packed rows against rows alone."""

import numpy as np
import pytest
import torch

from tests.reference.policy_step import as_float64, row_logprobs
from tests.reference.rows import make_rows, tiny_llama
from trainer.data.batch import pack_rows
from trainer.policy.logprob import chunked_logprobs, head_weight, token_scores


def head_case(num_tokens=23, width=8, vocabulary=19, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden_KD = torch.randn(num_tokens, width, generator=generator, dtype=dtype).requires_grad_()
    weight_VD = torch.randn(vocabulary, width, generator=generator, dtype=dtype).requires_grad_()
    targets_K = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    temperatures_K = torch.rand(num_tokens, generator=generator) + 0.5
    return hidden_KD, weight_VD, targets_K, temperatures_K


def plain(hidden_KD, weight_VD, targets_K, temperatures_K):
    distribution_KV = ((hidden_KD @ weight_VD.T) / temperatures_K[:, None]).log_softmax(-1)
    return distribution_KV.gather(-1, targets_K[:, None]).squeeze(-1), -(distribution_KV.exp() * distribution_KV).sum(
        -1
    )


@pytest.mark.parametrize("chunk_tokens", [1, 5, 23, 1000])
def test_chunks_change_neither_logprobs_nor_entropies_nor_gradients(chunk_tokens):
    case = head_case()
    expected, expected_entropies = plain(*case)
    found, entropies = chunked_logprobs(*case, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(entropies, expected_entropies.detach())
    weights_K = torch.linspace(-1, 2, len(found), dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights_K).sum(), case[:2]),
        torch.autograd.grad((expected * weights_K).sum(), case[:2]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_gradient_passes_a_finite_difference_check():
    hidden_KD, weight_VD, targets_K, temperatures_K = head_case(num_tokens=4, width=3, vocabulary=5)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: chunked_logprobs(hidden, weight, targets_K, temperatures_K, chunk_tokens=3)[0],
        (hidden_KD, weight_VD),
    )


def test_bfloat16_hidden_states_are_scored_in_float32():
    hidden_KD, weight_VD, targets_K, temperatures_K = head_case(dtype=torch.bfloat16)
    found, _ = chunked_logprobs(hidden_KD, weight_VD, targets_K, temperatures_K)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain(hidden_KD.float(), weight_VD.float(), targets_K, temperatures_K)[0])
    gradients = torch.autograd.grad(found.sum(), (hidden_KD, weight_VD))
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.bfloat16]


def test_no_tensor_of_tokens_by_vocabulary_is_kept_for_the_backward_pass():
    case = head_case(num_tokens=64, vocabulary=512)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        chunked_logprobs(*case, chunk_tokens=8)
    assert max(saved) == 512 * 8  # the head itself


def test_entropy_carries_no_gradient():
    assert not chunked_logprobs(*head_case())[1].requires_grad


@pytest.mark.parametrize("backend", ["packed_rows", "sdpa"])
def test_packed_logprobs_equal_unpacked_ones_at_their_own_temperatures(backend):
    rows = make_rows(9, [11, 4, 27, 18, 2])
    model = tiny_llama(attention=backend)
    twin = as_float64(model)
    for pack in pack_rows(rows, np.ones(5), token_budget=40):
        scores = token_scores(model, pack, chunk_tokens=7)
        with torch.no_grad():
            expected = [scored for index in pack.row_indices for scored in row_logprobs(twin, rows[index])]
        # float32 against float64, one row at a time: 2e-5 nats
        np.testing.assert_allclose(
            scores.logprobs_K.detach(), [float(logprob) for logprob, _, _ in expected], rtol=0, atol=2e-5
        )
        np.testing.assert_allclose(scores.entropies_K, [entropy for _, _, entropy in expected], rtol=0, atol=2e-5)


def test_a_head_that_does_more_than_multiply_is_refused():
    model = tiny_llama()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping=30.0"):
        head_weight(model)


def test_an_empty_chunk_is_refused():
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        chunked_logprobs(*head_case(), chunk_tokens=0)
