"""Weights that FSDP keeps in shards come out whole, on every rank, before anything is sent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.trainer.serving_fixtures import build_model
from trainer.policy.model import gathered_weights, named_weights

WORLD = 2
RANK = """
    import json, os, sys
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from pathlib import Path
    from tests.unit.trainer.serving_fixtures import build_model
    from trainer.policy.model import gathered_weights, named_weights
    from trainer.serving.slots import WeightSlots

    rank, directory = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=2)
    model = build_model(3)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    sharded = sum(tensor.to_local().numel() for _, tensor in named_weights(model))
    weights = gathered_weights(model)
    if rank == 0:
        WeightSlots(directory, "run").write(weights, "1")
    print(json.dumps({"sharded": sharded, "names": list(weights), "numel": sum(t.numel() for t in weights.values())}))
    dist.barrier()
    dist.destroy_process_group()
"""


def test_weights_in_one_piece_are_the_live_ones() -> None:
    model = build_model(3)
    gathered = gathered_weights(model)
    assert all(tensor.data_ptr() == gathered[name].data_ptr() for name, tensor in named_weights(model))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_gather_what_neither_of_them_has(tmp_path: Path) -> None:
    code = "\n".join(line.removeprefix("    ") for line in RANK.splitlines())
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    try:
        said = [json.loads(rank.communicate(timeout=500)[0].splitlines()[-1]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()  # where one failed, the other waits for it
            rank.wait()
    whole = dict(named_weights(build_model(3)))
    numel = sum(tensor.numel() for tensor in whole.values())
    assert all(one["names"] == list(whole) and one["numel"] == numel for one in said)
    assert all(one["sharded"] < numel for one in said)
    (path,) = tmp_path.glob("run-*.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_file(path).items())
