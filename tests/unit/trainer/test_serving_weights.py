"""The weight file: who may read it, who may write it again, and what is found out about it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.reference.ops import CountedOps
from tests.unit.trainer.serving_fixtures import build_model
from trainer.serving import slots as slots_module
from trainer.serving.errors import WeightsRefusedError, WeightUpdateError
from trainer.serving.slots import WeightDirectory, WeightSlots, shm_directory, write_weights
from trainer.serving.weights import (
    WeightFile,
    changed_names,
    read_weights,
    served_tensors,
    weights_checksum,
)

Damage = Callable[[WeightFile, dict[str, torch.Tensor]], WeightFile]


def test_tied_weights_travel_once_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = served_tensors(build_model(3))
    assert "lm_head.weight" not in tensors
    assert "model.embed_tokens.weight" in tensors
    file = write_weights(tensors, tmp_path / "w.safetensors", "3")
    back = read_weights(file, served_tensors(build_model(4))).tensors
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert file.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    tied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    with pytest.raises(WeightsRefusedError, match="one tensor"):
        write_weights(tied, tmp_path / "tied.safetensors", "3")


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8])
SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=6)


@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, dtypes=st.lists(DTYPES, min_size=6, max_size=6), slots=st.booleans())
def test_any_tensors_are_a_safetensors_file_with_each_at_its_place(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtypes: list[torch.dtype], slots: bool
) -> None:
    directory = tmp_path_factory.mktemp("any")
    tensors = {
        f"t.{at}": (torch.rand(shape) * 9).to(dtype)
        for at, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    store = WeightSlots(directory, "run") if slots else WeightDirectory(directory, "run")
    file = store.write(tensors, "1")
    back = load_file(file.path)
    assert back.keys() == tensors.keys() == set(file.names)
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert read_weights(file.with_checksum(), tensors).tensors.keys() == tensors.keys()


@pytest.fixture(params=["memory", "device"])
def tensors_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors that are written seem to lie: what is done on a GPU is done on the CPU here, step by step the same."""
    if request.param == "device":
        monkeypatch.setattr(slots_module, "_in_memory", lambda source: False)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("tensors_in")
def test_masters_in_float32_go_out_in_the_dtype_that_is_served(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"w": torch.randn(300, 7), "steps": torch.arange(3)}
    file = WeightSlots(tmp_path, "run").write(tensors, "1", dtype=dtype)
    back = load_file(file.path)
    assert torch.equal(back["w"], tensors["w"].to(dtype))
    assert torch.equal(back["steps"], tensors["steps"])
    with pytest.raises(WeightsRefusedError, match="w holds NaN or infinity as float16"):
        write_weights({"w": torch.full((3,), 1e6)}, tmp_path / "w.safetensors", "2", dtype=torch.float16)


def test_a_push_from_a_gpu_asks_the_device_for_no_value_but_one_list(tmp_path: Path, tensors_in: str) -> None:
    with CountedOps() as counted:
        WeightSlots(tmp_path, "run").write({f"w.{at}": torch.randn(20_000) for at in range(5)}, "1")
    # Each value that Python looks at is a wait for all that a GPU has been given to do.
    assert counted.times["aten._local_scalar_dense.default"] == (0 if tensors_in == "device" else 10)


@pytest.mark.usefixtures("tensors_in")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_found_before_anybody_is_told(tmp_path: Path, value: float) -> None:
    slots = WeightSlots(tmp_path, "run")
    kept = slots.write({"w": torch.ones(600_000)}, "1")
    bad = torch.ones(600_000)
    bad[599_999] = value
    with pytest.raises(WeightsRefusedError, match="w holds NaN or infinity"):
        slots.write({"w": bad}, "2")
    assert torch.equal(read_weights(kept, {"w": bad}).tensors["w"], torch.ones(600_000))
    assert slots.write({"w": torch.zeros(600_000)}, "3").version == "3"


def test_slots_take_turns_and_a_file_nobody_reads_keeps_its_memory(tmp_path: Path) -> None:
    slots = WeightSlots(tmp_path, "run")
    files = [slots.write({"w": torch.full((3,), float(at))}, str(at)) for at in range(4)]
    assert files[0].path == files[2].path != files[1].path == files[3].path
    assert len({file.stamp for file in files}) == 4
    inode = files[3].path.stat().st_ino
    slots.write({"w": torch.ones(3)}, "4")
    assert slots.write({"w": torch.ones(3)}, "5").path.stat().st_ino == inode
    slots.unlink()
    assert list(tmp_path.iterdir()) == []
    assert shm_directory().is_dir()


def test_a_file_that_is_still_read_is_replaced_and_not_written(tmp_path: Path) -> None:
    slots = WeightSlots(tmp_path, "run")
    first = slots.write({"w": torch.zeros(3)}, "0")
    slots.lend(first, "slow")
    slots.lend(first, "quick")
    slots.give_back(first, "quick")
    staged = read_weights(first, {"w": torch.zeros(3)})
    inode = first.path.stat().st_ino
    slots.write({"w": torch.ones(3)}, "1")
    third = slots.write({"w": torch.full((3,), 2.0)}, "2")
    assert third.path == first.path and third.path.stat().st_ino != inode
    staged.check()
    assert torch.equal(staged.tensors["w"], torch.zeros(3))


def test_a_reader_that_was_not_waited_for_finds_out(tmp_path: Path) -> None:
    slots = WeightSlots(tmp_path, "run")
    first = slots.write({"w": torch.zeros(3)}, "0")
    staged = read_weights(first, {"w": torch.zeros(3)})
    for version in ("1", "2"):
        slots.write({"w": torch.ones(3)}, version)
    with pytest.raises(WeightUpdateError, match="it changed since"):
        staged.check()
    with pytest.raises(WeightsRefusedError, match="is stamped .* it changed since. Push again"):
        read_weights(first, {"w": torch.zeros(3)})


def test_a_new_trainer_does_not_write_into_what_an_older_one_left(tmp_path: Path) -> None:
    left = WeightSlots(tmp_path, "run").write({"w": torch.zeros(3)}, "7")
    staged = read_weights(left, {"w": torch.zeros(3)})
    assert WeightSlots(tmp_path, "run").write({"w": torch.ones(3)}, "8").path == left.path
    staged.check()
    assert torch.equal(staged.tensors["w"], torch.zeros(3))


def test_frozen_tensors_are_written_once_in_each_slot_and_whole_layers_of_them_are_left_out(tmp_path: Path) -> None:
    slots = WeightSlots(tmp_path, "run")
    tensors = {
        "embed": torch.ones(2),
        "layers.0.q": torch.ones(2),
        "layers.0.k": torch.ones(2),
        "layers.1.q": torch.ones(2),
    }
    frozen = {"embed", "layers.0.q", "layers.1.q"}
    for version in range(4):
        tensors["layers.0.k"] = torch.full((2,), float(version))
        file = slots.write(tensors, str(version), frozen=frozen)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(file.path).items())
    assert changed_names(file.names, frozen) == {"layers.0.q", "layers.0.k"}
    part = file.only(changed_names(file.names, frozen), base="2")
    assert read_weights(part, tensors, "2").tensors.keys() == {"layers.0.q", "layers.0.k"}
    with pytest.raises(WeightsRefusedError, match="builds on version '2', served is '1'. Push all tensors"):
        read_weights(part, tensors, "1")


def test_memory_that_is_full_is_an_error_at_once_and_the_other_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = WeightSlots(tmp_path, "run")
    kept = slots.write({"w": torch.zeros(3)}, "1")

    def full(descriptor: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        slots.write({"w": torch.ones(3)}, "2")
    assert torch.equal(read_weights(kept, {"w": torch.zeros(3)}).tensors["w"], torch.zeros(3))
    assert [path.name for path in tmp_path.iterdir()] == [kept.path.name]


def test_a_directory_keeps_the_file_before_the_newest_for_who_reads_it(tmp_path: Path) -> None:
    directory = WeightDirectory(tmp_path / "weights", "run")
    files = [directory.write({"w": torch.full((3,), float(at))}, str(at)) for at in range(4)]
    assert sorted((tmp_path / "weights").iterdir()) == sorted(file.path for file in files[-2:])
    directory.unlink()
    assert list((tmp_path / "weights").iterdir()) == []


def lose_a_name(file: WeightFile, tensors: dict[str, torch.Tensor]) -> WeightFile:
    return replace(file, names=file.names[1:], shapes=file.shapes[1:], dtype_names=file.dtype_names[1:])


def change_a_shape(file: WeightFile, tensors: dict[str, torch.Tensor]) -> WeightFile:
    return write_weights({**tensors, "model.norm.weight": torch.ones(63)}, file.path, "1")


def change_a_dtype(file: WeightFile, tensors: dict[str, torch.Tensor]) -> WeightFile:
    return write_weights(tensors, file.path, "1", dtype=torch.bfloat16)


def poison(file: WeightFile, tensors: dict[str, torch.Tensor]) -> WeightFile:
    raw = bytearray(file.path.read_bytes())
    raw[-4:] = b"\xff\xff\xff\xff"
    file.path.write_bytes(raw)
    return file


def overwrite(file: WeightFile, tensors: dict[str, torch.Tensor]) -> WeightFile:
    write_weights({**tensors, "model.norm.weight": torch.zeros_like(tensors["model.norm.weight"])}, file.path, "1")
    return replace(file, checksum="")


def flip_a_bit(file: WeightFile, tensors: dict[str, torch.Tensor]) -> WeightFile:
    raw = bytearray(file.path.read_bytes())
    raw[-4] ^= 1
    file.path.write_bytes(raw)
    return file


def truncate(file: WeightFile, tensors: dict[str, torch.Tensor]) -> WeightFile:
    file.path.write_bytes(file.path.read_bytes()[:-100])
    return file


def remove(file: WeightFile, tensors: dict[str, torch.Tensor]) -> WeightFile:
    file.path.unlink()
    return file


DAMAGES = [
    (lose_a_name, "missing"),
    (change_a_shape, r"model.norm.weight is float32 \[63\], served is float32 \[64\]"),
    (change_a_dtype, "is bfloat16"),
    (poison, "NaN or infinity"),
    (overwrite, "is stamped"),
    (flip_a_bit, "has checksum"),
    (truncate, "cannot be read"),
    (remove, "cannot be read"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, damage: Damage, reason: str) -> None:
    tensors = served_tensors(build_model(1))
    good = write_weights(tensors, tmp_path / "w.safetensors", "1").with_checksum()
    with pytest.raises(WeightsRefusedError, match=reason):
        read_weights(damage(good, tensors), tensors)


def test_the_checksum_of_weights_does_not_depend_on_their_order() -> None:
    tensors = served_tensors(build_model(1))
    backwards = dict(reversed(list(tensors.items())))
    assert weights_checksum(tensors) == weights_checksum(backwards) != weights_checksum(served_tensors(build_model(2)))
