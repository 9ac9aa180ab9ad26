"""[worker] of RUN.toml: which agent runs, and how many copies of it."""

from __future__ import annotations

from lightning_bus import Section


class WorkerSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[worker]: runs the agent."""

    agent: str = ""  # "module:function"; the current directory is searched first
    concurrency: int = 16  # attempts at a time in each process
    processes: int = 1
    task_bytes_max: int = 64 << 20  # what the tasks in hand may weigh together, in each process; 0: no limit
    attempt_limit_s: float = 300.0  # an attempt that takes longer has failed and is tried again
    grace_s: float = 10.0  # a worker that is told to stop lets running attempts finish this long
