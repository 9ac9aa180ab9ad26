"""What one GPU trains in a second: attention, the head, whole steps and the weight copy, in one call of under 9 minutes.

    train      Qwen3-0.6B (full and LoRA r16) and Qwen3-4B (LoRA r16) with random weights at 16k and 65k tokens,
               activations recomputed, recomputed but for attention, and kept, layers compiled or not: tokens/s, MFU, peak
               memory, seconds of forward, backward and update
    attention  each backend that runs here, at 16k tokens in many rows and in one: error, forward and backward, TFLOP/s
    head       the chunked head at V = 151,936 against full logits: error, time, peak memory
    copy       bytes/s of a weight copy, device to device and device to the shared memory that engines read

    python -m bench.gpu --json --out DIRECTORY     one JSON object as the last line; rows.jsonl grows as they come
    python -m bench.gpu --json --tiny              the same code on tiny shapes, on a CPU if need be: it shows that it runs

What always holds: a result is compared with a float32 reference before it is timed, and what disagrees is not timed;
what does not fit into memory, or into its phase's time, is a row that says so; phases, and cases in them, come in the order
of their worth; each phase is a process of its own, so one that hangs costs only its rows, and one that dies or loses the
device is begun again behind the case that it died in; SIGTERM and Ctrl-C end the call with the JSON of what there is. MFU is
that of trainer/optimize/cost.py: forward and backward once, causal attention counted as the half that it is, recomputation
not at all, over 989 TFLOP/s for Hopper.

prime-rl's published rows (one H100, FA3, full recomputation, torch.compile, 2 micro-batches of one fake row each) stand
beside the matched ones: recomputation on, 2 micro-batches of one row, the update included; and beside the best of the same
model and length, however its activations are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import common
from bench.gpu_parts import ContextLostError, Here, attention, copy, head
from bench.gpu_train import train

# Seconds each may take, loading torch included; together under nine minutes.
PHASES = {"train": (train, 350.0), "attention": (attention, 80.0), "head": (head, 40.0), "copy": (copy, 40.0)}
TINY_S = 250.0  # on a machine that has other things to do
GRACE_S = 5.0  # after its time is over a phase may end by itself
CONTEXT_LOST = 75  # a process's exit status
BEGIN_S = 25.0  # less than this is not worth another process: most of it would go into loading torch

# benchmarks/results/BENCHMARKS.md of prime-rl, dated 2026-02-01, by our case: tokens/s, MFU in per cent where it is given.
PUBLISHED = {
    "0.6B/full/16k/recompute": {"tokens_per_s": 11_900, "mfu_percent": 11.1},
    "0.6B/full/65k/recompute": {"tokens_per_s": 10_150, "mfu_percent": 26.8},
    "0.6B/lora16/16k/recompute": {"tokens_per_s": 13_340},
    "4B/lora16/16k/recompute": {"tokens_per_s": 6_230, "mfu_percent": 21.7},
    "4B/lora16/65k/recompute": {"tokens_per_s": 4_160, "mfu_percent": 37.4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--out", type=Path, help="where rows.jsonl and gpu.json go; default: $OUT, if set")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU where there is no GPU")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)  # this process runs only this one
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--done", nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        print(
            f"torch {torch.__version__} finds no GPU, so there is nothing to measure. --tiny shows that it runs.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    if options.phase:
        raise SystemExit(run_phase(options.phase, options.done, tiny=options.tiny, seconds=options.seconds))
    out = options.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    rows: list[dict[str, Any]] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever stops us gets what there is
    interrupted = False
    try:
        for phase in options.phases:
            for row in phase_rows(phase, tiny=options.tiny):
                rows.append(row)
                print(said(row), file=sys.stderr, flush=True)
                if out:
                    out.mkdir(parents=True, exist_ok=True)
                    with (out / "rows.jsonl").open("a") as file:
                        file.write(json.dumps(row) + "\n")
    except KeyboardInterrupt:
        interrupted = True
    summary = {**summarised(rows, tiny=options.tiny), "interrupted": interrupted}
    if out:
        (out / "gpu.json").write_text(json.dumps(summary, indent=2) + "\n")
    common.finish(summary, options.json)


def phase_rows(phase: str, *, tiny: bool) -> Iterable[dict[str, Any]]:
    """Run a phase in processes of its own, and yield its rows as they come, each case once, while its time lasts."""
    until_s = time.monotonic() + (TINY_S if tiny else PHASES[phase][1])
    done: list[str] = []
    while True:
        begun: str | None = None
        ended = ""
        for row in process_rows(phase, done, until_s - time.monotonic(), tiny=tiny):
            if "begun" in row:
                begun = row["begun"]
            elif "ended" in row:
                ended = row["ended"]
            elif row["case"] not in done:
                done.append(row["case"])
                yield {"phase": phase, **row}
        if not ended:
            return
        if begun is None or begun in done:
            if begun is None:  # it did not come to its first case, and would not next time
                yield {"phase": phase, "case": "(phase)", "error": ended}
                return
        else:
            done.append(begun)
            yield {"phase": phase, "case": begun, "error": f"its process {ended}"}
        if until_s - time.monotonic() < BEGIN_S:
            yield {"phase": phase, "case": "(phase)", "error": f"{ended}; no time was left to begin again"}
            return


def process_rows(phase: str, done: Sequence[str], seconds: float, *, tiny: bool) -> Iterable[dict[str, Any]]:
    """Yield the rows of one process, {"begun": case} before each, and {"ended": how} last where it did not end well."""
    command = [sys.executable, "-m", "bench.gpu", "--phase", phase, "--seconds", str(seconds), "--done", *done]
    # Expandable segments: 65k tokens after 16k must not fail on fragments of what was freed.
    environment = {**os.environ, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    began = time.monotonic()
    process = subprocess.Popen(
        [*command, "--tiny"] if tiny else command, stdout=subprocess.PIPE, env=environment, text=True
    )
    assert process.stdout is not None
    guard = subprocess.Popen(  # a read that blocks cannot look at the clock
        [sys.executable, "-c", f"import os, time; time.sleep({seconds + GRACE_S}); os.kill({process.pid}, 9)"],
        stderr=subprocess.DEVNULL,
    )
    try:
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        status = process.wait()
        if status:
            how = "lost the device" if status == CONTEXT_LOST else "failed; see above" if status > 0 else "was killed"
            yield {"ended": f"{how} after {time.monotonic() - began:.0f} s"}
    finally:
        guard.kill()
        guard.wait()
        process.kill()
        process.wait()
        process.stdout.close()


def run_phase(phase: str, done: Sequence[str], *, tiny: bool, seconds: float) -> int:
    """Print the phase's rows but for those of the cases that are done, and return the process's exit status."""
    torch.set_num_threads(1)  # what a GPU is given to do needs no more, and a tiny CPU run none
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = Here(device, tiny=tiny, until_s=time.monotonic() + seconds, done=frozenset(done))
    try:
        for row in PHASES[phase][0](here):
            if row["case"] not in here.done:
                print(json.dumps(row), flush=True)
    except ContextLostError as exc:
        print(json.dumps(exc.args[0]), flush=True)
        return CONTEXT_LOST
    return 0


def summarised(rows: list[dict[str, Any]], *, tiny: bool) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    for row in rows:
        published = PUBLISHED.get(row["case"]) if row["phase"] == "train" and not tiny else None
        if published:
            row["published"] = published
            if "tokens_per_s" in row:
                row["published_ratio"] = round(row["tokens_per_s"] / published["tokens_per_s"], 2)
    matched = {row["case"]: row.get("published_ratio") for row in rows if "published" in row}
    best = {name: fastest_like(name, rows) for name in matched}
    return {
        "bench": "gpu",
        "tiny": tiny,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "torch": torch.__version__,
        "machine": common.machine(Path.cwd()),
        "published_ratios": matched,
        "best": best,
        "ok": all(ratio is not None and ratio > 1 for ratio in matched.values()) if matched else None,
        "errors": sum("error" in row for row in rows),
        "rows": rows,
    }


def fastest_like(matched: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest case of the same model, form and length as the matched one, in one row a micro-batch; None: none ran."""
    like = "/".join(matched.split("/")[:3]) + "/"
    ran = [
        row for row in rows if row["case"].startswith(like) and "tokens_per_s" in row and "/rows_of_" not in row["case"]
    ]
    if not ran:
        return None
    row = max(ran, key=lambda row: row["tokens_per_s"])
    ratio = round(row["tokens_per_s"] / PUBLISHED[matched]["tokens_per_s"], 2)
    return {
        "case": row["case"],
        "tokens_per_s": row["tokens_per_s"],
        "mfu_percent": row.get("mfu_percent"),
        "ratio": ratio,
    }


def said(row: dict[str, Any]) -> str:
    values = " ".join(f"{key}={value}" for key, value in row.items() if key not in ("phase", "case"))
    return f"{row['phase']} {row['case']}: {values}"


if __name__ == "__main__":
    main()
