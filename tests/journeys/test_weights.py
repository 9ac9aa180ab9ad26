"""A run's weights from outside: listed, pinned, compared, gone back to; and its model called by someone with a key."""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from typing import Any

import pytest
from openai import AuthenticationError, OpenAI

from lightning_bus import spans as s
from lightning_bus.log.reader import LogReader
from lightning_bus.records import Kind
from lightning_bus.spans import decode_spans
from tests.journeys.ring import Ring, cli, running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


AGENT = """
import time
from pathlib import Path

from openai import OpenAI


def agent(task, *, base_url, api_key):
    while "/rollout/train-" in base_url and not Path("go").exists():
        time.sleep(0.02)
    with OpenAI(base_url=base_url, api_key=api_key, timeout=100.0, max_retries=8) as client:
        client.chat.completions.create(
            model="policy", messages=[{"role": "user", "content": task["question"]}], max_tokens=4
        )
    return float(int(base_url.partition("/attempt")[0][-1]) % 2)  # in every group some earn it, so each step teaches
"""


def weights(ring: Ring, *argv: str) -> subprocess.CompletedProcess[str]:
    return cli("weights", *argv, "--run", str(ring.run_dir), cwd=ring.cwd)


def listed(ring: Ring) -> dict[int, dict[str, Any]]:
    """What `weights list` says of each version."""
    told = weights(ring, "list", "--all", "--json")
    assert told.returncode == 0, told.stderr
    return {version["version"]: version for version in json.loads(told.stdout)["versions"]}


def wait_served(ring: Ring, version: int) -> dict[int, dict[str, Any]]:
    """Return what is listed once some replica says that it serves this version."""

    def there() -> Any:
        versions = listed(ring)
        return versions if versions.get(version, {}).get("served_by") else None

    return wait_until(there, f"a replica with version {version}")


def test_a_pinned_version_stays_and_a_rolled_back_run_goes_on_from_it(ring: Ring) -> None:
    ring.table["train"]["rl"]["steps_max"] = 4
    ring.agent(AGENT)
    ring.start()
    # The trainer has no rollouts to go on with until it gets some, so it is known what is newest.
    wait_until(lambda: ring.metrics("sft"), "the policy that learnt from the teacher")
    versions = wait_served(ring, 1)
    assert (max(versions), versions[1]["served_by"]) == (1, ring.table["gateway"]["upstreams"])
    pinned = weights(ring, "pin", "1")
    assert (pinned.returncode, pinned.stdout) == (0, "version 1 is pinned\n"), pinned.stderr
    refused = weights(ring, "rollback", "0")
    assert (refused.returncode, "is being trained. Stop the trainer first" in refused.stderr) == (2, True), refused
    agreed = weights(ring, "check")
    assert agreed.returncode == 0, agreed.stdout + agreed.stderr
    (ring.cwd / "go").touch()
    assert ring.wait() == 0, ring.said()
    ring.assert_complete(steps=4)

    versions = listed(ring)
    assert {number: one["parent"] for number, one in versions.items()} == {0: None, 1: 0, 2: 1, 3: 2, 4: 3, 5: 4}
    assert [number for number, one in versions.items() if one["pinned"]] == [1]
    there = {number for number, one in versions.items() if one["file"] is not None}
    assert there == {0, 1, 4, 5}, "the first policy, the pinned one, and those of the newest three checkpoints"
    assert versions[5]["held_out_success"] is not None
    assert versions[5]["reward_mean"] == ring.metrics("rl")[-1]["reward_mean"]
    silent = weights(ring, "pin", "0")
    assert (silent.returncode, "Start the run, or only: lightning-bus broker" in silent.stderr) == (1, True), silent

    back = weights(ring, "rollback", "1", "--json")
    assert back.returncode == 0, back.stderr
    told = json.loads(back.stdout)
    assert (told["version"], told["parent"], told["step"], told["published"]) == (6, 1, 0, False)
    again = weights(ring, "rollback", "2")
    assert (again.returncode, "weights of version 2 are gone" in again.stderr) == (2, True), again
    exported = weights(ring, "export", "1", "v1")
    assert exported.returncode == 0, exported.stderr
    assert (ring.cwd / "v1" / "config.json").exists()

    with ExitStack() as stack:
        stack.enter_context(running(["broker", "--run", str(ring.run_dir)], ring.cwd))
        wait_until(lambda: cli("status", "--bus", ring.bus, cwd=ring.cwd).returncode == 0, "the broker")
        stack.enter_context(running(["serve", "--run", str(ring.run_dir)], ring.cwd))
        wait_served(ring, 5)
        served = weights(ring, "rollback", "1", "--json")
        assert served.returncode == 0, served.stderr
        told = json.loads(served.stdout)
        assert (told["version"], told["parent"], told["published"], told["served"]) == (7, 1, True, 1)
        versions = wait_served(ring, 7)
        assert versions[7]["served_by"] == ring.table["gateway"]["upstreams"]
        assert 6 not in versions, "what was never published leaves its number unused"

    ring.start(str(ring.run_dir))
    assert ring.wait() == 0, ring.said()
    versions = listed(ring)
    assert (versions[7]["parent"], versions[7]["rollouts_trained"], versions[8]["parent"]) == (1, 0, 7)
    assert versions[7]["checksum"] == versions[1]["checksum"]
    assert [line["step"] for line in ring.metrics("rl")] == [1, 2, 3, 4, 1, 2, 3, 4]
    verified = cli("verify", str(ring.run_dir), "--json", cwd=ring.cwd)
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_anyone_with_a_key_calls_the_model_and_nobody_without(ring: Ring) -> None:
    bind = ring.table["gateway"]["bind"].replace("127.0.0.1", "0.0.0.0")
    ring.table["gateway"]["bind"] = bind
    ring.endless()
    ring.start()
    wait_until(lambda: ring.metrics("eval"), "the first evaluation")
    made = cli("keys", "api", "alice", "--run", str(ring.run_dir), "--expires", "1d", "--json", cwd=ring.cwd)
    assert made.returncode == 0, made.stderr
    key = json.loads(made.stdout)
    asked: Any = [{"role": "user", "content": "2 + 2?"}]
    with OpenAI(base_url=key["base_url"], api_key="sk-nobody", max_retries=0) as stranger:
        with pytest.raises(AuthenticationError, match="lightning-bus keys api NAME"):
            stranger.chat.completions.create(model="policy", messages=asked, max_tokens=4)
    with OpenAI(base_url=key["base_url"], api_key=key["api_key"], max_retries=3) as alice:
        assert "policy" in [model.id for model in alice.models.list()]
        completion = alice.chat.completions.create(model="policy", messages=asked, max_tokens=4)
        with alice.chat.completions.create(model="policy", messages=asked, max_tokens=4, stream=True) as stream:
            ends = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
    assert completion.usage is not None
    assert completion.usage.completion_tokens in range(1, 5)
    assert ends[-1] in ("stop", "length")
    ring.end()
    with LogReader(ring.run_dir / "log") as log:
        calls = [
            span
            for record in log.records()
            if record.kind is Kind.SPANS and not record.rollout_id
            for span in decode_spans(record.body)
        ]
    answered = [span.attributes[s.AGENT_NAME] for span in calls if not span.attributes.get(s.UNTRAINABLE)]
    assert len(answered) >= 2  # a client that waited for too long asks once more
    assert set(answered) == {"alice"}
