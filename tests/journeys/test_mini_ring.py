"""The ring turns once, small, with the calculator agent and everything real, and leaves what it promises."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.journeys.ring import Ring, cli, free_ports, running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KEYS = {
    "success_before_rl", "success_after_rl", "seconds", "rollouts_submitted", "rollouts_succeeded", "rollouts_failed",
    "model_calls", "policy_versions", "seed",
}  # fmt: skip


def test_a_small_run_ends_well_and_leaves_what_it_promises(ring: Ring) -> None:
    ring.table["worker"]["agent"] = "examples.calc.agent:agent"
    ring.table["train"]["sft"]["rollouts"] = 64
    ring.start()
    assert ring.wait() == 0, ring.said()
    summary = ring.assert_complete(steps=3)
    assert summary.keys() >= KEYS
    assert summary["policy_versions"] >= 2
    assert summary["model_calls"] >= 64
    assert summary["rollouts_failed"] == 0
    assert (ring.run_dir / "reward.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [line["version"] for line in ring.metrics("eval")][:2] == [0, 1]
    for word in ("success before rl", "rollouts submitted", "summary.json"):
        assert word in ring.said()


def test_the_checkpoint_of_a_run_can_be_served(ring: Ring, tmp_path: Path) -> None:
    ring.table["train"]["rl"]["steps_max"] = 1
    ring.start()
    assert ring.wait() == 0, ring.said()
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with running(["serve", str(ring.run_dir / "checkpoint"), "--bind", f"127.0.0.1:{port}"], tmp_path) as serve:

        def healthy() -> bool:
            assert serve.poll() is None, "serve ended"
            try:
                return httpx.get(f"{url}/health", trust_env=False, timeout=30.0).status_code == 200
            except httpx.HTTPError:
                return False

        wait_until(healthy, "the engine")
        with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            question = [{"role": "user", "content": "Ada has 3 pens and buys 4 more. How many pens in total?"}]
            completion = client.chat.completions.create(model="policy", messages=question, max_tokens=8, logprobs=True)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert completion.usage.completion_tokens in range(1, 9)
    assert completion.choices[0].finish_reason in ("stop", "length")
    summary = json.loads((ring.run_dir / "summary.json").read_text(encoding="utf-8"))
    assert summary["rl_steps"] == 1


def test_a_run_with_keys_ends_as_well_and_tells_strangers_nothing(ring: Ring) -> None:
    ring.table["broker"]["keys"] = "auto"
    ring.endless()
    ring.start()
    wait_until(lambda: "broker is up" in ring.said(), "the broker")

    def stranger_is_told() -> bool:
        asked = cli("status", "--bus", ring.bus, cwd=ring.cwd)
        assert asked.returncode != 0, asked
        return asked.returncode == 2 and "key" in asked.stderr

    key = str(ring.run_dir / "keys" / "admin.key")
    # Neither waits longer than a person would, so on a busy machine both may have to ask again.
    wait_until(stranger_is_told, "a word about keys")
    wait_until(lambda: cli("status", "--bus", ring.bus, "--key", key, cwd=ring.cwd).returncode == 0, "the operator's")
    ring.end()
