"""Rollouts that are over take little room and come out as they were."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bus import messages as m
from lightning_bus.broker.register import Register
from lightning_bus.lifecycle import TERMINAL, Status

texts = st.text(max_size=10)
submissions = st.builds(
    m.Submission, st.just("r-1"), st.binary(max_size=40), texts, texts, st.dictionaries(texts, st.integers(0, 9), max_size=2),
    st.dictionaries(texts, texts, max_size=2), priority=st.integers(-5, 5), key=texts,
)  # fmt: skip
ended = st.builds(
    m.Rollout, submissions, st.sampled_from(sorted(TERMINAL)), st.integers(0, 9), texts, st.none() | st.floats(0, 1), texts,
    ended_offset=st.integers(0, 1 << 62), replayed_as=texts, purged=st.booleans(),
)  # fmt: skip


@given(ended)
def test_a_packed_rollout_comes_out_as_it_was_but_for_its_task(rollout: m.Rollout) -> None:
    register = Register()
    register.add(rollout)
    task = rollout.submission.task
    assert register["r-1"] is rollout
    register.pack("r-1")
    out = register["r-1"]
    assert out is not rollout
    assert out.submission.task == b""
    assert out.submission == m.Submission("r-1", b"", *list(_fields(rollout.submission))[2:])
    assert list(_fields(out))[1:] == list(_fields(rollout))[1:]
    assert register.status_of("r-1") is rollout.status
    assert register.same_task("r-1", task)
    assert not register.same_task("r-1", task + b"x")
    assert register.live("r-1") is None
    assert list(register.unpacked()) == []


def test_what_is_not_over_is_not_packed() -> None:
    register = Register()
    register.add(m.Rollout(m.Submission("r-1", b"task"), Status.QUEUED))
    with pytest.raises(AssertionError):
        register.pack("r-1")


def test_the_order_is_that_of_submission_packed_or_not() -> None:
    register = Register()
    for rollout_id in ("r-3", "r-1", "r-2"):
        register.add(m.Rollout(m.Submission(rollout_id, b"task"), Status.SUCCEEDED))
    register.pack("r-1")
    assert list(register) == ["r-3", "r-1", "r-2"]
    assert [rollout.submission.rollout_id for rollout in register.values()] == ["r-3", "r-1", "r-2"]
    register.remove("r-3")
    assert register.find("r-3") is None
    assert (len(register), "r-1" in register, "r-3" in register) == (2, True, False)


def test_a_packed_rollout_is_small() -> None:
    register = Register()
    register.add(m.Rollout(m.Submission("r-1", b"x" * 100_000, "g-1"), Status.SUCCEEDED, 1, "worker-1", 1.0))
    register.pack("r-1")
    kept = register._kept["r-1"]  # pyright: ignore[reportPrivateUsage]
    assert sys.getsizeof(kept) < 200


def _fields(value: m.Submission | m.Rollout) -> list[object]:
    return [getattr(value, name) for name in value.__struct_fields__]
