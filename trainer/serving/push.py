"""New weights for engines that run: one adapter, whatever carries them.

    staged (files)     start → update → pause → finish → resume        only the copying itself stands still
    unstaged (NCCL)    pause → start → update ‖ broadcast → finish → resume

What always holds: generation stands still from a pause to a resume and the requests in flight are kept; whatever an
engine refuses before it overwrites leaves its old weights serving, and it goes on; an engine in which an update broke
off after that is labelled "unfit" and left standing, so that it generates nothing, and its keeper starts it again; no
engine's failure touches another's push. The HTTP calls are vLLM's own; vllm itself is never imported.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import anyio
import torch
from torch import Tensor

from trainer.serving.errors import EngineAnsweredError, EngineSilentError, WeightsRefusedError, WeightUpdateError
from trainer.serving.remote import UNFIT, PushMode, RemoteEngine
from trainer.serving.slots import Store
from trainer.serving.weights import WeightFile, changed_names

log = logging.getLogger(__name__)

Call = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class PushTimes:
    """What one engine's push took: `seconds` in all, of which generation stood still for `standstill_ms`."""

    seconds: float
    standstill_ms: float


@dataclass(frozen=True, slots=True)
class Target:
    """An engine, and what is known of it.

    base    the version that this process has pushed to it last; "" where that is not known
    verify  have it check every byte of what arrives: the first time, and on demand
    """

    engine: RemoteEngine
    base: str = ""
    verify: bool = False


class Offer(Protocol):
    """One version's weights, ready to be taken.

    staged  start and update overwrite nothing, so generation goes on meanwhile and an update may be refused
    """

    version: str
    staged: bool

    async def connect(self, engines: Sequence[RemoteEngine]) -> None:
        """Make these engines, and no others, know where the weights come from. Raises WeightUpdateError."""
        ...

    def update_info(self, target: Target) -> dict[str, Any]:
        """The body of the target's /update_weights. Blocks."""
        ...

    async def carry(self, updates: Mapping[str, Call]) -> dict[str, WeightUpdateError]:
        """Have the engines take the weights; each call is one engine's update. Returns the failures by URL."""
        ...

    def arrived(self, engine: RemoteEngine) -> None:
        """The engine has these weights."""
        ...


@dataclass(frozen=True, slots=True)
class AdapterOffer:
    """A directory with a version's LoRA adapter, and the name of the model that answers with it: `serving.adapters`."""

    version: str
    name: str
    directory: Path


class Transfer(Protocol):
    """A way for weights to travel. `together`: all engines of a push take part in one transmission."""

    together: bool

    def offer(
        self, tensors: Mapping[str, Tensor], version: str, *, frozen: Collection[str] = ()
    ) -> Offer | AdapterOffer:
        """Copy these weights to where engines can take them. Blocks.

        frozen  names of tensors that are the same in every version

        Raises WeightsRefusedError for weights that are not finite, and OSError when there is no room.
        """
        ...

    def close(self) -> None:
        """Let go of memory, files and connections."""
        ...


class FileTransfer:
    """Through files: in shared memory, or in a directory that all machines see."""

    together = False

    def __init__(self, store: Store, *, dtype: torch.dtype | None = None) -> None:
        self._store = store
        self._dtype = dtype

    def offer(self, tensors: Mapping[str, Tensor], version: str, *, frozen: Collection[str] = ()) -> FileOffer:
        return FileOffer(self._store, self._store.write(tensors, version, dtype=self._dtype, frozen=frozen), frozen)

    def close(self) -> None:
        self._store.unlink()


class FileOffer:
    """A file that engines can read."""

    staged = True

    def __init__(self, store: Store, file: WeightFile, frozen: Collection[str] = ()) -> None:
        self.version = file.version
        self.file = file
        self._store = store
        self._changed = changed_names(file.names, frozen)
        self._checked: WeightFile | None = None

    async def connect(self, engines: Sequence[RemoteEngine]) -> None:
        pass  # a file needs no meeting point

    def update_info(self, target: Target) -> dict[str, Any]:
        self._store.lend(self.file, target.engine.url)
        if target.verify:
            self._checked = self._checked or self.file.with_checksum()
            return self._checked.update_info()
        if target.base and len(self._changed) < len(self.file.names):
            return self.file.only(self._changed, base=target.base).update_info()
        return self.file.update_info()

    async def carry(self, updates: Mapping[str, Call]) -> dict[str, WeightUpdateError]:
        return await all_of(updates)

    def arrived(self, engine: RemoteEngine) -> None:
        self._store.give_back(self.file, engine.url)


async def push(
    offer: Offer, targets: Sequence[Target], *, mode: PushMode = "keep"
) -> dict[str, PushTimes | WeightUpdateError]:
    """Make the engines answer under these weights, labelled with their version; return what came of it by URL.

    An error's `served` says whether that engine still answers under its old weights or has been marked unfit.
    Cancelled, it leaves no engine standing that could go on.
    """
    one_push = _Push(offer, targets, mode)
    await one_push.run()
    return one_push.results


class _Push:
    def __init__(self, offer: Offer, targets: Sequence[Target], mode: PushMode) -> None:
        self.results: dict[str, PushTimes | WeightUpdateError] = {}
        self._offer = offer
        self._targets = {target.engine.url: target for target in targets}
        self._mode: PushMode = mode
        self._paused: set[str] = set()  # perhaps: they were asked to
        self._standing: dict[str, float] = {}  # since when, by URL
        self._overwriting: set[str] = set()

    async def run(self) -> None:
        began = time.perf_counter()
        try:
            await self._offer.connect([target.engine for target in self._targets.values()])
        except WeightUpdateError as exc:
            self.results = dict.fromkeys(self._targets, exc)
            return
        if self._offer.staged:
            await self._each(self._start)
            await self._carry()
        # Shielded: a push that is cancelled must not leave an engine standing, or half new.
        with anyio.CancelScope(shield=True):
            await self._each(self._pause)
            if not self._offer.staged:
                await self._each(self._start)
                await self._carry()
            await self._each(self._finish)
            await self._each(self._resume, also_failed=True)
        ended = time.perf_counter()
        for url in self._targets.keys() - self.results.keys():
            self.results[url] = PushTimes(ended - began, (ended - self._standing[url]) * 1e3)
            self._offer.arrived(self._targets[url].engine)

    async def _start(self, target: Target) -> None:
        engine = target.engine
        if not self._offer.staged:
            self._overwriting.add(engine.url)
        try:
            await engine.start()
        except EngineAnsweredError:
            if not self._offer.staged or await engine.world_size() > 1:
                raise
            # A trainer that died left an update open. One that brings nothing is refused, which closes it.
            try:
                await engine.update({"abandon": True})
            except EngineAnsweredError:
                pass
            await engine.start()

    async def _carry(self) -> None:
        waiting = [url for url in self._targets if url not in self.results]
        failures = await self._offer.carry({url: self._update(self._targets[url]) for url in waiting})
        for url, exc in failures.items():
            await self._failed(self._targets[url], exc)

    def _update(self, target: Target) -> Call:
        async def call() -> None:
            info = await anyio.to_thread.run_sync(self._offer.update_info, target)
            try:
                await target.engine.update(info)
            except EngineAnsweredError as exc:
                if not self._offer.staged:
                    raise
                # vLLM 0.32 loses step with its workers when one of several raises, so only a lone one goes on.
                served = await target.engine.world_size() == 1
                raise WeightsRefusedError(f"{exc}. Its old weights keep serving.", served=served) from exc

        return call

    async def _pause(self, target: Target) -> None:
        self._paused.add(target.engine.url)
        await target.engine.pause(self._mode)
        self._standing[target.engine.url] = time.perf_counter()

    async def _finish(self, target: Target) -> None:
        self._overwriting.add(target.engine.url)
        await target.engine.finish(self._offer.version)

    async def _resume(self, target: Target) -> None:
        if target.engine.url in self._paused:
            await target.engine.resume()

    async def _each(self, step: Callable[[Target], Awaitable[None]], *, also_failed: bool = False) -> None:
        async def one(target: Target) -> None:
            try:
                await step(target)
            except WeightUpdateError as exc:
                await self._failed(target, exc)

        async with anyio.create_task_group() as tasks:
            for url, target in self._targets.items():
                failure = self.results.get(url)
                if failure is None or (also_failed and isinstance(failure, WeightUpdateError) and failure.served):
                    tasks.start_soon(one, target)

    async def _failed(self, target: Target, exc: WeightUpdateError) -> None:
        engine = target.engine
        text = f"pushing weight version {self._offer.version} to {engine.url} failed: {exc}"
        if engine.url not in self._overwriting and exc.served:
            kind = WeightsRefusedError if isinstance(exc, WeightsRefusedError) else WeightUpdateError
            self.results.setdefault(engine.url, kind(text))
            return
        way_out = "It may hold half an update and was marked unfit: its keeper restarts it."
        self.results[engine.url] = WeightUpdateError(f"{text}. {way_out}", served=False)
        await mark_unfit(engine)


async def mark_unfit(engine: RemoteEngine) -> None:
    """Label an engine so that nobody calls it and its keeper starts it again. Logs one that cannot be told."""
    with anyio.CancelScope(shield=True):
        try:
            await engine.set_label(UNFIT)
        except (EngineAnsweredError, EngineSilentError) as unreachable:
            log.warning("could not mark %s unfit, so its keeper has to notice: %s", engine.url, unreachable)


async def all_of(
    calls: Mapping[str, Call], on_failure: Callable[[], None] = lambda: None
) -> dict[str, WeightUpdateError]:
    """Await all calls at once; return the failures by key. `on_failure` is called with the first one's end."""
    failures: dict[str, WeightUpdateError] = {}

    async def one(key: str, call: Call) -> None:
        try:
            await call()
        except WeightUpdateError as exc:
            failures[key] = exc
            on_failure()

    async with anyio.create_task_group() as tasks:
        for key, call in calls.items():
            tasks.start_soon(one, key, call)
    return failures
