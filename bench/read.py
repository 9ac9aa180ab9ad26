"""How many model calls a second come out of the log as typed records?

From LMDB to `ModelCall` with numpy arrays: LogReader, checksum, decode_spans, model_call; one process, one thread, a
log in the page cache. And the same over Client.follow from a broker in its own process. `calls_per_s` has one span a
record, as the gateway writes them; `…_20` has 20.

The floor is per core, so it is compared with calls per second of processor time. On a machine that does nothing else
`calls_per_s`, by the clock, is the same; beside other work it is what the other work left over.

And as transitions: a log of rollouts of three turns each, one span a record, through a TransitionStream into scored
groups with advantages (`transitions_per_s`) and on into training rows (`replay_s`, of all rollouts), against the
obvious loop over spans, on lists of tokens, over the first tenth of the same log (`transitions_ratio`).

    python -m bench.read --json          some minutes; the last line is one JSON object
    python -m bench.read --rollouts 10000 --json
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Iterable
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench import common
from lightning_bus import Client, Kind, Record, RolloutEvent, Span, decode_spans, is_model_call, model_call
from lightning_bus import spans as s
from lightning_bus.adapters import Assembler, FinishedRollout, MergeStats, TransitionStream, call_advantages
from lightning_bus.log.codec import encode_event
from lightning_bus.log.reader import LogReader
from lightning_bus.log.store import LogWriter
from lightning_bus.spans import encode_spans

CHUNKS = (1, 20)  # spans a record
CALLS_PER_SECOND = 20_000  # written to the log for each second of measuring
MAP_BYTES_MAX = 1 << 36
CALLS_PER_S_FLOOR = 100_000
ROLLOUTS, TURNS, GROUP = 100_000, 3, 8
GROUPS = 8  # that are credited together, as the trainer does
OBVIOUS_SHARE = 10  # the obvious loop takes a tenth of the log; it would take most of the benchmark's time otherwise


def fill(directory: Path, calls: int, per_record: int) -> None:
    """Write a log of model calls, as a broker would."""
    bodies = [
        encode_spans([common.model_call_span(at + number) for number in range(per_record)])
        for at in range(0, 200, per_record)
    ]
    log = LogWriter(directory, map_bytes_max=MAP_BYTES_MAX)
    for first in range(0, calls // per_record, 512):
        log.commit(
            [
                Record(at, Kind.SPANS, "gateway-0", 1, at + 1, 0, "r-1", 1, per_record, 0, bodies[at % len(bodies)])
                for at in range(first, min(first + 512, calls // per_record))
            ]
        )
    log.close()


def typed(record: Record) -> int:
    """Make every span of a record a ModelCall; return how many there were."""
    calls = [model_call(span) for span in decode_spans(record.body)]
    assert not calls[0].untrainable
    return len(calls)


@dataclass(slots=True)
class Reading:
    """Calls per second of runs: by the clock, and by this process's own processor time."""

    per_s: list[float] = field(default_factory=list[float])
    per_cpu_s: list[float] = field(default_factory=list[float])

    @contextmanager
    def timed(self, calls: int) -> Generator[None]:
        began, began_cpu = time.perf_counter(), time.process_time()
        yield
        self.per_s.append(calls / (time.perf_counter() - began))
        self.per_cpu_s.append(calls / (time.process_time() - began_cpu))

    def figures(self, prefix: str, suffix: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, values in (("calls_per_s", self.per_s), ("calls_per_cpu_s", self.per_cpu_s)):
            result[f"{prefix}{name}{suffix}"] = common.median(values)
            result[f"{prefix}{name}{suffix}_spread"] = common.spread(values)
        return result


def read_local(directory: Path, calls: int, reading: Reading) -> None:
    with LogReader(directory) as log, reading.timed(calls):
        found = sum(map(typed, log.records()))
    assert found == calls


async def read_fetch(address: str, calls: int, reading: Reading) -> None:
    async with Client(address, role="trainer") as client:
        found = 0
        with reading.timed(calls):
            async with aclosing(client.follow()) as records:
                async for record in records:
                    found += typed(record)
                    if found == calls:
                        break


# -- transitions ------------------------------------------------------------------------------------------------------


def conversation(seed: int) -> list[Span]:
    """Return the calls of one rollout: every prompt continues the turn before it, with a tool's 20 tokens between."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, 32_000, 40)
    calls: list[Span] = []
    for turn in range(TURNS):
        made = common.model_call_span(seed * TURNS + turn)
        response = np.frombuffer(made.attributes[s.RESPONSE_IDS], "<u4")
        attributes = {**made.attributes, s.PROMPT_IDS: s.pack_ids(prompt)}
        calls.append(msgspec.structs.replace(made, attributes=attributes, start_ns=turn + 1, end_ns=turn + 2))
        prompt = np.concatenate([prompt, response, rng.integers(0, 32_000, 20)])
    return calls


def fill_rollouts(directory: Path, rollouts: int) -> None:
    """Write the log of finished rollouts, as a broker would."""
    bodies = [[encode_spans([call]) for call in conversation(seed)] for seed in range(50)]
    log = LogWriter(directory, map_bytes_max=MAP_BYTES_MAX)
    records: list[Record] = []

    def add(kind: Kind, rollout_id: str, attempt: int, count: int, body: bytes) -> None:
        records.append(Record(log.end_offset + len(records), kind, "", 0, 0, 0, rollout_id, attempt, count, 0, body))

    for number in range(rollouts):
        rollout_id, group = f"r-{number}", f"g-{number // GROUP}"
        for what, status in (("submit", "queued"), ("lease", "leased")):
            add(
                Kind.ROLLOUT, rollout_id, int(what == "lease"), 0, encode_event(RolloutEvent(what, status, group=group))
            )
        for body in bodies[number % len(bodies)]:
            add(Kind.SPANS, rollout_id, 1, 1, body)
        end = RolloutEvent("succeed", "succeeded", group=group, reward=float(number % 3 == 0))
        add(Kind.ROLLOUT, rollout_id, 1, 0, encode_event(end))
        if len(records) >= 512:
            log.commit(records)
            records = []
    log.commit(records)
    log.close()


def finished(directory: Path) -> Generator[FinishedRollout]:
    assembler = Assembler()
    with LogReader(directory) as log:
        for record in log.records():
            rollout = assembler.feed(record)
            if rollout is not None:
                yield rollout


def transitions(directory: Path, *, rows: bool) -> tuple[int, MergeStats]:
    """Make every call of the log a transition with its advantage, and those training rows if asked; return how many calls."""
    calls, merged = 0, MergeStats()
    with LogReader(directory) as log:
        groups = TransitionStream(group_size=GROUP).read(log)
        while step := [rollout for group in islice(groups, GROUPS) for rollout in group.rollouts]:
            made = [rollout.transitions for rollout in step if rollout.transitions is not None]
            episodes = [rollout.episode for rollout in step if rollout.episode is not None]
            for one, advantages_T in zip(made, call_advantages(episodes), strict=True):
                calls += len(one.turns)
                if rows:
                    merged += one.merged
                    advantage_of = dict(zip([turn.span_id for turn in one.turns], advantages_T.tolist(), strict=True))
                    assert all(row.with_advantages(advantage_of).trained.any() for row in one.rows)
    return calls, merged


def obvious(rollouts: Iterable[FinishedRollout]) -> int:
    """The loop that one writes first: lists of tokens, a mask and log-probs beside them, joined turn by turn."""
    calls = 0
    for rollout in rollouts:
        tokens: list[int] = []
        mask: list[bool] = []
        logprobs: list[float] = []
        for span in rollout.spans:
            if not is_model_call(span):
                continue
            calls += 1
            prompt = [int(one) for one in np.frombuffer(span.attributes[s.PROMPT_IDS], "<u4")]
            response = [int(one) for one in np.frombuffer(span.attributes[s.RESPONSE_IDS], "<u4")]
            said = [float(one) for one in np.frombuffer(span.attributes[s.LOGPROBS], "<f4")]
            assert prompt[: len(tokens)] == tokens
            between = len(prompt) - len(tokens)
            tokens = prompt + response
            mask = mask + [False] * between + [True] * len(response)
            logprobs = logprobs + [0.0] * between + said
        advantages = [(rollout.reward or 0.0) if sampled else 0.0 for sampled in mask]
        assert len(advantages) == len(tokens) == len(logprobs)
    return calls


def measure_transitions(directory: Path, rollouts: int, runs: int) -> dict[str, Any]:
    rollouts -= rollouts % GROUP  # whole groups: a stream waits for the rest of others
    fill_rollouts(directory, rollouts)
    expected = rollouts * TURNS
    made, loop, replay_s, merged = Reading(), Reading(), list[float](), MergeStats()
    transitions(directory, rows=False)  # into the page cache
    for _ in range(runs):
        with made.timed(expected):
            assert transitions(directory, rows=False)[0] == expected
        began = time.perf_counter()
        _, merged = transitions(directory, rows=True)
        replay_s.append(time.perf_counter() - began)
        with loop.timed(expected // OBVIOUS_SHARE):
            assert obvious(islice(finished(directory), rollouts // OBVIOUS_SHARE)) == expected // OBVIOUS_SHARE
    ratios = [ours / theirs for ours, theirs in zip(made.per_cpu_s, loop.per_cpu_s, strict=True)]
    return {
        "transitions_per_s": common.median(made.per_s),
        "transitions_per_cpu_s": common.median(made.per_cpu_s),
        "transitions_per_cpu_s_spread": common.spread(made.per_cpu_s),
        "transitions_ratio": common.median(ratios, 2),
        "obvious_per_cpu_s": common.median(loop.per_cpu_s),
        "merge_ratio": round(merged.merge_ratio, 2),
        "rows_per_rollout": merged.rows_per_rollout,
        "replay_rollouts": rollouts,
        "replay_s": common.median(replay_s, 1),
        "replay_s_spread": common.spread(replay_s, 1),
    }


def main() -> None:
    made = common.parser(__doc__, seconds=2.0, runs=5)
    made.add_argument("--rollouts", type=int, default=ROLLOUTS, help="of the log that is replayed")
    options = common.parse(made)
    if options.quick:
        options.rollouts = min(options.rollouts, 2_000)
    local = {chunk: Reading() for chunk in CHUNKS}
    fetched = {chunk: Reading() for chunk in CHUNKS}
    calls = int(CALLS_PER_SECOND * options.seconds)
    with common.workspace(options.dir) as directory:
        for chunk in CHUNKS:
            log = directory / f"log{chunk}"
            fill(log, calls, chunk)
            read_local(log, calls, Reading())  # into the page cache
            with common.broker(log) as broker:
                for _ in range(options.runs):
                    read_local(log, calls, local[chunk])
                    common.run_async(partial(read_fetch, broker.address, calls, fetched[chunk]))
            shutil.rmtree(log)
        replayed = measure_transitions(directory / "rollouts", options.rollouts, min(3, options.runs))
        summary: dict[str, Any] = {"bench": "read", "machine": common.machine(directory)}
    summary |= {"n": options.runs, "calls": calls}
    for chunk, suffix in zip(CHUNKS, ("", "_20"), strict=True):
        summary |= local[chunk].figures("", suffix) | fetched[chunk].figures("fetch_", suffix)
    summary |= replayed
    summary["calls_per_s_floor"] = CALLS_PER_S_FLOOR
    summary["ok"] = summary["calls_per_cpu_s"] >= CALLS_PER_S_FLOOR
    common.finish(summary, options.json)


if __name__ == "__main__":
    main()
