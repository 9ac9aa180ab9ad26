"""Does it learn? The calculator agent with one algorithm after the other, from random weights, as `make demo` does it.

Each run is a whole `lightning-bus up` on free ports, from examples/calc/run.toml (or examples/calc/ALGORITHM.toml where
there is one) with the algorithm, the bound on staleness and the seed laid over it. Success is the mean reward on 192
tasks that were never trained on: before imitation, after it, and after reinforcement.

    python -m bench.learning --algorithm gspo --staleness 1 --seed 0 --json
    python -m bench.learning --algorithm grpo ppo cispo gspo --staleness 0 1 4 --seed 0 1 2 --table

Several values are run in turn, every combination; --table prints them as markdown. A run takes minutes on two cores.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from bench import common

CALC = Path(__file__).resolve().parent.parent / "examples" / "calc"
SUCCESS_FLOOR = 0.95
RUN_LIMIT_S = 3600.0

# What departs from an algorithm's defaults here: a small policy that takes large steps moves further between versions
# than those that papers tune for.
OPTIONS: dict[str, dict[str, Any]] = {
    "gspo": {"clip_low": 0.03, "clip_high": 0.04},
}


def table_of(
    algorithm: str, staleness: int, seed: int, directory: Path, changes: Sequence[str] = (), quick: bool = False
) -> dict[str, Any]:
    """Return the RUN.toml of one run.

    changes  further keys of [train.rl], as in lr=1e-4
    """
    own = CALC / f"{algorithm}.toml"
    table = tomllib.loads((own if own.exists() else CALC / "run.toml").read_text(encoding="utf-8"))
    bus, gateway, engine = (common.free_port() for _ in range(3))
    table["run"] = {"name": f"{algorithm}-{staleness}-{seed}", "seed": seed, "directory": str(directory)}
    table["broker"]["bind"] = f"tcp://127.0.0.1:{bus}"
    table["gateway"] |= {"bind": f"127.0.0.1:{gateway}", "upstreams": [f"http://127.0.0.1:{engine}"]}
    table["serve"]["bind"] = f"127.0.0.1:{engine}"
    rl = table["train"]["rl"]
    rl["staleness_max"] = staleness
    if not own.exists():
        rl |= {"algorithm": algorithm, "options": OPTIONS.get(algorithm, {})}
    rl |= tomllib.loads("\n".join(changes))
    if quick:
        rl |= {"steps_max": 2, "group_size": 4, "groups_per_step": 2}
        table["train"]["sft"] |= {"rollouts": 16, "epochs": 1}
        table["train"]["eval"] |= {"tasks": 8}
    return table


def learn(table: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Carry out one run and return what it came to. A run that fails is an entry with its error, not an end."""
    path = directory / f"{table['run']['name']}.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    began = time.perf_counter()
    command = [sys.executable, "-m", "lightning_bus.cli", "up", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_LIMIT_S, check=False, cwd=Path.cwd())
    made: dict[str, Any] = {"seconds": round(time.perf_counter() - began, 1)}
    if done.returncode:
        return made | {"error": "\n".join((done.stdout + done.stderr).splitlines()[-5:]), "ok": False}
    run = directory / table["run"]["name"]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["phase"] == "rl"]
    success = summary["success_after_rl"]
    return made | {
        "success_before_sft": summary["success_before_sft"],
        "success_before_rl": summary["success_before_rl"],
        "success_after_rl": success,
        "reward_last": statistics.fmean(line["reward_mean"] for line in steps[-8:]),
        "steps": len(steps),
        "rollouts": summary["rollouts_submitted"],
        "staleness_mean": _mean(steps, "staleness_mean"),
        "clip_share": _mean(steps, "clip_share"),
        "idle_share": _mean(steps, "idle_share"),
        "stale_dropped": sum(line["dropped"].get("stale", 0) for line in steps),
        "ok": success >= SUCCESS_FLOOR,
    }


def markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the runs as a table: one row for each algorithm and bound, its seeds side by side."""
    found = ["| algorithm | staleness_max | success after RL, by seed | mean | before RL | steps | seconds | idle |"]
    found.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (algorithm, staleness), group in itertools.groupby(runs, key=lambda one: (one["algorithm"], one["staleness"])):
        each = list(group)
        whole = [one for one in each if "error" not in one]
        successes = " ".join(f"{one['success_after_rl']:.3f}" if "error" not in one else "failed" for one in each)
        figures = [
            f"{statistics.fmean(one[key] for one in whole):{shape}}" if whole else "–"
            for key, shape in (
                ("success_after_rl", ".3f"), ("success_before_rl", ".3f"), ("steps", ".0f"), ("seconds", ".0f"),
                ("idle_share", ".2f"),
            )
        ]  # fmt: skip
        found.append(f"| {algorithm} | {staleness} | {successes} | {' | '.join(figures)} |")
    return "\n".join(found)


def _mean(lines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [line[key] for line in lines if key in line]
    return round(statistics.fmean(values), 4) if values else None


def main() -> None:
    made = common.parser(__doc__, seconds=0.0, runs=1)
    made.add_argument("--algorithm", nargs="+", default=["grpo"], help="names, as in [train.rl] algorithm")
    made.add_argument("--staleness", nargs="+", type=int, default=[1], help="staleness_max; 0 is on-policy")
    made.add_argument("--seed", nargs="+", type=int, default=[0])
    made.add_argument("--set", dest="changes", action="append", default=[], help="a key of [train.rl]: lr=1e-4")
    made.add_argument("--table", action="store_true", help="print a markdown table")
    options = common.parse(made)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    runs: list[dict[str, Any]] = []
    with common.workspace(options.dir) as directory:
        for algorithm, staleness, seed in itertools.product(options.algorithm, options.staleness, options.seed):
            table = table_of(algorithm, staleness, seed, directory, options.changes, options.quick)
            run = {"algorithm": algorithm, "staleness": staleness, "seed": seed, **learn(table, directory)}
            runs.append(run)
            print(json.dumps(run), file=sys.stderr, flush=True)
        machine = common.machine(directory)
    if options.table:
        print(markdown(runs))
    rest = runs[0] if len(runs) == 1 else {"runs": runs, "ok": all(run["ok"] for run in runs)}
    common.finish({"bench": "learning", "machine": machine, "success_floor": SUCCESS_FLOOR, **rest}, options.json)


if __name__ == "__main__":
    main()
