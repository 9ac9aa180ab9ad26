"""A directory that holds no whole model is refused, with what is missing, before a weight is read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.calc.policy import build
from tests.unit.trainer.serving_fixtures import build_model, build_tokenizer
from trainer.policy.model import check_tokenizer, check_weights, load_policy


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    model = build_model()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    build_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def forget(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_whole_directory_in_shards_is_taken(policy: Path) -> None:
    assert len(list(policy.glob("model-*.safetensors"))) > 1
    check_weights(policy)
    check_tokenizer(policy)
    assert load_policy(policy).config._attn_implementation == "packed_rows"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda policy: (policy / "config.json").unlink(), "has no config.json"),
        (lambda policy: (policy / "config.json").write_text("{"), "config.json cannot be read as JSON"),
        (lambda policy: (policy / "config.json").write_text("[]"), "holds list where a JSON object"),
        (lambda policy: forget(policy / "config.json", model_type=None), "names no model_type"),
        (lambda policy: next(policy.glob("model-*1-of*")).unlink(), r"lacks 1 of its \d weight files, model-00001-of"),
        (
            lambda policy: (policy / "model.safetensors.index.json").unlink(),
            "lacks 1 of its 1 weight files, model.safet",
        ),
        (lambda policy: forget(policy / "model.safetensors.index.json", weight_map={}), "lacks every weight file"),
        (lambda policy: cut(next(policy.glob("model-*2-of*"))), "is not a whole safetensors file"),
    ],
)
def test_an_incomplete_model_is_refused_with_what_is_missing(policy: Path, damage, reason: str) -> None:
    damage(policy)
    for refuses in (check_weights, load_policy):
        with pytest.raises(ValueError, match=reason):
            refuses(policy)


def test_a_weight_that_the_config_promises_and_no_file_holds_is_not_drawn_at_random(tmp_path: Path) -> None:
    build(tmp_path, 0)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_weights(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 1 weights of a LlamaForCausalLM, model.layers.0.mlp.up_proj.weight"):
        load_policy(tmp_path)


def test_a_tokenizer_that_is_missing_or_of_another_model_is_refused(policy: Path) -> None:
    forget(policy / "config.json", vocab_size=200)
    with pytest.raises(ValueError, match="its tokenizer knows token id 258 and its model 200 ids"):
        check_tokenizer(policy)
    for path in policy.glob("*token*"):
        path.unlink()
    with pytest.raises(ValueError, match="holds no tokenizer that can be loaded"):
        check_tokenizer(policy)


def test_the_attention_follows_from_what_the_model_computes_in(policy: Path) -> None:
    assert load_policy(policy, compute_dtype=torch.bfloat16).dtype == torch.float32
    with pytest.raises(ValueError, match="'flash' cannot run here"):
        load_policy(policy, attention="flash")
