"""What the replicas of a run say of themselves: which version each serves, and whether they hold the same weights.

They are asked all at once, each within a limit, and one that does not answer is told as such: nothing here raises for it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import anyio
import httpx

from trainer.serving.errors import WeightUpdateError
from trainer.serving.proof import CONTINUATION, TRIES, Evidence, compare, evidence
from trainer.serving.remote import RemoteEngine

T = TypeVar("T")

LABEL_LIMIT_S = 2.0  # a replica that is well answers at once, also while it generates
CHECKSUM_LIMIT_S = 300.0  # SHA-256 over tens of gigabytes


@dataclass(frozen=True, slots=True)
class Replica:
    """What a replica said. `version` is its label, empty when it did not answer; `error` says why not."""

    url: str
    version: str = ""
    healthy: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of comparing replicas, by URL.

    `differing` names the tensors on which those of one version differ, and, last, the continuation of a fixed prompt.
    """

    versions: dict[str, str] = field(default_factory=dict[str, str])
    errors: dict[str, str] = field(default_factory=dict[str, str])
    differing: list[str] = field(default_factory=list[str])
    tensors: int = 0
    continued: bool = False  # whether the engines could be asked to continue a prompt

    @property
    def agree(self) -> bool:
        """Whether all answered, serve one version, and hold the same tensors."""
        return not self.errors and not self.differing and len(set(self.versions.values())) == 1

    def verdict(self) -> str:
        """Return it in a sentence, with the way out."""
        if self.errors:
            return (
                f"not compared: {len(self.errors)} of {len(self.errors) + len(self.versions)} replicas did not answer"
            )
        if self.differing:
            shown = ", ".join(self.differing[:3]) + (" …" if len(self.differing) > 3 else "")
            return f"replicas of one version differ in {len(self.differing)} things ({shown}): restart them"
        if len(set(self.versions.values())) > 1:
            return f"replicas serve versions {', '.join(sorted(set(self.versions.values())))}: an update is under way, or one is behind"
        alike = " and continue a prompt alike" if self.continued else ""
        return f"all {len(self.versions)} hold the same {self.tensors} tensors{alike}"


async def ask_replicas(urls: Sequence[str]) -> list[Replica]:
    """Return what each replica serves and whether it is well, in the order given."""

    async def ask(engine: RemoteEngine) -> Replica:
        return Replica(engine.url, await engine.label(), await engine.health())

    answers = await _each(urls, ask, LABEL_LIMIT_S)
    return [one if isinstance(one, Replica) else Replica(url, error=str(one)) for url, one in answers.items()]


async def compare_replicas(urls: Sequence[str]) -> Comparison:
    """Return whether the replicas hold the same weights, tensor by tensor. They should be of one kind of engine.

    Checksums alone would pass over what an engine has packed: vLLM keeps no tensor to sum up of its linear layers on a
    CPU. So each also continues a fixed prompt.
    """
    for _ in range(TRIES - 1):
        found = await _compared(urls)
        if found.differing != [CONTINUATION]:
            return found
    return await _compared(urls)


async def _compared(urls: Sequence[str]) -> Comparison:
    async def ask(engine: RemoteEngine) -> tuple[str, Evidence]:
        # The label twice: an update in between would compare tensors of two versions.
        for _ in range(3):
            label, said = await engine.label(), await evidence(engine)
            if await engine.label() == label:
                return label, said
        raise WeightUpdateError(f"{engine.url} took new weights each time it was asked for its checksums. Ask again.")

    answers = await _each(urls, ask, CHECKSUM_LIMIT_S)
    held = {url: one for url, one in answers.items() if not isinstance(one, Exception)}
    by_version: dict[str, list[Evidence]] = {}
    for label, said in held.values():
        by_version.setdefault(label, []).append(said)
    differing: set[str] = set()
    for first, *others in by_version.values():
        for other in others:
            differing.update(compare(first, other))
    return Comparison(
        versions={url: label for url, (label, _) in held.items()},
        errors={url: str(one) for url, one in answers.items() if isinstance(one, Exception)},
        differing=sorted(differing, key=lambda name: (name == CONTINUATION, name)),
        tensors=max((len(said.checksums) for _, said in held.values()), default=0),
        continued=all(said.continuation for _, said in held.values()),
    )


async def _each(
    urls: Sequence[str], ask: Callable[[RemoteEngine], Awaitable[T]], limit_s: float
) -> dict[str, T | Exception]:
    answers: dict[str, T | Exception] = {}

    async def one(client: httpx.AsyncClient, url: str) -> None:
        try:
            answers[url] = await ask(RemoteEngine(client, url, limit_s=limit_s))
        except (WeightUpdateError, ValueError, LookupError, TypeError) as exc:  # or it speaks something else
            answers[url] = exc

    async with httpx.AsyncClient(trust_env=False) as client, anyio.create_task_group() as tasks:
        for url in urls:
            tasks.start_soon(one, client, url)
    return {url: answers[url] for url in urls}
