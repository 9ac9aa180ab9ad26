"""Spans on their way in: HELLO names an incarnation of a producer, APPEND brings its batches.

What always holds. A batch is named (producer, epoch, seq) and is in the log at most once, however often and however
late it arrives: it is taken only when its number is the next one, and its number is written with it. A resend of one
of the last APPEND_BATCHES_MAX gets the verdict of the first. A higher epoch fences every lower one.
"""

from __future__ import annotations

from lightning_bus import messages as m
from lightning_bus.broker import moves
from lightning_bus.broker.access import Role
from lightning_bus.broker.state import BrokerState, Context, check_blobs, encode, record
from lightning_bus.errors import AccessDenied, FencedError, RemoteProtocolError
from lightning_bus.records import Kind, ProducerMark, Put, Table
from lightning_bus.tokens import BadToken, Claims, check

NO_SPANS = b"\x90"  # an empty MessagePack array


def on_hello(c: Context, body: m.Hello) -> m.Body:
    claims = _claims(c, body)
    mark = c.state.producers.get(c.peer)
    epoch_last = mark.epoch if mark else 0
    resent = mark is not None and body.nonce != b"" and body.nonce == mark.nonce
    succeeds = body.epoch == epoch_last and body.nonce != b""  # whoever has this epoch asks for the next one
    if mark is None or ((body.epoch == 0 or succeeds) and not resent):
        # Clients knock before the broker is up and knock again, so several HELLOs may arrive where one was meant.
        epoch = max(epoch_last, body.epoch) + 1
        mark = ProducerMark(epoch, nonce=body.nonce, rollout_id=claims.rollout_id, attempt=claims.attempt)
        _put(c, mark)
    elif not resent and body.epoch < epoch_last:
        raise FencedError(f"{c.peer} epoch {body.epoch} was succeeded by epoch {epoch_last}. This session is over.")
    return m.Welcome(
        mark.epoch, mark.seq, m.MESSAGE_BYTES_MAX, c.state.table.lease_s, c.state.next_offset,
        m.APPEND_BYTES_MAX, m.APPEND_BATCHES_MAX,
    )  # fmt: skip


def on_append(c: Context, body: m.Append) -> m.Body:
    mark = c.state.producers.get(c.peer)
    epoch, seq = c.header.epoch, c.header.seq
    if mark is None:
        raise RemoteProtocolError(f"{c.peer} appends before HELLO")
    if epoch < mark.epoch:
        raise FencedError(f"{c.peer} epoch {epoch} was succeeded by epoch {mark.epoch}. This session is over.")
    if len(body.parts) != len(c.blobs):
        raise RemoteProtocolError(f"{len(body.parts)} parts named, {len(c.blobs)} sent")
    check_blobs(c.blobs)
    _check_parts(c, body, mark)
    if epoch > mark.epoch or seq == 0:
        raise RemoteProtocolError(
            f"{c.peer} sent batch {epoch}:{seq}; after {mark.epoch}:{mark.seq} comes {mark.epoch}:{mark.seq + 1}"
        )
    if seq > mark.seq + 1:
        # Several may be on the way, and one before this was lost or refused.
        return m.Resync(mark.epoch, mark.seq)
    if seq <= mark.seq:
        verdicts = [mark.fenced, *mark.fenced_before]
        age = mark.seq - seq
        if age >= len(verdicts):
            raise RemoteProtocolError(
                f"{c.peer} sent batch {epoch}:{seq} again; {mark.epoch}:{mark.seq} is the newest, and verdicts are "
                f"kept for {m.APPEND_BATCHES_MAX}. After it comes {mark.epoch}:{mark.seq + 1}"
            )
        return m.Acked(c.state.next_offset, verdicts[age], duplicate=True)
    fenced = _take(c, body, mark)
    return m.Acked(c.state.next_offset, fenced)


def _take(c: Context, body: m.Append, mark: ProducerMark) -> list[int]:
    """Keep the next batch, but for what is fenced; return that."""
    state, header = c.state, c.header
    fenced: list[int] = []
    for index, (part, blob) in enumerate(zip(body.parts, c.blobs, strict=True)):
        if part.rollout_id and not moves.is_running(state, part.rollout_id, part.attempt):
            fenced.append(index)
            continue
        record(
            state, c.effects, Kind.SPANS, c.wall_ns, blob, producer=c.peer, epoch=header.epoch, seq=header.seq,
            part=index, rollout_id=part.rollout_id, attempt=part.attempt, span_count=part.count,
        )  # fmt: skip
    if len(fenced) == len(body.parts):
        # Every number leaves a record, or a batch that was lost would look like one of which nothing was kept.
        record(
            state, c.effects, Kind.SPANS, c.wall_ns, NO_SPANS, producer=c.peer, epoch=header.epoch, seq=header.seq
        )  # fmt: skip
    state.fenced += len(fenced)
    before = [mark.fenced, *mark.fenced_before][: m.APPEND_BATCHES_MAX - 1] if mark.seq else []
    _put(c, ProducerMark(mark.epoch, header.seq, fenced, mark.nonce, before, mark.rollout_id, mark.attempt))
    return fenced


def _put(c: Context, mark: ProducerMark) -> None:
    c.state.producers[c.peer] = mark
    c.effects.writes.append(Put(Table.PRODUCERS, c.peer.encode(), encode(mark)))


def _claims(c: Context, body: m.Hello) -> Claims:
    """Return the attempt that a token stands for; no attempt at all without one."""
    if not body.token:
        return Claims("", 0)
    try:
        return check(c.state.secret, body.token)
    except BadToken as exc:
        raise AccessDenied(f"{c.peer}: {exc}. Use the token of the TASK, as it is in the agent's API key.") from exc


def _check_parts(c: Context, body: m.Append, mark: ProducerMark) -> None:
    """Raise AccessDenied for spans that this role may not append. What is merely late is fenced, not denied."""
    if c.role in ("", Role.ADMIN, Role.GATEWAY):
        return
    for part in body.parts:
        if c.role == Role.AGENT:
            if not mark.rollout_id:
                raise AccessDenied(
                    f"{c.peer} said HELLO without a token, so it may append nothing. Give the task's token when connecting."
                )
            allowed = (part.rollout_id, part.attempt) == (mark.rollout_id, mark.attempt)
        elif c.role == Role.WORKER:
            allowed = not part.rollout_id or not _is_held_by_another(c.state, c.peer, part)
        else:
            allowed = not part.rollout_id
        if not allowed:
            raise AccessDenied(
                f"{c.peer} (role {c.role}) may not append to rollout {part.rollout_id!r} attempt {part.attempt}: "
                f"{_MAY_APPEND[Role(c.role)]}. Nothing of the message was kept."
            )


_MAY_APPEND = {
    Role.AGENT: "an agent appends to the attempt that its token names",
    Role.WORKER: "a worker appends to attempts that it holds",
    Role.TRAINER: "a trainer appends what belongs to no rollout",
}


def _is_held_by_another(state: BrokerState, peer: str, part: m.Part) -> bool:
    lease = state.table.leases.get(part.rollout_id)
    return lease is not None and lease.attempt == part.attempt and lease.worker != peer
