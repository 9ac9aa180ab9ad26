"""Two policies trained at the same time from one log: a writer's trainer carries out rollouts, a checker's follows it."""

from __future__ import annotations

import json
import signal
from copy import deepcopy
from pathlib import Path

import pytest
import tomli_w

from lightning_bus.log.reader import LogReader
from lightning_bus.resources import WeightVersion, decode, policy_of
from lightning_bus.spans import REQUEST_MODEL, decode_spans, is_model_call
from tests.journeys.ring import ENDLESS, Ring, cli, free_ports, running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

AGENT = """
from functools import cache
from zlib import crc32

from openai import OpenAI


def agent(task, *, base_url, api_key):
    def ask(who, model, text):
        completion = client().with_options(base_url=base_url, api_key=api_key).chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], max_tokens=4, extra_headers={"x-agent-name": who}
        )
        return completion.choices[0].message.content or ""

    ask("checker", "checker", "Is it so? " + ask("writer", "policy", task["question"]))
    return float(crc32(base_url.encode()) % 2)  # whatever was said: every group of rollouts has something to teach


@cache
def client():
    return OpenAI(base_url="http://127.0.0.1", api_key="none", timeout=100.0, max_retries=8)
"""


def test_two_trainers_learn_from_one_log_each_under_its_own_versions(ring: Ring) -> None:
    (port,) = free_ports(1)
    ring.agent(AGENT)
    table = ring.table
    table["credit"] = {"agents": {"writer": "policy", "checker": "checker"}}
    table["gateway"]["upstreams"].append(f"http://127.0.0.1:{port}")
    del table["serve"]["scripted"], table["train"]["sft"]
    table["train"]["rl"]["steps_max"] = ENDLESS  # until it is stopped
    theirs = deepcopy(table)
    theirs["run"]["name"] = "checker"
    theirs["policy"]["name"] = "checker"
    theirs["serve"]["bind"] = f"127.0.0.1:{port}"
    theirs["train"]["follow"] = True
    theirs["train"]["rl"] |= {"steps_max": 3, "staleness_max": 8}
    (ring.cwd / "checker.toml").write_text(tomli_w.dumps(theirs), encoding="utf-8")
    ring.start()
    wait_until(lambda: "broker is up" in ring.said(), "the broker")  # whom the other engine asks once
    with running(["serve", "--run", "checker.toml"], ring.cwd):
        followed = cli("train", "checker.toml", cwd=ring.cwd, limit_s=1200.0)
        assert followed.returncode == 0, followed.stderr[-3000:] + ring.said()
        listed = json.loads(cli("weights", "list", "--run", "checker.toml", "--json", cwd=ring.cwd).stdout)
        wait_until(lambda: len(ring.metrics("rl")) >= 3, "three steps of the writer")
        ring.signal(signal.SIGINT)
        ring.wait()
    checker = ring.cwd / "runs" / "checker"
    steps = [json.loads(line) for line in (checker / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["phase"] == "rl"] == [1, 2, 3]
    assert not (checker / "log").exists()
    assert listed["policy"] == "checker"
    assert len(listed["versions"]) >= 2
    assert_apart(ring.run_dir / "log")
    checks = json.loads(cli("verify", str(ring.run_dir), "--json", cwd=ring.cwd).stdout)["checks"]
    about = [check for check in checks if check["unit"] in ("records", "versions", "calls", "spans", "batches")]
    assert len(about) == 6
    assert not [check for check in about if not (check["proved"] and check["looked_at"])]


def assert_apart(log: Path) -> None:
    """Both policies have versions, each was trained on answers of its own model only, and on none twice."""
    model_of: dict[tuple[str, bytes], str] = {}
    trained: dict[str, list[tuple[str, bytes]]] = {}
    with LogReader(log) as reader:
        for record in reader.records():
            if record.rollout_id and record.span_count:
                for span in decode_spans(record.body):
                    if is_model_call(span):
                        model_of[record.rollout_id, span.span_id] = span.attributes[REQUEST_MODEL]
        for resource in reader.resources():
            policy = policy_of(resource.name)
            if policy is not None:
                calls = trained.setdefault(policy, [])
                for one in decode(resource, WeightVersion).trained:
                    calls += [(one.rollout_id, span_id) for span_id in one.span_ids]
        cursors = reader.cursors()
    assert set(trained) == {"policy", "checker"}
    for policy, calls in trained.items():
        assert calls
        assert len(calls) == len(set(calls))
        assert {model_of[call] for call in calls} == {policy}
    assert cursors["trainer/policy"] > 0
    assert cursors["trainer/checker"] > 0
