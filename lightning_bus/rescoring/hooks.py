"""Reward hooks: the user's function over finished rollouts, in processes that can be killed.

    def reward(rollout: FinishedRollout) -> float | list[Reward]: ...        # async def works too

    async with HookPool("my_rewards:reward", processes=2, limit_s=5.0) as hooks:
        answers = await hooks.ask(rollouts)         # Given or Dropped, one for each, in the same order
        rollouts = await hooks.judge(rollouts)      # the same rollouts with what the hook says as their rewards

What always holds: each rollout gets an answer. A hook that raises, hangs, dies or returns what is no reward gives
Dropped with its reason, never a 0; what hangs is killed with everything that it started, and the next rollouts go on in
a new process. A hook that cannot be loaded at all is the caller's mistake, a ConfigError.

An async hook works on several rollouts at a time. What takes long once, such as loading a judge, belongs at the top of
the hook's module: importing it is not under the limit of a rollout. A process is no jail: it may do what its user may.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

import anyio
import msgspec
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from lightning_bus.adapters import FinishedRollout, RewardsSection
from lightning_bus.errors import ConfigError
from lightning_bus.lifecycle import Status
from lightning_bus.rescoring.answers import LENGTH, Answer, Dropped, Given, NotLoaded, Ready
from lightning_bus.rescoring.verdicts import Verdicts, judged, verdict_span
from lightning_bus.spans import Span

Keep = Callable[[Sequence[Span]], Awaitable[None]]

AT_A_TIME = 16  # rollouts that one process is handed at once, so that it need not wait for us; async hooks work on all
START_LIMIT_S = 60.0  # a hook may import torch
ANSWER_BYTES_MAX = 64 << 20

_answers = msgspec.msgpack.Decoder(Answer | Ready | NotLoaded)
_encode = msgspec.msgpack.Encoder(enc_hook=list).encode  # RecordedSpans go as what they hold


class HookPool:
    """Processes that run one hook. Entering it starts them, leaving it ends them."""

    def __init__(self, hook: str, *, processes: int = 1, limit_s: float = 10.0, memory_bytes: int = 0) -> None:
        """hook          MODULE:FUNCTION, imported with the working directory on the path
        limit_s       for one rollout; then its process is killed
        memory_bytes  of address space for each process; 0: no limit
        """
        self.hook = hook
        self._asked = anyio.Lock()  # a process answers one who asks at a time
        self._children = [_Child(hook, limit_s, memory_bytes) for _ in range(processes)]

    @property
    def code(self) -> str:
        """A digest of the file that the hook stands in, known while the pool is open: a changed hook is another judge."""
        return self._children[0].code

    async def ask(self, rollouts: Sequence[FinishedRollout]) -> list[Answer]:
        """Return the hook's answer for each rollout, in their order."""
        async with self._asked:
            return await self._ask(rollouts)

    async def judge(
        self, rollouts: Sequence[FinishedRollout], *, known: Verdicts | None = None, keep: Keep | None = None
    ) -> list[FinishedRollout]:
        """Return the rollouts with what the hook says of them as their reward; see `FinishedRollout.judged`.

        known  verdicts that are in the log: the hook is not asked again
        keep   has to make the spans of new verdicts durable, which are not handed out before

        Rollouts that did not succeed are returned as they are, and so is the recorded reward where the hook rewards
        spans only. One that the hook fails on has no reward any more, which is not a reward of 0.
        """
        told = {at: known.of(one) for at, one in enumerate(rollouts)} if known is not None else {}
        asked = [at for at, one in enumerate(rollouts) if one.status is Status.SUCCEEDED and told.get(at) is None]
        answers = dict(zip(asked, await self.ask([rollouts[at] for at in asked]), strict=True))
        new = [(rollouts[at], answer.given) for at, answer in answers.items() if isinstance(answer, Given)]
        if keep is not None and new:
            await keep([verdict_span(one, given, hook=self.hook, code=self.code) for one, given in new])
        result: list[FinishedRollout] = []
        for at, rollout in enumerate(rollouts):
            given = told.get(at)
            if rollout.status is not Status.SUCCEEDED:
                result.append(rollout)
            elif given is not None:
                result.append(judged(rollout, given))
            else:
                result.append(_answered(rollout, answers[at]))
        return result

    async def _ask(self, rollouts: Sequence[FinishedRollout]) -> list[Answer]:
        waiting = deque(range(len(rollouts)))
        answers: list[Answer | None] = [None] * len(rollouts)

        async def work(child: _Child) -> None:
            while waiting:
                # Fewer towards the end, so that no process is left with many while the others have none.
                fair = math.ceil(len(waiting) / len(self._children))
                mine = [waiting.popleft() for _ in range(min(AT_A_TIME, fair))]
                for at, answer in zip(mine, await child.ask([rollouts[at] for at in mine]), strict=True):
                    answers[at] = answer

        async with anyio.create_task_group() as tasks:
            for child in self._children:
                tasks.start_soon(work, child)
        return [answer for answer in answers if answer is not None]

    async def __aenter__(self) -> HookPool:
        try:
            for child in self._children:
                await child.start()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def _end(self) -> None:
        with anyio.CancelScope(shield=True):
            for child in self._children:
                await child.kill()


@asynccontextmanager
async def reward_hooks(section: RewardsSection) -> AsyncGenerator[HookPool | None]:
    """Give the pool that [rewards] asks for, or None where it names no hook."""
    if not section.hook:
        yield None
        return
    pool = HookPool(
        section.hook, processes=section.hook_processes, limit_s=section.hook_limit_s,
        memory_bytes=section.hook_memory_bytes,
    )  # fmt: skip
    async with pool:
        yield pool


def _answered(rollout: FinishedRollout, answer: Answer) -> FinishedRollout:
    if isinstance(answer, Dropped):
        return replace(rollout, reward=None, not_judged=answer.reason, error=answer.detail)
    return judged(rollout, answer.given)


class _Child:
    """One process, started anew when it had to be killed."""

    def __init__(self, hook: str, limit_s: float, memory_bytes: int) -> None:
        self.code = ""
        self._hook = hook
        self._limit_s = limit_s
        self._command = [sys.executable, "-m", "lightning_bus.rescoring.child", hook, str(memory_bytes)]
        self._process: Process | None = None
        self._stdout: Any = None

    async def start(self) -> None:
        """Return once the hook is loaded. Raises ConfigError when it cannot be."""
        # A session of its own, so that what the hook starts can be killed with it.
        self._process = await anyio.open_process(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None, start_new_session=True
        )
        assert self._process.stdout is not None
        self._stdout = BufferedByteReceiveStream(self._process.stdout)
        said: object = None
        with anyio.move_on_after(START_LIMIT_S):
            said = await self._receive()
        if not isinstance(said, Ready):
            await self.kill()
            why = said.error if isinstance(said, NotLoaded) else f"its process ended, or took over {START_LIMIT_S:g} s"
            raise ConfigError(f"the reward hook {self._hook!r} cannot be loaded: {why}.")
        self.code = said.code

    async def ask(self, rollouts: Sequence[FinishedRollout]) -> list[Answer]:
        answers: list[Answer] = []
        while len(answers) < len(rollouts):
            if self._process is None:
                await self.start()
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._send, rollouts[len(answers) :])
                    await self._collect(answers, len(rollouts))
            except* _Gone as gone:
                answers.append(Dropped(str(gone.exceptions[0])))
                await self.kill()
        return answers

    async def _collect(self, answers: list[Answer], count: int) -> None:
        while len(answers) < count:
            said: object = None
            with anyio.move_on_after(self._limit_s) as scope:
                said = await self._receive()
            if scope.cancelled_caught:
                raise _Gone(f"hook took more than {self._limit_s:g} s")
            if not isinstance(said, Answer):
                raise _Gone("hook ended its process")
            answers.append(said)

    async def _send(self, rollouts: Sequence[FinishedRollout]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, BrokenPipeError, ConnectionResetError):
            for rollout in rollouts:
                body = _encode(rollout)
                await self._process.stdin.send(LENGTH.pack(len(body)) + body)

    async def _receive(self) -> Answer | Ready | NotLoaded | None:
        """Return the next frame; None when the process has ended or sends what is none."""
        try:
            (size,) = LENGTH.unpack(await self._stdout.receive_exactly(LENGTH.size))
            return None if size > ANSWER_BYTES_MAX else _answers.decode(await self._stdout.receive_exactly(size))
        except (anyio.IncompleteRead, anyio.BrokenResourceError, anyio.EndOfStream, msgspec.DecodeError):
            return None

    async def kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        await process.aclose()


class _Gone(Exception):
    """The hook's process is of no use any more."""
