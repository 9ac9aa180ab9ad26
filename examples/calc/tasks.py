"""Arithmetic word problems: what the calculator agent is asked, and the right answers.

A task is `{"question": str, "answer": int}`. Two sources give the same shape: `train` and `held_out` make small
stories from a seed (two numbers and one operation), and `read_jsonl` reads a file in GSM8K's format. What always
holds: a seed gives the same tasks on any machine, and the two numbers of a held-out task never occur in a training
task that tells the same story, whatever the two seeds.
"""

import json
import random
import re
import zlib
from itertools import product
from pathlib import Path
from typing import Literal, TypedDict

Operator = Literal["+", "-", "*", "/"]


class Task(TypedDict):
    question: str
    answer: int


STORIES: dict[Operator, tuple[str, ...]] = {
    "+": (
        "{name} has {a} {thing} and buys {b} more. How many {thing} in total?",
        "{name} found {a} {thing} and {friend} found {b}. How many {thing} did they find?",
        "{name} walked {a} miles on Monday and {b} miles on Friday. How far was that?",
    ),
    "-": (
        "{name} had {a} {thing} and gave {b} to {friend}. How many {thing} are left?",
        "{name} is {a} years old and {friend} is {b}. What is the difference?",
        "{name} picked {a} {thing} and ate {b} of them. How many {thing} did {friend} see?",
    ),
    "*": (
        "{name} filled {a} boxes with {b} {thing} in each. How many {thing} is that?",
        "{name} planted {a} rows of {b} trees. How many trees did {friend} count?",
        "{name} earns {a} coins an hour and works {b} hours. How many coins is the pay?",
    ),
    "/": (
        "{name} shared {a} {thing} equally among {b} friends. How many {thing} per friend?",
        "{name} cut {a} feet of rope into {b} pieces. How long was one piece?",
        "{name} put {a} {thing} on {b} plates. How many {thing} were on one plate?",
    ),
}
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
THINGS = ("apples", "books", "cards", "eggs", "pens", "shells", "stamps", "toys")

# Of every number, results included. At most 99, so that the example's tokenizer makes it one token; not much more
# than this, or six hundred rollouts show each number too seldom for a tiny policy to learn to copy it.
NUMBER_MAX = 36
HELD_OUT_EVERY = 5  # of a story's pairs of numbers, one in five is never trained on


def train(seed: int, count: int = 2048) -> list[Task]:
    """Return `count` training tasks, the same ones for the same seed."""
    return _stories(random.Random(f"calc train {seed}"), count, held_out=False)


def held_out(seed: int, count: int = 192) -> list[Task]:
    """Return `count` tasks to judge by: every story equally often, with numbers `train` never puts in it."""
    return _stories(random.Random(f"calc held out {seed}"), count, held_out=True)


def read_jsonl(path: str | Path) -> list[Task]:
    """Read GSM8K-style tasks, one JSON object a line with `question` and `answer`.

    The answer is the whole number after the last `####`; thousands commas are dropped. Blank lines are skipped.
    Raises ValueError, naming the file and the line, for a line that is not such an object.
    """
    tasks: list[Task] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                tasks.append(_parse(line))
            except (ValueError, TypeError, KeyError) as exc:
                raise ValueError(
                    f'{path}, line {number}: expected {{"question": ..., "answer": "... #### 42"}} with a whole '
                    f"number after ####, got {line[:80]!r}. Correct the line or remove it."
                ) from exc
    return tasks


def _stories(random_: random.Random, count: int, *, held_out: bool) -> list[Task]:
    kinds: list[tuple[Operator, str]] = [
        (operator, story) for operator, stories in STORIES.items() for story in stories
    ]
    pairs = {story: _pairs(operator, story, held_out=held_out) for operator, story in kinds}
    tasks: list[Task] = []
    for index in range(count):
        # Stories take turns and only then are shuffled: a held-out success rate is not blurred by their mix.
        operator, story = kinds[index % len(kinds)]
        a, b = random_.choice(pairs[story])
        name, friend = random_.sample(NAMES, 2)
        question = story.format(name=name, friend=friend, thing=random_.choice(THINGS), a=a, b=b)
        tasks.append(Task(question=question, answer=_result(operator, a, b)))
    random_.shuffle(tasks)
    return tasks


def _pairs(operator: Operator, story: str, *, held_out: bool) -> list[tuple[int, int]]:
    """Every (a, b) with a result in 2..NUMBER_MAX; equal numbers are left out, where operations agree too often."""
    return [
        (a, b)
        for a, b in product(range(2, NUMBER_MAX + 1), repeat=2)
        if a != b
        and (operator != "/" or a % b == 0)
        and 2 <= _result(operator, a, b) <= NUMBER_MAX
        # A checksum spreads the held-out pairs; a plain remainder would set whole divisors apart.
        and (zlib.crc32(f"{story} {a} {b}".encode()) % HELD_OUT_EVERY == 0) is held_out
    ]


def _result(operator: Operator, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]


def _parse(line: str) -> Task:
    row = json.loads(line)
    _, marker, answer = row["answer"].rpartition("####")
    whole = re.fullmatch(r"-?\d+", answer.strip().replace(",", ""))
    if not marker or whole is None or not isinstance(row["question"], str):
        raise ValueError("no whole number after ####")
    return Task(question=row["question"], answer=int(whole.group()))
