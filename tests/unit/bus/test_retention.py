"""Retention: pure numbers. What goes, and above all what stays."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from lightning_bus.log.retention import SegmentInfo, droppable, held_back

S = 1_000_000_000  # ns
NOW = 1000 * S


@dataclass(frozen=True)
class Keep:
    retain_s: float = 0.0
    retain_bytes: int = 0
    drop_read: bool = False


def segments(*ages_s: float, size: int = 100) -> list[SegmentInfo]:
    """Segments of ten records; the newest record of each is that old."""
    return [SegmentInfo(10 * at, 10 * at + 10, size, NOW - int(age * S)) for at, age in enumerate(ages_s)]


def test_everything_is_kept_by_default() -> None:
    assert droppable(segments(900, 800, 700), {"trainer": 30}, Keep(), NOW) is None


def test_what_is_too_old_goes() -> None:
    log = segments(100, 51, 49, 0)
    assert droppable(log, {}, Keep(retain_s=50), NOW) == 20
    assert droppable(log, {}, Keep(retain_s=200), NOW) is None


def test_the_oldest_go_while_the_log_is_too_large() -> None:
    log = segments(4, 3, 2, 1)
    assert droppable(log, {}, Keep(retain_bytes=400), NOW) is None
    assert droppable(log, {}, Keep(retain_bytes=399), NOW) == 10
    assert droppable(log, {}, Keep(retain_bytes=150), NOW) == 30


def test_what_every_cursor_has_passed_goes_when_asked_to() -> None:
    log = segments(4, 3, 2, 1)
    assert droppable(log, {"a": 25, "b": 20}, Keep(drop_read=True), NOW) == 20
    assert droppable(log, {"a": 25, "b": 9}, Keep(drop_read=True), NOW) is None
    assert droppable(log, {"a": 25, "b": 20}, Keep(), NOW) is None


def test_without_a_cursor_nothing_counts_as_read() -> None:
    assert droppable(segments(4, 3, 2), {}, Keep(drop_read=True), NOW) is None


def test_the_segment_being_written_stays() -> None:
    everything = Keep(retain_s=1, retain_bytes=1, drop_read=True)
    assert droppable(segments(900), {"a": 10}, everything, NOW) is None
    assert droppable(segments(900, 900), {"a": 20}, everything, NOW) == 10


def test_an_older_segment_with_a_newer_record_keeps_those_behind_it() -> None:
    """A clock that was set back must not tear a hole into the log."""
    assert droppable(segments(10, 900, 0), {}, Keep(retain_s=50), NOW) is None


def test_what_a_cursor_has_still_to_read_stays_and_somebody_is_told() -> None:
    log = segments(900, 800, 700, 0)
    limits = Keep(retain_s=50, retain_bytes=100)
    assert droppable(log, {"trainer": 15, "eval": 40}, limits, NOW) == 10
    warning = held_back(log, {"trainer": 15, "eval": 40}, limits, NOW)
    assert warning is not None
    assert "cursor 'trainer' is at 15 and has not read 15 records" in warning
    assert held_back(log, {"trainer": 30}, limits, NOW) is None
    assert held_back(log, {}, limits, NOW) is None


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 1000), st.integers(0, 1000)), min_size=1, max_size=12),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 400)),
    st.builds(Keep, st.floats(0, 1000), st.integers(0, 5000), st.booleans()),
)
def test_whatever_the_limits_nothing_unread_and_nothing_active_goes(
    shape: list[tuple[int, int, int]], cursors: dict[str, int], keep: Keep
) -> None:
    log: list[SegmentInfo] = []
    for records, size, age_s in shape:
        first = log[-1].end_offset if log else 0
        log.append(SegmentInfo(first, first + records, size, NOW - age_s * S))
    before = droppable(log, cursors, keep, NOW)
    if before is not None:
        assert before in [segment.end_offset for segment in log[:-1]]
        assert all(at >= before for at in cursors.values())
        assert keep.retain_s or keep.retain_bytes or (keep.drop_read and cursors)
        kept = [segment for segment in log if segment.end_offset > before]
        assert droppable(kept, cursors, keep, NOW) is None, "one call is enough"
