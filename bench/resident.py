"""How much memory this process has, and had at most. Standard library only: peers' environments import it too."""

from __future__ import annotations

from pathlib import Path


def resident_bytes() -> int:
    return _status_kib("VmRSS") * 1024


def peak_bytes() -> int:
    """Return the most that was resident since `reset_peak`."""
    return _status_kib("VmHWM") * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes what is resident now


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))
