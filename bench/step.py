"""How many tokens a second does one optimiser step train on a CPU, beside TRL's GRPO step on the same rows?

Measures, in turns and each in a process of its own that does nothing else, what it takes from rows that are already
packed (or padded) to updated weights: forward, loss, backward, clipping by the norm, AdamW. Nothing else is timed: no
generation, no rewards, no packing or padding, no data loader. For all of them the same Llama with random weights in
float32, the same rows, DAPO's loss (PPO's clip, a mean over all tokens of the step) and the same number of threads:

    packed   trainer.optimize.step.train_step on packs
    padded   the same head, loss and optimiser on micro-batches of rows, each padded to its longest row
    trl      GRPOTrainer.compute_loss and its accelerator's backward, on micro-batches of its default size, padded as it
             pads them: to the longest prompt and the longest completion of the generation batch

Lengths are those of agents' rollouts: log-normal prompts and completions with a long tail, a fifth of a completion being
tool answers that are not trained; `even` is the same with all rows of one length, where nobody pads. All three must give the same loss and gradient norm before anything is timed. The
ratios named cpu compare processor time, which neighbours on a busy machine disturb less.

head_peak_ratio is the memory that the chunked head needs for forward and backward over what full logits need.

    python -m bench.install
    python -m bench.step --json                  about ten minutes, mostly the 135M model
    python -m bench.step --json --sizes 1M
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import common
from bench.step_parts import (
    HEAD_TOKENS,
    HEADS,
    LAYOUTS,
    PHASES,
    SIZES,
    TOKEN_BUDGET,
    load_rows,
    make_rows,
    run_member,
    write_inputs,
)
from trainer.data.batch import pack_rows

FLOOR_TRL_RATIO = 1.5
AGREEMENT = 1e-4  # relative, of losses and gradient norms


def main() -> None:
    parser = common.parser(__doc__, seconds=0.0, runs=3)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--threads", type=int, default=1, help="of each member; they take turns")
    parser.add_argument("--member", choices=[*LAYOUTS, *HEADS], help=argparse.SUPPRESS)
    options = common.parse(parser)
    if options.member:
        return run_member(options.member, options.dir, options.threads)
    with common.workspace(options.dir) as directory:
        sizes = {
            name: measure(name, directory / name, options.runs, options.threads, quick=options.quick)
            for name in options.sizes
        }
        host = common.machine(directory)
    ratios = [result["trl_ratio"] for result in sizes.values() if result["trl_ratio"] is not None]
    summary = {
        "bench": "step",
        "machine": host,
        "torch": torch.__version__,
        "threads": options.threads,
        "n": options.runs,
        "trl_ratio_least": min(ratios, default=None),
        "trl_ratio_floor": FLOOR_TRL_RATIO,
        "ok": min(ratios) >= FLOOR_TRL_RATIO if ratios else None,
        "sizes": sizes,
    }
    common.finish(summary, options.json)


def measure(name: str, directory: Path, runs: int, threads: int, *, quick: bool) -> dict[str, Any]:
    size = SIZES[name]
    if common.trl_python() is None:
        print("TRL is left out: python -m bench.install puts it into .bench/", file=sys.stderr)
    count = 4 if quick else size.rows
    parameters = write_inputs(directory, size, make_rows(size, count), threads)
    heads = {head: run_once(own_command(head, directory, threads), threads) for head in HEADS}
    check_agreement(heads)
    found = race(name, directory, runs, threads)
    write_inputs(directory, size, make_rows(size, count // 2, even=True), threads)
    return {
        "parameters": parameters,
        **found,
        "even": race(f"{name}, even rows", directory, runs, threads),
        "head_peak_ratio": round(heads["head_chunked"]["peak_bytes"] / heads["head_full"]["peak_bytes"], 3),
        "head_peak_bytes": {head: int(said["peak_bytes"]) for head, said in heads.items()},
        "head_tokens": HEAD_TOKENS,
    }


def race(name: str, directory: Path, runs: int, threads: int) -> dict[str, Any]:
    """Let the parties take steps in turns on the rows in the directory."""
    samples: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        commands = {layout: own_command(layout, directory, threads) for layout in LAYOUTS}
        if python := common.trl_python():
            commands["trl"] = [python, "-m", "bench.trl_step", str(directory)]
        members = {party: stack.enter_context(stepping(command, threads)) for party, command in commands.items()}
        for run in range(-1, runs):  # the first one warms up: it makes the optimiser's state, and shows that they agree
            for party in sorted(members, reverse=bool(run % 2)):
                samples.setdefault(party, []).append(members[party]())
            if run < 0:
                check_agreement({party: taken[0] for party, taken in samples.items()})
            took = ", ".join(f"{party} {taken[-1]['seconds']:.2f} s" for party, taken in samples.items())
            print(f"{name}: {took}", file=sys.stderr)
    seconds = {party: [sample["seconds"] for sample in taken[1:]] for party, taken in samples.items()}
    cpu_s = {party: [sample["cpu_s"] for sample in taken[1:]] for party, taken in samples.items()}
    rows = load_rows(directory)
    num_tokens = sum(len(row.token_ids) for row in rows)
    return {
        "rows": len(rows),
        "tokens": num_tokens,
        "trained_tokens": sum(int(row.trained.sum()) for row in rows),
        "row_tokens": [int(q) for q in np.percentile([len(row.token_ids) for row in rows], [0, 25, 50, 75, 100])],
        "packs": len(pack_rows(rows, token_budget=TOKEN_BUDGET)),
        "tokens_per_s": common.median([num_tokens / s for s in seconds["packed"]], 1),
        "tokens_per_s_spread": common.spread([num_tokens / s for s in seconds["packed"]], 1),
        "tokens_per_cpu_s": common.median([num_tokens / s for s in cpu_s["packed"]], 1),
        **ratio_of("trl_ratio", seconds.get("trl"), seconds["packed"]),
        **ratio_of("trl_cpu_ratio", cpu_s.get("trl"), cpu_s["packed"]),
        **ratio_of("packed_vs_padded", seconds["padded"], seconds["packed"]),
        **ratio_of("packed_vs_padded_cpu", cpu_s["padded"], cpu_s["packed"]),
        "phases_s": {key: common.median([s[key] for s in samples["packed"][1:]], 3) for key in PHASES},
        "peak_bytes": {party: int(max(sample["peak_bytes"] for sample in taken)) for party, taken in samples.items()},
    }


def ratio_of(name: str, theirs: Sequence[float] | None, ours: Sequence[float]) -> dict[str, Any]:
    """How many times as long they take: the median over paired runs, and their spread."""
    if theirs is None:
        return {name: None, f"{name}_spread": None}
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    return {name: common.median(ratios, 2), f"{name}_spread": common.spread(ratios, 2)}


def check_agreement(first: dict[str, dict[str, float]]) -> None:
    """Stop where the parties do not compute the same: their times could not be compared."""
    one, ours = next(iter(first.items()))
    for key in ("loss", "grad_norm"):
        for party, said in first.items():
            if not abs(said[key] - ours[key]) <= AGREEMENT * max(1.0, abs(ours[key])):
                raise SystemExit(f"{key} is {said[key]} for {party} and {ours[key]} for {one}: not the same work")


# -- the members, each a process --------------------------------------------------------------------------------------


def own_command(member: str, directory: Path, threads: int) -> list[str]:
    return common.member("step", "--member", member, "--dir", directory, "--threads", threads)


@contextmanager
def stepping(command: Sequence[str], threads: int) -> Generator[Callable[[], dict[str, float]]]:
    """Run a member until it is no longer needed; calling what it yields takes one step there."""
    quiet = None if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet, env=environment, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    reader, writer = process.stdout, process.stdin

    def answer() -> str:
        while line := reader.readline():
            if line == "ready\n" or line.startswith("{"):
                return line
        raise SystemExit(f"{' '.join(command)} ended; run it by hand to see why, or with BENCH_VERBOSE=1")

    def step() -> dict[str, float]:
        writer.write("step\n")
        writer.flush()
        return json.loads(answer())

    try:
        answer()
        yield step
    finally:
        process.kill()
        process.wait()
        reader.close()
        writer.close()


def run_once(command: Sequence[str], threads: int) -> dict[str, float]:
    with stepping(command, threads) as step:
        return step()


if __name__ == "__main__":
    main()
