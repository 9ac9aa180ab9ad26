"""What streamed answers are made of: several completions merged as they come, text that never shows half, events.

What always holds: the deltas of a choice joined are what the whole answer says; the first source that fails ends all.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

import msgspec

from trainer.serving.chat import ChatFormat
from trainer.serving.errors import ServingError
from trainer.serving.hermes import HermesStream
from trainer.serving.protocol import error_body, status_of
from trainer.serving.request import Completion, Delta
from trainer.serving.text import Detokenizer, StopStrings, TextState


async def merged(
    sources: list[AsyncIterator[Delta | Completion]],
) -> AsyncGenerator[tuple[int, Delta | Completion]]:
    """What all sources yield, in the order of arrival, with each one's index. The first to raise ends all.

    Deltas of one source that arrived while nobody was looking come as one.
    """
    arrivals: asyncio.Queue[tuple[int, Delta | Completion | Exception]] = asyncio.Queue()

    async def forward(index: int, source: AsyncIterator[Delta | Completion]) -> None:
        try:
            async for item in source:
                arrivals.put_nowait((index, item))
        except ServingError as exc:
            arrivals.put_nowait((index, exc))

    tasks = [asyncio.ensure_future(forward(index, source)) for index, source in enumerate(sources)]
    unfinished = len(sources)
    try:
        while unfinished:
            arrived = [await arrivals.get()]
            while not arrivals.empty():
                arrived.append(arrivals.get_nowait())
            for index, item in _joined(arrived):
                if isinstance(item, Exception):
                    raise item
                unfinished -= isinstance(item, Completion)
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _joined(
    arrived: list[tuple[int, Delta | Completion | Exception]],
) -> Iterator[tuple[int, Delta | Completion | Exception]]:
    open_at: dict[int, Delta] = {}
    for index, item in arrived:
        if isinstance(item, Delta):
            before = open_at.get(index)
            open_at[index] = item if before is None else before.followed_by(item)
        elif index in open_at:
            yield index, open_at.pop(index)
            yield index, item
        else:
            yield index, item
    yield from open_at.items()


async def scripted_stream(completion: Completion) -> AsyncIterator[Delta | Completion]:
    yield Delta(completion.token_ids, completion.logprobs, completion.top_logprobs)
    yield completion


class StreamedText:
    """From token ids to the deltas of one choice: stop strings, end token and tool calls never show half.

    with_special shows special tokens, which tool-call tags are in some tokenizers; `tools` takes tool calls out of the
    text. `state()` is all there is to know about it: another one made from that goes on where this one stands.
    """

    def __init__(
        self,
        chat_format: ChatFormat,
        stops: tuple[str, ...],
        *,
        with_special: bool = False,
        tools: bool = False,
        state: TextState | None = None,
    ) -> None:
        state = state or TextState()
        self._format = chat_format
        self._detokenizer = Detokenizer(
            chat_format.tokenizer, skip_special_tokens=not with_special, window=state.window, shown=state.shown
        )
        self._stops = StopStrings(stops, held=state.held, found=state.found)
        self._tools = HermesStream(pending=state.pending, called=state.calls_sent > 0) if tools else None
        self._calls_sent = state.calls_sent

    @property
    def called(self) -> bool:
        return self._calls_sent > 0

    def state(self) -> TextState:
        return TextState(
            window=self._detokenizer.window,
            shown=self._detokenizer.shown,
            held=self._stops.held,
            found=self._stops.found,
            pending="" if self._tools is None else self._tools.pending,
            calls_sent=self._calls_sent,
        )

    def push(self, token_ids: list[int], *, last: bool = False) -> dict[str, Any]:
        """The delta that these ids add; the `last` one brings everything that was held back."""
        piece = self._stops.push(self._detokenizer.push(self._format.shown_ids(token_ids), last=last))
        if last:
            piece += self._stops.flush()
        if self._tools is None:
            return self._delta(piece, [])
        content, calls = self._tools.push(piece)
        if not last:
            return self._delta(content, calls)
        more, last_calls = self._tools.flush()
        return self._delta(content + more, calls + last_calls)

    def _delta(self, content: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": content}
        if calls:
            delta["tool_calls"] = [{"index": self._calls_sent + at, **call} for at, call in enumerate(calls)]
            self._calls_sent += len(calls)
        return delta


async def server_sent(first: dict[str, Any], rest: AsyncGenerator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Events as server-sent ones. A failure in mid-stream is an error event, as the status is long sent."""
    async with contextlib.aclosing(rest):
        try:
            yield _event(first)
            async for event in rest:
                yield _event(event)
        except ServingError as exc:
            yield _event(error_body(str(exc), status_of(exc)))
        yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
