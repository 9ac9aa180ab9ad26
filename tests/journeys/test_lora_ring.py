"""A run that trains an adapter, from its first policy to its export: on the embedded engine, and on real vLLM.

What is looked at: each version's recorded log-probs are those of the base with that version's adapter and of no other,
so that the adapter arrived, under the right label, past a prefix cache that knew the prompt; what `weights` lists, pins,
compares and rolls back; that the run goes on from an adapter; and that what it exports loads again. The policy is random
and its reward a coin's: whether an adapter learns is not looked at.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from examples.calc.policy import build
from lightning_bus import Status
from lightning_bus.adapters import Assembler, Row, transitions_of
from lightning_bus.log.reader import LogReader
from tests.engines import load
from tests.journeys.ring import LIMIT_S, START_LIMIT_S, Ring, cli, wait_until
from trainer.data.batch import pack_rows
from trainer.policy.logprob import token_scores
from trainer.policy.lora import read_config
from trainer.policy.model import load_policy, named_weights
from trainer.registry import read_log, tensors_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

RANK, STEPS = 4, 2
GAP_MAX = 5e-5  # nats a token between the log-probs of engine and trainer; measured: 7e-7
MOVED_MIN = 1e-3  # that an adapter of one version differs from the next's, measured in the same way

# In every group some earn a reward, whatever the model says. The second step's group waits to be let go.
AGENT = """
import time
from pathlib import Path

from openai import OpenAI


def agent(task, *, base_url, api_key):
    rollout, member = base_url.partition("/rollout/")[2].partition("/attempt")[0].rpartition("-")[::2]
    while rollout == "train-00001" and not Path("go").exists():
        time.sleep(0.02)
    with OpenAI(base_url=base_url, api_key=api_key, timeout=300.0, max_retries=8) as client:
        client.chat.completions.create(
            model="policy", messages=[{"role": "user", "content": task["question"]}], max_tokens=8
        )
    return float(int(member) % 2)
"""


# peft 0.21 asks transformers 5.23 a question that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_run_with_an_adapter_is_pinned_rolled_back_resumed_and_exported(ring: Ring) -> None:
    configure(ring)
    ring.start()
    ring.wait_step(1)
    assert weights(ring, "pin", "1").returncode == 0
    agreed = weights(ring, "check")
    assert agreed.returncode == 0, agreed.stdout + agreed.stderr
    wait_served(ring, 1)
    (ring.cwd / "go").touch()
    assert ring.wait() == 0, ring.said()
    assert_trained(ring, versions=3)

    back = weights(ring, "rollback", "1", "--json")
    assert back.returncode == 0, back.stderr
    ring.start(str(ring.run_dir))
    assert ring.wait() == 0, ring.said()
    versions = listed(ring)
    assert {number: one["parent"] for number, one in versions.items()} == {0: None, 1: 0, 2: 1, 3: 1, 4: 3}
    assert versions[3]["checksum"] == versions[1]["checksum"] and versions[1]["pinned"]
    assert [(line["step"], line["version"]) for line in ring.metrics("rl")] == [(1, 1), (2, 2), (2, 4)]
    assert_trained(ring, versions=5)
    assert_exported(ring, 4)


@pytest.mark.vllm
def test_vllm_answers_with_the_newest_adapter_under_its_version(ring: Ring) -> None:
    configure(ring)
    ring.on_vllm()
    ring.table["serve"] |= {"context_tokens": 256, "slots_max": 8, "cache_bytes": 1 << 28, "lora_rank_max": RANK}
    ring.start()
    ring.wait_step(1, limit_s=START_LIMIT_S)
    agreed = weights(ring, "check")
    assert agreed.returncode == 0, agreed.stdout + agreed.stderr
    wait_served(ring, 1)
    with httpx.Client(base_url=ring.table["gateway"]["upstreams"][0], trust_env=False, timeout=LIMIT_S) as vllm:
        models = vllm.get("/v1/models").json()["data"]
    (ring.cwd / "go").touch()
    assert ring.wait(limit_s=START_LIMIT_S) == 0, ring.said()
    assert {model["id"]: model.get("parent") for model in models} == {"policy-base": None, "policy": "policy-base"}
    assert_trained(ring, versions=3)
    # Adapters were all that was ever sent.
    assert {path.name for path in (ring.run_dir / "adapters").iterdir()} == {"0", "1", "2"}


def configure(ring: Ring) -> None:
    """Make the ring one that trains an adapter on-policy, with large steps, on a base that does not repeat itself."""
    base = ring.cwd / "base"
    build(base, 0)
    _, model = load(base)
    with torch.no_grad():
        model.model.norm.weight.mul_(
            0.2
        )  # fresh weights say one token for ever, and its log-prob of 0.000 proves nothing
    model.save_pretrained(base)
    ring.agent(AGENT)
    ring.table["policy"] = {"model": str(base), "lora_rank": RANK}
    ring.table["serve"].pop("scripted")
    ring.table["train"].pop("sft")
    ring.table["train"] |= {"keep_checkpoints": 9, "rollout_limit_s": 3000.0}
    ring.table["train"]["rl"] |= {"groups_per_step": 1, "steps_max": STEPS, "staleness_max": 0, "lr": 2e-2}


def weights(ring: Ring, *argv: str) -> Any:
    return cli("weights", *argv, "--run", str(ring.run_dir), cwd=ring.cwd)


def listed(ring: Ring) -> dict[int, dict[str, Any]]:
    told = weights(ring, "list", "--all", "--json")
    assert told.returncode == 0, told.stderr
    return {version["version"]: version for version in json.loads(told.stdout)["versions"]}


def wait_served(ring: Ring, version: int) -> None:
    """Return once the list has asked the engine in time and been told this version."""
    upstreams = ring.table["gateway"]["upstreams"]
    wait_until(lambda: listed(ring)[version]["served_by"] == upstreams, f"version {version} to be listed as served")


def assert_trained(ring: Ring, *, versions: int) -> None:
    """Check that each step learnt from its own weights, and that each version's calls were answered by its adapter."""
    for line in ring.metrics("rl"):
        assert line["staleness_max"] == 0 and line["logprob_difference"] < GAP_MAX, line
        assert line["grad_norm"] > 0 and line["replicas_current"] == 1, line
    assert {0, versions - 1} <= {line["version"] for line in ring.metrics("eval")}
    gaps, moved = gaps_by_version(ring)
    print("gap by version:", gaps, "and with the adapter before:", moved)
    assert gaps.keys() == set(range(versions)) and max(gaps.values()) < GAP_MAX, gaps
    assert min(moved.values()) > MOVED_MIN, f"adapters hardly differ, so nothing is proved: {moved}"


def gaps_by_version(ring: Ring) -> tuple[dict[int, float], dict[int, float]]:
    """Return how far, in nats a token, each version's log-probs are from its own weights and from its parent's."""
    rows: dict[int, list[Row]] = defaultdict(list)
    assembler = Assembler()
    with LogReader(ring.run_dir / "log") as reader:
        for record in reader.records():
            rollout = assembler.feed(record)
            if rollout is not None and rollout.status is Status.SUCCEEDED:
                made = transitions_of(rollout.rollout_id, rollout.attempt, rollout.group, rollout.spans)
                assert all(row.version_oldest == row.version_newest for row in made.rows), "on-policy"
                rows[made.rows[0].version_oldest].extend(made.rows)
    known = read_log(ring.run_dir).versions
    own, parents = {}, {}
    for number, said in rows.items():
        parent = known[number].parent
        own[number] = gap(ring, number, said)
        # A rollback's version is a copy of its parent.
        if parent is not None and known[parent].checksum != known[number].checksum:
            parents[number] = gap(ring, parent, said)
    return own, parents


@torch.no_grad()
def gap(ring: Ring, version: int, rows: list[Row]) -> float:
    """Return the mean difference between recorded log-probs and those of a version's base and adapter in one."""
    policy = load_policy(ring.run_dir / "policy")
    live = policy.state_dict(keep_vars=True)
    for name, tensor in tensors_of(read_log(ring.run_dir).versions[version], ring.run_dir).items():
        live[name].copy_(tensor)
    differences = [
        (token_scores(policy, pack).logprobs_K - pack.logprobs_T[pack.trained_T]).abs()
        for pack in pack_rows(rows, [1.0] * len(rows), token_budget=1024)
    ]
    return float(torch.cat(differences).mean())


def assert_exported(ring: Ring, newest: int) -> None:
    """Check that the run's export and `weights export` load again, as the version that they say."""
    merged = tensors_of(read_log(ring.run_dir).versions[newest], ring.run_dir)
    assert weights(ring, "export", str(newest), "again").returncode == 0
    for directory in (ring.run_dir / "checkpoint", ring.cwd / "again"):
        found = dict(named_weights(AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)))
        assert found.keys() == merged.keys()
        assert all(torch.equal(tensor, merged[name]) for name, tensor in found.items())
    assert weights(ring, "export", str(newest), "alone", "--adapter").returncode == 0
    base = read_config(ring.cwd / "alone")["base_model_name_or_path"]
    loaded: Any = PeftModel.from_pretrained(load_policy(Path(base)), str(ring.cwd / "alone"))
    for name, tensor in named_weights(loaded.merge_and_unload()):
        torch.testing.assert_close(tensor, merged[name])
    none = weights(ring, "export", "0", "nothing", "--adapter")
    assert (none.returncode, "version 0 was trained without one" in none.stderr) == (2, True), none
