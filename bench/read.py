"""How many model calls a second come out of the log as typed records?

From LMDB to `ModelCall`: LogReader, checksum, decoding, and whether each can be trained on; one process, one thread, a
log in the page cache. And the same over Client.follow from a broker in its own process. `calls_per_s` has one span a
record, as the gateway writes them; `…_20` has 20.

The floors are per core, so they are compared with calls per second of processor time. On a machine that does nothing
else `calls_per_s`, by the clock, is the same; beside other work it is what the other work left over.

And as transitions. `transitions_per_cpu_s`: a log of finished rollouts through a TransitionStream into scored groups,
rollouts of 3 calls with one span a record, and (`…_20`) of 20 calls in one record. `replay_s`: all rollouts of the
first log, from the log to training rows with their advantages; `replay_ratio`: how many times as fast as the obvious
loop over spans, on lists of tokens, which takes a tenth of the same log.

    python -m bench.read --json          some minutes; the last line is one JSON object
    python -m bench.read --rollouts 10000 --json
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench import common
from lightning_bus import Client, Kind, Record, RolloutEvent, Span, decode_event, decode_spans, is_model_call
from lightning_bus import spans as s
from lightning_bus.adapters import MergeStats, TransitionStream, call_advantages
from lightning_bus.log.codec import encode_event
from lightning_bus.log.reader import LogReader
from lightning_bus.log.store import LogWriter
from lightning_bus.spans import RecordedSpans, encode_spans, why_untrainable

CHUNKS = (1, 20)  # spans a record
CALLS_PER_SECOND = 20_000  # written to the log for each second of measuring
MAP_BYTES_MAX = 1 << 36
CALLS_PER_S_FLOOR = 100_000
ROLLOUTS, TURNS, CALLS_OF_20, GROUP = 100_000, 3, 20, 8
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
    """Make every span of a record a ModelCall that can be trained on; return how many there were."""
    calls = RecordedSpans([record.body]).calls
    assert not any(why_untrainable(calls))
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


def agent(seed: int, calls: int) -> list[Span]:
    """Return the calls of one rollout: conversations of three turns, each going on from the turn before it."""
    rng = np.random.default_rng(seed)
    made: list[Span] = []
    prompt = rng.integers(0, 32_000, 40)
    for number in range(calls):
        if number % TURNS == 0:
            prompt = rng.integers(0, 32_000, 40)
        one = common.model_call_span(seed * calls + number)
        response = np.frombuffer(one.attributes[s.RESPONSE_IDS], "<u4")
        attributes = {**one.attributes, s.PROMPT_IDS: s.pack_ids(prompt)}
        made.append(msgspec.structs.replace(one, attributes=attributes, start_ns=number + 1, end_ns=number + 2))
        prompt = np.concatenate([prompt, response, rng.integers(0, 32_000, 20)])  # what a tool said
    return made


def fill_rollouts(directory: Path, rollouts: int, calls: int, per_record: int) -> None:
    """Write the log of finished rollouts, as a broker would."""
    bodies: list[list[bytes]] = []
    for seed in range(50):
        spans = agent(seed, calls)
        bodies.append([encode_spans(spans[at : at + per_record]) for at in range(0, calls, per_record)])
    log = LogWriter(directory, map_bytes_max=MAP_BYTES_MAX)
    records: list[Record] = []

    def add(kind: Kind, rollout_id: str, attempt: int, count: int, body: bytes) -> None:
        records.append(Record(log.end_offset + len(records), kind, "", 0, 0, 0, rollout_id, attempt, count, 0, body))

    for number in range(rollouts):
        rollout_id, group = f"r-{number}", f"g-{number // GROUP}"
        for attempt, (what, status) in enumerate((("submit", "queued"), ("lease", "leased"))):
            add(Kind.ROLLOUT, rollout_id, attempt, 0, encode_event(RolloutEvent(what, status, group=group)))
        for body in bodies[number % len(bodies)]:
            add(Kind.SPANS, rollout_id, 1, per_record, body)
        end = RolloutEvent("succeed", "succeeded", group=group, reward=float(number % 3 == 0))
        add(Kind.ROLLOUT, rollout_id, 1, 0, encode_event(end))
        if len(records) >= 512:
            log.commit(records)
            records = []
    log.commit(records)
    log.close()


def stream(directory: Path) -> int:
    """Make every call of the log a scored transition; return how many there were."""
    with LogReader(directory) as log:
        made = (one.transitions for group in TransitionStream(group_size=GROUP).read(log) for one in group.rollouts)
        return sum(len(each.turns) for each in made if each is not None)


def replay(directory: Path) -> MergeStats:
    """Make the log training rows with their advantages; return what merging saved."""
    merged = MergeStats()
    with LogReader(directory) as log:
        groups = TransitionStream(group_size=GROUP).read(log)
        while step := [rollout for group in islice(groups, GROUPS) for rollout in group.rollouts]:
            made = [rollout.transitions for rollout in step if rollout.transitions is not None]
            episodes = [rollout.episode for rollout in step if rollout.episode is not None]
            for one, advantages_T in zip(made, call_advantages(episodes), strict=True):
                merged += one.merged
                advantage_of = dict(zip([turn.span_id for turn in one.turns], advantages_T.tolist(), strict=True))
                assert all(row.with_advantages(advantage_of).trained.any() for row in one.rows)
    return merged


def obvious(directory: Path, rollouts: int) -> int:
    """The loop that one writes first: every span decoded, lists of tokens, a mask and log-probs beside them, joined."""
    calls, ended = 0, 0
    spans_of: dict[str, list[Span]] = {}
    with LogReader(directory) as log:
        for record in log.records():
            if record.kind is Kind.SPANS:
                spans_of.setdefault(record.rollout_id, []).extend(decode_spans(record.body))
                continue
            reward = decode_event(record).reward
            if reward is None:
                continue
            tokens: list[int] = []
            mask: list[bool] = []
            logprobs: list[float] = []
            for span in filter(is_model_call, spans_of.pop(record.rollout_id)):
                calls += 1
                prompt = [int(one) for one in np.frombuffer(span.attributes[s.PROMPT_IDS], "<u4")]
                response = [int(one) for one in np.frombuffer(span.attributes[s.RESPONSE_IDS], "<u4")]
                said = [float(one) for one in np.frombuffer(span.attributes[s.LOGPROBS], "<f4")]
                assert prompt[: len(tokens)] == tokens
                between = len(prompt) - len(tokens)
                tokens = prompt + response
                mask = mask + [False] * between + [True] * len(response)
                logprobs = logprobs + [0.0] * between + said
            advantages = [reward if sampled else 0.0 for sampled in mask]
            assert len(advantages) == len(tokens) == len(logprobs)
            ended += 1
            if ended == rollouts:
                break
    return calls


def measure_stream(directory: Path, rollouts: int, runs: int, calls: int, per_record: int) -> Reading:
    fill_rollouts(directory, rollouts, calls, per_record)
    made = Reading()
    assert stream(directory) == rollouts * calls  # and it is in the page cache
    for _ in range(runs):
        with made.timed(rollouts * calls):
            stream(directory)
    return made


def measure_transitions(directory: Path, rollouts: int, runs: int) -> dict[str, Any]:
    rollouts -= rollouts % (GROUP * OBVIOUS_SHARE)  # whole groups: a stream waits for the rest of others
    few = max(GROUP, rollouts * TURNS // CALLS_OF_20 // GROUP * GROUP)  # as many calls, in fewer rollouts
    singles = measure_stream(directory / "singles", rollouts, runs, TURNS, 1)
    together = measure_stream(directory / "together", few, runs, CALLS_OF_20, 20)
    shutil.rmtree(directory / "together")
    replays, loop, replay_s, merged = Reading(), Reading(), list[float](), MergeStats()
    for _ in range(runs):
        began = time.perf_counter()
        with replays.timed(rollouts):
            merged = replay(directory / "singles")
        replay_s.append(time.perf_counter() - began)
        with loop.timed(rollouts // OBVIOUS_SHARE):
            assert obvious(directory / "singles", rollouts // OBVIOUS_SHARE) == rollouts // OBVIOUS_SHARE * TURNS
    ratios = [ours / theirs for ours, theirs in zip(replays.per_cpu_s, loop.per_cpu_s, strict=True)]
    result: dict[str, Any] = {}
    for reading, suffix in ((singles, ""), (together, "_20")):
        result[f"transitions_per_s{suffix}"] = common.median(reading.per_s)
        result[f"transitions_per_cpu_s{suffix}"] = common.median(reading.per_cpu_s)
        result[f"transitions_per_cpu_s{suffix}_spread"] = common.spread(reading.per_cpu_s)
    return result | {
        "merge_ratio": round(merged.merge_ratio, 2),
        "rows_per_rollout": merged.rows_per_rollout,
        "replay_rollouts": rollouts,
        "replay_s": common.median(replay_s, 1),
        "replay_s_spread": common.spread(replay_s, 1),
        "replay_rollouts_per_cpu_s": common.median(replays.per_cpu_s),
        "obvious_rollouts_per_cpu_s": common.median(loop.per_cpu_s),
        "replay_ratio": common.median(ratios, 2),
        "replay_ratio_spread": common.spread(ratios, 2),
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
    floored = [summary[name] for name in ("calls_per_cpu_s", "transitions_per_cpu_s")]
    summary["ok"] = all(value >= CALLS_PER_S_FLOOR for value in floored)
    common.finish(summary, options.json)


if __name__ == "__main__":
    main()
