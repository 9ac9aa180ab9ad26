"""New LoRA adapters for engines that run with their base: vLLM reads each from a directory by itself.

    pause → load_lora_adapter → label → resume

What always holds: the base is not touched; an engine that does not take an adapter goes on with the one that it had; one
that may have it and could not be given its label is left standing, marked unfit where that can be said.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
from torch import Tensor

from trainer.policy.lora import write_adapter
from trainer.serving.errors import EngineAnsweredError, EngineSilentError, WeightsRefusedError, WeightUpdateError
from trainer.serving.push import AdapterOffer, PushTimes, Target, mark_unfit
from trainer.serving.remote import PushMode, RemoteEngine

ADAPTERS_KEPT = 4  # directories: the one that is served, the next, and what a slow replica may still be reading


class AdapterTransfer:
    """Through a directory for each version's LoRA adapter, which all engines' machines see.

    name    of the model that answers with it: what agents call. vLLM serves the base under another (`base_name`), because
            it refuses an adapter of the same name
    config  what peft's adapter_config.json says
    """

    together = False

    def __init__(self, directory: Path, name: str, config: Mapping[str, Any]) -> None:
        self._directory = directory
        self._name = name
        self._config = config

    def offer(self, tensors: Mapping[str, Tensor], version: str, *, frozen: Collection[str] = ()) -> AdapterOffer:
        """tensors  the adapter's, by peft's names."""
        if odd := sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()):
            raise WeightsRefusedError(f"{len(odd)} tensors of adapter {version} are not finite, {odd[0]} among them")
        # A path of its own: vLLM's prefix cache knows an adapter by the path that it came from.
        directory = self._directory / version
        write_adapter(directory, self._config, tensors)
        for old in sorted(self._directory.iterdir(), key=lambda path: path.stat().st_mtime)[:-ADAPTERS_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        return AdapterOffer(version, self._name, directory)

    def close(self) -> None:
        pass  # a replica that restarts may still read the newest


def base_name(name: str) -> str:
    """What the base is called where an adapter answers to `name`. Nobody calls it."""
    return f"{name}-base"


async def push_adapter(
    engine: RemoteEngine, name: str, directory: Path, version: str, *, mode: PushMode = "keep"
) -> PushTimes:
    """Make model `name` answer with the LoRA adapter in this directory, which the engine's machine must see.

    mode  "keep" lets calls in flight finish first, as "drain" does

    An adapter is megabytes where a model is gigabytes; vLLM reads it by itself and the base model is not touched.
    Raises WeightsRefusedError when the engine does not take it; it goes on with the adapter that it had. Raises
    WeightUpdateError when it cannot be told; where it may have the adapter already, it is left standing, because it
    would answer under the wrong label.
    """
    began = time.perf_counter()
    # A call in flight would go on with the old adapter under the new label: vLLM 0.32 loads what a call began with again
    # at each of its steps, in place of what has the name by then. So none is kept: they finish first.
    await engine.pause("drain" if mode == "keep" else mode)
    standing = time.perf_counter()
    with anyio.CancelScope(shield=True):
        try:
            await engine.load_adapter(name, str(directory))
        except EngineAnsweredError as exc:
            await engine.resume()
            raise WeightsRefusedError(f"{exc}. It goes on with the adapter that it had.", served=True) from exc
        except EngineSilentError as exc:
            raise WeightUpdateError(str(exc), served=False) from exc
        try:
            await engine.set_label(version)
        except WeightUpdateError as exc:
            raise WeightUpdateError(str(exc), served=False) from exc
        await engine.resume()
    ended = time.perf_counter()
    return PushTimes(ended - began, (ended - standing) * 1e3)


async def push_adapters(
    offer: AdapterOffer, targets: Sequence[Target], *, mode: PushMode = "keep"
) -> dict[str, PushTimes | WeightUpdateError]:
    """Make the engines answer with this adapter; return what came of it by URL, as `push` does."""
    results: dict[str, PushTimes | WeightUpdateError] = {}

    async def one(target: Target) -> None:
        url = target.engine.url
        try:
            results[url] = await push_adapter(target.engine, offer.name, offer.directory, offer.version, mode=mode)
        except WeightUpdateError as exc:
            kind = WeightsRefusedError if isinstance(exc, WeightsRefusedError) else WeightUpdateError
            results[url] = kind(f"pushing adapter {offer.version} to {url} failed: {exc}", served=exc.served)
            if not exc.served:
                await mark_unfit(target.engine)

    async with anyio.create_task_group() as tasks:
        for target in targets:
            tasks.start_soon(one, target)
    return results
