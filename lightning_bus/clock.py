"""The only module that reads a clock. Everything else is handed the time.

Two clocks, never mixed: leases and limits run on the monotonic one, which no administrator or NTP daemon moves;
the wall clock is data, written into spans and records for people to read and never compared with.
"""

from __future__ import annotations

import time


def monotonic_s() -> float:
    """Seconds since an arbitrary start; never goes back."""
    return time.monotonic()


def wall_ns() -> int:
    """Nanoseconds since the Unix epoch, as the machine believes."""
    return time.time_ns()
