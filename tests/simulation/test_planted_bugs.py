"""Tests of the tests: a broker that breaks a promise is found, within few histories, from what it did to others."""

from __future__ import annotations

import pytest

from tests.simulation.bugs import BUGS, Bug, catch


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(bug: Bug) -> None:
    _, told = catch(bug)
    assert any(promise in told for promise in bug.promises), told
