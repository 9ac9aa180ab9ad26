"""Packed rows must come out as if each had the model to itself."""

import numpy as np
import pytest
import torch

from tests.reference.rows import make_rows, tiny_llama
from trainer.data.batch import pack_rows
from trainer.policy.attention import choose_backend
from trainer.policy.logprob import hidden_states

# Largest difference of a hidden state of order 1 between a packed row and the same row alone, in float32: the
# matrix kernels block their sums differently when there are more tokens.
PACKED_TOLERANCE = 2e-5


def alone_and_packed(model, lengths):
    rows = make_rows(5, lengths)
    (pack,) = pack_rows(rows, np.ones(len(rows)), token_budget=sum(lengths))
    with torch.no_grad():
        packed = hidden_states(model, pack).split(pack.row_lengths)
        alone = [
            hidden_states(model, *pack_rows([rows[k]], [1.0], token_budget=sum(lengths))) for k in pack.row_indices
        ]
    return alone, packed


@pytest.mark.parametrize("backend", ["rows", "sdpa"])
def test_a_packed_row_equals_the_row_alone(backend):
    model = tiny_llama(attention=choose_backend(backend))
    for alone, packed in zip(*alone_and_packed(model, [9, 2, 31, 16]), strict=True):
        torch.testing.assert_close(packed, alone, rtol=0, atol=PACKED_TOLERANCE)


def test_the_two_backends_agree():
    rows = make_rows(6, [9, 2, 31, 16])
    (pack,) = pack_rows(rows, np.ones(4), token_budget=64)
    with torch.no_grad():
        ours, theirs = (hidden_states(tiny_llama(attention=choose_backend(name)), pack) for name in ("rows", "sdpa"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=PACKED_TOLERANCE)


def test_a_neighbour_full_of_nan_changes_not_one_bit():
    rows = make_rows(7, [12, 12, 12])
    poison = 36
    for row in rows:
        row.token_ids[row.token_ids == poison] = 0
    rows[1].token_ids[5] = poison
    (pack,) = pack_rows(rows, np.ones(3), token_budget=36)
    model = tiny_llama(tied=False)
    with torch.no_grad():
        clean = hidden_states(model, pack).split(pack.row_lengths)
        model.get_input_embeddings().weight[poison] = float("nan")
        poisoned = hidden_states(model, pack).split(pack.row_lengths)
    assert poisoned[1].isnan().any()
    for k in (0, 2):
        assert torch.equal(poisoned[k], clean[k])


def test_a_sliding_window_is_respected():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM._from_config(config, attn_implementation="packed_rows").eval()
    (pack,) = pack_rows(make_rows(8, [14, 3]), [1.0, 1.0], token_budget=17)
    with torch.no_grad():
        ours = hidden_states(model, pack)
        model.set_attn_implementation("eager")
        for part, length, start in zip(ours.split(pack.row_lengths), pack.row_lengths, (0, 14), strict=True):
            alone = model.base_model(pack.token_ids_T[None, start : start + length], use_cache=False).last_hidden_state[
                0
            ]
            torch.testing.assert_close(part, alone, rtol=0, atol=PACKED_TOLERANCE)


def test_the_backend_is_chosen_or_forced_and_a_wrong_name_is_refused():
    assert choose_backend("auto") == choose_backend("rows") == "packed_rows"
    assert choose_backend("sdpa") == "sdpa"
    with pytest.raises(ValueError, match="'flesh' is not known: use 'auto' or one of 'rows', 'sdpa'"):
        choose_backend("flesh")


def test_a_call_that_does_not_say_where_rows_end_is_refused():
    with pytest.raises(ValueError, match="row_lengths=None"):
        tiny_llama()(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False)
