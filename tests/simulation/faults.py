"""Which harm a history knows, and how much: drawn from its seed. Few kinds at a time find more than all at once."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.simulation.disk import DiskHealth
from tests.simulation.network import Weather

# Where a broker may be killed: between a decision and its commit, on both sides of the disk, between two replies.
MOMENTS = ("decided", "before commit", "after commit", "between replies")
EVENTS = (
    "kill client", "pause client", "kill broker", "stop broker", "pause broker", "cut", "silence", "stall",
    "move wall clock", "revoke",
)  # fmt: skip


@dataclass(slots=True)
class Faults:
    """The harm of one history."""

    weather: Weather
    disk: DiskHealth
    broker_dies: dict[str, float]  # moment → probability
    every_s: dict[str, float]  # event → mean time between two


def draw_faults(chance: random.Random) -> Faults:
    """Roll the dice."""

    def some(probability: float) -> bool:
        return chance.random() < probability

    weather = Weather(delay_s=chance.choice([0.001, 0.01, 0.1]))
    if some(0.5):
        weather.lose = chance.choice([0.01, 0.05, 0.2])
    if some(0.5):
        weather.repeat = chance.choice([0.02, 0.1])
    if some(0.2):
        weather.damage = chance.choice([0.002, 0.01])
    if some(0.5):
        weather.straggle = 0.5
    weather.late_s = chance.choice([0.5, 3.0, 10.0])
    disk = DiskHealth(commit_s=chance.choice([0.001, 0.02, 0.2]))
    if some(0.25):
        disk.refuse = 0.02
    if some(0.25):
        disk.slow = 0.02
    broker_dies = {moment: 0.004 for moment in MOMENTS if some(0.4)}
    every_s = {event: chance.choice([4.0, 12.0]) for event in EVENTS if some(0.4)}
    if some(0.15):
        # Connections that hardly last: messages are refused while copies of them are still under way.
        weather = Weather(delay_s=0.3, damage=0.1, straggle=1.0, late_s=chance.choice([1.0, 2.0]))
        every_s["cut"] = 1.0
    return Faults(weather, disk, broker_dies, every_s)
