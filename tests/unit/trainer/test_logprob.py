"""Chunked log-probs and their gradients against the plain formula, and packed rows against rows alone."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference.policy_step import as_float64, row_logprobs
from tests.reference.rows import make_rows, tiny_llama
from trainer.data.batch import pack_rows
from trainer.policy.logprob import chunked_logprobs, head_weight, token_scores


def head_case(num_tokens=23, width=8, vocabulary=19, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden_KD = (scale * torch.randn(num_tokens, width, generator=generator, dtype=dtype)).requires_grad_()
    weight_VD = torch.randn(vocabulary, width, generator=generator, dtype=dtype).requires_grad_()
    targets_K = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    temperatures_K = torch.rand(num_tokens, generator=generator) + 0.5
    return hidden_KD, weight_VD, targets_K, temperatures_K


def plain(hidden_KD, weight_VD, targets_K, temperatures_K):
    distribution_KV = ((hidden_KD @ weight_VD.T) / temperatures_K[:, None]).log_softmax(-1)
    return distribution_KV.gather(-1, targets_K[:, None]).squeeze(-1), -(distribution_KV.exp() * distribution_KV).sum(
        -1
    )


@pytest.mark.parametrize("scale", [1.0, 300.0])  # at 300, blocks of the vocabulary are e^1000 apart
@pytest.mark.parametrize(("chunk_tokens", "chunk_vocabulary"), [(1, 19), (5, 7), (23, 1), (1000, 1000)])
def test_chunks_change_neither_logprobs_nor_entropies_nor_gradients(chunk_tokens, chunk_vocabulary, scale):
    case = head_case(scale=scale)
    expected, expected_entropies = plain(*case)
    found, entropies = chunked_logprobs(*case, chunk_tokens=chunk_tokens, chunk_vocabulary=chunk_vocabulary)
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


class LargestTensor(TorchDispatchMode):
    """Watches every result of every operation, forward and backward: the most elements that one had."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor._base is None:  # a view takes no memory
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("head", [torch.float32, torch.bfloat16])
def test_no_tensor_of_tokens_by_vocabulary_ever_exists(head):
    tokens, vocabulary, width = 96, 512, 4
    hidden_KD, weight_VD, *rest = head_case(num_tokens=tokens, vocabulary=vocabulary, width=width, dtype=head)
    with LargestTensor() as largest:
        logprobs, entropies = chunked_logprobs(hidden_KD, weight_VD, *rest, chunk_tokens=16, chunk_vocabulary=128)
        (logprobs.sum() + entropies.sum()).backward()
    assert largest.numel == max(16 * 128, vocabulary * width)  # one block of logits; or the head's gradient


def test_the_head_of_a_whole_model_keeps_no_tensor_of_tokens_by_vocabulary():
    rows = make_rows(9, [40, 40, 40])
    model = tiny_llama(vocab_size=2048)
    with LargestTensor() as largest:
        for pack in pack_rows(rows, np.ones(3), token_budget=120):
            token_scores(model, pack, chunk_tokens=8).logprobs_K.sum().backward()
    assert largest.numel == 2048 * 32  # the head's own gradient


def test_a_frozen_head_gets_no_gradient_and_hidden_states_the_same_one():
    hidden_KD, weight_VD, *rest = head_case()
    chunked_logprobs(hidden_KD, weight_VD, *rest)[0].sum().backward()
    expected, hidden_KD.grad = hidden_KD.grad, None
    chunked_logprobs(hidden_KD, weight_VD.detach(), *rest)[0].sum().backward()
    assert torch.equal(hidden_KD.grad, expected)


def test_a_head_in_float32_is_rounded_block_by_block_where_that_is_asked_for():
    hidden_KD, weight_VD, *rest = head_case(dtype=torch.float32)
    found, _ = chunked_logprobs(hidden_KD, weight_VD, *rest, head_dtype=torch.bfloat16, chunk_vocabulary=7)
    rounded = [part.detach().bfloat16().float() for part in (hidden_KD, weight_VD)]
    torch.testing.assert_close(found, plain(*rounded, *rest)[0])
    gradient, expected = (
        torch.autograd.grad(logprobs.sum(), weight_VD)[0] for logprobs in (found, plain(hidden_KD, weight_VD, *rest)[0])
    )
    assert gradient.dtype == torch.float32
    assert (gradient - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(("chunk_tokens", "chunk_vocabulary"), [(1, 19), (5, 7), (1000, 1000)])
@pytest.mark.parametrize("with_logprobs", [False, True])
def test_entropy_has_the_gradient_of_the_plain_formula(chunk_tokens, chunk_vocabulary, with_logprobs):
    case = head_case()
    found = chunked_logprobs(*case, chunk_tokens=chunk_tokens, chunk_vocabulary=chunk_vocabulary)
    expected = plain(*case)
    weights_K = torch.linspace(-1, 2, len(found[0]), dtype=torch.float64)

    def gradients(logprobs_K, entropies_K):
        loss = (entropies_K * weights_K).sum()
        return torch.autograd.grad(loss + (logprobs_K * weights_K.flip(0)).sum() if with_logprobs else loss, case[:2])

    for ours, theirs in zip(gradients(*found), gradients(*expected), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["packed_rows", "packed_sdpa"])
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
        np.testing.assert_allclose(
            scores.entropies_K.detach(), [entropy for _, _, entropy in expected], rtol=0, atol=2e-5
        )


def test_a_head_that_does_more_than_multiply_is_refused():
    model = tiny_llama()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping=30.0"):
        head_weight(model)


def test_an_empty_chunk_is_refused():
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        chunked_logprobs(*head_case(), chunk_tokens=0)
