"""A LoRA adapter against the sum written out, and against peft reading what we write."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.reference.rows import make_rows, tiny_model
from tests.unit.trainer.serving_fixtures import build_model, build_tokenizer
from trainer.data.batch import pack_rows
from trainer.optimize import checkpoint
from trainer.optimize.optimizer import Optimizer
from trainer.policy.logprob import token_scores
from trainer.policy.lora import (
    adapter_weights,
    add_adapter,
    base_weights,
    export_policy,
    load_adapter,
    merged_weights,
    save_adapter,
    without_adapter,
    zero_adapter,
)
from trainer.policy.model import load_policy, named_weights, save_policy
from trainer.policy.precision import checkpoint_activations, forward_precision

pytest.importorskip("peft")

FAMILIES = ["llama", "qwen2", "qwen3"]


def pack_of(lengths=(9, 20)):
    rows = make_rows(3, list(lengths))
    return pack_rows(rows, np.ones(len(rows)), token_budget=sum(lengths))[0]


def adapted(family="qwen3", rank=3, **options):
    """A model with an adapter that has learnt something."""
    model = add_adapter(tiny_model(family), rank, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert ".lora_" in name
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def scores(model, pack):
    with torch.no_grad():
        return token_scores(model, pack).logprobs_K


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_adds_nothing_and_only_it_is_trained(family):
    pack, plain = pack_of(), tiny_model(family)
    expected = scores(plain, pack)
    model = add_adapter(copy.deepcopy(plain), 4)
    assert torch.equal(scores(model, pack), expected)
    before = {name: tensor.clone() for name, tensor in base_weights(model).items()}
    assert before.keys() == dict(named_weights(plain)).keys()
    optimizer = Optimizer(model, lr=1e-2)
    for _ in range(2):  # the first step moves B only: A's gradient passes through it
        optimizer.zero_grad()
        (-token_scores(model, pack).logprobs_K.mean()).backward()
        optimizer.step()
    assert scores(model, pack).mean() > expected.mean()
    for name, tensor in base_weights(model).items():
        assert torch.equal(tensor, before[name])
    with without_adapter(model):
        assert torch.equal(scores(model, pack), expected)
    assert all(parameter.requires_grad == (".lora_" in name) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_merged_weights_compute_what_base_and_adapter_do(family, targets):
    pack = pack_of()
    model = adapted(family, rank=3, alpha=5.0, targets=targets)
    plain = tiny_model(family)
    untouched = dict(named_weights(plain))
    parts = adapter_weights(model)
    merged = merged_weights(model)
    assert merged.keys() == untouched.keys()
    for name, tensor in merged.items():
        part = f"base_model.model.{name.removesuffix('.weight')}"
        expected = untouched[name].double()
        if f"{part}.lora_A.weight" in parts:
            up, down = (parts[f"{part}.lora_{letter}.weight"].double() for letter in "BA")
            expected = expected + 5.0 / 3 * up @ down
        torch.testing.assert_close(tensor, expected.float(), rtol=0, atol=1e-6)
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(scores(plain, pack), scores(model, pack), rtol=0, atol=2e-5)


# peft 0.21 asks transformers 5.23 a question that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_reads_the_directory_that_we_write(tmp_path):
    from peft import PeftModel

    pack, model = pack_of(), adapted("llama", alpha=7)
    save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(scores(theirs.base_model.model, pack), scores(model, pack), rtol=0, atol=1e-6)
    ours = add_adapter(tiny_model("llama"), 3, alpha=7)
    load_adapter(ours, tmp_path / "adapter")
    assert torch.equal(scores(ours, pack), scores(model, pack))


def test_the_first_adapter_is_known_from_the_config_alone_and_adds_nothing(tmp_path):
    build_model().config.save_pretrained(tmp_path)
    config, weights = zero_adapter(tmp_path, 3)
    expected = adapter_weights(add_adapter(build_model(), 3))
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert config["r"] == 3 and not any(tensor.any() for tensor in weights.values())


def test_an_adapter_of_another_shape_or_model_is_refused_and_changes_nothing(tmp_path):
    directory = tmp_path / "adapter"
    save_adapter(adapted("llama"), directory)
    for other, reason in (
        (adapted("llama", rank=2), "adapter with r 3, this model's has 2"),
        (adapted("llama", alpha=1), "adapter with lora_alpha 6, this model's has 1"),
        (adapted("llama", targets=["q_proj"]), "of another model: .* differ"),
    ):
        before = {name: tensor.clone() for name, tensor in adapter_weights(other).items()}
        with pytest.raises(ValueError, match=reason):
            load_adapter(other, directory)
        assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_weights(other).items())


def test_an_export_is_a_whole_model_and_its_tokenizer(tmp_path):
    model = add_adapter(build_model(), 2)
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.normal_(std=0.1)
    with pytest.raises(ValueError, match="export_policy\\(\\) writes a whole model"):
        save_policy(model, build_tokenizer(), tmp_path / "export")
    export_policy(model, build_tokenizer(), tmp_path / "export")
    loaded = dict(named_weights(load_policy(tmp_path / "export")))
    merged = merged_weights(model)
    assert loaded.keys() == merged.keys()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in loaded.items())


def test_a_checkpoint_holds_the_adapter_alone_and_resumes_it_bit_for_bit(tmp_path):
    pack = pack_of()

    def step(model, optimizer):
        optimizer.zero_grad()
        (-token_scores(model, pack).logprobs_K.mean()).backward()
        optimizer.step()

    model = adapted()
    optimizer = Optimizer(model, lr=1e-3)
    step(model, optimizer)
    path = checkpoint.save(tmp_path, 1, model, optimizer, {})
    held = load_file(path).keys()
    assert not any("base_layer" in name or "embed" in name for name in held)
    other = add_adapter(tiny_model("qwen3"), 3)
    resumed = Optimizer(other, lr=1e-3)
    checkpoint.load(path, other, resumed)
    for one in ((model, optimizer), (other, resumed)):
        step(*one)
    assert torch.equal(scores(model, pack), scores(other, pack))
    with pytest.raises(ValueError, match="of another model"):
        checkpoint.load(path, tiny_model("qwen3"), Optimizer(tiny_model("qwen3"), lr=1.0))


def test_in_16_bits_the_base_is_halved_and_the_adapter_stays_whole():
    pack, model = pack_of(), adapted()
    expected = scores(model, pack)
    checkpoint_activations(forward_precision(model, torch.bfloat16))
    found = token_scores(model, pack).logprobs_K
    found.sum().backward()
    assert 1e-4 < (found - expected).abs().max() < 0.15
    for name, parameter in model.named_parameters():
        is_base_matrix = "base_layer" in name
        assert parameter.dtype == (torch.bfloat16 if is_base_matrix else torch.float32), name
        assert (parameter.grad is not None) == (".lora_" in name)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rank": 0}, "rank=0"),
        (
            {"rank": 2, "targets": ["q_proj", "nose"]},
            "no matrices called nose: choose from down_proj, gate_proj, k_proj",
        ),
        ({"rank": 2, "targets": []}, "no matrices called nothing"),
    ],
)
def test_what_makes_no_adapter_is_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        add_adapter(tiny_model("qwen3"), **options)
    with pytest.raises(ValueError, match="has an adapter already"):
        add_adapter(adapted(), 2)
    with pytest.raises(ValueError, match="has no adapter"), without_adapter(tiny_model("qwen3")):
        pass


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-bus\[lora\]'"):
        add_adapter(tiny_model("llama"), 2)
