"""The engine's thread: carry out commands, let waiting requests join, give every running one a token, let the finished go.

What holds: only this thread touches the batch and the model; whatever another thread wants done to them is a command
that runs between two steps; each request submitted here gets exactly one `on_done`, whatever fails.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from trainer.serving.batch import Batch
from trainer.serving.errors import EngineFailedError, QueueFullError
from trainer.serving.request import Request

FAILED_STEPS_MAX = 3  # in a row, before the engine calls itself unhealthy

PauseMode = Literal["abort", "wait", "keep"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """Counted since the start; running and waiting are of this moment."""

    running: int
    waiting: int
    prompt_tokens: int
    generation_tokens: int
    prefix_tokens_reused: int
    steps: int
    failed_steps: int
    weight_updates: int


class StepLoop:
    """Runs a batch on a thread of its own. All methods may be called from any thread and return at once."""

    def __init__(
        self,
        batch: Batch,
        tensors: Mapping[str, Tensor],
        *,
        version: str,
        waiting_max: int,
        torch_threads: int | None,
    ) -> None:
        self.version = version
        self.paused = False
        self._batch = batch
        self._tensors = tensors
        self._waiting_max = waiting_max
        self._torch_threads = torch_threads
        self._wake = threading.Condition()
        # Guarded by _wake: what other threads hand over.
        self._inbox: list[Request] = []
        self._commands: list[Callable[[], None]] = []
        self._any_cancelled = False
        self._closed = False
        # This thread's alone from here on; others read single values at most.
        self._waiting: deque[Request] = deque()
        self._draining: list[Future[None]] = []
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._steps = 0
        self._failed_steps = 0
        self._failed_in_a_row = 0
        self._weight_updates = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises QueueFullError or EngineFailedError (closed), having queued nothing."""
        with self._wake:
            self._check_open()
            waiting = len(self._inbox) + len(self._waiting)
            if waiting >= self._waiting_max:
                raise QueueFullError(waiting, retry_after_s=1)
            self._inbox.append(request)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        """Give a request up; its slot is free before the next step. No effect on a finished one."""
        with self._wake:
            request.cancelled = True
            self._any_cancelled = True
            self._wake.notify()

    def call(self, command: Callable[[], T]) -> Future[T]:
        """Run `command` between two steps; the future gets what it returns or raises."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(command())
            except Exception as exc:
                done.set_exception(exc)

        with self._wake:
            self._check_open()
            self._commands.append(run)
            self._wake.notify()
        return done

    def pause(self, mode: PauseMode) -> Future[None]:
        """Stand still; the future is done once the engine does. See Engine.pause for the modes."""
        done: Future[None] = Future()

        def command() -> None:
            if mode == "abort":
                aborted = self._batch.leave(lambda _: True) + list(self._waiting)
                self._waiting.clear()
                for request in aborted:
                    self._finish(request)
            self._draining.append(done)
            if mode != "wait" or not self._batch.rows or self.paused:
                self._stand_still()

        self.call(command)
        return done

    def resume(self) -> Future[None]:
        """Go on; a pause still waiting for requests to finish is over too."""

        def command() -> None:
            self._stand_still()
            self.paused = False

        return self.call(command)

    def swap(self, tensors: Mapping[str, Tensor], version: str | None) -> Future[None]:
        """Overwrite these of the served tensors between two steps; None keeps the version's label."""

        def command() -> None:
            for name, tensor in tensors.items():
                self._tensors[name].copy_(tensor)
            self._batch.weights_changed()
            self._weight_updates += 1
            if version is not None:
                self.version = version

        return self.call(command)

    def close(self) -> None:
        """Stop the thread and wait for its end; requests in flight or waiting end with EngineFailedError."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and self._failed_in_a_row < FAILED_STEPS_MAX

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            running=len(self._batch.rows),
            waiting=len(self._inbox) + len(self._waiting),
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_tokens_reused=self._batch.prefix_tokens_reused,
            steps=self._steps,
            failed_steps=self._failed_steps,
            weight_updates=self._weight_updates,
        )

    # --- on the thread ---

    @torch.inference_mode()
    def _run(self) -> None:
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)
        while True:
            with self._wake:
                while not self._has_work():
                    self._wake.wait()
                if self._closed:
                    break
                commands, self._commands = self._commands, []
                self._waiting.extend(self._inbox)
                self._inbox.clear()
                any_cancelled, self._any_cancelled = self._any_cancelled, False
            if any_cancelled:
                self._drop_cancelled()
            for command in commands:
                command()
            if not self.paused:
                self._step()
        self._fail([*self._batch.reset(), *self._waiting, *self._inbox], "the engine was closed")
        for command in self._commands:
            command()
        self._stand_still()

    def _has_work(self) -> bool:
        if self._closed or self._commands or self._any_cancelled:
            return True
        return not self.paused and bool(self._batch.rows or self._waiting or self._inbox)

    def _step(self) -> None:
        batch = self._batch
        try:
            if not self._draining:
                while self._waiting and batch.join(self._waiting, self.version):
                    self._finish_rows()
            if batch.rows:
                batch.step(self.version)
                self._steps += 1
            self._finish_rows()
            self._failed_in_a_row = 0
        except Exception as exc:  # whatever the model raises: its requests are lost, the engine is not
            self._failed_steps += 1
            self._failed_in_a_row += 1
            self._fail(batch.reset(), f"a forward pass failed: {type(exc).__name__}: {exc}")
        if self._draining and not batch.rows:
            self._stand_still()

    def _finish_rows(self) -> None:
        for request in self._batch.leave(lambda row: row.finish_reason is not None):
            self._finish(request)

    def _drop_cancelled(self) -> None:
        gone = self._batch.leave(lambda row: row.cancelled)
        gone += [request for request in self._waiting if request.cancelled]
        self._waiting = deque(request for request in self._waiting if not request.cancelled)
        for request in gone:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        self._prompt_tokens += len(request.prompt_ids)
        self._generation_tokens += len(request.token_ids)
        request.on_done(request.completion())

    def _fail(self, requests: Sequence[Request], reason: str) -> None:
        for request in requests:
            lost = f"The request was lost after {len(request.token_ids)} tokens; send it again."
            request.on_done(EngineFailedError(f"{reason}. {lost}"))

    def _stand_still(self) -> None:
        self.paused = True
        draining, self._draining = self._draining, []
        for done in draining:
            done.set_result(None)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineFailedError("the engine is closed. Start it again and send the request once more.")
