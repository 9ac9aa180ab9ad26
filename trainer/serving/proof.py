"""Does an engine hold what was sent? Proved with the first push.

    before = await evidence(engine)      # it serves version 7, loaded from disk
    push version 7 again                 # the same weights, the trainer's way
    after = await evidence(engine)       # must be the same: names, fusing, casts and packing are right

What holds: evidence is what an engine itself says about its weights, the checksum of each tensor as it holds it, and a
greedy continuation of a fixed prompt with its log-probs. Where an engine repacks its weights and keeps no tensor to sum
up (vLLM's linear layers on a CPU), the continuation is the part that tells; of LoRA adapters, which no checksum covers,
it is the only one, so each continues the prompt, too.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.serving.errors import EngineAnsweredError
from trainer.serving.remote import RemoteEngine

PROMPT = list(range(1, 17))  # ids that every vocabulary has
TOKENS = 4
LOGPROB_TOLERANCE = 0.05  # another batch size picks another kernel, wrong weights are off by whole nats
TRIES = 3  # before a continuation counts as different: greedy decoding may fall either way at a tie
CONTINUATION = "the continuation of a fixed prompt"  # among the names of tensors that differ


@dataclass(frozen=True, slots=True)
class Evidence:
    """What an engine says about its weights; `continuation` is empty where it has no route for token ids."""

    checksums: dict[str, str]
    continuation: list[tuple[int, float]]


async def evidence(engine: RemoteEngine) -> Evidence:
    """Ask an engine that is not paused. Raises WeightUpdateError when it does not answer."""
    return Evidence(await engine.checksums(), await _continuation(engine))


async def differences(engine: RemoteEngine, before: Evidence) -> list[str]:
    """Return what the engine now says otherwise than `before`; empty when it holds the same weights."""
    after = Evidence(await engine.checksums(), [])
    for _ in range(TRIES):
        after = Evidence(after.checksums, await _continuation(engine))
        if CONTINUATION not in compare(before, after):
            break
    return compare(before, after)


def compare(left: Evidence, right: Evidence) -> list[str]:
    """Return what two engines, or one at two times, say otherwise: names of tensors, and CONTINUATION last."""
    names = left.checksums.keys() | right.checksums.keys()
    found = sorted(name for name in names if left.checksums.get(name) != right.checksums.get(name))
    return found if _same(left.continuation, right.continuation) else [*found, CONTINUATION]


async def _continuation(engine: RemoteEngine) -> list[tuple[int, float]]:
    said: list[tuple[int, float]] = []
    try:
        said += await engine.sample(PROMPT, TOKENS, salt=secrets.token_hex(8))
        for name in await engine.adapters():
            said += await engine.sample(PROMPT, TOKENS, salt=secrets.token_hex(8), model=name)
    except EngineAnsweredError as exc:
        if exc.status not in (400, 404, 405, 501):
            raise
    return said


def _same(left: Sequence[tuple[int, float]], right: Sequence[tuple[int, float]]) -> bool:
    if not left or not right:
        return True
    return len(left) == len(right) and all(
        a[0] == b[0] and abs(a[1] - b[1]) <= LOGPROB_TOLERANCE for a, b in zip(left, right, strict=False)
    )
