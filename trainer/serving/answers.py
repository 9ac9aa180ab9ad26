"""From completions to OpenAI's chat objects, whole and in pieces.

Always holds: the deltas of a choice joined are what the whole answer says; whoever sampled the completions (the
engine here, a script, another server whose ids were brought to be derendered) leaves no trace in the shape.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from trainer.serving.chat import ChatFormat
from trainer.serving.choices import usage
from trainer.serving.protocol import ChatBody
from trainer.serving.request import Completion, Delta
from trainer.serving.streaming import StreamedText, TextState, merged


class ChatAnswer:
    """The answer to one chat request.

    request     what was asked; it decides whether log-probs, ids and tool calls are shown
    identifier  the answer's id; None makes one
    model       who answers; None is whom the request names
    """

    def __init__(
        self,
        chat_format: ChatFormat,
        request: ChatBody,
        prompt_ids: list[int],
        *,
        identifier: str | None = None,
        model: str | None = None,
    ) -> None:
        self._format = chat_format
        self._request = request
        self._prompt_ids = prompt_ids
        self._stops = request.stops()
        self._tools = bool(request.offered_tools())
        self._head = {
            "id": identifier or f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model or request.model,
        }

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The chat.completion object."""
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(index, completion) for index, completion in enumerate(completions)],
            "usage": usage(len(self._prompt_ids), completions),
            "prompt_token_ids": self._prompt_ids if self._request.return_token_ids else None,
        }

    async def events(self, sources: list[AsyncIterator[Delta | Completion]]) -> AsyncGenerator[dict[str, Any]]:
        """The chat.completion.chunks: role first, then text, ids and log-probs as they come, versions last."""
        texts = [self.text() for _ in sources]
        completions: list[Completion] = []
        async with contextlib.aclosing(merged(sources)) as items:
            opened = False
            async for index, item in items:
                if not opened:
                    # Only now: had the engine refused, the answer would have been an error with its own status.
                    opened = True
                    for role_index in range(len(sources)):
                        choice = {"index": role_index, "delta": {"role": "assistant", "content": ""}}
                        ids = {"prompt_token_ids": self._prompt_ids} if role_index == 0 else {}
                        yield {
                            **(self.chunk_head(**ids) if self._request.return_token_ids else self.chunk_head()),
                            "choices": [{**choice, "logprobs": None, "finish_reason": None}],
                        }
                if isinstance(item, Completion):
                    completions.append(item)
                    delta = texts[index].push([], last=True)
                    choice = {"logprobs": None, **self.ending(texts[index], item)}
                else:
                    delta = texts[index].push(item.token_ids)
                    choice = {**self.tokens(item), "finish_reason": None}
                yield {**self.chunk_head(), "choices": [{"index": index, "delta": delta, **choice}]}
        if self._request.stream_options is not None and self._request.stream_options.include_usage:
            yield {**self.chunk_head(), "choices": [], "usage": usage(len(self._prompt_ids), completions)}

    def text(self, state: TextState | None = None) -> StreamedText:
        """What turns the ids of one choice into deltas, from its beginning or from `state`."""
        return StreamedText(self._format, self._stops, with_special=self._tools, tools=self._tools, state=state)

    def chunk_head(self, **more: Any) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", **more}

    def tokens(self, item: Completion | Delta) -> dict[str, Any]:
        """What a choice says of its tokens, as far as it was asked for."""
        logprobs = None
        if self._request.logprobs:
            logprobs = self._format.logprobs(item.token_ids, item.logprobs, item.top_logprobs)
        return {"logprobs": logprobs, "token_ids": item.token_ids if self._request.return_token_ids else None}

    def ending(self, text: StreamedText, completion: Completion) -> dict[str, Any]:
        """How a streamed choice ended."""
        called = text.called and completion.finish_reason == "stop"
        return {
            "finish_reason": "tool_calls" if called else completion.finish_reason,
            "stop_reason": completion.stop_reason,
            "weight_versions": completion.weight_versions,
        }

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        text = self._format.text(completion, self._stops, with_special=self._tools)
        message = self._format.message(text, tools=self._tools)
        called = "tool_calls" in message and completion.finish_reason == "stop"
        return {
            "index": index,
            "message": message,
            **self.tokens(completion),
            "finish_reason": "tool_calls" if called else completion.finish_reason,
            "stop_reason": completion.stop_reason,
            "weight_versions": completion.weight_versions,
        }
