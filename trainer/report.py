"""What a run leaves for people: summary.json and reward.png, made from the log and metrics.jsonl alone."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_bus import POLICY, Client, Kind, Status, decode_event, decode_spans, is_model_call, weights_of


async def count_log(bus: Client, policy: str = POLICY) -> Counter[str]:
    """Return what the log holds, from its oldest record on: rollouts by how they ended, model calls, policy versions."""
    counts: Counter[str] = Counter()
    offset = (await bus.status()).first_offset  # retention may have dropped what was before
    end_offset = offset + 1
    while offset < end_offset:
        records, offset, end_offset = await bus.fetch(offset, bytes_max=4 << 20)
        for record in records:
            if record.kind is Kind.SPANS:
                counts["model_calls"] += sum(is_model_call(span) for span in decode_spans(record.body))
            elif record.kind is Kind.ROLLOUT:
                event = decode_event(record)
                if event.what == "submit":
                    counts["rollouts_submitted"] += 1
                elif Status(event.status).terminal:
                    counts[f"rollouts_{event.status}"] += 1
    newest = await bus.get(weights_of(policy))
    counts["policy_versions"] = 0 if newest is None else newest.version + 1
    return counts


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write summary.json whole or not at all."""
    draft = path.with_suffix(".partial")
    draft.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


def plot_reward(path: Path, lines: Sequence[dict[str, Any]], title: str) -> None:
    """Draw the mean reward of each step, its running mean, and the held-out points, against the policy version."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [(line["version"], line["reward_mean"]) for line in lines if line["phase"] == "rl"]
    held_out = [(line["version"], line["held_out_success"]) for line in lines if line["phase"] == "eval"]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=150)
    if steps:
        versions, rewards = zip(*steps, strict=True)
        window = min(5, len(rewards))
        smooth = [
            sum(rewards[max(0, i - window + 1) : i + 1]) / len(rewards[max(0, i - window + 1) : i + 1])
            for i in range(len(rewards))
        ]
        axes.plot(versions, rewards, color="#9db8d9", linewidth=1, label="mean reward of a step")
        axes.plot(versions, smooth, color="#1f5fa8", linewidth=2, label=f"mean of {window} steps")
    if held_out:
        versions, successes = zip(*held_out, strict=True)
        axes.plot(versions, successes, "o", color="#d1495b", markersize=7, label="held-out success")
        for version, success in held_out:
            axes.annotate(f"{success:.2f}", (version, success), textcoords="offset points", xytext=(6, -12), fontsize=8)
    axes.set(
        xlabel="policy version (0: random weights, 1: after imitation)",
        ylabel="reward",
        ylim=(-0.05, 1.08),
        title=title,
    )
    axes.grid(alpha=0.25)
    if steps or held_out:
        axes.legend(loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
