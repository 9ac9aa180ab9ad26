"""A resumed run is the unbroken run, bit for bit; a damaged or foreign checkpoint is refused and says why."""

import json
import random
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from tests.reference.rows import make_rows, tiny_llama
from trainer.data.batch import pack_rows
from trainer.optimize import checkpoint
from trainer.optimize.losses import cispo
from trainer.optimize.optimizer import Optimizer
from trainer.optimize.step import train_step
from trainer.policy.model import load_policy, load_tokenizer, named_weights, save_policy

EXTRA = {"cursor": 1234567890123, "pending": {"g-1": [b"\x00\xff", "r-9"]}, "ratio": 0.1, "none": None}


def fresh_run(seed=0):
    model = tiny_llama(seed)
    return model, Optimizer(model, lr=1e-2, warmup_updates=2, schedule="cosine", total_updates=10, weight_decay=0.1)


def step_on_random_rows(model, optimizer):
    """A step whose rows depend on all three generators: one that was not restored shows in the loss."""
    seed = random.randrange(1 << 20) + int(np.random.randint(1 << 20)) + int(torch.randint(1 << 20, ()))
    rows = make_rows(seed, [11, 4, 27, 18])
    packs = pack_rows(rows, np.linspace(-1, 1, 4), token_budget=40)
    return train_step(model, optimizer, packs, cispo()).loss


def seed_generators(seed=1):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def test_a_resumed_run_matches_an_unbroken_one_bit_for_bit(tmp_path):
    model, optimizer = fresh_run()
    seed_generators()
    unbroken = [step_on_random_rows(model, optimizer) for _ in range(3)]
    unbroken_weights = dict(named_weights(model))

    model, optimizer = fresh_run()
    seed_generators()
    resumed = [step_on_random_rows(model, optimizer)]
    path = checkpoint.save(tmp_path, 1, model, optimizer, EXTRA)

    model, optimizer = fresh_run(seed=99)
    seed_generators(99)
    restored = checkpoint.load(path, model, optimizer)
    resumed += [step_on_random_rows(model, optimizer) for _ in range(2)]

    assert resumed == unbroken
    assert all(torch.equal(weight, unbroken_weights[name]) for name, weight in named_weights(model))
    assert (restored.step, restored.extra) == (1, EXTRA)
    assert (optimizer.updates, optimizer.skipped) == (3, 0)


def test_a_checkpoint_before_the_first_update_resumes_too(tmp_path):
    model, optimizer = fresh_run()
    optimizer.skip()
    path = checkpoint.save(tmp_path, 0, model, optimizer, {})
    other_model, other = fresh_run(seed=5)
    checkpoint.load(path, other_model, other)
    assert (other.updates, other.skipped, other.tensors()) == (0, 1, {})


def test_only_the_newest_and_the_spared_are_kept(tmp_path):
    model, optimizer = fresh_run()
    paths = [checkpoint.save(tmp_path, step, model, optimizer, {}) for step in range(1, 6)]
    checkpoint.drop_old(tmp_path, 2, spared=[tmp_path / "." / paths[1].name, tmp_path / "elsewhere"])
    assert sorted(tmp_path.iterdir()) == [paths[1], *paths[3:]]
    assert checkpoint.latest(tmp_path) == paths[-1]


def test_a_checkpoint_written_again_under_another_number_resumes_as_the_old_one(tmp_path):
    model, optimizer = fresh_run()
    seed_generators()
    step_on_random_rows(model, optimizer)
    old = checkpoint.read(checkpoint.save(tmp_path, 1, model, optimizer, {"try": 1}))
    unbroken = step_on_random_rows(model, optimizer)
    again = checkpoint.save_again(tmp_path, 7, old, {"try": 2})
    other_model, other = fresh_run(seed=5)
    assert checkpoint.load(again, other_model, other) == checkpoint.Checkpoint(7, {"try": 2})
    assert step_on_random_rows(other_model, other) == unbroken
    assert checkpoint.latest(tmp_path) == again


def test_a_critic_and_its_optimiser_resume_with_the_policy_bit_for_bit(tmp_path):
    model, optimizer = fresh_run()
    critic, its_optimizer = fresh_run(seed=3)
    its_optimizer.skip()
    seed_generators()
    step_on_random_rows(critic, its_optimizer)
    old = checkpoint.save(tmp_path, 1, model, optimizer, {}, parts={"critic": (critic, its_optimizer)})
    path = checkpoint.save_again(tmp_path, 2, checkpoint.read(old), {})
    unbroken = step_on_random_rows(critic, its_optimizer)

    model, optimizer = fresh_run(seed=8)
    critic, its_optimizer = fresh_run(seed=9)
    checkpoint.load(path, model, optimizer, parts={"critic": (critic, its_optimizer)})
    assert (its_optimizer.updates, its_optimizer.skipped, optimizer.updates) == (1, 1, 0)
    assert step_on_random_rows(critic, its_optimizer) == unbroken
    checkpoint.load(path, model, optimizer)  # what exports the policy alone needs no critic
    with pytest.raises(ValueError, match="cannot be called 'a/b'"):
        checkpoint.save(tmp_path, 3, model, optimizer, {}, parts={"a/b": (critic, its_optimizer)})


def test_a_part_that_is_not_there_or_of_another_model_changes_nothing(tmp_path):
    model, optimizer = fresh_run()
    other, its_optimizer = fresh_run(seed=3)
    before = {name: weight.clone() for name, weight in named_weights(other)}
    path = checkpoint.save(tmp_path, 1, model, optimizer, {})
    with pytest.raises(ValueError, match="holds no critic"):
        checkpoint.load(path, other, its_optimizer, parts={"critic": fresh_run()})
    path = checkpoint.save(tmp_path, 1, model, optimizer, {}, parts={"critic": fresh_run()})
    larger = tiny_llama(0, num_hidden_layers=3)
    with pytest.raises(ValueError, match="only in this model"):
        checkpoint.load(path, other, its_optimizer, parts={"critic": (larger, Optimizer(larger, lr=1e-3))})
    assert all(torch.equal(weight, before[name]) for name, weight in named_weights(other))


def test_a_checkpoint_from_before_there_were_parts_still_loads(tmp_path):
    model, optimizer = fresh_run()
    path = checkpoint.save(tmp_path, 1, model, optimizer, EXTRA)
    tensors = load_file(path)
    state = msgspec.msgpack.decode(tensors.pop("state").numpy().tobytes()[4:])
    assert state.pop("parts") == {}
    encoded = msgspec.msgpack.encode(state)
    raw = bytearray(zlib.crc32(encoded).to_bytes(4, "little") + encoded)
    save_file({**tensors, "state": torch.frombuffer(raw, dtype=torch.uint8)}, path)
    assert checkpoint.load(path, *fresh_run(seed=5)).extra == EXTRA


def test_a_directory_has_one_writer_until_that_process_is_gone(tmp_path):
    held = tmp_path / "checkpoints"
    source = (
        "import sys, pathlib\nfrom trainer.optimize.checkpoint import writing\n"
        "with writing(pathlib.Path(sys.argv[1])):\n    print('in', flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", source, str(held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(BlockingIOError), checkpoint.writing(held):
            pass
        other.kill()
        other.wait()
        with checkpoint.writing(held):
            pass
    assert checkpoint.latest(held) is None


def test_a_step_that_is_saved_again_replaces_the_old_one(tmp_path):
    model, optimizer = fresh_run()
    checkpoint.save(tmp_path, 1, model, optimizer, {"try": 1})
    path = checkpoint.save(tmp_path, 1, model, optimizer, {"try": 2})
    assert checkpoint.load(path, model, optimizer).extra == {"try": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001.safetensors"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit_of(tensor_name: str, path: Path) -> None:
    raw = bytearray(path.read_bytes())
    header_bytes = int.from_bytes(raw[:8], "little")
    first, past = json.loads(raw[8 : 8 + header_bytes])[tensor_name]["data_offsets"]
    raw[8 + header_bytes + (first + past) // 2] ^= 1
    path.write_bytes(raw)


def flip_a_weight_bit(path: Path) -> None:
    flip_a_bit_of("model/model.norm.weight", path)


def flip_a_state_bit(path: Path) -> None:
    flip_a_bit_of("state", path)


def swap_two_names(path: Path) -> None:
    raw = path.read_bytes()
    mlp = b"model/model.layers.%d.mlp.up_proj.weight"
    path.write_bytes(raw.replace(mlp % 0, b"#" * len(mlp)).replace(mlp % 1, mlp % 0).replace(b"#" * len(mlp), mlp % 1))


def write_a_foreign_state(path: Path) -> None:
    tensors = load_file(path)
    state = msgspec.msgpack.encode({"format": 1})
    raw = bytearray(zlib.crc32(state).to_bytes(4, "little") + state)
    save_file({**tensors, "state": torch.frombuffer(raw, dtype=torch.uint8)}, path)


def write_only_weights(path: Path) -> None:
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "state"}, path)


@pytest.mark.parametrize(
    "damage",
    [truncate, empty, flip_a_weight_bit, flip_a_state_bit, swap_two_names, write_a_foreign_state, write_only_weights],
)
def test_latest_passes_over_a_damaged_checkpoint_and_load_refuses_it(tmp_path, damage):
    model, optimizer = fresh_run()
    first, second = (checkpoint.save(tmp_path, step, model, optimizer, {}) for step in (1, 2))
    before = {name: weight.clone() for name, weight in named_weights(model)}
    damage(second)
    assert checkpoint.latest(tmp_path) == first
    with pytest.raises(ValueError, match="step-00000002"):
        checkpoint.load(second, model, optimizer)
    assert all(torch.equal(weight, before[name]) for name, weight in named_weights(model))


def test_a_writer_that_died_leaves_nothing_that_is_taken_for_a_checkpoint(tmp_path):
    model, optimizer = fresh_run()
    whole = checkpoint.save(tmp_path, 1, model, optimizer, {})
    shutil.copy(whole, tmp_path / ".step-00000002.safetensors.partial")
    assert checkpoint.latest(tmp_path) == whole
    checkpoint.save(tmp_path, 3, model, optimizer, {})
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_takes_no_more_leaves_earlier_checkpoints_alone(tmp_path, monkeypatch):
    def full_disk(tensors, path):
        path.write_bytes(b"half of it")
        raise SafetensorError("No space left on device")

    model, optimizer = fresh_run()
    whole = checkpoint.save(tmp_path, 1, model, optimizer, {})
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.save(tmp_path, 2, model, optimizer, {})
    assert checkpoint.latest(tmp_path) == whole


def test_there_is_no_latest_checkpoint_where_there_is_none(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None


def test_an_extra_that_msgpack_cannot_say_leaves_earlier_checkpoints_alone(tmp_path):
    model, optimizer = fresh_run()
    whole = checkpoint.save(tmp_path, 1, model, optimizer, {})
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 2, model, optimizer, {"socket": object()})
    assert checkpoint.latest(tmp_path) == whole


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"num_hidden_layers": 3}, "only in this model"),
        ({"num_hidden_layers": 1}, "only in the checkpoint"),
        ({"intermediate_size": 64}, r"\(48, 32\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_with_the_reason(tmp_path, overrides, reason):
    model, optimizer = fresh_run()
    path = checkpoint.save(tmp_path, 1, model, optimizer, {})
    other = tiny_llama(7, **overrides)
    before = {name: weight.clone() for name, weight in named_weights(other)}
    with pytest.raises(ValueError, match=reason):
        checkpoint.load(path, other, Optimizer(other, lr=1e-3))
    assert all(torch.equal(weight, before[name]) for name, weight in named_weights(other))


def small_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", chat_template="{{ messages }}")


def test_a_saved_policy_loads_as_it_was_and_replaces_the_old_one(tmp_path):
    directory = tmp_path / "policy"
    for seed in (1, 2):
        model = tiny_llama(seed)
        save_policy(model, small_tokenizer(), directory)
        loaded = load_policy(directory)
        assert all(torch.equal(weight, dict(named_weights(model))[name]) for name, weight in named_weights(loaded))
    assert not loaded.training
    assert loaded.config._attn_implementation == "packed_rows"
    assert load_policy(directory, attention="sdpa").config._attn_implementation == "packed_sdpa"
    assert load_tokenizer(directory).chat_template == "{{ messages }}"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    assert "packed_rows" not in (directory / "config.json").read_text()


def test_tied_embeddings_are_one_weight_on_the_wire():
    tied = [name for name, _ in named_weights(tiny_llama(tied=True))]
    assert "model.embed_tokens.weight" in tied and "lm_head.weight" not in tied
    assert "lm_head.weight" in [name for name, _ in named_weights(tiny_llama(tied=False))]


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        load_policy(tmp_path)
