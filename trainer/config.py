"""[policy], [serve] and [train] of RUN.toml. No torch here: every process of a run reads this file.

A comment at a key says what it trades. Defaults are for a small policy on a laptop.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from lightning_bus import ConfigError, Section, client_address

Count = Annotated[int, msgspec.Meta(ge=1)]
CountOrNone = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]

PORT_MAX = 65_535


class PolicySection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[policy]: the model that agents call and training improves."""

    model: str  # a Hugging Face model directory, or MODULE:FUNCTION that writes one (directory, seed)
    name: str = "policy"  # what agents call it


class ServeSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[serve]: the engines behind the gateway, and how new weights reach them."""

    engine: Literal["embedded", "vllm"] = "embedded"
    bind: str = "127.0.0.1:4752"  # further replicas listen on the ports that follow
    replicas: Count = 1  # engines with the same weights; each needs its own line in [gateway] upstreams
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights served; embedded: float32
    context_tokens: CountOrNone = 0  # prompt plus completion; 0: the model's own limit
    slots_max: Count = 64  # requests generated together
    waiting_max: Count = 1024  # requests that may queue; more are told to come back (embedded)
    torch_threads: Count = 1  # the trainer wants the other core
    scripted: dict[str, str] = msgspec.field(
        default_factory=dict
    )  # further models that are scripts: name = "module:function"
    scripted_bind: str = ""  # where they are served when the engine is vLLM; default: the port after the last replica
    # How weights travel: nccl between GPUs, shm on one machine, file through a directory that all machines share.
    transfer: Literal["shm", "file", "nccl"] = "shm"
    transfer_directory: str = ""  # of shm and file; default: shared memory, <run>/weights
    # What follows is vLLM's.
    python: str = ".venv-vllm/bin/python"  # of the environment that vLLM is installed in; `make vllm` makes this one
    tensor_parallel: Count = 1
    data_parallel: Count = 1
    # GPUs of the replicas in turn, tensor_parallel × data_parallel for each: [1, 2] leaves GPU 0 to the trainer, and
    # [0, 0] shares one between two replicas (with a smaller --gpu-memory-utilization). Default: all, in order.
    devices: list[CountOrNone] = msgspec.field(default_factory=list)
    tool_parser: str = "hermes"  # turns the policy's text into tool calls; empty: none
    reasoning_parser: str = ""
    lora_rank_max: CountOrNone = 0  # serve LoRA adapters up to this rank; 0: none
    cache_bytes: Count = 1 << 30  # for keys and values, where vLLM runs on a CPU
    # Further arguments of `vllm serve`, such as ["--gpu-memory-utilization", "0.8"].
    arguments: list[str] = msgspec.field(default_factory=list)
    start_limit_s: Positive = 600.0  # from the start of a replica until it answers


class SftSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[train.sft]: imitate a teacher's recorded rollouts before reinforcement begins. rollouts = 0 leaves it out."""

    teacher: str = "teacher"  # the model name that the teacher's rollouts call
    rollouts: CountOrNone = 0
    epochs: Count = 4
    batch_rollouts: Count = 32
    lr: Positive = 1e-5  # for a pretrained model; the demo's million random weights take 1.5e-3
    weight_decay: float = 0.01
    warmup_updates: CountOrNone = 10


class RlSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[train.rl]: asynchronous policy-gradient training on the policy's own rollouts."""

    steps_max: Count = 100
    group_size: Annotated[int, msgspec.Meta(ge=2)] = 8  # rollouts of one task, compared with each other
    groups_per_step: Count = 8
    refill_groups_max: CountOrNone = (
        4  # groups whose rewards were all equal are replaced by at most this many others a step
    )
    staleness_max: CountOrNone = 2  # versions between sampling and training; also bounds how far rollouts run ahead
    loss: Literal["ppo_clip", "cispo", "reinforce"] = "cispo"
    scale: Literal["none", "std"] = "none"  # divide advantages by the group's spread?
    normalise: Literal["token", "rollout"] = "token"
    temperature: Positive = 1.0
    lr: Positive = 1e-6  # for a pretrained model; the demo's million random weights take 3e-4
    weight_decay: float = 0.0
    warmup_updates: CountOrNone = 0
    grad_norm_max: Positive = 1.0
    stop_reward: float | None = None  # stop early when the mean reward of `stop_window` steps reaches this
    stop_window: Count = 6
    # Tasks in turn, or those first that the policy sometimes succeeds at: whose running share of rollouts with a reward
    # of at least success_reward lies within these bounds. The share `explore` of groups tries the others.
    curriculum: bool = False
    success_reward: float = 1.0
    success_min: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    success_max: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.9
    explore: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.2

    def __post_init__(self) -> None:
        if self.success_min > self.success_max:
            raise ValueError(
                f"success_min {self.success_min} is above success_max {self.success_max}: no task is between"
            )


class EvalSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[train.eval]: held-out tasks, carried out by the same workers."""

    tasks: Count = 96
    every_steps: CountOrNone = 0  # also during training; 0: only before and after
    temperature: float = 1.0  # 0 is greedy


class TrainSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[train]: what to learn from, and how."""

    # MODULE:FUNCTION is called with the seed and returns a list of tasks; "MODULE:FUNCTION PATH" calls it with the path
    # ("examples.calc.tasks:read_jsonl gsm8k.jsonl"); a .jsonl file by itself has one task a line.
    tasks: str
    held_out: str
    token_budget: Count = 2048  # tokens per forward pass: memory against speed
    torch_threads: Count = 1
    keep_checkpoints: Count = 3
    # What happens to calls in flight while weights change: keep freezes them and they go on under the new weights, drain
    # lets them finish first, abort ends them and the gateway asks again.
    push_mode: Literal["keep", "drain", "abort"] = "keep"
    push_limit_s: Positive = 60.0  # of each step of a push: enough for gigabytes, little enough to notice a dead engine
    rollout_limit_s: Positive = 600.0  # how long to wait for rollouts before saying that nobody carries them out
    sft: SftSection = msgspec.field(default_factory=SftSection)
    rl: RlSection = msgspec.field(default_factory=RlSection)
    eval: EvalSection = msgspec.field(default_factory=EvalSection)


def replica_binds(section: ServeSection) -> list[str]:
    """Return the HOST:PORT of each replica: `serve.bind`, and the ports that follow it."""
    host, port = _host_and_port(section.bind, "serve.bind")
    last = port + section.replicas - 1
    if last > PORT_MAX:
        raise ConfigError(
            f"serve.replicas = {section.replicas} from serve.bind {section.bind} on would need port {last}; the last "
            f"is {PORT_MAX}. Choose a lower port."
        )
    return [f"{host}:{port + number}" for number in range(section.replicas)]


def replica_urls(section: ServeSection) -> list[str]:
    """Return the base URL of each replica, as this machine reaches it. Raises ConfigError."""
    return [f"http://{client_address(bind)}" for bind in replica_binds(section)]


def scripted_bind(section: ServeSection) -> str:
    """Return the HOST:PORT of the scripted models beside vLLM; without one of its own, the port after the replicas."""
    if section.scripted_bind:
        _host_and_port(section.scripted_bind, "serve.scripted_bind")
        return section.scripted_bind
    host, port = _host_and_port(section.bind, "serve.bind")
    return f"{host}:{port + section.replicas}"


def scripted_url(section: ServeSection) -> str:
    """Return the base URL of the scripted models beside vLLM. The embedded engine serves them itself."""
    return f"http://{client_address(scripted_bind(section))}"


def _host_and_port(bind: str, key: str) -> tuple[str, int]:
    host, _, port = bind.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= PORT_MAX:
        raise ConfigError(f"{key}: {bind!r} is not host:port. Write it like 127.0.0.1:4752.")
    return host, int(port)
