"""Resources and cursors: PUT, GET, WATCH, COMMIT.

What always holds. A published version never changes. A cursor never goes back and never leaves the log.
"""

from __future__ import annotations

from lightning_bus import messages as m
from lightning_bus.broker.state import Context, check_blobs, check_name, encode, record
from lightning_bus.broker.waits import WAIT_MS_MAX
from lightning_bus.errors import CallError, Conflict
from lightning_bus.records import Kind, Put, Table


def on_put(c: Context, body: m.Put) -> m.Body:
    resource = body.resource
    versions = c.state.resources.get(resource.name, {})
    known = versions.get(resource.version)
    if known is not None:
        if known != resource:
            raise Conflict(
                f"{resource.name} version {resource.version} is published with other content. Publish the next version."
            )
        return m.Accepted(0)
    check_name("resource", resource.name)
    if resource.version < 0:
        raise CallError(f"{resource.name}: version {resource.version} is below 0")
    check_blobs([resource.body])
    newest = max(versions, default=-1)
    c.state.resources.setdefault(resource.name, {})[resource.version] = resource
    body_bytes = encode(resource)
    key = resource.name.encode() + b"\0" + resource.version.to_bytes(8, "big")
    c.effects.writes.append(Put(Table.RESOURCES, key, body_bytes))
    record(c.state, c.effects, Kind.RESOURCE, c.wall_ns, body_bytes, producer=c.peer)
    if resource.version > newest:
        c.effects.sends += c.state.watches.published(resource)
    return m.Accepted(1)


def on_get(c: Context, body: m.Get) -> m.Body:
    versions = c.state.resources.get(body.name, {})
    if not versions:
        return m.ResourceIs(None)
    return m.ResourceIs(versions.get(max(versions) if body.version is None else body.version))


def on_watch(c: Context, body: m.Watch) -> m.Body | None:
    versions = c.state.resources.get(body.name, {})
    newest = max(versions, default=-1)
    if versions and newest > body.above:
        return m.ResourceIs(versions[newest])
    if body.wait_ms == 0:
        return m.ResourceIs(None)
    check_name("resource", body.name)
    until_s = c.now_s + min(body.wait_ms, WAIT_MS_MAX) / 1000
    c.state.watches.subscribe((c.peer, c.header.request), body.name, body.above, until_s)
    return None  # the answer comes with the version, or when the time is over


def on_commit(c: Context, body: m.Commit) -> m.Body:
    check_name("cursor", body.name)
    known = c.state.cursors.get(body.name)
    at = known or 0
    # A new cursor is kept even at 0: from then on retention drops nothing that its reader has still to see.
    if body.offset is not None and body.offset != known:
        if not at <= body.offset <= c.state.next_offset:
            raise CallError(
                f"cursor {body.name} is at {at}, the log ends at {c.state.next_offset}: it cannot move to {body.offset}"
            )
        c.state.cursors[body.name] = at = body.offset
        c.effects.writes.append(Put(Table.CURSORS, body.name.encode(), encode(at)))
    return m.CursorAt(body.name, at)
