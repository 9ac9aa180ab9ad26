"""Keeps one vLLM replica alive, and out of the way until it serves the current weights.

    start ──► answers /health ──► has generated ──► brought current, labelled ──► watched ──┐
      ▲                                                                                      │ gone, sick, silent,
      └──────────────────────── ended with all its processes, a pause ◄──────────────────────┘ or marked unfit

What always holds. A replica becomes ready, which its label's being a number says to everybody, only once it holds the
newest published weights: until then the keeper alone pushes to it, and from then on the trainer alone. Whatever ends,
ends with all its processes. One that a trainer left paused, having died in the middle of a push, goes on by itself.
A replica that never gets as far as answering is given up, with the end of its log in the message.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import httpx
from anyio.abc import Process

from lightning_bus import BusyError, CallError, LightningBusError, StopProcess, monotonic_s
from trainer.serving import guard
from trainer.serving.errors import WeightUpdateError
from trainer.serving.remote import UNFIT
from trainer.serving.vllm import Launch

STILLBORN_MAX = 3  # starts in a row that never became ready
PAUSE_S = 1.0  # before the first restart; doubles with each
PAUSE_MAX_S = 30.0
STEADY_S = 60.0  # a replica that was ready this long starts again at PAUSE_S
LOOK_S = 10.0  # for one answer about its state; an engine whose core died leaves some questions open for ever
SHUT_S = 3.0  # that a replica which was ready may refuse connections
TELL_S = 10.0  # between two lines about a replica that is starting
TAIL_LINES = 20
TAIL_BYTES = 16_384
USAGE_CODE = 2  # of a command line that vLLM does not understand

log = logging.getLogger(__name__)


class ReplicaGivenUp(StopProcess):
    """A replica cannot be started; the message holds the end of its log."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a keeper waits for what.

    start_s    from the start until /health answers, then for the first request, and again until the weights are current
    silent_s   for an answer of a replica that was ready
    paused_s   until a pause is taken for one that nobody will end
    probe_s    between two looks
    """

    start_s: float = 600.0
    silent_s: float = 60.0
    paused_s: float = 180.0
    probe_s: float = 1.0
    pause_s: float = PAUSE_S
    pause_max_s: float = PAUSE_MAX_S


class Keeper:
    """Keeps replica `number`; see the top of this module.

    launch         how it is started
    log_path       where its output goes; None: to our own stderr
    bring_current  gives the replica at launch.url the newest weights and labels it; called until it returns. Raises
                   TryAgain or OSError when that may work later, WeightUpdateError when the replica took harm
    on_ready       is called with the URL whenever the replica has become ready
    others_ready   whether another replica serves, so that giving this one up would end more than it mends
    resumable      a pause that nobody ends can be ended by us: pushes overwrite nothing until their last step
    """

    def __init__(
        self,
        number: int,
        launch: Launch,
        http: httpx.AsyncClient,
        *,
        bring_current: Callable[[], Awaitable[str]],
        log_path: Path | None = None,
        on_ready: Callable[[str], None] | None = None,
        others_ready: Callable[[], bool] = lambda: False,
        resumable: bool = True,
        limits: Limits | None = None,
    ) -> None:
        self.name = f"replica {number}"
        self.url = launch.url
        self.ready = False
        self.restarts = 0
        self._launch = launch
        self._http = http
        self._bring_current = bring_current
        self._log_path = log_path
        self._on_ready = on_ready
        self._others_ready = others_ready
        self._resumable = resumable
        self._limits = limits or Limits()

    async def run(self) -> None:
        """Keep the replica until cancelled. Raises ReplicaGivenUp; however it ends, no process is left."""
        pause_s = self._limits.pause_s
        stillborn = 0
        while True:
            served_s, reason, code = await self._one_life()
            stillborn = 0 if served_s else stillborn + 1
            hopeless = stillborn >= STILLBORN_MAX or (stillborn and code == USAGE_CODE)
            if hopeless and not self._others_ready():
                times = "" if stillborn == 1 else f", {stillborn} starts in a row without becoming ready"
                raise ReplicaGivenUp(f"{self.name} ({self.url}) {reason}{times}. {self._tail()}")
            if served_s > STEADY_S:
                pause_s = self._limits.pause_s
            if hopeless:
                pause_s = self._limits.pause_max_s
            log.warning(
                "%s (%s) %s; starting it again in %.0f s. %s", self.name, self.url, reason, pause_s, self._tail()
            )
            await anyio.sleep(pause_s)
            pause_s = min(self._limits.pause_max_s, pause_s * 2)
            self.restarts += 1

    # -- one life ---------------------------------------------------------------------------------------------------

    async def _one_life(self) -> tuple[float, str, int | None]:
        """Return for how long the replica was ready, why that ended, and the exit code if it had one."""
        if in_use := _in_use(self.url):
            return 0.0, in_use, None
        process = await self._start()
        try:
            return *await self._live(process), process.returncode
        finally:
            self.ready = False
            await _end(process)

    async def _start(self) -> Process:
        log.info("%s: starting on %s%s", self.name, self.url, f", log in {self._log_path}" if self._log_path else "")
        output = None
        if self._log_path is not None:
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            output = self._log_path.open("ab")
        process: Process | None = None
        # Shielded: a process that exists must be known here, or nobody would end it.
        with anyio.CancelScope(shield=True):
            try:
                process = await anyio.open_process(
                    [sys.executable, "-I", guard.__file__, *self._launch.argv],
                    stdin=subprocess.PIPE,  # a lifeline: nothing is ever written, its end is the news
                    stdout=output or sys.stderr,
                    stderr=output or sys.stderr,
                    start_new_session=True,
                    env=self._launch.environment,
                )
            finally:
                if output is not None:
                    output.close()
        assert process is not None
        return process

    async def _live(self, process: Process) -> tuple[float, str]:
        """Return for how long the replica was ready, and why that ended."""
        reasons: list[str] = []
        ready_since_s: list[float] = []
        async with anyio.create_task_group() as tasks:

            async def wait_end() -> None:
                code = await process.wait()
                reasons.append(f"ended with {f'exit code {code}' if code >= 0 else f'signal {-code}'}")
                tasks.cancel_scope.cancel()

            async def serve() -> None:
                reason = await self._become_ready()
                if not reason:
                    self.ready = True
                    ready_since_s.append(monotonic_s())
                    if self._on_ready is not None:
                        self._on_ready(self.url)
                    reason = await self._watch()
                reasons.append(reason)
                tasks.cancel_scope.cancel()

            tasks.start_soon(wait_end)
            tasks.start_soon(serve)
        return (monotonic_s() - ready_since_s[0] if ready_since_s else 0.0), reasons[0]

    async def _become_ready(self) -> str:
        """Return "" once the replica serves the newest weights, or why it will not."""
        began_s = monotonic_s()
        if not await self._wait_healthy():
            return f"did not answer /health within {self._limits.start_s:g} s ([serve] start_limit_s)"
        if trouble := await self._first_request():
            return trouble
        answered_s = monotonic_s() - began_s
        trouble = "no answer"
        told_s = 0.0
        with anyio.move_on_after(self._limits.start_s):
            while True:
                try:
                    label = await self._bring_current()
                except WeightUpdateError as exc:
                    if not exc.served:
                        return f"could not be brought to the current weights: {exc}"
                    trouble = str(exc)
                except (LightningBusError, OSError, httpx.HTTPError) as exc:
                    if isinstance(exc, CallError | StopProcess) and not isinstance(exc, BusyError):
                        raise
                    trouble = f"{type(exc).__name__} {exc}".strip()
                else:
                    seconds = monotonic_s() - began_s
                    log.info("%s is ready with weights %s: %.0f s to start, %.1f s more to be current", self.name, label, answered_s, seconds - answered_s)  # fmt: skip
                    return ""
                if monotonic_s() - told_s > TELL_S:
                    told_s = monotonic_s()
                    log.warning("%s cannot be brought to the current weights yet: %s", self.name, trouble)
                await anyio.sleep(self._limits.probe_s)
        return f"could not be brought to the current weights within {self._limits.start_s:g} s: {trouble}"

    async def _first_request(self) -> str:
        """Have the replica generate two tokens; return "" once it has answered, or why it did not.

        vLLM may compile when it is first asked, for minutes on a busy machine, and answers nothing else meanwhile. One
        that is watched would be called silent for it and started again, to compile again.
        """
        body = {"token_ids": [1], "sampling_params": {"max_tokens": 2, "logprobs": 0, "seed": 1}}
        url = f"{self.url}/inference/v1/generate"
        try:
            response = await self._http.post(url, json=body, timeout=self._limits.start_s)
        except httpx.HTTPError as exc:
            return f"did not answer its first request: {type(exc).__name__} {exc} (limit {self._limits.start_s:g} s)"
        if response.status_code != 200:  # not for us to judge: what it cannot do will show
            log.warning("%s answered its first request with %d: %.400s", self.name, response.status_code, response.text)
        return ""

    async def _wait_healthy(self) -> bool:
        began_s = told_s = monotonic_s()
        with anyio.move_on_after(self._limits.start_s):
            while True:
                if await self._get("/health") is not None:
                    return True
                if monotonic_s() - told_s > TELL_S:
                    told_s = monotonic_s()
                    lines = self._log_lines()
                    log.info("%s: starting for %.0f s: %s", self.name, told_s - began_s, lines[-1] if lines else "…")
                await anyio.sleep(min(0.2, self._limits.probe_s))
        return False

    async def _watch(self) -> str:
        """Return why a replica that was ready must be started again."""
        silent_s = 0.0
        turn_max_s = self._limits.probe_s + 3 * min(LOOK_S, self._limits.silent_s)
        paused_since_s: float | None = None
        while True:
            began_s = monotonic_s()
            await anyio.sleep(self._limits.probe_s)
            try:
                status = (await self._ask("GET", "/health")).status_code
                label = str((await self._ask("GET", "/weight_info")).json()["weight_version"])
                paused = bool((await self._ask("GET", "/is_paused")).json()["is_paused"])
            except (httpx.HTTPError, ValueError, LookupError, TypeError) as exc:
                # One whose engine died closes its door and then waits for calls that nobody will answer.
                shut = isinstance(exc, httpx.ConnectError)
                # Longer than its questions may take we were not listening but stood still ourselves.
                silent_s += min(monotonic_s() - began_s, turn_max_s)
                if silent_s > (min(SHUT_S, self._limits.silent_s) if shut else self._limits.silent_s):
                    return f"gave no answer for {silent_s:.0f} s ({type(exc).__name__} {exc})"
                continue
            silent_s, heard_s = 0.0, monotonic_s()
            if status != 200:
                return f"answers {status} at /health"
            if label == UNFIT:
                return "was marked unfit: a push broke off while it overwrote the weights"
            if not paused:
                paused_since_s = None
                continue
            paused_since_s = paused_since_s or heard_s
            if heard_s - paused_since_s > self._limits.paused_s:
                stood = f"was paused for {heard_s - paused_since_s:.0f} s and nobody resumed it"
                if not self._resumable:
                    return stood
                log.warning("%s %s: going on with weights %s. Did the trainer die in a push?", self.name, stood, label)
                try:
                    await self._ask("POST", "/resume")
                    paused_since_s = None
                except httpx.HTTPError as exc:
                    return f"{stood}; it does not resume either: {exc}"

    # -- helpers ----------------------------------------------------------------------------------------------------

    async def _get(self, route: str) -> httpx.Response | None:
        try:
            response = await self._ask("GET", route)
        except httpx.HTTPError:
            return None
        return response if response.status_code == 200 else None

    async def _ask(self, method: str, route: str) -> httpx.Response:
        # A look that is never answered must not keep us from looking again: then the door may be shut.
        limit_s = self._limits.silent_s if method == "POST" else min(LOOK_S, self._limits.silent_s)
        response = await self._http.request(method, self.url + route, timeout=limit_s)
        if route != "/health":
            response.raise_for_status()
        return response

    def _log_lines(self) -> list[str]:
        if self._log_path is None:
            return []
        try:
            with self._log_path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        except OSError:
            return []

    def _tail(self) -> str:
        if self._log_path is None:
            return "Its output is above."
        return "\n".join([f"The end of {self._log_path}:", *(f"  {line}" for line in self._log_lines()[-TAIL_LINES:])])


def _in_use(url: str) -> str:
    """Why a replica cannot listen there, or "". Whoever answers on its port would be taken for it."""
    where = urlsplit(url)
    assert where.hostname is not None
    try:
        family, kind, proto, _, address = socket.getaddrinfo(where.hostname, where.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
            probe.bind(address)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            return f"cannot listen: {where.netloc} is in use by another process. Stop that one, or change [serve] bind"
        return f"cannot listen on {where.netloc}: {exc}. Change [serve] bind"
    return ""


async def _end(process: Process) -> None:
    """End a replica and all its processes."""
    with anyio.CancelScope(shield=True):
        if process.returncode is None:
            process.terminate()
            with anyio.move_on_after(2 * guard.GRACE_S):
                await process.wait()
        # The guard has done this, unless something killed the guard.
        await anyio.to_thread.run_sync(guard.kill_session, process.pid)
        await process.wait()
        await process.aclose()
