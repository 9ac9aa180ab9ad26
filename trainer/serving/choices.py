"""The choices of one prompt: a seed for each, generated together, given up together, counted together.

Always holds: when one choice is refused or the client goes away, no other is left running.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from trainer.serving.engine import Engine
from trainer.serving.errors import ServingError
from trainer.serving.request import Completion, Delta
from trainer.serving.sampling import SamplingParams


def each_choice(params: SamplingParams, count: int | None) -> list[SamplingParams]:
    """What each of `count` choices (None: one) is sampled by.

    One seed for n choices would make them one and the same; vLLM counts the seed up, and so do we.
    """
    return [params if params.seed is None else replace(params, seed=params.seed + at) for at in range(count or 1)]


async def complete(
    engine: Engine, request: HttpRequest, prompt_ids: list[int], each: list[SamplingParams], cache_salt: str | None
) -> list[Completion]:
    """One completion per entry of `each`. Raises what the engine raises, ClientDisconnect when nobody waits any more."""
    tasks = [asyncio.ensure_future(engine.generate(prompt_ids, params, cache_salt=cache_salt)) for params in each]
    gone = asyncio.ensure_future(_wait_gone(request))
    finished = asyncio.gather(*tasks)
    try:
        await asyncio.wait((finished, gone), return_when=asyncio.FIRST_COMPLETED)
        if not finished.done():
            raise ClientDisconnect
        return finished.result()
    finally:
        finished.cancel()
        for task in (*tasks, gone):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, ServingError):
            await finished


def streams(
    engine: Engine, prompt_ids: list[int], each: list[SamplingParams], cache_salt: str | None
) -> list[AsyncIterator[Delta | Completion]]:
    """The same as they come; `streaming.merged` takes them."""
    return [engine.stream(prompt_ids, params, cache_salt=cache_salt) for params in each]


def usage(prompt_tokens: int, completions: Sequence[Completion]) -> dict[str, int]:
    sampled = sum(len(completion.token_ids) for completion in completions)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": sampled, "total_tokens": prompt_tokens + sampled}


async def _wait_gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
