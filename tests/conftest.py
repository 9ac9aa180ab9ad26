"""What all tests share: one thread a library, and Hypothesis without a clock."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# Before numpy or torch is imported: tests run side by side, and threads that fight over cores only add noise.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No deadline, and no alarm when examples are slow to draw: on a busy machine that would fail tests for being slow, not
# for being wrong.
# On CI the examples are the same each time: see .ci/run.
settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("default")


@pytest.fixture
def anyio_backend() -> str:
    """The one event loop that the daemons run on."""
    return "asyncio"
