"""The broker's core at a desk: messages go in, effects are carried out on a log made of dicts, answers come back.

Everything a decision produces goes through the real encoders: a write that the log's format could not hold, or an
answer that the wire could not carry, fails the test that caused it. Time is a number that the test sets.
"""

from __future__ import annotations

import msgspec

from lightning_bus import messages as m
from lightning_bus import wire
from lightning_bus.broker import core
from lightning_bus.log.codec import decode_event, decode_record, encode_record
from lightning_bus.records import Delete, Kind, ProducerMark, Record, Table
from lightning_bus.resources import Resource

SECRET = b"s" * 32
LEASE_S = 10.0
_decode = msgspec.msgpack.decode


class MemoryLog:
    """What the LMDB log keeps, in dicts. Refuses what the real one refuses: gaps, and keys that are too long."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.tables: dict[Table, dict[bytes, bytes]] = {table: {} for table in Table}

    def commit(self, effects: core.Effects) -> None:
        for write in effects.writes:
            if isinstance(write, Record):
                assert write.offset == len(self.records), "offsets are contiguous"
                assert decode_record(encode_record(write)) == write
                self.records.append(write)
            else:
                assert 0 < len(write.key) <= 511, "LMDB's limit for keys"
                if isinstance(write, Delete):
                    self.tables[write.table].pop(write.key, None)
                else:
                    self.tables[write.table][write.key] = write.value

    def snapshot(self) -> core.Snapshot:
        tables = self.tables
        return core.Snapshot(
            next_offset=len(self.records),
            rollouts=[_decode(value, type=m.Rollout) for _, value in sorted(tables[Table.ROLLOUTS].items())],
            standings={k.decode(): _decode(v, type=m.Standing) for k, v in tables[Table.STANDINGS].items()},
            producers={k.decode(): _decode(v, type=ProducerMark) for k, v in tables[Table.PRODUCERS].items()},
            cursors={k.decode(): _decode(v, type=int) for k, v in tables[Table.CURSORS].items()},
            resources=[_decode(value, type=Resource) for value in tables[Table.RESOURCES].values()],
        )


class Desk:
    """A broker without sockets or disk. `now_s` is its clock."""

    def __init__(self, *, max_attempts: int = 3, queued_max: int = 1000) -> None:
        self.log = MemoryLog()
        self.max_attempts = max_attempts
        self.queued_max = queued_max
        self.now_s = 1000.0
        self.wall_ns = 1_700_000_000_000_000_000  # moves with now_s in `tick`; a test may set it
        self.role = ""  # of whoever speaks
        self.last = core.Effects()
        self.tasks: list[tuple[str, m.Task]] = []  # every task ever sent, and to whom
        self.pushed: list[tuple[str, m.End]] = []  # every end told after the answer to its WAIT, and to whom
        self.state = self.restored()

    def restored(self) -> core.BrokerState:
        """Return the state of a broker that opens this log now."""
        return core.restore(
            self.log.snapshot(), secret=SECRET, lease_s=LEASE_S, max_attempts=self.max_attempts, now_s=self.now_s,
            wall_ns=self.wall_ns, queued_max=self.queued_max,
        )  # fmt: skip

    def restart(self) -> None:
        self.state = self.restored()

    def say(
        self, peer: str, body: m.Body, blobs: list[bytes] | None = None, *, epoch: int = 0, seq: int = 0, count: int = 0,
        as_: str | None = None, request: int = 7,
    ) -> m.Body:  # fmt: skip
        """Carry out a message and return its answer; tasks it set free are in `tasks`."""
        self.ask(peer, body, blobs, epoch=epoch, seq=seq, count=count, as_=as_, request=request)
        answer = self.last.sends[0]
        assert (answer.peer, answer.request) == (peer, request), "the answer comes before what the message set free"
        more = [send.body for send in self.last.sends[1:] if send[:2] == (peer, request)]
        assert all(isinstance(body, m.Ended) for body in more), "every message has one answer, but for a long ENDED"
        return answer.body

    def ask(
        self, peer: str, body: m.Body, blobs: list[bytes] | None = None, *, epoch: int = 0, seq: int = 0, count: int = 0,
        as_: str | None = None, request: int = 7,
    ) -> list[core.Send]:  # fmt: skip
        """Carry out a message and return all that is sent; WATCH may have to wait for its answer."""
        frames = wire.encode(
            body, blobs or [], request=request, producer=peer if as_ is None else as_, epoch=epoch, seq=seq, count=count
        )
        message = wire.decode(frames)
        self._carry_out(
            core.handle(self.state, peer, *message, now_s=self.now_s, wall_ns=self.wall_ns, role=self.role),
            body,
        )  # fmt: skip
        return self.last.sends

    def refused(self, peer: str, body: m.Body, blobs: list[bytes] | None = None, **header: int) -> m.Error:
        """Return the refusal of a message that must be refused, and must have written nothing."""
        before = len(self.log.records), self.state.next_offset
        answer = self.say(peer, body, blobs, **header)
        assert isinstance(answer, m.Error), answer
        assert not self.last.writes
        assert before == (len(self.log.records), self.state.next_offset)
        return answer

    def tick(self, after_s: float = 0.0) -> list[tuple[str, m.Task]]:
        """Let time pass and return the tasks that it set free."""
        self.now_s += after_s
        self.wall_ns += int(after_s * 1e9)
        known = len(self.tasks)
        self._carry_out(core.tick(self.state, self.now_s, self.wall_ns))
        return self.tasks[known:]

    def drop_peer(self, peer: str) -> None:
        self._carry_out(core.drop_peer(self.state, peer, self.now_s, self.wall_ns))

    def forget(self, first_offset: int) -> None:
        self._carry_out(core.forget(self.state, first_offset))

    # -- the usual conversations

    def submit(self, *ids: str, max_attempts: int = 0) -> None:
        answer = self.say(
            "t", m.Submit([m.Submission(i, b"task of " + i.encode(), max_attempts=max_attempts) for i in ids])
        )
        assert isinstance(answer, m.Accepted)

    def beat(self, worker: str, slots: int, *held: tuple[str, int]) -> list[tuple[str, int]]:
        """Return the attempts that the worker has lost."""
        answer = self.say(worker, m.Heartbeat(slots, [m.Held(*claim) for claim in held]))
        assert isinstance(answer, m.Beat)
        return [(lost.rollout_id, lost.attempt) for lost in answer.lost]

    def leased(self, rollout_id: str = "r-1", worker: str = "w") -> None:
        """Submit a rollout and give its first attempt to a worker."""
        self.submit(rollout_id)
        self.beat(worker, len(self.state.table.of_worker(worker)) + 1, *self.held(worker))
        assert self.tasks[-1][0] == worker
        assert self.tasks[-1][1].rollout_id == rollout_id

    def held(self, worker: str) -> list[tuple[str, int]]:
        return [(lease.rollout_id, lease.attempt) for lease in self.state.table.of_worker(worker)]

    def hello(self, peer: str, **fields: int | bytes | str) -> m.Welcome:
        answer = self.say(peer, m.Hello("test", **fields))  # pyright: ignore[reportArgumentType]
        assert isinstance(answer, m.Welcome), answer
        return answer

    def append(self, peer: str, epoch: int, seq: int, *parts: tuple[str, int, bytes]) -> m.Body:
        body = m.Append([m.Part(rollout_id, attempt, 1) for rollout_id, attempt, _ in parts])
        return self.say(peer, body, [blob for *_, blob in parts], epoch=epoch, seq=seq)

    def rollout(self, rollout_id: str = "r-1") -> m.Rollout:
        answer = self.say("t", m.Query([rollout_id]))
        assert isinstance(answer, m.Rollouts)
        return answer.rollouts[0]

    def events(self, rollout_id: str = "r-1") -> list[str]:
        """What the log says of a rollout's life."""
        records = [r for r in self.log.records if r.kind is Kind.ROLLOUT and r.rollout_id == rollout_id]
        return [decode_event(record).what for record in records]

    def bodies(self) -> list[bytes]:
        """The chunks of spans in the log, in its order."""
        return [record.body for record in self.log.records if record.kind is Kind.SPANS]

    def _carry_out(self, effects: core.Effects, asked: m.Body | None = None) -> None:
        self.last = effects
        self.log.commit(effects)
        for send in effects.sends:
            wire.encode(send.body, request=send.request)
            if isinstance(send.body, m.Ended) and not isinstance(asked, m.Wait):
                self.pushed += [(send.peer, end) for end in send.body.ended]
            if isinstance(send.body, m.Task):
                stored = _decode(self.log.tables[Table.STANDINGS][send.body.rollout_id.encode()], type=m.Standing)
                assert (stored.attempt, stored.worker) == (send.body.attempt, send.peer), "written before it is sent"
                self.tasks.append((send.peer, send.body))


def accepted(answer: m.Body) -> int:
    """How many of what was submitted were fresh."""
    assert isinstance(answer, m.Accepted), answer
    return answer.fresh
