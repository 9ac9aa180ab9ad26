"""The trainer's view of the bus: submit rollouts, and get them back finished, in the log's order.

One background task follows the log and hands each finished rollout to whoever waits for its kind ("train",
"eval", "teacher": the label `phase`). What it hands out depends on the log alone, so a trainer that resumes from an
offset sees the same rollouts in the same order, and takes the same next batch; what a reward hook said of them is in the
log too, and the hook is not asked twice. What a checkpoint has no more need of the bus is told, by a named cursor:
retention drops nothing that lies after it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import msgspec

from lightning_bus import (
    REQUEST_MODEL,
    AgentError,
    BrokenError,
    CallError,
    Client,
    HookPool,
    Record,
    Span,
    Status,
    Submission,
    Verdicts,
    is_model_call,
    model_call,
)
from lightning_bus.adapters import Cursor, FinishedRollout, Group, Groups

TRAIN, EVAL, TEACHER = "train", "eval", "teacher"


class RolloutStream:
    """Follows the log from `cursor`. `run` must be running in a task of its own."""

    def __init__(
        self,
        bus: Client,
        group_size: int,
        cursor: Cursor,
        limit_s: float,
        *,
        hooks: HookPool | None = None,
        policy: str = "",
        cursor_name: str = "",
    ) -> None:
        """limit_s      give up when no rollout has ended for so long
        hooks        says what rollouts earned, where a run has a reward hook
        policy       whose versions `wait_version_called` means, where the log has several; "": whatever was called
        cursor_name  of the bus's cursor that `commit` moves; "": none
        """
        self.bus = bus
        self._limit_s = limit_s
        self._hooks = hooks
        self._policy = policy
        self._cursor_name = cursor_name
        self._verdicts = None if hooks is None else Verdicts(hooks.hook, code=hooks.code)
        self._read_past = anyio.Event()  # the end that the log had when this life began: it has no older verdicts
        self._groups = Groups(size=group_size, cursor=cursor, labels={"phase": TRAIN})
        self._ended: dict[str, FinishedRollout] = {}
        self._version_seen = -1
        self._progress = anyio.Event()

    async def run(self) -> None:
        """Follow the log for ever."""
        end = 0
        if self._verdicts is not None:
            _, _, end = await self.bus.fetch(self._groups.next_offset, bytes_max=1)
        async for record in self._following(end):
            finished = self._groups.feed(record)
            if finished is not None:
                self._note(finished)

    async def commit(self, state: Mapping[str, Any]) -> None:
        """Tell the bus, under `cursor_name`, that this state is durable: what lies before it may be dropped from the log.

        To be called once a checkpoint holds the state, and when a trainer starts: until then nothing is kept for it. A
        state that lies before the cursor leaves it where it is.
        """
        if not self._cursor_name:
            return
        offset = msgspec.convert(state, Cursor).offset
        if not offset or offset > await self.bus.cursor(self._cursor_name):
            with suppress(CallError):  # at 0: the cursor has been further on in an earlier life
                await self.bus.cursor(self._cursor_name, offset)

    async def release(self) -> None:
        """Tell the bus that this trainer is done: from now on nothing is kept for it."""
        if self._cursor_name:
            await self.bus.cursor(self._cursor_name, self._groups.next_offset)

    async def _following(self, end: int) -> AsyncGenerator[Record]:
        """Yield the log's records, taking verdicts out of them on the way."""
        if self._groups.next_offset >= end:
            self._read_past.set()
        async with aclosing(self.bus.follow(self._groups.next_offset)) as records:
            async for record in records:
                if self._verdicts is not None and record.producer != self.bus.session:
                    self._verdicts.feed(record)
                yield record
                if record.offset + 1 >= end:
                    self._read_past.set()

    async def next_groups(self, count: int) -> list[Group]:
        """Return the next `count` complete groups of training rollouts, in the order in which they became complete."""
        await self._wait_for(lambda: self._groups.complete >= count, f"{count} complete groups of rollouts")
        groups = [group for _ in range(count) if (group := self._groups.take()) is not None]
        return [replace(group, rollouts=tuple(await self._judged(group.rollouts))) for group in groups]

    async def wait_ended(self, rollout_ids: Collection[str]) -> list[FinishedRollout]:
        """Return these rollouts once all have ended, in the order given."""
        waiting = set(rollout_ids)

        def all_ended() -> bool:
            waiting.difference_update(self._ended)
            return not waiting

        await self._wait_for(
            all_ended, f"{len(waiting)} rollouts, {rollout_ids and next(iter(rollout_ids))} among them,"
        )
        return await self._judged([self._ended.pop(rollout_id) for rollout_id in rollout_ids])

    async def carry_out(self, submissions: Sequence[Submission], run_dir: Path) -> list[FinishedRollout]:
        """Submit rollouts and return them, ended, in the order given.

        Raises AgentError when all of them failed: then it is not the policy that is at fault, and training on would be
        in vain. Where all failed in an earlier life of this run they are submitted anew, under other ids, because what
        they failed of may have been mended since.
        """
        again = 0
        while True:
            suffix = f"-again{again}" if again else ""
            named = [msgspec.structs.replace(one, rollout_id=one.rollout_id + suffix) for one in submissions]
            submitted = await self.bus.submit(named)
            ended = await self.wait_ended([one.rollout_id for one in named])
            if any(rollout.status is Status.SUCCEEDED for rollout in ended):
                return ended
            if submitted.fresh:
                first = ended[0]
                reason = (first.error.strip().splitlines() or [first.status.value])[-1]
                raise AgentError(
                    f"all {len(ended)} rollouts of phase {first.labels.get('phase')} failed; {first.rollout_id} after "
                    f"{first.attempt} attempts with: {reason}\n"
                    f"Its record: lightning-bus spans {first.rollout_id} --run {run_dir}"
                )
            again += 1

    async def wait_version_called(self, version: int) -> None:
        """Return once a finished rollout holds a call that this weight version, or a later one, answered."""
        await self._wait_for(
            lambda: self._version_seen >= version, f"a model call answered by weight version {version}"
        )

    def saved_state(self) -> dict[str, Any]:
        """What a checkpoint must keep, as plain values: the groups' Cursor."""
        return msgspec.to_builtins(self._groups.cursor)

    async def _judged(self, rollouts: Sequence[FinishedRollout]) -> list[FinishedRollout]:
        if self._hooks is None or self._verdicts is None:
            return list(rollouts)
        await self._read_past.wait()
        judged = await self._hooks.judge(rollouts, known=self._verdicts, keep=self._keep)
        for rollout in rollouts:
            self._verdicts.forget(rollout)
        return judged

    async def _keep(self, verdicts: Sequence[Span]) -> None:
        """Make verdicts durable before anything is learnt from them. They belong to no attempt, for theirs is over."""
        await self.bus.append("", 0, verdicts)

    def _note(self, finished: FinishedRollout) -> None:
        self._version_seen = max(self._version_seen, version_of(finished, self._policy))
        if finished.labels.get("phase") != TRAIN:
            self._ended[finished.rollout_id] = finished
        self._progress.set()
        self._progress = anyio.Event()

    async def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait while rollouts keep ending; give up when none has ended for limit_s."""
        while not condition():
            with anyio.move_on_after(self._limit_s) as scope:
                await self._progress.wait()
            if scope.cancelled_caught:
                status = await self.bus.status()
                raise BrokenError(
                    f"waited {self._limit_s:g} s for {what} and no rollout ended: {status.workers} workers with {status.slots} "
                    f"slots are connected, rollouts stand at {status.rollouts}. Start workers, or raise [train] rollout_limit_s."
                )


async def beginning(bus: Client, state: Mapping[str, Any]) -> Cursor:
    """Return where a trainer with this saved state reads on; one that has read nothing yet, at the oldest record kept."""
    cursor = msgspec.convert(state, Cursor)
    return cursor if cursor.offset else Cursor((await bus.status()).first_offset, cursor.consumed)


def submission(
    rollout_id: str,
    task: Any,
    phase: str,
    *,
    group: str = "",
    model: str = "",
    overrides: dict[str, Any] | None = None,
    **labels: str,
) -> Submission:
    """Return a rollout to submit. The same arguments give the same bytes, so it can be submitted again."""
    return Submission(
        rollout_id=rollout_id,
        task=msgspec.msgpack.encode(task),
        group=group or rollout_id,
        model=model,
        overrides=overrides or {},
        labels={"phase": phase, **labels},
    )


def version_of(finished: FinishedRollout, policy: str = "") -> int:
    """Return the newest version that answered a call of this rollout; of this policy, where one is named. -1: none did."""
    spans = (span for span in finished.spans if not policy or span.attributes.get(REQUEST_MODEL) == policy)
    calls = (model_call(span) for span in spans if is_model_call(span))
    versions = (version for call in calls for version, _, _ in call.weight_versions)
    return max((int(version) for version in versions if version.isdecimal()), default=-1)
