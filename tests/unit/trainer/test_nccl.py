"""The broadcast's message flow and byte layout; NCCL itself is replaced by a group that records, or fails."""

from __future__ import annotations

import base64
import subprocess
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.unit.trainer.engine_stub import EngineStub, client_of, engine_of
from trainer.serving.errors import WeightsRefusedError, WeightUpdateError
from trainer.serving.nccl import NcclTransfer, nccl_unique_id, packed
from trainer.serving.push import PushTimes, Target, push

VLLM_PYTHON = Path(__file__).resolve().parents[3] / ".venv-vllm" / "bin" / "python"
UNIQUE_ID = bytes(range(128))
TENSORS = {"embed": torch.arange(6.0).view(2, 3), "norm": torch.ones(2), "head": torch.ones(3, 1)}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class RecordingGroup:
    """Stands in for NCCL: `failing` hangs in the first broadcast until the group is aborted."""

    def __init__(self, *, failing: bool = False) -> None:
        self.chunks: list[bytes] = []
        self.waited = 0
        self.aborted = threading.Event()
        self._failing = failing

    def broadcast(self, chunk: torch.Tensor) -> None:
        if self._failing:
            self.aborted.wait()
            raise RuntimeError("aborted")
        self.chunks.append(bytes(chunk.numpy()))

    def wait(self) -> None:
        self.waited += 1

    def abort(self) -> None:
        self.aborted.set()


def transfer_of(joined: list[Any], group: RecordingGroup, **options: Any) -> NcclTransfer:
    def join(unique_id: bytes, world_size: int) -> RecordingGroup:
        joined.append((unique_id, world_size))
        return group

    return NcclTransfer(new_id=lambda: UNIQUE_ID, join=join, buffer_bytes=20, limit_s=60.0, **options)


@pytest.mark.anyio
async def test_every_replica_learns_its_ranks_and_receives_while_the_trainer_sends() -> None:
    stubs = [
        EngineStub("http://a", world_size=2, overwrites_at_start=True),
        EngineStub("http://b", overwrites_at_start=True),
    ]
    joined: list[Any] = []
    group = RecordingGroup()
    transfer = transfer_of(joined, group, dtype=torch.bfloat16)
    async with client_of(*stubs) as client:
        targets = [Target(engine_of(client, stub)) for stub in stubs]
        for version in ("1", "2"):
            results = await push(transfer.offer(TENSORS, version), targets)
            assert all(isinstance(result, PushTimes) for result in results.values())
    assert joined == [(UNIQUE_ID, 4)]
    common = {
        "nccl_unique_id_b64": base64.b64encode(UNIQUE_ID).decode(),
        "world_size": 4,
        "packed": True,
        "packed_buffer_size_bytes": 20,
        "packed_num_buffers": 2,
    }
    assert [stub.inits for stub in stubs] == [[{**common, "rank_offset": 1}], [{**common, "rank_offset": 3}]]
    once = ["pause", "start_weight_update", "update_weights", "finish_weight_update", "resume"]
    for stub in stubs:
        assert stub.calls == ["init_weight_transfer_engine", *once, *once]
        assert (
            stub.updates
            == [{"names": ["embed", "norm", "head"], "dtype_names": ["bfloat16"] * 3, "shapes": [[2, 3], [2], [3, 1]]}]
            * 2
        )
        assert (stub.label, stub.paused) == ("2", False)
    sent = b"".join(bytes(tensor.bfloat16().view(-1).view(torch.uint8).numpy()) for tensor in TENSORS.values())
    assert b"".join(group.chunks) == sent * 2 and group.waited == 2


@pytest.mark.anyio
async def test_a_replica_that_comes_or_goes_makes_a_new_group() -> None:
    stubs = [EngineStub("http://a"), EngineStub("http://b")]
    joined: list[Any] = []
    group = RecordingGroup()
    transfer = transfer_of(joined, group)
    async with client_of(*stubs) as client:
        first, second = (Target(engine_of(client, stub)) for stub in stubs)
        await push(transfer.offer(TENSORS, "1"), [first])
        await push(transfer.offer(TENSORS, "2"), [first, second])
        await push(transfer.offer(TENSORS, "3"), [first, second])
    assert [size for _, size in joined] == [2, 3]
    assert group.aborted.is_set()
    assert [len(stub.inits) for stub in stubs] == [2, 1]


@pytest.mark.anyio
@pytest.mark.parametrize("failing", ["start_weight_update", "update_weights"])
async def test_one_that_fails_ends_the_broadcast_and_every_replica_of_the_group_is_unfit(failing: str) -> None:
    stubs = [EngineStub("http://a"), EngineStub("http://b")]
    stubs[1].on_call = lambda route: 500 if route == failing else None
    group = RecordingGroup(failing=True)
    transfer = transfer_of([], group)
    async with client_of(*stubs) as client:
        results = await push(transfer.offer(TENSORS, "1"), [Target(engine_of(client, stub)) for stub in stubs])
    for stub in stubs:
        failure = results[stub.url]
        assert isinstance(failure, WeightUpdateError) and not failure.served
        assert (stub.label, stub.paused) == ("unfit", True)
    assert group.aborted.is_set() and transfer.members == []


@pytest.mark.anyio
async def test_a_replica_that_cannot_join_leaves_the_old_weights_serving() -> None:
    stub = EngineStub()
    stub.on_call = lambda route: 500 if route == "init_weight_transfer_engine" else None
    async with client_of(stub) as client:
        result = await push(transfer_of([], RecordingGroup()).offer(TENSORS, "1"), [Target(engine_of(client, stub))])
    failure = result[stub.url]
    assert isinstance(failure, WeightUpdateError) and failure.served
    assert (stub.label, stub.paused) == ("0", False)


def test_the_copy_that_is_sent_is_not_the_tensor_that_learns() -> None:
    live = torch.ones(3)
    offer = NcclTransfer().offer({"w": live}, "1")
    live.zero_()
    assert torch.equal(offer.tensors["w"], torch.ones(3))
    with pytest.raises(WeightsRefusedError, match="w holds NaN or infinity"):
        NcclTransfer().offer({"w": torch.tensor([torch.inf])}, "1")


def test_without_nccl_the_way_out_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has NCCL")
    with pytest.raises(
        WeightUpdateError, match=r'\[serve\] transfer = "nccl" needs torch for CUDA.*Use "shm" or "file"'
    ):
        nccl_unique_id()


SHAPES = st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(shapes=SHAPES, buffer_bytes=st.integers(1, 400))
def test_chunks_hold_every_byte_once_and_end_with_the_tensor_that_fills_them(
    shapes: list[list[int]], buffer_bytes: int
) -> None:
    tensors = [torch.randn(shape) for shape in shapes]
    chunks = list(packed(tensors, buffer_bytes))
    assert torch.equal(torch.cat(chunks), torch.cat([tensor.view(-1).view(torch.uint8) for tensor in tensors]))
    sizes = iter(tensor.nbytes for tensor in tensors)
    for chunk in chunks[:-1]:
        taken = 0
        while taken <= buffer_bytes:
            taken += next(sizes)
        assert taken == chunk.numel()


CONSUMER = """
    import contextlib, json, sys
    import torch
    from safetensors.torch import load_file
    from vllm.distributed.weight_transfer import packed_tensor

    class Stream:
        def synchronize(self): pass
    packed_tensor._get_streams = lambda index, count: [Stream()] * count
    torch.accelerator.current_device_index = lambda: 0
    torch.cuda.stream = lambda stream: contextlib.nullcontext()

    directory = sys.argv[1]
    tensors = load_file(directory + "/tensors")
    order = json.load(open(directory + "/order"))
    for size in sys.argv[2:]:
        chunks = load_file(directory + "/chunks-" + size)
        waiting = [chunks[f"{at:04d}"] for at in range(len(chunks))]

        class Group:
            def broadcast(self, tensor, src):
                chunk = waiting.pop(0)
                assert tensor.shape == chunk.shape, (tensor.shape, chunk.shape)
                tensor.copy_(chunk)

        found = {}
        packed_tensor.packed_nccl_broadcast_consumer(
            iterator=iter([(name, (list(tensors[name].shape), tensors[name].dtype)) for name in order]),
            group=Group(), src=0, post_unpack_func=lambda pairs: found.update((n, t.clone()) for n, t in pairs),
            buffer_size_bytes=int(size), num_buffers=2, device="cpu",
        )
        assert not waiting and list(found) == order
        assert all(torch.equal(found[name], tensors[name]) for name in order)
        print("same")
"""


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_vllms_own_consumer_reads_the_chunks(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{at}": torch.randn([1 + at % 5, 1 + at % 7], generator=generator).to([torch.float32, torch.bfloat16][at % 2])
        for at in range(40)
    }
    tensors = dict(NcclTransfer().offer(tensors, "1").tensors)
    save_file(tensors, tmp_path / "tensors")
    sizes = ["1", "1000", str(1 << 20)]
    for size in sizes:
        chunks = enumerate(packed(tensors.values(), int(size)))
        save_file({f"{at:04d}": chunk for at, chunk in chunks}, tmp_path / f"chunks-{size}")
    (tmp_path / "order").write_text(str(list(tensors)).replace("'", '"'))
    code = textwrap.dedent(CONSUMER)
    run = subprocess.run(
        [str(VLLM_PYTHON), "-c", code, str(tmp_path), *sizes], capture_output=True, text=True, timeout=600
    )
    assert run.stdout.split() == ["same"] * len(sizes), run.stderr[-2000:]
