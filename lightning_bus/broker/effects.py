"""What a decision asks for: what to write, and then what to send.

What always holds. Writes go into one transaction; sends leave after it, in this order. Nothing is sent that depends
on what is not on disk yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_bus import messages as m
from lightning_bus.records import Write


class Send(NamedTuple):
    """Answer or task for one peer, to go out once the writes decided with it are durable."""

    peer: str
    request: int
    body: m.Body


@dataclass(slots=True)
class Effects:
    """What a decision asks for: `writes` in one transaction, then `sends`."""

    writes: list[Write] = field(default_factory=lambda: [])  # three times as fast as list[Write], and one a message
    sends: list[Send] = field(default_factory=lambda: [])
