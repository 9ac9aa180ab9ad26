"""Packed rows must come out as if each had the model to itself, under every backend and for each family of models.

What this file leaves unwatched: the CUDA kernels themselves. Their calls are watched through stand-ins with the real
signatures; bench/gpu.py compares the kernels with the reference where there is a GPU.
"""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.policy_step import as_float64
from tests.reference.rows import make_rows, tiny_llama, tiny_model
from trainer.data.batch import pack_rows
from trainer.policy.attention import BACKENDS, RowLayout, backends, choose_backend
from trainer.policy.logprob import hidden_states, token_scores

# Largest difference of a hidden state of order 1 between a packed row and the same row alone, in float32: the
# matrix kernels block their sums differently when there are more tokens.
PACKED_TOLERANCE = 2e-5

FAMILIES = ["llama", "qwen2", "qwen3", "qwen3-window"]
# flex runs here without a backward pass, and torch warns that it is slow; importing its compiler warns of torch itself.
FLEX = pytest.param(
    "flex",
    marks=[
        pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
        pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    ],
)


def pack_of(rows):
    (pack,) = pack_rows(rows, np.ones(len(rows)), token_budget=sum(len(row.token_ids) for row in rows))
    return pack


def alone(model, row):
    """(L, D) by transformers' eager attention in float64, nothing packed."""
    ids = torch.from_numpy(row.token_ids.astype("int64"))[None]
    with torch.no_grad():
        return as_float64(model).base_model(ids, use_cache=False).last_hidden_state[0].float()


# --- a row in a pack is the row alone ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["rows", "sdpa", FLEX, "varlen", "varlen-2.11", "varlen-2.10", "flash"])
def test_a_packed_row_equals_the_row_alone(backend, family, monkeypatch):
    if backend == "varlen-2.10":  # it has no window; its refusal is a test of its own
        family = family.removesuffix("-window")
    stand_in(monkeypatch, backend)
    rows = make_rows(5, [9, 2, 31, 16])
    model = tiny_model(family, attention=BACKENDS[backend.partition("-")[0]])
    pack = pack_of(rows)
    with torch.no_grad():
        packed = hidden_states(model, pack).split(pack.row_lengths)
    for found, index in zip(packed, pack.row_indices, strict=True):
        torch.testing.assert_close(found, alone(model, rows[index]), rtol=0, atol=PACKED_TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_backends_agree_on_gradients(family, monkeypatch):
    pack = pack_of(make_rows(6, [9, 2, 31, 16]))
    found = {}
    for backend in ("rows", "sdpa", "varlen", "flash"):
        stand_in(monkeypatch, backend)
        model = tiny_model(family, attention=BACKENDS[backend])
        token_scores(model, pack).logprobs_K.sum().backward()
        found[backend] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for backend in found:
        for name, gradient in found["rows"].items():
            torch.testing.assert_close(found[backend][name], gradient, rtol=1e-4, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 14), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_rows_in_a_pack_changes_no_logprob(lengths, random):
    rows = make_rows(7, lengths)
    model = tiny_model("qwen3")
    order = random.sample(range(len(rows)), len(rows))
    scored = []
    for chosen in (rows, [rows[k] for k in order]):
        pack = pack_of(chosen)
        with torch.no_grad():
            logprobs = token_scores(model, pack).logprobs_K
        sizes = [int(chosen[index].trained.sum()) for index in pack.row_indices]
        parts = zip(pack.row_indices, logprobs.split(sizes), strict=True)
        scored.append({chosen[index].rollout_id: part for index, part in parts})
    for rollout_id, part in scored[0].items():
        torch.testing.assert_close(scored[1][rollout_id], part, rtol=0, atol=PACKED_TOLERANCE)


# --- neighbours ---


@pytest.mark.parametrize("backend", ["rows", "varlen", "flash"])
def test_a_neighbour_full_of_nan_changes_not_one_bit(backend, monkeypatch):
    """Of log-probs, and of the gradients that reach the other rows' embeddings."""
    stand_in(monkeypatch, backend)
    rows = make_rows(7, [12, 12, 12])
    poison = 36
    for row in rows:
        row.token_ids[row.token_ids == poison] = 0
    rows[1].token_ids[:] = poison
    pack = pack_of(rows)
    found = []
    for value in (0.5, float("nan")):
        model = tiny_llama(tied=False, attention=BACKENDS[backend])
        with torch.no_grad():
            model.get_input_embeddings().weight[poison] = value
        logprobs = token_scores(model, pack).logprobs_K.split([int(row.trained.sum()) for row in rows])
        (logprobs[0].sum() + logprobs[2].sum()).backward()
        found.append((logprobs, model.get_input_embeddings().weight.grad[:poison]))
    (clean, clean_grad), (poisoned, poisoned_grad) = found
    assert poisoned[1].isnan().all()
    for k in (0, 2):
        assert torch.equal(poisoned[k], clean[k])
    assert torch.equal(poisoned_grad, clean_grad) and clean_grad.abs().sum() > 0


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([None, 1, 3, 50]))
@settings(max_examples=25, deadline=None)
def test_a_token_sees_its_own_row_up_to_itself_and_within_the_window(lengths, window):
    layout = RowLayout(lengths)
    row = [k for k, length in enumerate(lengths) for _ in range(length)]
    expected = [[row[q] == row[k] and 0 <= q - k < (window or 100) for k in range(len(row))] for q in range(len(row))]
    assert layout.dense_mask(window).tolist() == expected
    assert layout.dense_mask(window) is layout.dense_mask(window)
    ids = torch.arange(len(row))
    mask_mod = layout.block_mask(window).mask_mod
    assert mask_mod(ids[:0], ids[:0], ids[:, None], ids[None, :]).tolist() == expected
    assert layout.starts_N1.tolist() == [sum(lengths[:k]) for k in range(len(lengths) + 1)]
    assert layout.starts_N1.dtype == torch.int32 and layout.longest == max(lengths)


def test_the_layout_is_made_once_for_all_layers(monkeypatch):
    seen = []
    stand_in(monkeypatch, "flash", spy=lambda layout_starts: seen.append(layout_starts))
    with torch.no_grad():
        hidden_states(tiny_model("qwen2", attention=BACKENDS["flash"]), pack_of(make_rows(1, [5, 4])))
    assert len(seen) == 2 and seen[0] is seen[1]


# --- choosing ---


def test_without_a_gpu_rows_are_chosen_and_the_log_says_why_not_better(caplog):
    with caplog.at_level("INFO"):
        assert choose_backend("auto") == "packed_rows"
    assert "attention rows for torch.float32 on cpu" in caplog.text
    for reason in ("not flash: its kernels need a CUDA device", "not varlen:", "not flex: it has no backward pass"):
        assert reason in caplog.text


@pytest.mark.parametrize(
    ("dtype", "capability", "flash_attn", "triton", "expected"),
    [
        (torch.bfloat16, (9, 0), True, True, "flash"),
        (torch.bfloat16, (8, 0), False, True, "varlen"),
        (torch.float16, (7, 5), True, True, "flex"),
        (torch.float32, (9, 0), True, True, "flex"),
        (torch.float32, (9, 0), True, False, "rows"),
    ],
)
def test_on_a_gpu_the_best_that_runs_is_chosen(dtype, capability, flash_attn, triton, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(backends, "_flash", lambda: object() if flash_attn else None)
    find_spec = importlib.util.find_spec
    installed = {"triton": object() if triton else None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: installed[name] if name in installed else find_spec(name)
    )
    assert choose_backend("auto", device="cuda", dtype=dtype) == BACKENDS[expected]


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("flesh", {}, "'flesh' is not known: use 'auto' or one of 'flash', 'varlen', 'flex', 'rows', 'sdpa'"),
        ("flash", {}, "'flash' cannot run here: its kernels need a CUDA device"),
        ("varlen", {}, "'varlen' cannot run here: its kernels need a CUDA device"),
        ("flex", {}, "'flex' cannot run here: it has no backward pass on cpu"),
        ("varlen", {"device": "cuda"}, "compute_dtype bfloat16"),
        ("flash", {"device": "cuda", "dtype": torch.bfloat16}, "pip install flash-attn"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_with_the_way_out(name, options, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with pytest.raises(ValueError, match=reason):
        choose_backend(name, **options)


def test_a_short_row_in_16_bits_on_a_cpu_is_rounded_once_and_a_long_one_stays_in_16_bits():
    torch.manual_seed(0)
    rounded = [torch.randn(1, heads, 340, 16).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    exact = [part.detach().double().requires_grad_() for part in rounded]
    layout, asked = RowLayout([80, 260]), backends.Asked(None, None, None)
    outputs = [backends.rows_kernel(*parts, layout, asked) for parts in (rounded, exact)]
    toward = torch.randn(outputs[0].shape).bfloat16()
    for output in outputs:
        output.backward(toward.to(output.dtype))

    def error(found, expected):
        return float((found.double() - expected).norm() / expected.norm())

    for ours, theirs in zip(rounded, exact, strict=True):
        errors = [
            error(one, two)
            for one, two in zip(ours.grad.split([80, 260], 2), theirs.grad.split([80, 260], 2), strict=True)
        ]
        assert errors[0] < 0.002 < errors[1]  # half an ulp of bfloat16, root mean square, is 0.0017


# --- what a kernel cannot do is refused ---


def test_a_call_that_does_not_say_where_rows_end_is_refused():
    with pytest.raises(ValueError, match="row_layout=None"):
        tiny_llama()(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"softcap": 30.0}, "caps attention scores at 30.0"),
        ({"dropout": 0.1}, "drops 10% of its attention: call eval"),
        ({"s_aux": torch.zeros(4)}, "has attention sinks"),
    ],
)
def test_what_a_layer_asks_for_in_vain_is_refused(options, reason):
    heads = torch.zeros(1, 4, 3, 8)
    attend = backends.AttentionInterface()["packed_rows"]
    with pytest.raises(ValueError, match=reason):
        attend(torch.nn.Module(), heads, heads, heads, None, row_layout=RowLayout([3]), **options)


def test_an_old_torch_refuses_a_window_that_rows_reach_beyond(monkeypatch):
    stand_in(monkeypatch, "varlen-2.10")
    model = tiny_model("qwen3-window", attention=BACKENDS["varlen"])
    with torch.no_grad():
        hidden_states(model, pack_of(make_rows(1, [5, 4])))
        with pytest.raises(ValueError, match="no sliding window.*is 5: install torch"):
            hidden_states(model, pack_of(make_rows(1, [6, 4])))


# --- stand-ins for kernels that need a GPU: the real signatures, written as an obvious loop ---


def attend_slowly(query_THE, key_TGE, value_TGE, starts, scale, left, softcap=0.0):
    outputs = []
    times = query_THE.shape[1] // key_TGE.shape[1]
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        for t in range(start, end):
            first = start if left < 0 else max(start, t - left)
            key, value = (x[first : t + 1].repeat_interleave(times, dim=1) for x in (key_TGE, value_TGE))
            scores = torch.einsum("he,she->hs", query_THE[t], key) * scale
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            outputs.append(torch.einsum("hs,she->he", scores.softmax(-1), value))
    return torch.stack(outputs)


def varlen_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert window_size[1] == 0 and cu_seq_q is cu_seq_k and max_q == max_k == int(cu_seq_q.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return attend_slowly(query, key, value, cu_seq_q, scale or query.shape[-1] ** -0.5, window_size[0])


def varlen_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return varlen_2_13(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    return attend_slowly(query, key, value, cu_seq_q, query.shape[-1] ** -0.5, -1)


def stand_in(monkeypatch, backend, spy=lambda starts: None):
    """Let the backend's kernel be a slow loop, where the real one needs a GPU."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
        block_table=None,
    ):  # fmt: skip
        spy(cu_seqlens_q)
        assert causal and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        assert window_size == (-1, -1) or window_size[1] == 0
        return attend_slowly(q, k, v, cu_seqlens_q, softmax_scale, window_size[0], softcap)

    kernels = {"varlen": varlen_2_13, "varlen-2.11": varlen_2_11, "varlen-2.10": varlen_2_10}
    if backend in kernels:
        from torch.nn.attention import varlen

        monkeypatch.setattr(varlen, "varlen_attn", kernels[backend])
        backends._varlen.cache_clear()
        monkeypatch.setattr(backends, "_varlen", backends._varlen.__wrapped__)
    if backend == "flash":
        module = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        monkeypatch.setattr(backends, "_flash", backends._flash.__wrapped__)
