"""What streamed answers are made of: several completions merged as they come, text that never shows half, events.

What always holds: the deltas of a choice joined are what the whole answer says; the first source that fails ends all.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import msgspec

from trainer.serving.batch import Completion, Delta
from trainer.serving.chat import ChatFormat
from trainer.serving.errors import ServingError
from trainer.serving.hermes import HermesStream
from trainer.serving.protocol import error_body, status_of
from trainer.serving.text import Detokenizer, StopStrings


async def merged(
    sources: list[AsyncIterator[Delta | Completion]],
) -> AsyncGenerator[tuple[int, Delta | Completion]]:
    """What all sources yield, in the order of arrival, with each one's index. The first to raise ends all."""
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
            index, item = await arrivals.get()
            if isinstance(item, Exception):
                raise item
            unfinished -= isinstance(item, Completion)
            yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def scripted_stream(completion: Completion) -> AsyncIterator[Delta | Completion]:
    yield Delta(completion.token_ids, completion.logprobs, completion.top_logprobs)
    yield completion


class StreamedText:
    """From token ids to the deltas of one choice: stop strings, end token and tool calls never show half."""

    def __init__(self, chat_format: ChatFormat, stops: tuple[str, ...], tools: bool) -> None:
        self._format = chat_format
        self._detokenizer = Detokenizer(chat_format.tokenizer, skip_special_tokens=not tools)
        self._stops = StopStrings(stops)
        self._tools = HermesStream() if tools else None
        self._calls_sent = 0

    @property
    def called(self) -> bool:
        return self._calls_sent > 0

    def push(self, token_ids: list[int]) -> dict[str, Any]:
        piece = self._stops.push(self._detokenizer.push(self._format.shown_ids(token_ids)))
        content, calls = self._tools.push(piece) if self._tools is not None else (piece, [])
        return self._delta(content, calls)

    def finish(self) -> dict[str, Any]:
        piece = self._stops.push(self._detokenizer.push([], last=True)) + self._stops.flush()
        if self._tools is None:
            return self._delta(piece, [])
        content, calls = self._tools.push(piece)
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
