"""OTLP/HTTP: `/v1/traces`, where any OpenTelemetry SDK or collector sends what an agent did.

    body ──► spans ──► whose? ──► append ──► answer
                         └─ refused: counted, with the reason, in a partial success

What always holds: a span is recorded under the attempt that its token names and under no other; an answer that says
spans were taken means that they are on disk; a span that is sent again, because its answer was late, is recorded once
(as long as this gateway remembers it). The answer has the format of the request, as OTLP asks.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import anyio
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lightning_bus import tokens
from lightning_bus.clock import wall_ns
from lightning_bus.errors import BrokenError, BusyError, FencedError, LightningBusError
from lightning_bus.otel import names as n
from lightning_bus.otel.convert import BadSpan, convert, resource_facts
from lightning_bus.otel.otlp import (
    Attributes,
    BadExport,
    OtlpSpan,
    Scope,
    decode_protobuf,
    encode_response,
    encode_status,
)
from lightning_bus.otel.otlp_json import decode_json
from lightning_bus.otel.sink import CHUNK, TRACES, append_whole
from lightning_bus.otel.traceparent import root_of_attempt
from lightning_bus.spans import Span, decode_spans

PROTOBUF, JSON = "application/x-protobuf", "application/json"
REMEMBERED = 100_000  # span ids of late
ON_WAY_BYTES_MAX = 64 << 20  # of requests whose spans are not yet durable; above this exports are answered 503
REASONS_MAX = 5  # told in one answer

Key = tuple[str, int, bytes]
Append = Callable[[str, int, Sequence[Span]], Awaitable[None]]


@dataclass(eq=False, slots=True)
class _Writing:
    """Spans on their way, and then what became of them."""

    over: anyio.Event = field(default_factory=anyio.Event)
    too_large: int = 0
    error: LightningBusError | None = None


class Ingest:
    """The endpoint. `append` makes spans durable, as `Client.append` does.

    secret          the run's, which tokens are minted with
    body_bytes_max  of a request, once it is unpacked
    open_           spans of no rollout are taken without a token (on loopback)
    limit_s         how long a sender waits before it is asked to send again. `append` goes on meanwhile and should have
                    no limit of its own: spans that it gave up may come into the log later, beside those sent again
    """

    def __init__(
        self, append: Append, *, secret: bytes, body_bytes_max: int, open_: bool = False, limit_s: float = 60.0
    ) -> None:
        self._append = append
        self._limit_s = limit_s
        self._on_way_bytes = 0
        self._writers: set[asyncio.Task[None]] = set()  # the event loop itself holds tasks weakly
        self._secret = secret
        self._body_bytes_max = body_bytes_max
        self._open = open_
        self._sequence = count(1)
        self._known: OrderedDict[Key, None] = OrderedDict()  # recorded, newest last
        self._on_way: dict[Key, _Writing] = {}
        self.refused: Counter[str] = Counter()  # spans, by reason without particulars

    def routes(self) -> list[Route]:
        """Return the routes: for whoever has a token, and below an attempt's own address."""
        attempt = "/rollout/{rollout_id}/attempt/{attempt:int}"
        return [Route(path + TRACES, self.traces, methods=["POST"]) for path in ("", attempt)]

    async def traces(self, request: Request) -> Response:
        """Record an export."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in (PROTOBUF, JSON, CHUNK):
            return _refusal(415, f"The content type is {kind or 'missing'}. Send {PROTOBUF} or {JSON}.", JSON)
        try:
            body = await self._body(request)
            found = _Found(request, self._secret, self._open, self._sequence)
            if kind == CHUNK:
                found.take_chunk(body)
            else:
                for scope in decode_json(body) if kind == JSON else decode_protobuf(body):
                    found.take(scope)
        except _TooLarge as exc:
            return _refusal(413, str(exc), kind)
        except BadExport as exc:
            return _refusal(400, f"{exc}.", kind)
        try:
            for (rollout_id, attempt), spans in found.spans.items():
                await self._record(rollout_id, attempt, spans, found, len(body))
        except (BusyError, BrokenError) as exc:
            retry_after_s = exc.retry_after_s if isinstance(exc, BusyError) else 1.0
            return _refusal(503, str(exc), kind, {"retry-after": str(max(1, round(retry_after_s)))})
        except LightningBusError as exc:
            return _refusal(500, str(exc), kind)
        self.refused += found.refused
        if kind == CHUNK and found.refused:
            return _refusal(409 if found.fenced else 403, found.message(), kind)
        return Response(
            encode_response(found.refused.total(), found.message(), as_json=kind != PROTOBUF),
            media_type=PROTOBUF if kind == PROTOBUF else JSON,
        )

    async def _record(self, rollout_id: str, attempt: int, spans: list[Span], found: _Found, size: int) -> None:
        """Make spans of one attempt durable, but for those that are already. `size` is that of their request."""
        given = {(rollout_id, attempt, span.span_id): span for span in spans}
        with anyio.move_on_after(self._limit_s) as limit:
            while under_way := next((self._on_way[key] for key in given if key in self._on_way), None):
                await under_way.over.wait()  # sent again while the first is still being written: its fate is this one's
            fresh = {key: span for key, span in given.items() if key not in self._known}
            if not fresh:
                return
            writing = self._begin(rollout_id, attempt, fresh, size)
            await writing.over.wait()
            if isinstance(writing.error, FencedError):
                found.fenced = True
                found.refuse("the attempt is over", len(fresh), str(writing.error))
            elif writing.error is not None:
                raise writing.error
            elif writing.too_large:
                found.refuse("a span exceeds what one message carries", writing.too_large)
        if limit.cancelled_caught:
            raise BrokenError(
                f"These spans were not durable within {self._limit_s:g} s. Is the broker running? Send them again: they "
                "are recorded once."
            )

    def _begin(self, rollout_id: str, attempt: int, fresh: dict[Key, Span], size: int) -> _Writing:
        """Write spans in a task of its own, which goes on when the sender hangs up or was asked to send again."""
        if self._on_way_bytes and self._on_way_bytes + size > ON_WAY_BYTES_MAX:
            raise BusyError(
                f"{self._on_way_bytes} bytes of exports are not yet durable, the limit is {ON_WAY_BYTES_MAX}. "
                "Is the broker up, and is its disk keeping up? Send these again."
            )
        writing = _Writing()
        self._on_way.update(dict.fromkeys(fresh, writing))
        self._on_way_bytes += size
        writer = asyncio.create_task(self._write(writing, rollout_id, attempt, fresh, size))
        self._writers.add(writer)
        writer.add_done_callback(self._writers.discard)
        return writing

    async def _write(self, writing: _Writing, rollout_id: str, attempt: int, fresh: dict[Key, Span], size: int) -> None:
        writing.error = BrokenError("the gateway ended before these spans were acknowledged")  # until they are
        try:
            writing.too_large = await append_whole(
                lambda some: self._append(rollout_id, attempt, some), list(fresh.values())
            )
            writing.error = None
            self._known.update(dict.fromkeys(fresh))
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        except LightningBusError as exc:
            writing.error = exc
        finally:
            for key in fresh:
                del self._on_way[key]
            self._on_way_bytes -= size
            writing.over.set()

    async def _body(self, request: Request) -> bytes:
        """Return the request's body, unpacked. Raises _TooLarge, and BadExport for packing that cannot be undone."""
        packing = request.headers.get("content-encoding", "identity").strip().lower()
        if packing not in ("identity", "gzip"):
            raise BadExport(f"The content encoding is {packing}. Send gzip, or none")
        unpack = zlib.decompressobj(wbits=31) if packing == "gzip" else None
        parts: list[bytes] = []
        left = self._body_bytes_max
        async for part in request.stream():
            if unpack is not None:
                try:
                    part = unpack.decompress(part, left + 1)  # a few bytes may unpack into gigabytes
                except zlib.error as exc:
                    raise BadExport(f"The body is not gzip: {exc}") from exc
            left -= len(part)
            if left < 0:
                raise _TooLarge(
                    f"The export exceeds {self._body_bytes_max} bytes. Send smaller batches, or raise [gateway] body_bytes_max."
                )
            parts.append(part)
        if unpack is not None and not unpack.eof:
            raise BadExport("The body is not gzip: it breaks off")
        return b"".join(parts)


class _Found:
    """The spans of one request by attempt, and what was refused of it."""

    def __init__(self, request: Request, secret: bytes, open_: bool, sequence: count[int]) -> None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        self._token = token.strip() if kind.lower() == "bearer" else ""
        self._rollout_id: str = request.path_params.get("rollout_id", "")
        self._attempt: int = request.path_params.get("attempt", 0)
        self._secret = secret
        self._open = open_
        self._sequence = sequence
        self._checked: dict[str, tokens.Claims] = {}
        self.spans: dict[tuple[str, int], list[Span]] = {}
        self.refused: Counter[str] = Counter()
        self.fenced = False
        self._reasons: dict[str, None] = {}

    def take(self, scope: Scope) -> None:
        """Sort spans of one scope by whose they are."""
        resource = resource_facts(scope.resource)
        shared = _whose(scope.resource, {})
        for span in scope.spans:
            try:
                self._take(span, _whose(span.attributes, shared), scope.name, resource)
            except _Refused as exc:
                self.refuse(exc.reason, 1, exc.detail)
            except BadSpan as exc:
                self.refuse("not a span", 1, str(exc))

    def take_chunk(self, body: bytes) -> None:
        """Sort spans that are encoded as the log keeps them."""
        try:
            spans = decode_spans(body)
        except LightningBusError as exc:
            raise BadExport(str(exc)) from exc
        for span in spans:
            try:
                owner = self._owner(self._token, span.rollout_id, span.attempt or None)
                if owner != (span.rollout_id, span.attempt):
                    span = msgspec.structs.replace(span, rollout_id=owner[0], attempt=owner[1])
                self.spans.setdefault(owner, []).append(span)
            except _Refused as exc:
                self.refuse(exc.reason, 1, exc.detail)

    def refuse(self, reason: str, spans: int, detail: str = "") -> None:
        self.refused[reason] += spans
        if len(self._reasons) < REASONS_MAX:
            self._reasons[detail or reason] = None

    def message(self) -> str:
        """Return why spans were refused; empty when none was."""
        return " ".join(f"{reason.rstrip('.')}." for reason in self._reasons)

    def _take(self, span: OtlpSpan, whose: Attributes, scope: str, resource: Attributes) -> None:
        token = str(whose.get(n.TOKEN, "") or self._token)
        rollout_id = str(whose.get(n.ROLLOUT_ID) or "")
        owner = self._owner(token, rollout_id, _attempt(whose.get(n.ATTEMPT)))
        sequence = whose.get(n.SEQUENCE)
        record = convert(
            span, rollout_id=owner[0], attempt=owner[1], scope=scope, resource=resource,
            sequence=sequence if isinstance(sequence, int) and 0 <= sequence < 1 << 63 else next(self._sequence),
        )  # fmt: skip
        if record.parent_id is None and owner[0]:
            record = msgspec.structs.replace(record, parent_id=root_of_attempt(*owner)[1])
        self.spans.setdefault(owner, []).append(record)

    def _owner(self, token: str, rollout_id: str, attempt: int | None) -> tuple[str, int]:
        """Return the attempt that a span belongs to. Raises _Refused unless the token says that the sender may."""
        rollout_id = rollout_id or self._rollout_id
        attempt = attempt or self._attempt
        if not token:
            if self._open and not rollout_id:
                return "", 0
            raise _Refused(
                "no token", "no token was sent: set the header authorization to Bearer and the attempt's API key"
            )
        claims = self._claims(token)
        if (rollout_id and rollout_id != claims.rollout_id) or (attempt and attempt != claims.attempt):
            raise _Refused(
                "another attempt's token",
                f"the token is for rollout {claims.rollout_id} attempt {claims.attempt}, the span for rollout "
                f"{rollout_id or claims.rollout_id} attempt {attempt or claims.attempt}",
            )
        return claims.rollout_id, claims.attempt

    def _claims(self, token: str) -> tokens.Claims:
        claims = self._checked.get(token)
        if claims is None:
            try:
                claims = self._checked[token] = tokens.check(self._secret, token, wall_ns() / 1e9)
            except tokens.BadToken as exc:
                raise _Refused("bad token", f"{exc}. Use the api_key that the worker gave to this attempt") from exc
        return claims


class _Refused(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class _TooLarge(Exception):
    pass


def _whose(attributes: Attributes, shared: Attributes) -> Attributes:
    """Return what attributes say of whose a span is, over what its resource says."""
    found = {ours: attributes[name] for name in attributes if (ours := n.translate(name)) in _WHOSE}
    return {**shared, **found} if found else shared


_WHOSE = frozenset({n.ROLLOUT_ID, n.ATTEMPT, n.SEQUENCE, n.TOKEN})


def _attempt(value: object) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, int) and value > 0:
        return value
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    raise _Refused("no attempt", f"{n.ATTEMPT} is {value!r:.40}: a number from 1 on is wanted")


def _refusal(status: int, message: str, kind: str, headers: dict[str, str] | None = None) -> Response:
    as_json = kind != PROTOBUF
    return Response(encode_status(message, as_json=as_json), status, headers, JSON if as_json else PROTOBUF)
