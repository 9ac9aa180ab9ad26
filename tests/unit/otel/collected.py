"""What tests of tracing share: a store that keeps spans, and both tracers."""

from __future__ import annotations

import threading

from lightning_bus.otel.queue import FLUSH_LIMIT_S, Key
from lightning_bus.spans import Span, decode_spans, encode_spans


class Collected:
    """A store: what is put into it can be looked at, as the log would give it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self.flushed: list[Key | None] = []

    def put(self, span: Span) -> None:
        (kept,) = decode_spans(encode_spans([span]))
        with self._lock:
            self._spans.append(kept)

    def flush(self, key: Key | None = None, *, limit_s: float = FLUSH_LIMIT_S) -> None:
        self.flushed.append(key)

    async def wait_flushed(self, key: Key | None = None, *, limit_s: float = FLUSH_LIMIT_S) -> None:
        self.flushed.append(key)

    @property
    def spans(self) -> list[Span]:
        with self._lock:
            return list(self._spans)

    def named(self, name: str) -> Span:
        (found,) = [span for span in self.spans if span.name == name]
        return found

    def parent_of(self, name: str) -> str:
        """Return the name of the span above the one of this name; empty where it is not among the spans."""
        above = self.named(name).parent_id
        return next((span.name for span in self.spans if span.span_id == above), "")
