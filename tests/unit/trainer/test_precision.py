"""16-bit computing beside 32-bit weights, and recomputed activations, against float64 and against the plain pass."""

import copy

import numpy as np
import pytest
import torch

from tests.reference.ops import CountedOps
from tests.reference.policy_step import as_float64, row_logprobs
from tests.reference.rows import make_rows, tiny_model
from tests.unit.trainer.serving_fixtures import build_tokenizer
from trainer.config import PolicySection
from trainer.data.batch import pack_rows
from trainer.policy import build
from trainer.policy.logprob import hidden_states, token_scores
from trainer.policy.model import save_policy
from trainer.policy.precision import (
    ATTENTION_OPS,
    checkpoint_activations,
    compile_layers,
    decoder_layers,
    forward_precision,
)

# bfloat16 has 8 bits: each rounding is off by up to 2^-9 of its size, and they add up as a random walk. Measured on the
# four models with three seeds each: log-probs at most 0.11 nats off (0.02 on average), gradients 4.6 % of their norm. The
# same models wholly in bfloat16 were off by up to 0.29 nats.
LOGPROB_TOLERANCE = 0.15
GRADIENT_TOLERANCE = 0.06

FAMILIES = ["llama", "qwen2", "qwen3", "qwen3-window"]


def pack_of(lengths):
    rows = make_rows(3, lengths)
    (pack,) = pack_rows(rows, np.ones(len(rows)), token_budget=sum(lengths))
    return rows, pack


def gradients(model, pack):
    model.zero_grad()
    token_scores(model, pack).logprobs_K.sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("backend", ["packed_rows", "packed_sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_computing_is_near_float64_in_logprobs_and_gradients(family, backend):
    rows, pack = pack_of([9, 30, 17])
    plain = tiny_model(family, attention=backend)
    model = forward_precision(copy.deepcopy(plain), torch.bfloat16)
    twin = as_float64(plain)
    expected = torch.stack([scored[0] for index in pack.row_indices for scored in row_logprobs(twin, rows[index])])
    found = token_scores(model, pack).logprobs_K
    assert found.dtype == torch.float32
    off = (found - expected).abs()
    assert 1e-4 < off.max() < LOGPROB_TOLERANCE  # it does compute in 16 bits
    expected.sum().backward()
    twins = dict(twin.named_parameters())
    for name, gradient in gradients(model, pack).items():
        assert gradient.dtype == torch.float32
        assert (gradient - twins[name].grad).norm() < GRADIENT_TOLERANCE * twins[name].grad.norm(), name


def test_names_tensors_and_masters_stay_and_frozen_matrices_are_halved():
    plain = tiny_model("qwen2")
    model = copy.deepcopy(plain)
    model.model.layers[0].requires_grad_(False)
    forward_precision(model, torch.bfloat16)
    for (name, before), (same, after) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        frozen_matrix = "layers.0" in name and "norm" not in name
        assert (name, after.dtype) == (same, torch.bfloat16 if frozen_matrix else torch.float32)
        assert torch.equal(after, before.to(after.dtype))


def test_the_residual_stream_is_16_bits_and_rope_norms_and_head_are_32():
    model = forward_precision(tiny_model("qwen3"), torch.bfloat16)
    seen = {}

    def watch(name):
        return lambda module, args, output: seen.setdefault(name, output)

    layer = decoder_layers(model)[1]
    model.model.rotary_emb.register_forward_hook(watch("rope"))
    layer.register_forward_hook(watch("residual"))
    layer.self_attn.q_norm.register_forward_hook(watch("q_norm"))
    layer.self_attn.o_proj.register_forward_hook(watch("o_proj"))
    pack = pack_of([20])[1]
    hidden = hidden_states(model, pack)
    dtypes = {name: (output[0] if isinstance(output, tuple) else output).dtype for name, output in seen.items()}
    half, single = torch.bfloat16, torch.float32
    assert dtypes == {"rope": single, "residual": half, "q_norm": single, "o_proj": half}
    assert hidden.dtype == single
    cosines = tiny_model("qwen3").model.rotary_emb(torch.zeros(1), pack.positions_T[None])
    assert torch.equal(seen["rope"][0], cosines[0])  # not rounded on the way either


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_angles_are_exact_while_other_products_are_rounded(dtype):
    """An angle is frequency times position as a product of matrices: TF32 would round positions to 11 bits."""
    model = forward_precision(tiny_model("qwen3"), dtype)
    seen = []
    model.model.rotary_emb.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    rotary = type(model.model.rotary_emb).__mro__[2]  # transformers' own
    original = rotary.forward
    before = torch.get_float32_matmul_precision()
    try:
        rotary.forward = lambda self, *args, **kwargs: (
            seen.append(torch.get_float32_matmul_precision()),
            original(self, *args, **kwargs),
        )[1]
        torch.set_float32_matmul_precision("high")
        hidden_states(model, pack_of([12])[1])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        rotary.forward = original
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest", "high"]


def test_a_copy_of_a_16_bit_model_computes_with_its_own_weights():
    model = forward_precision(tiny_model("llama"), torch.bfloat16)
    twin = copy.deepcopy(model)
    pack = pack_of([12])[1]
    before = token_scores(model, pack).logprobs_K
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(token_scores(model, pack).logprobs_K, before)
    assert not torch.equal(token_scores(twin, pack).logprobs_K, before)


def test_float32_is_left_alone_and_whole_numbers_are_refused():
    plain, pack = tiny_model("llama"), pack_of([12])[1]
    model = forward_precision(copy.deepcopy(plain), torch.float32)
    assert torch.equal(token_scores(model, pack).logprobs_K, token_scores(plain, pack).logprobs_K)
    with pytest.raises(ValueError, match="torch.int8 is not a floating point type"):
        forward_precision(plain, torch.int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_give_the_same_bits(family, dtype):
    pack = pack_of([9, 30, 17])[1]
    plain = forward_precision(tiny_model(family), dtype)
    saving = checkpoint_activations(forward_precision(tiny_model(family), dtype))
    for (name, expected), found in zip(gradients(plain, pack).items(), gradients(saving, pack).values(), strict=True):
        assert torch.equal(found, expected), name
    assert saving.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_is_kept_runs_once_and_gives_the_same_bits(dtype):
    pack = pack_of([9, 30, 17])[1]
    found, times = {}, {}
    for keep_attention in (False, True):
        model = forward_precision(tiny_model("qwen3"), dtype)
        with CountedOps() as counted:
            found[keep_attention] = gradients(checkpoint_activations(model, keep_attention=keep_attention), pack)
        times[keep_attention] = sum(counted.times[op] for op in ATTENTION_OPS)
    layers, rows = len(decoder_layers(model)), 3
    assert times == {False: 2 * layers * rows, True: layers * rows}
    for name, expected in found[False].items():
        assert torch.equal(found[True][name], expected), name


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # torch's own tracing
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_share_a_few_graphs_for_all_packs_and_give_the_same_bits(recompute):
    """Traced only: what torch's compiler then makes of a graph is not watched here."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    plain = forward_precision(tiny_model("qwen3"), torch.bfloat16)
    model = compile_layers(forward_precision(tiny_model("qwen3"), torch.bfloat16), backend=backend)
    if recompute:
        checkpoint_activations(model)
    known = []
    for lengths in ([9, 30, 17], [5, 12], [40, 3, 3, 8]):
        pack = pack_of(lengths)[1]
        for (name, expected), found in zip(
            gradients(plain, pack).items(), gradients(model, pack).values(), strict=True
        ):
            assert torch.equal(found, expected), name
        known.append(len(graphs))
    assert known[0] == known[-1] <= 4  # before attention and behind it; the first layer may differ


@pytest.mark.parametrize("attention_again", [True, False])
def test_a_policy_runs_as_its_section_says(attention_again, tmp_path, monkeypatch):
    save_policy(tiny_model("qwen3"), build_tokenizer(), tmp_path / "model")
    prepared = []
    monkeypatch.setattr(build, "compile_layers", lambda model: prepared.append("compiled"))
    monkeypatch.setattr(build, "checkpoint_activations", lambda model, **how: prepared.append(how))
    section = PolicySection(model="", recompute=True, recompute_attention=attention_again, compile=True)
    build.build_policy(section, tmp_path / "model")
    assert prepared == ["compiled", {"keep_attention": not attention_again}]
    build.build_policy(PolicySection(model=""), tmp_path / "model")
    assert len(prepared) == 2


def test_recomputed_activations_are_not_kept():
    pack = pack_of([60, 60])[1]
    kept = {}
    for name, prepare in (("plain", lambda model: model), ("saving", checkpoint_activations)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            hidden_states(prepare(tiny_model("qwen3")), pack)
        kept[name] = sum(sizes)
    assert kept["saving"] < 0.2 * kept["plain"]


def test_a_model_whose_layers_are_elsewhere_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="GPT2LMHeadModel keeps its decoder layers in no list called layers"):
        checkpoint_activations(model)
