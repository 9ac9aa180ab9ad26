"""`lightning-bus replay` as its user runs it: a recorded run, a reward of their own, a table, and files to train on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import msgspec
import numpy as np
import pytest

from lightning_bus import Client, Submission
from tests.bus_fixtures import ROOT, broker
from tests.recorded_agent import Play

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="hook processes need process groups"),
    pytest.mark.timeout(600),
]

HOOK = """
def by_length(rollout):
    '''Short answers are good ones, which the run did not reward; one task cannot be judged.'''
    if rollout.task == "unclear":
        raise ValueError("nobody knows")
    return 1.0 / sum(span.name == "chat policy" for span in rollout.spans)
"""

GROUPS = {"sums": "2 + 2?", "words": "How many words?", "odd": "unclear"}


async def record(run: Path) -> None:
    """Have three groups of three carried out over a real broker: member n makes n + 1 calls and earns n."""
    names = [(group, n) for group in GROUPS for n in range(3)]
    async with broker(run / "log") as address, Client(address) as bus:
        await bus.submit(
            [
                Submission(f"{group}-{n}", msgspec.msgpack.encode(GROUPS[group]), group=group, labels={"phase": "train"})
                for group, n in names
            ]
        )  # fmt: skip
        async with bus.lease(1) as leases:
            for _ in names:
                task = await anext(aiter(leases))
                number = int(task.rollout_id[-1])
                play = Play(rollout_id=task.rollout_id)
                for turn in range(number):
                    play.say("", ("calc", f'{{"turn": {turn}}}'))
                    play.tool("4")
                play.say("four")
                # Ids that no other rollout's spans have, as a tracer makes them.
                spans = [
                    msgspec.structs.replace(one, span_id=task.rollout_id.encode()[-5:].rjust(5) + bytes((0, 0, at)))
                    for at, one in enumerate(play.spans)
                ]
                await bus.append(task.rollout_id, task.attempt, spans)
                await leases.done(task, float(number))


def told(text: str) -> dict[str, list[str]]:
    """Return the printed tables, a row by its first cell."""
    rows = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in text.splitlines() if "│" in line]
    return {cells[0]: cells[1:] for cells in rows if len(cells) > 1}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_is_scored_again_by_another_reward_and_another_credit(tmp_path: Path) -> None:
    anyio.run(record, tmp_path / "runs" / "r")
    (tmp_path / "my_rewards.py").write_text(HOOK, encoding="utf-8")
    command = [sys.executable, "-m", "lightning_bus.cli", "replay", "runs/r", "--reward", "my_rewards:by_length"]
    command += ["--credit", "turn", "--relevance", "0.5", "--out", "new"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert "written: new" in done.stdout

    # The table says what the file says: all nine have another return, three of them none, and every pair swapped ranks.
    facts = json.loads((tmp_path / "new" / "replay.json").read_text())
    table, differences = told(done.stdout), facts["differences"]
    assert (differences["changed"], differences["lost"], differences["pairs"], differences["pairs_swapped"]) == (
        9,
        3,
        6,
        6,
    )
    assert table["mean return"] == ["1", f"{differences['mean_after']:.4g}"]
    assert table["mean return"][1] == f"{np.mean([1, 1 / 2, 1 / 3]):.4g}"
    assert table["… that swapped ranks"] == ["", "6"]
    assert table["… with another best rollout"] == ["", "2"]
    assert table["dropped: hook raised ValueError"] == ["", "3"]
    assert table["hook"][2:] == [f"{differences['mean_after']:.4g}", "+100.0%"]

    # What was written can be trained on: ids, log-probs and advantages of the same lengths, by the rule that was asked for.
    rollouts = {row["rollout_id"]: row for row in read(tmp_path / "new" / "rollouts.jsonl")}
    transitions = read(tmp_path / "new" / "transitions.jsonl")
    assert len(transitions) == facts["transitions"] == 3 * (1 + 2 + 3)
    finals = {n: 1 / (n + 1) for n in range(3)}
    mean = np.mean(list(finals.values()))
    for row in transitions:
        group, _, number = row["rollout_id"].rpartition("-")
        assert len(row["action"]) == len(row["logprobs"]) > 0
        if group == "odd":
            assert (row["advantage"], rollouts[row["rollout_id"]]["detail"]) == (None, "nobody knows")
            continue
        last = row["turn"] == int(number)
        assert row["advantage"] == pytest.approx((1.0 if last else 0.5) * (finals[int(number)] - mean), abs=1e-6)
        assert row["next_state"] is None if last else row["next_state"][: len(row["state"])] == row["state"]
