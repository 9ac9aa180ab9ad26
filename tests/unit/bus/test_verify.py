"""verify on a sound log, and on logs broken by hand, one promise each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import msgspec
import pytest

from lightning_bus.errors import CallError
from lightning_bus.log.codec import encode_event, encode_record, offset_key
from lightning_bus.log.layout import find_segments
from lightning_bus.log.store import LogWriter
from lightning_bus.log.verify import Check, Report, verify
from lightning_bus.records import Kind, Record, RolloutEvent
from lightning_bus.resources import POLICY_WEIGHTS, Resource, TrainedRollout, WeightVersion, encode
from lightning_bus.spans import (
    LOGPROBS,
    MODEL_CALL_NAME,
    OPERATION,
    PROMPT_IDS,
    RESPONSE_IDS,
    UNTRAINABLE,
    WEIGHT_VERSIONS,
    Span,
    encode_spans,
    pack_ids,
    pack_logprobs,
)

MAP_BYTES = 1 << 24


class Story:
    """Tells a log, record by record; what a test leaves out or adds is what is broken."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.seq = 0

    def record(self, kind: Kind, body: bytes, **fields: Any) -> None:
        defaults: dict[str, Any] = {
            "producer": "", "epoch": 0, "seq": 0, "part": 0, "rollout_id": "", "attempt": 0, "span_count": 0, "wall_ns": 0,
        }  # fmt: skip
        self.records.append(Record(len(self.records), kind, body=body, **{**defaults, **fields}))

    def event(self, rollout_id: str, what: str, status: str, attempt: int) -> None:
        self.record(Kind.ROLLOUT, encode_event(RolloutEvent(what, status)), rollout_id=rollout_id, attempt=attempt)

    def spans(self, rollout_id: str, attempt: int, *spans: Span, **fields: Any) -> None:
        self.seq += 1
        named = {"producer": "gateway-1", "epoch": 1, "seq": self.seq, "span_count": len(spans), **fields}
        self.record(Kind.SPANS, encode_spans(spans), rollout_id=rollout_id, attempt=attempt, **named)

    def weights(self, version: int, trained: list[TrainedRollout], phase: str = "rl", parent: int | None = -1) -> None:
        parent = (version - 1 if version else None) if parent == -1 else parent
        body = encode(
            WeightVersion(
                version=version, parent=parent, phase=phase, step=version, path="w", checksum="c", trained=trained
            )
        )
        resource = Resource(POLICY_WEIGHTS, version, body)
        self.record(Kind.RESOURCE, msgspec.msgpack.encode(resource), producer="trainer-1")

    def rollout(self, rollout_id: str, *spans: Span, attempt: int = 1) -> None:
        """A rollout that is submitted, leased, recorded and done."""
        self.event(rollout_id, "submit", "queued", 0)
        self.event(rollout_id, "lease", "leased", attempt)
        self.spans(rollout_id, attempt, *spans)
        self.event(rollout_id, "succeed", "succeeded", attempt)

    def write(self, run_dir: Path, first_offset: int = 0) -> Report:
        """Write it to a log of which everything before `first_offset` is dropped again, and verify that."""
        log = LogWriter(run_dir / "log", map_bytes_max=MAP_BYTES, segment_bytes=1)
        log.commit(self.records[:first_offset])
        log.commit(self.records[first_offset:])
        assert log.drop_before(first_offset) == first_offset
        log.close()
        return verify(run_dir)


def call(span_id: str, version: str = "0", **attributes: Any) -> Span:
    found: dict[str, Any] = {
        OPERATION: MODEL_CALL_NAME,
        PROMPT_IDS: pack_ids([1, 2]),
        RESPONSE_IDS: pack_ids([3]),
        LOGPROBS: pack_logprobs([-0.5]),
        WEIGHT_VERSIONS: [[version, 0, 1]],
        **attributes,
    }
    return Span(span_id.encode().ljust(8, b"."), bytes(16), None, "chat", 0, 1, found)


def trained(rollout_id: str, *span_ids: str, attempt: int = 1) -> TrainedRollout:
    return TrainedRollout(rollout_id, attempt, [span_id.encode().ljust(8, b".") for span_id in span_ids])


def sound() -> Story:
    """Version 0 plays a, version 1 is trained on it, and plays b."""
    story = Story()
    story.weights(0, [], phase="init")
    story.rollout("a", call("a1"), call("a2"))
    story.weights(1, [trained("a", "a1", "a2")])
    story.rollout("b", call("b1", version="1"))
    return story


def broken(report: Report) -> dict[str, Check]:
    return {check.promise: check for check in report.checks if not check.proved}


def test_a_sound_log_is_proved_and_every_check_looked_at_something(tmp_path: Path) -> None:
    report = sound().write(tmp_path)
    assert report.proved, broken(report)
    assert all(check.looked_at > 0 for check in report.checks)
    assert json.loads(json.dumps(report.to_builtins()))["proved"] is True


def test_a_rollout_that_was_tried_twice_is_sound(tmp_path: Path) -> None:
    story = sound()
    story.event("c", "submit", "queued", 0)
    story.event("c", "lease", "leased", 1)
    story.spans("c", 1, call("c1"))
    story.event("c", "requeue", "queued", 1)
    story.event("c", "lease", "leased", 2)
    story.spans("c", 2, call("c2"))
    story.event("c", "fail", "failed", 2)
    assert story.write(tmp_path).proved


def test_a_cancelled_rollout_is_sound(tmp_path: Path) -> None:
    story = sound()
    story.event("c", "submit", "queued", 0)
    story.event("c", "cancel", "cancelled", 0)
    assert story.write(tmp_path).proved


def test_a_version_that_a_rollback_gave_up_need_not_have_been_called(tmp_path: Path) -> None:
    story = sound()
    story.weights(2, [trained("b", "b1")])
    story.weights(3, [], parent=1)
    story.rollout("c", call("c1", version="3"))
    story.weights(4, [trained("c", "c1")], parent=3)
    story.rollout("d", call("d1", version="4"))
    report = story.write(tmp_path / "sound")
    assert report.proved, broken(report)
    assert report.checks[-1].note == "version 2 was rolled back before it was used"
    story.weights(5, [], parent=7)
    (check,) = broken(story.write(tmp_path / "broken")).values()
    assert check.first == ["version 5 has the unpublished parent 7"]


def test_sft_may_train_on_a_call_in_every_epoch(tmp_path: Path) -> None:
    story = Story()
    story.weights(0, [], phase="init")
    story.rollout("a", call("a1"))
    story.weights(1, [trained("a", "a1")], phase="sft")
    story.weights(2, [trained("a", "a1")], phase="sft")
    story.rollout("b", call("b1", version="1"), call("b2", version="2"))
    assert story.write(tmp_path).proved


def test_batches_that_left_no_record_are_counted(tmp_path: Path) -> None:
    story = sound()
    story.event("c", "submit", "queued", 0)
    story.event("c", "lease", "leased", 1)
    story.seq += 3
    story.spans("c", 1, call("c1"))
    story.event("c", "succeed", "succeeded", 1)
    report = story.write(tmp_path)
    assert report.proved
    assert "3 numbers left no record" in report.checks[3].note


def test_what_a_worker_hands_back_and_what_is_done_to_dead_letters_is_sound(tmp_path: Path) -> None:
    story = sound()
    story.event("c", "submit", "queued", 0)
    for attempt, end in enumerate(("nack", "release", "requeue"), start=1):
        story.event("c", "lease", "leased", attempt)
        story.event("c", end, "queued", attempt)
    story.event("c", "lease", "leased", 4)
    story.event("c", "fail", "failed", 4)
    story.event("c", "replay", "failed", 4)
    story.event("c", "purge", "failed", 4)
    report = story.write(tmp_path)
    assert report.proved, broken(report)


def test_a_batch_that_was_fenced_whole_is_sound(tmp_path: Path) -> None:
    story = sound()
    story.spans("", 0)
    story.rollout("c", call("c1"))
    report = story.write(tmp_path)
    assert report.proved, broken(report)
    assert report.checks[3].note == ""


def _told(story: Story) -> Story:
    """A run of which the first records will be dropped: a ends in what is dropped, b, c and d in what is kept."""
    for rollout_id in "bcd":
        story.event(rollout_id, "submit", "queued", 0)
        story.event(rollout_id, "lease", "leased", 1)
    story.spans("b", 1, call("b1"))
    return story


def test_what_rests_on_dropped_records_is_counted_and_the_rest_is_proved(tmp_path: Path) -> None:
    story = Story()
    story.weights(0, [], phase="init")
    story.rollout("a", call("a1"))
    kept_from = len(_told(story).records)
    story.event("b", "succeed", "succeeded", 1)
    story.event("c", "requeue", "queued", 1)
    story.event("c", "lease", "leased", 2)
    story.event("c", "cancel", "cancelled", 2)
    story.spans("d", 1, call("d1"))
    story.event("d", "succeed", "succeeded", 1)
    story.weights(1, [trained("a", "a1"), trained("b", "b1"), trained("d", "d1")])
    story.rollout("e", call("e1", version="1"))
    report = story.write(tmp_path, first_offset=kept_from)
    assert report.proved, broken(report)
    assert report.to_builtins()["first_offset"] == kept_from
    unproved = {check.promise: check.unproved for check in report.checks if check.unproved}
    assert [count for promise, count in unproved.items() if promise.startswith(ONCE)] == [3]
    assert [count for promise, count in unproved.items() if promise.startswith(TRAINED)] == [2]
    (trained_check,) = [check for check in report.checks if check.promise.startswith(TRAINED)]
    assert f"2 calls rest on records before {kept_from}, which were dropped" in trained_check.note


def test_what_begins_in_the_kept_records_is_checked_as_ever(tmp_path: Path) -> None:
    story = Story()
    story.rollout("a", call("a1"))
    kept_from = len(story.records)
    story.rollout("b", call("b1"))
    story.event("b", "fail", "failed", 1)
    story.weights(1, [trained("b", "no-such")], parent=None)
    report = story.write(tmp_path, first_offset=kept_from)
    assert {promise.split()[0] for promise in broken(report)} == {"every", "attempts"}
    assert any("not in the log before it" in said for check in report.checks for said in check.first)


def _still_running(story: Story) -> None:
    story.event("c", "submit", "queued", 0)
    story.event("c", "lease", "leased", 1)


def _submitted_twice(story: Story) -> None:
    story.event("a", "submit", "queued", 0)


def _ended_twice(story: Story) -> None:
    story.event("a", "fail", "failed", 1)


def _attempt_skipped(story: Story) -> None:
    story.rollout("c", attempt=2)


def _illegal_move(story: Story) -> None:
    story.event("c", "submit", "queued", 0)
    story.event("c", "succeed", "succeeded", 0)


def _status_does_not_fit(story: Story) -> None:
    story.event("c", "submit", "queued", 0)
    story.event("c", "lease", "queued", 1)
    story.event("c", "fail", "failed", 1)


def _never_submitted(story: Story) -> None:
    story.event("c", "lease", "leased", 1)
    story.event("c", "succeed", "succeeded", 1)


def _batch_twice(story: Story) -> None:
    story.event("c", "submit", "queued", 0)
    story.event("c", "lease", "leased", 1)
    story.spans("c", 1, call("c1"))
    story.spans("c", 1, call("c2"), seq=story.seq)
    story.event("c", "succeed", "succeeded", 1)


def _batch_lost(story: Story) -> None:
    story.spans("", 0)  # an empty record: this log accounts for every number
    story.seq += 1
    story.rollout("c", call("c1"))


def _purged_though_it_succeeded(story: Story) -> None:
    story.event("a", "purge", "succeeded", 1)


def _last_spans_twice(story: Story) -> None:
    story.event("c", "submit", "queued", 0)
    story.event("c", "lease", "leased", 1)
    story.spans("c", 1, call("c1"), producer="worker-1", seq=0)
    story.spans("c", 1, call("c2"), producer="worker-1", seq=0)
    story.event("c", "succeed", "succeeded", 1)


def _span_twice(story: Story) -> None:
    story.rollout("c", call("c1"), call("c1"))


def _late_span(story: Story) -> None:
    story.spans("a", 1, call("a3"))


def _span_of_an_old_attempt(story: Story) -> None:
    story.event("c", "submit", "queued", 0)
    story.event("c", "lease", "leased", 1)
    story.event("c", "requeue", "queued", 1)
    story.event("c", "lease", "leased", 2)
    story.spans("c", 1, call("c1"))
    story.event("c", "succeed", "succeeded", 2)


def _trained_on_nothing(story: Story) -> None:
    _update(story, trained("b", "no-such"))


def _trained_on_an_unknown_rollout(story: Story) -> None:
    _update(story, trained("z", "b1"))


def _trained_on_another_attempt(story: Story) -> None:
    _update(story, trained("b", "b1", attempt=2))


def _trained_on_a_tool_span(story: Story) -> None:
    story.rollout("c", Span(b"tool....", bytes(16), None, "tool", 0, 1))
    _update(story, trained("c", "tool"))


def _trained_on_an_untrainable_call(story: Story) -> None:
    story.rollout("c", call("c1", **{UNTRAINABLE: "client went away"}))
    _update(story, trained("c", "c1"))


def _trained_on_a_failure(story: Story) -> None:
    story.event("c", "submit", "queued", 0)
    story.event("c", "lease", "leased", 1)
    story.spans("c", 1, call("c1"))
    story.event("c", "fail", "failed", 1)
    _update(story, trained("c", "c1"))


def _trained_before_it_was_recorded(story: Story) -> None:
    story.weights(2, [trained("c", "c1")])
    story.rollout("c", call("c1", version="2"))


def _trained_on_twice(story: Story) -> None:
    _update(story, trained("a", "a1"))


def _trained_on_twice_in_one_update(story: Story) -> None:
    _update(story, trained("b", "b1", "b1"))


def _version_goes_back(story: Story) -> None:
    story.weights(5, [], parent=1)
    story.weights(4, [], parent=1)


def _version_without_parent(story: Story) -> None:
    story.weights(9, [], parent=8)


def _version_never_served(story: Story) -> None:
    story.weights(2, [trained("b", "b1")])


def _update(story: Story, what: TrainedRollout) -> None:
    story.weights(2, [what])
    story.rollout("after", call("after", version="2"))


ONCE, ATTEMPTS, BATCHES = "every submitted rollout", "attempts were", "no batch"
SPANS, FENCED, VERSIONS = "no span", "spans were only kept", "weight versions"
TRAINED, TRAINED_ONCE, SERVED = "every call trained on", "no call was trained on", "every update's"


@pytest.mark.parametrize(
    ("harm", "promise", "says"),
    [
        (_still_running, ONCE, "c ended 0 times; it is leased at attempt 1"),
        (_submitted_twice, ONCE, "a was submitted 2 times"),
        (_ended_twice, ONCE, "a ended 2 times"),
        (_ended_twice, ATTEMPTS, "a rollout that is succeeded cannot fail"),
        (_attempt_skipped, ATTEMPTS, "attempt 2 where 1 is due"),
        (_illegal_move, ATTEMPTS, "a rollout that is queued cannot succeed"),
        (_status_does_not_fit, ATTEMPTS, "leads to leased, the log says queued"),
        (_never_submitted, ATTEMPTS, "never submitted"),
        (_never_submitted, ONCE, "c was submitted 0 times"),
        (_batch_twice, BATCHES, "comes after 1:3 part 0"),
        (_batch_lost, BATCHES, "1:5 part 0 (record 13) comes after 1:3: what was between left no record"),
        (_purged_though_it_succeeded, ATTEMPTS, "a rollout that is succeeded is no dead letter"),
        (_last_spans_twice, BATCHES, "ended c attempt 1 before"),
        (_span_twice, SPANS, "of rollout 'c' again"),
        (_late_span, FENCED, "a attempt 1, which was succeeded at attempt 1"),
        (_span_of_an_old_attempt, FENCED, "c attempt 1, which was leased at attempt 2"),
        (_trained_on_nothing, TRAINED, "not in the log before it"),
        (_trained_on_an_unknown_rollout, TRAINED, "z attempt 1, which is unknown"),
        (_trained_on_another_attempt, TRAINED, "belongs to attempt 1"),
        (_trained_on_a_tool_span, TRAINED, "not a model call"),
        (_trained_on_an_untrainable_call, TRAINED, "untrainable: client went away"),
        (_trained_on_a_failure, TRAINED, "which is failed at attempt 1"),
        (_trained_before_it_was_recorded, TRAINED, "not in the log before it"),
        (_trained_on_twice, TRAINED_ONCE, "version 1 did already"),
        (_trained_on_twice_in_one_update, TRAINED_ONCE, "version 2 did already"),
        (_version_goes_back, VERSIONS, "version 4 was published after version 5"),
        (_version_without_parent, VERSIONS, "version 9 has the unpublished parent 8"),
        (_version_never_served, SERVED, "version 2 (rl step 2): no call after record"),
    ],
)
def test_what_breaks_a_promise_is_named(tmp_path: Path, harm: Callable[[Story], None], promise: str, says: str) -> None:
    story = sound()
    harm(story)
    report = story.write(tmp_path)
    assert not report.proved
    (check,) = [check for check in report.checks if check.promise.startswith(promise)]
    assert any(says in offender for offender in check.first), check


def _flip_a_bit(log: Any, txn: Any) -> None:
    value = bytearray(txn.get(offset_key(3), db=log))
    value[-1] ^= 1
    txn.put(offset_key(3), bytes(value), db=log)


def _delete_the_last(log: Any, txn: Any) -> None:
    txn.put(offset_key(99), txn.get(offset_key(3), db=log), db=log)


def _hole(log: Any, txn: Any) -> None:
    txn.delete(offset_key(3), db=log)


def _foreign_bytes(log: Any, txn: Any) -> None:
    txn.put(offset_key(3), b"not a record", db=log)


def _spans_that_are_none(log: Any, txn: Any) -> None:
    record = Record(3, Kind.SPANS, "gateway-1", 1, 1, 0, "a", 1, 2, 0, b"\x01")
    txn.put(offset_key(3), encode_record(record), db=log)


@pytest.mark.parametrize("harm", [_flip_a_bit, _delete_the_last, _hole, _foreign_bytes, _spans_that_are_none])
def test_damage_on_the_disk_is_found(tmp_path: Path, harm: Callable[[Any, Any], None]) -> None:
    assert sound().write(tmp_path).proved
    env = lmdb.open(str(find_segments(tmp_path / "log")[0].path), map_size=MAP_BYTES, max_dbs=8)
    log = env.open_db(b"log", create=False)
    with env.begin(write=True) as txn:
        harm(log, txn)
    env.close()
    whole = verify(tmp_path).checks[0]
    assert whole.offenders > 0


def test_a_directory_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CallError, match="holds no log"):
        verify(tmp_path)
