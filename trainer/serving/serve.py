"""`serve`, whichever engine it is: make the first policy, take over the newest weights, serve until stopped.

    embedded   one engine in this process; scripted models answer beside the policy at the same address
    vLLM       one keeper a replica (keeper.py); scripted models get an address of their own

What always holds: nothing answers as ready before it serves the newest published weights, and a pause that a dead
trainer left behind ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lightning_bus import BrokenError, ConfigError, monotonic_s, serve_http
from trainer.config import PolicySection, ServeSection, replica_urls, scripted_bind, scripted_url
from trainer.loading import import_named
from trainer.policy.model import check_weights, move_into_place
from trainer.refusals import as_config_error, refuse_directory
from trainer.serving.adapters import base_name
from trainer.serving.app import build_app
from trainer.serving.chat import Script
from trainer.serving.current import FIRST, Weights
from trainer.serving.engine import Engine
from trainer.serving.errors import WeightsRefusedError
from trainer.serving.keeper import Keeper, Limits
from trainer.serving.remote import CALL_LIMIT_S, UNFIT, RemoteEngine
from trainer.serving.scripted import build_scripted_app
from trainer.serving.vllm import find_vllm, vllm_launch

LOOK_S = 1.0  # between two looks at an embedded engine

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Serving:
    """What is served, and on whose behalf.

    directory  of the model
    name       what callers name it
    weights    which weights it has to hold; None: those in `directory`, under the label "0"
    seed       for requests without their own
    logs       directory for the output of vLLM; None: our own stderr
    push_limit_s  of each step of a push
    """

    directory: Path
    name: str = "policy"
    weights: Weights | None = None
    seed: int = 0
    logs: Path | None = None
    push_limit_s: float = 60.0

    @property
    def paused_limit_s(self) -> float:
        """How long a push may hold a pause: start, update and finish, each at its limit."""
        return 3 * self.push_limit_s

    @property
    def log_name(self) -> str:
        """Of vLLM's log; a pinned version beside the newest has one of its own."""
        return "serve-vllm" if self.weights is None or self.weights.pinned is None else f"serve-vllm-{self.name}"


async def serve_policy(section: ServeSection, what: Serving, *, started: Callable[[str], None] | None = None) -> None:
    """Serve until cancelled.

    started  is called with an engine's URL whenever that has become ready

    Raises ConfigError for what cannot work, and StopProcess when no replica can be kept alive.
    """
    scripts = load_scripts(section.scripted)
    if what.weights is not None and what.weights.pinned is not None:
        await what.weights.wanted()  # one that does not exist is better known now than when a large model has started
    if section.engine == "embedded":
        await _serve_embedded(section, what, scripts, started)
    else:
        await _serve_vllm(section, what, scripts, started)


def check_serving(section: ServeSection, upstreams: Iterable[str] | None = None) -> None:
    """Raise ConfigError for values of [serve] that contradict each other, or the gateway's upstreams.

    upstreams  [gateway] upstreams of a run: every replica, and the scripted models beside vLLM, must be among them
    """
    if section.engine == "embedded":
        default = ServeSection()
        for key in ("replicas", "dtype", "tensor_parallel", "data_parallel", "lora_rank_max", "arguments"):
            if getattr(section, key) != getattr(default, key):
                raise ConfigError(
                    f"serve.{key} = {getattr(section, key)!r} is for vLLM; the embedded engine is one engine in float32 "
                    f'on the CPU. Leave {key} out, or set [serve] engine = "vllm".'
                )
        if section.transfer == "nccl":
            raise ConfigError(
                'serve.transfer = "nccl" is for vLLM on GPUs. The embedded engine takes "shm" and "file".'
            )
    if upstreams is None:
        return
    urls = replica_urls(section)
    if section.engine == "vllm" and section.scripted:
        urls.append(scripted_url(section))
    # By port alone: the gateway may be on another machine and know this one by another name.
    known = {urlsplit(upstream).port for upstream in upstreams}
    missing = [url for url in urls if urlsplit(url).port not in known]
    if missing:
        raise ConfigError(
            f"[serve] will listen on {', '.join(urls)}, but [gateway] upstreams does not name {', '.join(missing)}, so "
            f"no call would ever go there. Write upstreams = {urls}."
        )


def ensure_policy(policy: PolicySection, run_directory: Path, seed: int) -> Path:
    """Return the directory of the first policy, `<run>/policy`, having made it if it was not there.

    Written beside and moved into place, so that a trainer that waits for it never reads half a model.
    """
    target = run_directory / "policy"
    if not target.exists():
        if ":" not in policy.model:
            return _linked(Path(policy.model), target)
        build = import_named(policy.model, "policy.model")
        partial = target.with_name(".policy.partial")
        partial.mkdir(parents=True, exist_ok=True)
        build(partial, seed)
        move_into_place(partial, target)
    return target


def load_scripts(named: Mapping[str, str]) -> dict[str, Script]:
    """Return the functions of [serve] scripted by model name."""
    return {name: import_named(source, f"serve.scripted.{name}") for name, source in named.items()}


# -- the embedded engine ------------------------------------------------------------------------------------------


async def _serve_embedded(
    section: ServeSection, what: Serving, scripts: Mapping[str, Script], started: Callable[[str], None] | None
) -> None:
    model = await anyio.to_thread.run_sync(load_served, what.directory)
    try:
        label = FIRST if what.weights is None else await what.weights.load_into(model)
    except WeightsRefusedError as exc:
        raise ConfigError(f"the run's newest weights cannot be served: {exc}") from exc
    with Engine(
        model,
        AutoTokenizer.from_pretrained(what.directory),
        version=label,
        rows_max=section.slots_max,
        waiting_max=section.waiting_max,
        context_tokens=section.context_tokens or None,
        torch_threads=section.torch_threads,
        seed=what.seed,
    ) as engine:
        app = build_app(engine, model_name=what.name, scripted=scripts)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch_engine, engine, what.paused_limit_s)
            await serve_http(app, section.bind, key="serve.bind", started=started)


def load_served(directory: Path) -> PreTrainedModel:
    """Load the model as the embedded engine serves it: float32, with the attention that transformers chooses."""
    with as_config_error("this model cannot be served"):
        check_weights(directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


async def watch_engine(engine: Engine, paused_limit_s: float) -> None:
    """Resume an engine that a trainer left paused. Raises BrokenError, for a restart, once it was marked unfit."""
    paused_since_s: float | None = None
    while True:
        await anyio.sleep(min(LOOK_S, paused_limit_s))
        if engine.version == UNFIT:
            raise BrokenError("this engine was marked unfit: a push broke off while it overwrote the weights")
        now_s = monotonic_s()
        paused_since_s = (paused_since_s or now_s) if engine.is_paused else None
        if paused_since_s is not None and now_s - paused_since_s > paused_limit_s:
            log.warning("paused for %.0f s and nobody resumed: going on. Did the trainer die?", now_s - paused_since_s)
            await engine.resume()


# -- vLLM ---------------------------------------------------------------------------------------------------------


async def _serve_vllm(
    section: ServeSection, what: Serving, scripts: Mapping[str, Script], started: Callable[[str], None] | None
) -> None:
    installed = await anyio.to_thread.run_sync(find_vllm, section)
    log.info("vLLM %s for %s, from %s", installed.version, "CPUs" if installed.cpu else "CUDA", installed.python)
    limits = Limits(start_s=section.start_limit_s, silent_s=what.push_limit_s, paused_s=what.paused_limit_s)
    keepers: list[Keeper] = []

    async with httpx.AsyncClient(trust_env=False) as http, anyio.create_task_group() as tasks:
        for number in range(section.replicas):
            launch = vllm_launch(
                section,
                what.directory,
                name=base_name(what.name) if what.weights is not None and what.weights.adapter else what.name,
                installed=installed,
                replica=number,
                seed=what.seed,
            )
            engine = RemoteEngine(http, launch.url, limit_s=max(what.push_limit_s, CALL_LIMIT_S))
            keeper = Keeper(
                number + 1,
                launch,
                http,
                bring_current=partial(_bring, what.weights, engine, section),
                log_path=None if what.logs is None else what.logs / f"{what.log_name}-{number + 1}.log",
                others_ready=lambda me=number: any(one.ready for one in keepers if one is not keepers[me]),
                on_ready=started,
                resumable=section.transfer != "nccl",
                limits=limits,
            )
            keepers.append(keeper)
        for keeper in keepers:
            tasks.start_soon(keeper.run)
        if scripts:
            app = await anyio.to_thread.run_sync(build_scripted_app, what.directory, scripts)
            tasks.start_soon(partial(serve_http, app, scripted_bind(section), key="serve.scripted_bind"))


async def _bring(weights: Weights | None, engine: RemoteEngine, section: ServeSection) -> str:
    if weights is not None:
        return await weights.bring(engine, section)
    await engine.set_label(FIRST)
    return FIRST


def _linked(model: Path, target: Path) -> Path:
    """Make an existing model directory the run's first policy, without copying it."""
    if not (model / "config.json").is_file():
        raise ConfigError(
            f"policy.model = {str(model)!r} is neither MODULE:FUNCTION nor a model directory (no config.json in it). A model "
            "of a hub is downloaded first: hf download OWNER/NAME --local-dir NAME"
        )
    refuse_directory(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(model.resolve(), target_is_directory=True)
    return target
