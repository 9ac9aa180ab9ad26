"""All replicas of a run, and how each of them comes to the newest weights.

    fleet.prepare(tensors, "12")   copies them to where replicas can take them
    fleet.push()                   returns once one replica serves them and the others had their chance
    fleet.run()                    beside training: who was slow, away or restarted is caught up

What always holds: a replica is pushed to only once its keeper has handed it over, by labelling it with a number or as
"behind", and by one push at a time; one good replica is enough to go on, none within the limit is a BrokenError; who is behind
is known, counted, and said in the log. The first push of a version that a replica serves already proves the way: what
the replica says about its weights must be the same before and after.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.to_thread
import torch
from anyio.abc import TaskGroup
from torch import Tensor

from lightning_bus import BrokenError, monotonic_s
from trainer.config import ServeSection
from trainer.serving.adapters import push_adapters
from trainer.serving.errors import WeightsRefusedError, WeightUpdateError
from trainer.serving.proof import Evidence, differences, evidence
from trainer.serving.push import AdapterOffer, FileTransfer, Offer, PushTimes, Target, Transfer, push
from trainer.serving.remote import CALL_LIMIT_S, UNFIT, PushMode, RemoteEngine
from trainer.serving.slots import WeightDirectory, WeightSlots, shm_directory

ENGINE_LIMIT_S = 180.0  # an engine that restarts and loads a model is back well within this
GRACE_S = 1.0  # that others may take longer than the quickest replica
GRACE_FACTOR = 2.0  # or this many times as long, where that is more
SETTLE_S = 60.0  # at the end of a run, for replicas that are behind
REFUSALS_MAX = 2  # of one version by one replica: once may be bad luck, twice is a mismatch
LOOK_S = 0.2  # between two looks at a replica that is not ready
LOOK_MAX_S = 2.0  # that often in the end
TELL_S = 30.0  # between two lines about a replica that is behind

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FleetTimes:
    """How one version arrived.

    seconds        of prepare and push, until training went on
    copy_s         of those, the trainer's own copying
    standstill_ms  for which the replica that stood still longest generated nothing
    current        replicas that serve the version, of `replicas`
    """

    seconds: float
    copy_s: float
    standstill_ms: float
    current: int
    replicas: int


@dataclass(slots=True)
class _Replica:
    engine: RemoteEngine
    version: str = ""  # that we pushed to it last, and that it took
    times: PushTimes | None = None  # of that push
    proven: bool = False
    refusals: int = 0  # of the newest version
    reason: str = "nobody has looked at it yet"  # why it is behind
    told_s: float = -TELL_S


class Fleet:
    """Pushes weights to every replica of a run.

    limit_s  for the first replica to take a version, a restart of all of them included
    """

    def __init__(
        self,
        engines: Sequence[RemoteEngine],
        transfer: Transfer,
        *,
        mode: PushMode = "keep",
        limit_s: float = ENGINE_LIMIT_S,
    ) -> None:
        self._replicas = [_Replica(engine) for engine in engines]
        self._transfer = transfer
        self._mode: PushMode = mode
        self._limit_s = limit_s
        self._prepared: Offer | AdapterOffer | None = None
        self._copy_s = 0.0
        self._offer: Offer | AdapterOffer | None = None  # what replicas are to serve
        self._news = anyio.Event()  # replaced whenever something happened to a replica
        self._catching_up: set[int] = set()  # groups of replicas with a task of their own
        self._tasks: TaskGroup | None = None
        self._garbled: BrokenError | None = None

    @property
    def current(self) -> int:
        """How many replicas serve the newest version."""
        return 0 if self._offer is None else sum(one.version == self._offer.version for one in self._replicas)

    async def run(self) -> None:
        """Catch up, until cancelled, the replicas that `push` did not wait for."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            try:
                await anyio.sleep_forever()
            finally:
                self._tasks = None

    async def prepare(self, tensors: Mapping[str, Tensor], version: str, *, frozen: Collection[str] = ()) -> None:
        """Copy these weights to where replicas can take them, and tell nobody yet.

        tensors  are read before this returns, and not after
        frozen   names of tensors that are the same in every version

        Raises WeightsRefusedError for weights that are not finite, and OSError when there is no room for them.
        """
        began = time.perf_counter()
        self._prepared = await anyio.to_thread.run_sync(lambda: self._transfer.offer(tensors, version, frozen=frozen))
        self._copy_s = time.perf_counter() - began

    async def push(self) -> FleetTimes:
        """Have the replicas serve what was prepared; return once one does and the others had their chance.

        Raises WeightsRefusedError for weights that no replica takes, and BrokenError when no replica took them in
        time or one garbled them.
        """
        began = time.perf_counter()
        assert self._prepared is not None, "prepare() comes first"
        self._offer, version = self._prepared, self._prepared.version
        for one in self._replicas:
            one.refusals = 0
            if one.version == version:  # a trainer that came back pushes again what it is not sure of
                one.version = ""
        if self._tasks is not None:
            self._catch_up(self._tasks)
            failure = await self._wait()
        else:
            failure = None
            async with anyio.create_task_group() as tasks:
                self._catch_up(tasks)
                failure = await self._wait()
                tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure
        arrived = [one.times for one in self._replicas if one.version == version and one.times is not None]
        if behind := [one for one in self._replicas if one.version != version]:
            log.warning("weight version %s: %d replicas are behind, %s", version, len(behind), _reasons(behind))
        return FleetTimes(
            seconds=self._copy_s + time.perf_counter() - began,
            copy_s=self._copy_s,
            standstill_ms=max(times.standstill_ms for times in arrived),
            current=len(arrived),
            replicas=len(self._replicas),
        )

    async def settle(self, limit_s: float = SETTLE_S) -> None:
        """Wait for who is still behind: after the last version nobody would catch them up. Logs who stayed behind."""
        with anyio.move_on_after(limit_s):
            while self._tasks is not None and self.current < len(self._replicas):
                await self._news.wait()
        if self._offer is not None and self.current < len(self._replicas):
            behind = [one for one in self._replicas if one.version != self._offer.version]
            log.warning("weight version %s never reached %s", self._offer.version, _reasons(behind))

    def close(self) -> None:
        """Let go of shared memory, files and connections."""
        self._transfer.close()

    # --- waiting for the first ---

    async def _wait(self) -> Exception | None:
        """Return once the newest version is where it can be for now, with what stands in the way if it is nowhere."""
        began_s = monotonic_s()
        until_s = began_s + self._limit_s
        first = True
        while self.current < len(self._replicas):
            if self._garbled is not None:
                return self._garbled
            if all(one.refusals >= REFUSALS_MAX for one in self._replicas):
                return WeightsRefusedError(f"no replica takes the weights: {_reasons(self._replicas)}")
            if self.current and first:
                now_s = monotonic_s()
                until_s, first = now_s + max(GRACE_S, GRACE_FACTOR * (now_s - began_s)), False
            if monotonic_s() >= until_s:
                break
            news = self._news
            with anyio.move_on_after(until_s - monotonic_s()):
                await news.wait()
        if self.current:
            return None
        assert self._offer is not None
        return BrokenError(
            f"no engine took weight version {self._offer.version} within {self._limit_s:g} s: "
            f"{_reasons(self._replicas)}. Look at their logs; the run goes on where it was when they are back."
        )

    # --- one task for each replica, or one for all where they are sent to together ---

    def _catch_up(self, tasks: TaskGroup) -> None:
        groups = [self._replicas] if self._transfer.together else [[one] for one in self._replicas]
        for number, group in enumerate(groups):
            if number not in self._catching_up:
                self._catching_up.add(number)
                tasks.start_soon(self._keep_at, number, group)

    async def _keep_at(self, number: int, group: Sequence[_Replica]) -> None:
        """Push until the whole group serves the newest version, whichever that is by then."""
        pause_s = LOOK_S
        try:
            while behind := [one for one in group if self._offer is not None and one.version != self._offer.version]:
                ours = [one for one in behind if await self._is_ours(one)]
                if not ours or not await self._push(ours):
                    await anyio.sleep(pause_s)
                    pause_s = min(LOOK_MAX_S, 1.5 * pause_s)
        finally:
            self._catching_up.discard(number)

    async def _is_ours(self, one: _Replica) -> bool:
        if one.refusals >= REFUSALS_MAX:
            return False
        reason = await one.engine.why_not_ours()
        if reason:
            self._say(one, reason)
        return not reason

    async def _push(self, ours: Sequence[_Replica]) -> bool:
        """Push what is newest now; return whether all took it."""
        offer = self._offer
        assert offer is not None
        before = {one.engine.url: await self._evidence(one, offer) for one in ours}
        targets = [Target(one.engine, base=one.version, verify=not one.proven) for one in ours]
        adapter = isinstance(offer, AdapterOffer)
        results = await (
            push_adapters(offer, targets, mode=self._mode) if adapter else push(offer, targets, mode=self._mode)
        )
        for one in ours:
            result = results[one.engine.url]
            if isinstance(result, PushTimes):
                if await self._prove(one, offer, before[one.engine.url]):
                    one.version, one.times, one.reason = offer.version, result, ""
            else:
                one.version = ""
                one.refusals += isinstance(result, WeightsRefusedError)
                self._say(one, str(result))
        self._tell_all()
        return all(isinstance(result, PushTimes) for result in results.values())

    async def _evidence(self, one: _Replica, offer: Offer | AdapterOffer) -> Evidence | None:
        try:
            served = not one.proven and await one.engine.label() == offer.version
            # One that a dead trainer left standing generates nothing until this push has ended.
            if served and not await one.engine.is_paused():
                return await evidence(one.engine)
        except WeightUpdateError as exc:
            log.warning("%s cannot tell what it serves before the push: %s", one.engine.url, exc)
        return None

    async def _prove(self, one: _Replica, offer: Offer | AdapterOffer, before: Evidence | None) -> bool:
        """After the first push: what was version N before must be version N still."""
        one.proven = True
        if before is None:
            return True
        try:
            odd = await differences(one.engine, before)
            if not odd:
                log.info("%s holds what was sent: %d checksums agree", one.engine.url, len(before.checksums))
                return True
            await one.engine.set_label(UNFIT)
        except WeightUpdateError as exc:
            log.warning("%s cannot tell what it serves after the push: %s", one.engine.url, exc)
            return True
        self._garbled = BrokenError(
            f"{one.engine.url} served version {offer.version} from disk, and something else after the same version was "
            f"pushed to it: {', '.join(odd[:3])}. It does not load this model's tensors by these names; serve it from a "
            "checkpoint that this trainer's libraries have written."
        )
        return False

    # --- saying it ---

    def _say(self, one: _Replica, reason: str) -> None:
        now_s = monotonic_s()
        if reason != one.reason or now_s - one.told_s > TELL_S:
            log.warning("%s is behind: %s", one.engine.url, reason)
            one.told_s = now_s
        one.reason = reason
        self._tell_all()

    def _tell_all(self) -> None:
        news, self._news = self._news, anyio.Event()
        news.set()


def build_transfer(section: ServeSection, directory: Path, name: str, *, limit_s: float = CALL_LIMIT_S) -> Transfer:
    """How weights travel as [serve] says it.

    directory  of the run
    name       of the weight files; no other run on these machines may use it
    limit_s    for meeting the engines, and for each broadcast, where there are some
    """
    dtype: torch.dtype = getattr(torch, section.dtype)
    if section.transfer == "nccl":
        from trainer.serving.nccl import NcclTransfer

        return NcclTransfer(dtype=dtype, limit_s=limit_s)
    if section.transfer == "file":
        return FileTransfer(
            WeightDirectory(Path(section.transfer_directory or directory / "weights"), name), dtype=dtype
        )
    return FileTransfer(WeightSlots(Path(section.transfer_directory or shm_directory()), name), dtype=dtype)


def _reasons(replicas: Sequence[_Replica]) -> str:
    return "; ".join(f"{one.engine.url}: {one.reason}" for one in replicas)
