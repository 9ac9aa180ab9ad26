"""Frames that no client of ours would send, from a seed.

What always holds: the same seed gives the same frames; nothing made here is a message that a broker obeys to others'
harm, such as a DRAIN, however it came about.
"""

from __future__ import annotations

import json
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec

from lightning_bus import messages as m
from lightning_bus import wire
from lightning_bus.errors import LightningBusError

GOLDEN = Path(__file__).parents[1] / "golden" / "protocol.json"
SOMEBODY_ELSE = "somebody-else"  # a name that no connection has
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF]
# MessagePack that promises more than comes: 4 GiB of bytes, text, array, map, extension; and arrays in arrays.
PROMISES = [bytes([tag]) + b"\xff" * 4 for tag in (0xC6, 0xDB, 0xDD, 0xDF, 0xC9)]
NESTED = b"\x91" * 60_000


class Fuzzer:
    """An endless supply of messages, most of them broken, that pretend to come from `name`."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["messages"]
        sound = [[bytes.fromhex(frame) for frame in frames] for frames in golden.values()]
        self._valid = [wire.decode(frames) for frames in sound if not _harmful(frames)]

    def messages(self, name: str) -> Iterator[list[bytes]]:
        kinds = [self._noise, self._mutated, self._mutated, self._resealed, self._miscounted, self._promised,
                 self._versions, self._replayed]  # fmt: skip
        while True:
            frames = self.dice.choice(kinds)(name)
            if not _harmful(frames):
                yield frames

    def _message(self, name: str) -> list[bytes]:
        """A good message as `name` would send it, or one that only the broker sends."""
        message = self.dice.choice(self._valid)
        dice, header = self.dice, message.header
        seq = dice.randint(1, 5) if header.seq else 0
        return wire.encode(message.body, message.blobs, request=dice.randint(1, 99), producer=name,
                           epoch=dice.randint(0, 2), seq=seq, count=header.count)  # fmt: skip

    def _noise(self, name: str) -> list[bytes]:
        return [self.dice.randbytes(self.dice.randint(0, 80)) for _ in range(self.dice.randint(1, 6))]

    def _mutated(self, name: str) -> list[bytes]:
        """Bytes changed, cut out or put in, in any frame."""
        frames = self._message(name)
        for _ in range(self.dice.randint(1, 3)):
            which = self.dice.randrange(len(frames))
            frame = bytearray(frames[which])
            place = self.dice.randint(0, len(frame))
            match self.dice.randrange(4):
                case 0 if frame:
                    frame[place % len(frame)] = self.dice.randrange(256)
                case 1:
                    del frame[place : place + self.dice.randint(1, 8)]
                case 2:
                    frame[place:place] = self.dice.randbytes(self.dice.randint(1, 8))
                case _:
                    number = self.dice.choice(NUMBERS)
                    frame[place : place + 1] = b"\xcf" + struct.pack(">Q", number)
            frames[which] = bytes(frame)
        return frames

    def _resealed(self, name: str) -> list[bytes]:
        """A changed body under a checksum that fits: what only the decoder of the body can refuse."""
        _, body, *blobs = [*self._mutated(name), b""]
        sealed = m.Header(
            m.PROTOCOL_VERSION, self.dice.choice(list(m.Op)), self.dice.choice(NUMBERS) >> 1, name, 1,
            self.dice.randint(0, 9), "", self.dice.randint(0, 3), 0, 0, wire.checksum(body, blobs),
        )  # fmt: skip
        return [msgspec.msgpack.encode(sealed), body, *blobs]

    def _miscounted(self, name: str) -> list[bytes]:
        """Frames left out, repeated, in another order, or far too many."""
        frames = self._message(name)
        match self.dice.randrange(5):
            case 0:
                return frames[:1]
            case 1:
                return frames + frames
            case 2:
                return frames[::-1]
            case 3:
                return frames + [b"x"] * (300 if self.dice.random() < 0.02 else self.dice.randint(1, 4))
            case _:
                return [b"", *frames]

    def _promised(self, name: str) -> list[bytes]:
        """Lengths that are not kept, and depths that no decoder should follow."""
        header, *rest = self._message(name)
        promise = NESTED if self.dice.random() < 0.05 else self.dice.choice(PROMISES)
        if self.dice.random() < 0.5:
            return [header, promise]
        return [header[:1] + promise, *rest]

    def _versions(self, name: str) -> list[bytes]:
        header, *rest = self._message(name)
        return [header[:1] + bytes([self.dice.choice([0, 2, 3, 0x7F, 0xC0, 0xE0])]) + header[2:], *rest]

    def _replayed(self, name: str) -> list[bytes]:
        """A message in good order, at a time and under a number that make no sense."""
        return self._message(self.dice.choice([name, name, SOMEBODY_ELSE]))


def tcp_garbage(address: str, dice: random.Random) -> socket.socket:
    """Open a connection, say something that is not ZMTP or goes wrong halfway, and leave it open."""
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
    properties = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
    ready = b"\x04" + bytes([len(properties)]) + properties
    endless = b"\x02" + struct.pack(">Q", 1 << 62)
    said = dice.choice(
        [
            b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", dice.randbytes(200), greeting[:20], greeting,
            greeting + dice.randbytes(100), greeting + ready + endless, greeting + ready + dice.randbytes(100),
        ]
    )  # fmt: skip
    connection = socket.create_connection((host, int(port)))
    connection.sendall(said)
    return connection


def _harmful(frames: list[bytes]) -> bool:
    """Whether this would stop a broker from doing its work, and rightly so."""
    try:
        messages = wire.split(wire.decode(frames))
    except LightningBusError:
        return False
    return any(isinstance(message, wire.Message) and isinstance(message.body, m.Drain) for message in messages)
