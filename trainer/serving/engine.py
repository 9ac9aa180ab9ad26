"""A small serving engine over any `transformers` causal model: continuous batching, exact log-probs, live weight swaps.

One thread owns the model (`loop.py`); callers on any thread or event loop only queue things and are called back.
What holds:

- A request joins or leaves between two steps; who shares its batch changes neither its tokens (given a seed, or
  greedily) nor its log-probs beyond float32 rounding.
- Weights change only between two steps, all tensors at once, after everything about them was checked. Requests in
  flight go on under the new ones with the keys and values they have; each token knows which weights made it.
- The queue is bounded, a cancelled request frees its slot at the next step, and a step that fails loses the requests
  of its batch and nothing else.

    engine = Engine(model, tokenizer, version="0")
    completion = await engine.generate(prompt_ids, SamplingParams(temperature=1.0, max_tokens=48))
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trainer.serving.batch import Batch
from trainer.serving.errors import BadRequestError, WeightUpdateError
from trainer.serving.loop import EngineStatistics, PauseMode, StepLoop
from trainer.serving.request import Completion, Delta, Request
from trainer.serving.sampling import SamplingParams
from trainer.serving.text import Detokenizer, StopStrings
from trainer.serving.weights import StagedWeights, WeightFile, checksums, read_weights, served_tensors

CONTEXT_TOKENS_DEFAULT = 4096  # what a slot may grow to when the model's own limit is larger


class Engine:
    """Serves one model. Thread-safe; close it, or use it as a context manager.

    version             label of the weights the model holds now
    rows_max            requests that run at once; the others wait
    waiting_max         requests that wait before QueueFullError
    retained_max        finished conversations whose keys and values are kept for what continues them
    context_tokens      prompt plus completion; None is the model's own limit, at most 4096
    prefill_tokens_max  prompt tokens computed in one pass, padding included: bounds how long others stand still
    torch_threads       of the engine's thread; None leaves torch's choice
    seed                for requests without their own; None draws one
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        version: str = "0",
        rows_max: int = 64,
        waiting_max: int = 1024,
        retained_max: int = 64,
        context_tokens: int | None = None,
        prefill_tokens_max: int = 4096,
        torch_threads: int | None = None,
        seed: int | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.end_ids = end_ids(model, tokenizer)
        own_limit = int(getattr(model.config.get_text_config(), "max_position_embeddings", CONTEXT_TOKENS_DEFAULT))
        self.context_tokens = context_tokens or min(own_limit, CONTEXT_TOKENS_DEFAULT)
        _check_attention(model, self.context_tokens)
        batch = Batch(
            model,
            rows_max=rows_max,
            retained_max=retained_max,
            context_tokens=self.context_tokens,
            prefill_tokens_max=prefill_tokens_max,
            end_ids=self.end_ids,
        )
        self._tensors = served_tensors(model)
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._engine_tokenizer = copy.deepcopy(tokenizer)  # the engine thread's own: see text.py
        self._seeds = random.Random(seed)
        self._update_open = False
        self._staged: StagedWeights | None = None
        self._loop = StepLoop(
            batch, self._tensors, version=version, waiting_max=waiting_max, torch_threads=torch_threads
        )

    @classmethod
    def from_directory(cls, directory: Path, **options: Any) -> Engine:
        """An engine over a Hugging Face model directory, in float32 on the CPU; options as for the class."""
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return cls(model, AutoTokenizer.from_pretrained(directory), **options)

    # --- requests ---

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, cache_salt: str | None = None
    ) -> Completion:
        """The completion of one prompt. Cancelling the caller frees the slot.

        Raises BadRequestError (does not fit), QueueFullError (try later), EngineFailedError (the step failed).
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Completion | Exception] = loop.create_future()

        def on_done(result: Completion | Exception) -> None:
            _tell(loop, lambda: None if done.done() else done.set_result(result))

        request = self.submit(prompt_ids, params, cache_salt=cache_salt, on_done=on_done)
        try:
            result = await done
        except asyncio.CancelledError:
            self.cancel(request)
            raise
        if isinstance(result, Exception):
            raise result
        return result

    async def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, cache_salt: str | None = None
    ) -> AsyncIterator[Delta | Completion]:
        """The tokens of one prompt as they come, then the Completion. Closing the iterator frees the slot."""
        loop = asyncio.get_running_loop()
        arrivals: asyncio.Queue[Delta | Completion | Exception] = asyncio.Queue()

        def put(item: Delta | Completion | Exception) -> None:
            _tell(loop, lambda: arrivals.put_nowait(item))

        request = self.submit(prompt_ids, params, cache_salt=cache_salt, on_tokens=put, on_done=put)
        try:
            while True:
                item = await arrivals.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if isinstance(item, Completion):
                    return
        finally:
            self.cancel(request)

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        on_done: Callable[[Completion | Exception], None],
        on_tokens: Callable[[Delta], None] | None = None,
        cache_salt: str | None = None,
    ) -> Request:
        """Queue one prompt. Exactly one on_done follows, from the engine's thread; `cancel` takes the request back.

        A seeded request draws the same tokens whenever weights and prompt are the same. Raises as `generate` does.
        """
        request = Request(
            prompt_ids=np.asarray(prompt_ids, dtype=np.int32),
            params=params,
            tokens_max=self.tokens_max(prompt_ids, params),
            generator=random.Random(params.seed if params.seed is not None else self._seeds.getrandbits(64)),
            on_tokens=on_tokens,
            on_done=on_done,
            cache_salt=cache_salt,
        )
        if params.stop:
            request.stop = StopStrings(params.stop)
            request.detokenizer = Detokenizer(self._engine_tokenizer)
        self._loop.submit(request)
        return request

    def cancel(self, request: Request) -> None:
        """Give the request up; its slot is free before the next step. No effect on a finished one."""
        self._loop.cancel(request)

    def tokens_max(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        """How many tokens a completion of this prompt may have. Raises BadRequestError when prompt or params do not fit."""
        if len(prompt_ids) == 0:
            raise BadRequestError("the prompt holds no tokens; send at least one", param="prompt")
        self.check_ids(prompt_ids, param="prompt")
        room = self.context_tokens - len(prompt_ids)
        if room < 1 or (params.max_tokens or 1) > room:
            raise BadRequestError(
                f"This model's maximum context length is {self.context_tokens} tokens. The prompt has "
                f"{len(prompt_ids)} and max_tokens is {params.max_tokens}. Shorten the prompt or lower max_tokens.",
                param="max_tokens" if room >= 1 else "messages",
            )
        return params.max_tokens or room

    def check_ids(self, token_ids: Sequence[int], *, param: str) -> None:
        """Raise BadRequestError, naming `param`, when an id is none of the model's."""
        if len(token_ids) and (min(token_ids) < 0 or max(token_ids) >= self._vocabulary):
            raise BadRequestError(
                f"the {param} holds token id {max(token_ids) if min(token_ids) >= 0 else min(token_ids)}; "
                f"ids of this model run from 0 to {self._vocabulary - 1}",
                param=param,
            )

    # --- control ---

    async def pause(self, mode: PauseMode = "abort") -> None:
        """Stand still between two steps; returns once it does. New requests are taken in and wait.

        abort  in-flight and waiting requests end now with finish_reason "abort" and the tokens they have
        wait   in-flight requests finish first; waiting ones stay
        keep   in-flight requests freeze and go on at `resume`
        """
        await asyncio.wrap_future(self._loop.pause(mode))

    async def resume(self) -> None:
        """Go on. No effect on an engine that is not paused.

        An update that was opened and never finished is abandoned: nothing of it has been overwritten, and whoever
        pushed it may be dead. So after a resume the next push always finds the door open.
        """
        self.abandon_weight_update()
        await asyncio.wrap_future(self._loop.resume())

    @property
    def version(self) -> str:
        """The label of the weights that the next step will use."""
        return self._loop.version

    @property
    def is_paused(self) -> bool:
        return self._loop.paused

    @property
    def healthy(self) -> bool:
        """False once several steps in a row have failed, or the engine's thread is gone."""
        return self._loop.healthy

    def statistics(self) -> EngineStatistics:
        return self._loop.statistics()

    def close(self) -> None:
        """Stop the thread; requests in flight or waiting end with EngineFailedError."""
        self._loop.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- weights:  start → update → finish, in this order ---

    def start_weight_update(self) -> None:
        """Open an update. Raises WeightUpdateError when one is open already."""
        if self._update_open:
            raise WeightUpdateError("a weight update is already open. Call /finish_weight_update first.")
        self._update_open = True
        self._staged = None

    async def update_weights(self, file: WeightFile) -> None:
        """Read and check the file while generation goes on or stands still; nothing is overwritten yet.

        A file that does not fit (names, shapes, dtypes, what it builds on, checksum) ends the update with
        WeightsRefusedError and the old weights keep serving.
        """
        if not self._update_open:
            raise WeightUpdateError("no weight update is open. Call /start_weight_update first.")
        try:
            self._staged = await asyncio.to_thread(read_weights, file, self._tensors, self.version)
        except BaseException:
            self._update_open = False
            raise

    def abandon_weight_update(self) -> None:
        """Forget an update that was opened and not finished, if there is one; the next finds the door open."""
        self._update_open, self._staged = False, None

    async def finish_weight_update(self, version: str | None) -> None:
        """Copy the checked tensors in between two steps; from then on tokens carry `version` (None keeps the label)."""
        if not self._update_open:
            raise WeightUpdateError("no weight update is open. Call /start_weight_update first.")
        staged, self._staged, self._update_open = self._staged, None, False
        if staged is None:
            raise WeightUpdateError("the open weight update brought no weights. Call /update_weights before finishing.")
        staged.check()
        await asyncio.wrap_future(self._loop.swap(staged.tensors, version))
        staged.check()

    async def set_version(self, version: str) -> None:
        """Change the label without changing weights."""

        def command() -> None:
            self._loop.version = version

        await asyncio.wrap_future(self._loop.call(command))

    async def weight_checksums(self) -> dict[str, str]:
        """SHA-256 of every tensor served, by name, taken between two steps."""
        return await asyncio.wrap_future(self._loop.call(lambda: checksums(self._tensors)))


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        # The caller's loop is closed: nobody is left to tell.
        pass


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What ends an answer: the model's own say, else the tokenizer's."""
    configured = cast("int | list[int] | None", getattr(model.generation_config, "eos_token_id", None))
    if configured is None:
        configured = cast("int | None", tokenizer.eos_token_id)
    if configured is None:
        return frozenset()
    return frozenset(configured if isinstance(configured, list) else [configured])


def _check_attention(model: PreTrainedModel, context_tokens: int) -> None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    windowed = window is not None and getattr(config, "use_sliding_window", True) and window < context_tokens
    if kinds - {"full_attention", "sliding_attention"} or windowed:
        raise ValueError(
            f"{type(model).__name__} has layers of kind {sorted(kinds)} with sliding_window={window}; this engine "
            f"caches full attention only. Lower context_tokens (now {context_tokens}) to the window, or serve the "
            "model with vLLM."
        )
