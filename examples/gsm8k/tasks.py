"""GSM8K's questions, from a file in its own format: one JSON object a line, the answer after `####`.

The file is the user's; nothing is downloaded. What always holds: `train` and `held_out` of one file have no question in
common, and a question stays on its side however the file is sorted or cut.
"""

from __future__ import annotations

import random
import zlib

from examples.calc.tasks import Task, read_jsonl

HELD_OUT_EVERY = 10  # of a file's questions, about one in ten is never trained on


def read(path: str) -> list[Task]:
    """Return every task of the file. Raises ValueError, naming the line, for one that is not GSM8K's format."""
    return read_jsonl(path)


def train(path: str) -> list[Task]:
    """Return the tasks to train on, shuffled, in the same order each time."""
    tasks = [task for task in read(path) if not _held_out(task)]
    random.Random("gsm8k").shuffle(tasks)
    return tasks


def held_out(path: str) -> list[Task]:
    """Return the tasks to judge by."""
    return [task for task in read(path) if _held_out(task)]


def _held_out(task: Task) -> bool:
    # A checksum, because hash() is another one in every process.
    return zlib.crc32(task["question"].encode()) % HELD_OUT_EVERY == 0
