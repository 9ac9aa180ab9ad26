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
    """What came of comparing replicas, by URL. `differing` names the tensors on which those of one version differ."""

    versions: dict[str, str] = field(default_factory=dict[str, str])
    errors: dict[str, str] = field(default_factory=dict[str, str])
    differing: list[str] = field(default_factory=list[str])
    tensors: int = 0

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
            shown = ", ".join(self.differing[:3])
            return f"{len(self.differing)} of {self.tensors} tensors differ ({shown} …): restart the replicas"
        if len(set(self.versions.values())) > 1:
            return f"replicas serve versions {', '.join(sorted(set(self.versions.values())))}: an update is under way, or one is behind"
        return f"all {len(self.versions)} hold the same {self.tensors} tensors"


async def ask_replicas(urls: Sequence[str]) -> list[Replica]:
    """Return what each replica serves and whether it is well, in the order given."""

    async def ask(engine: RemoteEngine) -> Replica:
        return Replica(engine.url, await engine.label(), await engine.health())

    answers = await _each(urls, ask, LABEL_LIMIT_S)
    return [one if isinstance(one, Replica) else Replica(url, error=str(one)) for url, one in answers.items()]


async def compare_replicas(urls: Sequence[str]) -> Comparison:
    """Return whether the replicas hold the same weights, tensor by tensor. They should be of one kind of engine."""

    async def ask(engine: RemoteEngine) -> tuple[str, dict[str, str]]:
        # The label twice: an update in between would compare tensors of two versions.
        for _ in range(3):
            label, checksums = await engine.label(), await engine.checksums()
            if await engine.label() == label:
                return label, checksums
        raise WeightUpdateError(f"{engine.url} took new weights each time it was asked for its checksums. Ask again.")

    answers = await _each(urls, ask, CHECKSUM_LIMIT_S)
    held = {url: one for url, one in answers.items() if not isinstance(one, Exception)}
    by_version: dict[str, list[dict[str, str]]] = {}
    for label, checksums in held.values():
        by_version.setdefault(label, []).append(checksums)
    differing: set[str] = set()
    for first, *others in by_version.values():
        for other in others:
            differing |= {name for name in first.keys() | other.keys() if first.get(name) != other.get(name)}
    return Comparison(
        versions={url: label for url, (label, _) in held.items()},
        errors={url: str(one) for url, one in answers.items() if isinstance(one, Exception)},
        differing=sorted(differing),
        tensors=max((len(checksums) for _, checksums in held.values()), default=0),
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
