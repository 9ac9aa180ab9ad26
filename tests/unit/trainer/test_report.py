"""What a run leaves for people, counted from a real log."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from lightning_bus import POLICY_WEIGHTS, Client, Resource, WeightVersion
from lightning_bus import spans as s
from tests.bus_fixtures import broker, span
from trainer.data.stream import TRAIN, submission
from trainer.report import count_log, plot_reward, write_summary


@pytest.mark.anyio
async def test_the_log_is_counted_by_how_rollouts_ended(tmp_path: Path) -> None:
    async with broker(tmp_path) as address, Client(address, role="trainer") as bus:
        assert dict(await count_log(bus)) == {"policy_versions": 0}
        await bus.submit([submission(f"r-{n}", n, TRAIN) for n in range(4)])
        async with bus.lease(3) as leases:
            tasks = [await leases.__anext__() for _ in range(3)]
            call = span("chat", tasks[0].rollout_id, 1, **{s.OPERATION: s.MODEL_CALL_NAME, s.UNTRAINABLE: "no ids"})
            await leases.done(tasks[0], 1.0, [call, span("tool", tasks[0].rollout_id, 1)])
            await leases.done(tasks[1], None)
            await leases.fail(tasks[2], "broken", retryable=False)
            await bus.cancel(["r-3"])
        for number in (0, 1):
            version = WeightVersion(version=number, parent=None, phase="init", step=0, path="", checksum="")
            await bus.put(Resource(POLICY_WEIGHTS, number, msgspec.msgpack.encode(version)))
        assert dict(await count_log(bus)) == {
            "rollouts_submitted": 4, "rollouts_succeeded": 2, "rollouts_failed": 1, "rollouts_cancelled": 1,
            "model_calls": 1, "policy_versions": 2,
        }  # fmt: skip


@pytest.mark.parametrize("rl", [0, 1, 9])
@pytest.mark.parametrize("held_out", [0, 2])
def test_the_curve_is_a_png_however_little_there_is_to_draw(tmp_path: Path, rl: int, held_out: int) -> None:
    lines = [{"phase": "rl", "version": n, "reward_mean": n / 9} for n in range(rl)]
    lines += [{"phase": "eval", "version": n, "held_out_success": 0.5} for n in range(held_out)]
    plot_reward(tmp_path / "reward.png", [{"phase": "sft", "version": 0}, *lines], "title")
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_summary_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, {"seconds": 1.5, "success_before_rl": None})
    write_summary(path, {"seconds": 2.5})
    assert json.loads(path.read_text()) == {"seconds": 2.5}
    assert [one.name for one in tmp_path.iterdir()] == ["summary.json"]
