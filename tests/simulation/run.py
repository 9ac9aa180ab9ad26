"""Play seeds, or show the history of one.

    python -m tests.simulation.run --seeds 20000 --jobs 2      seeds 0 … 19999; stops at the first that fails
    python -m tests.simulation.run --seed 4172 -v              one seed, every message and every transaction

Exit code 0: every promise held in every history. 1: one did not; its seed is printed and replays to the same end.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing

from tests.simulation.ledger import Violation
from tests.simulation.world import Outcome, simulate

PROGRESS_S = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Simulate the bus, one seed a history, and check its promises.")
    parser.add_argument("--seed", type=int, help="play this one")
    parser.add_argument("--seeds", type=int, default=1000, help="play this many")
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the history")
    parser.add_argument("--keep-going", action="store_true", help="play the other seeds after one has failed")
    given = parser.parse_args(arguments)
    if given.seed is not None:
        try:
            outcome = simulate(given.seed, note=print if given.verbose else None)
        except Violation as exc:
            print(f"FAILED {exc}", file=sys.stderr)
            if given.verbose:
                raise
            return 1
        print(outcome)
        return 0
    return play(range(given.start, given.start + given.seeds), given.jobs, keep_going=given.keep_going)


def play(seeds: range, jobs: int, *, keep_going: bool) -> int:
    """Play the seeds, telling how it goes, and return the exit code."""
    started_s = told_s = time.monotonic()
    failed: list[str] = []
    totals: Counter[str] = Counter()
    played = 0
    with closing(_outcomes(seeds, jobs)) as outcomes:
        for played, outcome in enumerate(outcomes, 1):
            if isinstance(outcome, str):
                failed.append(outcome)
                print(f"FAILED {outcome}", file=sys.stderr, flush=True)
                if not keep_going:
                    break
            else:
                totals.update(outcome.events)
                totals.update({"messages": outcome.messages, "transactions": outcome.transactions})
                totals["virtual hours"] += int(outcome.seconds)
            now_s = time.monotonic()
            if now_s - told_s > PROGRESS_S:
                told_s = now_s
                rate = played / (now_s - started_s)
                left_s = (len(seeds) - played) / rate
                print(f"{played} of {len(seeds)} seeds, {rate:.0f}/s, {left_s:.0f} s to go", flush=True)
    totals["virtual hours"] //= 3600
    print(f"{played} seeds in {time.monotonic() - started_s:.0f} s, {len(failed)} failed")
    print("  ".join(f"{name} {count}" for name, count in sorted(totals.items())))
    return 1 if failed else 0


def _outcomes(seeds: range, jobs: int) -> Generator[Outcome | str]:
    if jobs == 1:
        yield from map(_play_one, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(_play_one, seeds, chunksize=20)


def _play_one(seed: int) -> Outcome | str:
    try:
        return simulate(seed)
    except Violation as exc:
        return str(exc)


if __name__ == "__main__":
    sys.exit(main())
