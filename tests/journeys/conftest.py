"""What the journeys share: a ring of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.journeys.ring import Ring


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[Ring]:
    """A small run that is configured but not started; whatever was started ends with the test."""
    with Ring(tmp_path.resolve()) as one:
        yield one
