"""[policy], [serve] and [train] of RUN.toml. No torch here: every process of a run reads this file.

A comment at a key says what it trades. Defaults are for a small policy on a laptop.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from lightning_bus import ConfigError, CreditSection, Section, client_address

Count = Annotated[int, msgspec.Meta(ge=1)]
CountOrNone = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
PositiveOrNone = Annotated[float, msgspec.Meta(ge=0)]
Decay = Annotated[float, msgspec.Meta(ge=0, lt=1)]  # of a running mean: 0 forgets everything, 1 would never learn

Schedule = Literal["constant", "cosine", "linear"]

PORT_MAX = 65_535

# The algorithms that have a name, and where they are. The table, with papers: docs/training.md.
ALGORITHMS = {
    "grpo": "trainer.algorithms.policy_gradients:GRPO",
    "dr_grpo": "trainer.algorithms.policy_gradients:DrGRPO",
    "dapo": "trainer.algorithms.policy_gradients:DAPO",
    "gspo": "trainer.algorithms.policy_gradients:GSPO",
    "cispo": "trainer.algorithms.policy_gradients:CISPO",
    "reinforce": "trainer.algorithms.policy_gradients:Reinforce",
    "dppo": "trainer.algorithms.policy_gradients:DPPO",
    "ppo": "trainer.algorithms.ppo:PPO",
}


class PolicySection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[policy]: the model that agents call and training improves."""

    model: str  # a Hugging Face model directory, or MODULE:FUNCTION that writes one (directory, seed)
    name: str = "policy"  # what agents call it
    # What computes attention over packed rows: auto takes the fastest that runs here (docs/training.md has the table).
    attention: Literal["auto", "flash", "varlen", "flex", "rows", "sdpa"] = "auto"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products; the weights trained stay float32
    # Of the last product, hidden states times vocabulary, whose sums are float32 in any case. bfloat16 is what
    # GPUs multiply fast, and moves log-probs by up to 1e-2 nats or so: watch logprob_difference_staleness_0.
    head_dtype: Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False  # layers run again in the backward pass instead of keeping activations: memory against time
    recompute_attention: bool = (
        True  # with recompute; false keeps what attention gave, for rows of many thousand tokens
    )
    # By torch.compile, for a GPU: norms, rotary positions and roundings become few kernels. The first steps take minutes.
    compile: bool = False
    # Train an adapter of this rank instead of all weights; 0: all weights. vLLM with serve.lora_rank_max at least as
    # high is pushed the adapter alone, every other engine the whole model with the adapter in it.
    lora_rank: CountOrNone = 0
    lora_alpha: PositiveOrNone = 0.0  # the adapter counts lora_alpha / lora_rank; 0: twice the rank
    lora_targets: list[str] = msgspec.field(default_factory=list[str])  # ["q_proj", "v_proj"]; default: all matrices


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
    """[train.sft]: imitate before reinforcement begins: a teacher's rollouts, conversations in files, or both."""

    teacher: str = "teacher"  # the model name that the teacher's rollouts call
    rollouts: CountOrNone = 0  # that the workers carry out with it; 0: none
    files: list[str] = msgspec.field(default_factory=list[str])  # of conversations, as `export --as chat` writes them
    epochs: Count = 4
    batch_rollouts: Count = 32
    # What follows means what it does in [train.rl].
    lr: Positive = 1e-5  # for a pretrained model; the demo's million random weights take 1.5e-3
    weight_decay: PositiveOrNone = 0.01
    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    momentum: Decay = 0.95
    warmup_updates: CountOrNone = 10
    schedule: Schedule = "constant"
    schedule_updates: CountOrNone = 0  # 0: to the end of the last epoch
    grad_norm_max: Positive = 1.0

    def __post_init__(self) -> None:
        if self.schedule_updates:
            check_schedule(self.schedule, self.warmup_updates, self.schedule_updates, "schedule_updates")

    @property
    def wanted(self) -> bool:
        """Whether there is anything to imitate."""
        return bool(self.rollouts or self.files)


class RlSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[train.rl]: asynchronous policy-gradient training on the policy's own rollouts."""

    steps_max: Count = 100
    group_size: Annotated[int, msgspec.Meta(ge=2)] = 8  # rollouts of one task, compared with each other
    groups_per_step: Count = 8
    refill_groups_max: CountOrNone = (
        4  # groups whose rewards were all equal are replaced by at most this many others a step
    )
    # Versions between sampling and training; also bounds how far rollouts run ahead. 0 is on-policy: the trainer waits
    # for its rollouts, and they for its weights.
    staleness_max: CountOrNone = 2
    # What to learn by: a name (grpo, dapo, cispo, reinforce, …: docs/training.md has the table) or a class of your own,
    # "module:Class". Its options, such as clip_high = 0.28, stand in [train.rl.options].
    algorithm: str = ""
    options: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    # Without `algorithm`, these three, compared as [credit] estimator says. They are options of each algorithm, too.
    loss: Literal["ppo_clip", "cispo", "reinforce"] = "cispo"
    scale: Literal["none", "std"] = "none"  # divide advantages by the group's spread?
    normalise: Literal["token", "rollout"] = "token"
    temperature: Positive = 1.0
    lr: Positive = 1e-6  # for a pretrained model; the demo's million random weights take 3e-4
    weight_decay: PositiveOrNone = 0.0  # of matrices alone
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the layers, adamw for the rest
    betas: tuple[Decay, Decay] = (0.9, 0.95)  # adamw's: of the mean gradient, and of its square
    momentum: Decay = 0.95  # muon's
    warmup_updates: CountOrNone = 0
    # After the warm-up lr stays, or goes down to 0 over this many updates (0: those of steps_max steps).
    schedule: Schedule = "constant"
    schedule_updates: CountOrNone = 0
    grad_norm_max: Positive = 1.0  # longer gradients are scaled down to it; inf: none
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
        self._check_algorithm()
        if self.schedule_updates:
            check_schedule(self.schedule, self.warmup_updates, self.schedule_updates, "schedule_updates")
        if self.success_min > self.success_max:
            raise ValueError(
                f"success_min {self.success_min} is above success_max {self.success_max}: no task is between"
            )

    def _check_algorithm(self) -> None:
        if self.algorithm and self.algorithm not in ALGORITHMS and ":" not in self.algorithm:
            raise ValueError(
                f"algorithm {self.algorithm!r} is not known: choose from {', '.join(ALGORITHMS)}, or name a class of "
                "your own as module:Class"
            )
        if self.options and not self.algorithm:
            raise ValueError(f"options {', '.join(self.options)} belong to an algorithm, and none is named")
        said = [
            key
            for key, default in (("loss", "cispo"), ("scale", "none"), ("normalise", "token"))
            if self.algorithm and getattr(self, key) != default
        ]
        if said:
            raise ValueError(
                f"{said[0]} = {getattr(self, said[0])!r} stands beside algorithm = {self.algorithm!r}, which has its own: "
                "leave one of the two out, or say it in [train.rl.options]"
            )


class EvalSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[train.eval]: held-out tasks, carried out by the same workers."""

    tasks: Count = 96
    every_steps: CountOrNone = 0  # also during training; 0: only before and after
    temperature: Annotated[float, msgspec.Meta(ge=0)] = 1.0  # 0 is greedy
    # Tries of each task: above 1 also gives pass_at_K, for K = 1, 2, 4, … and `samples`. A try passes where its reward
    # is at least [train.rl] success_reward.
    samples: Count = 1

    def __post_init__(self) -> None:
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"samples = {self.samples} tries at temperature = 0 are the same one: sample, or try once")


class TrainSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[train]: what to learn from, and how."""

    # MODULE:FUNCTION is called with the seed and returns a list of tasks; "MODULE:FUNCTION PATH" calls it with the path
    # ("examples.calc.tasks:read_jsonl gsm8k.jsonl"); a .jsonl file by itself has one task a line.
    tasks: str
    held_out: str
    token_budget: Count = 2048  # tokens per forward pass: memory against speed
    torch_threads: Count = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU for each rank where there is one
    # How many processes train together on this machine, each with 1/processes of the weights and a GPU of its own. For
    # several machines leave it out and use torchrun.
    processes: Count = 1
    # Of float32 products: "high" lets GPUs take TF32, which has 10 bits of mantissa instead of 23, "medium" bfloat16, on
    # some CPUs too. Faster, and log-probs move: watch logprob_difference_staleness_0.
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    deterministic: bool = False  # the same rows give the same weights, bit for bit; slower on a GPU
    keep_checkpoints: Count = 3
    # Where the lines of metrics.jsonl go besides; a package that is named must be installed.
    log: list[Literal["console", "tensorboard", "wandb", "trackio"]] = msgspec.field(default_factory=list)
    log_project: str = "lightning-bus"  # of wandb and trackio; the environment's WANDB_PROJECT goes before it
    # What happens to calls in flight while weights change: keep freezes them and they go on under the new weights, drain
    # lets them finish first, abort ends them and the gateway asks again.
    push_mode: Literal["keep", "drain", "abort"] = "keep"
    push_limit_s: Positive = 60.0  # of each step of a push: enough for gigabytes, little enough to notice a dead engine
    rollout_limit_s: Positive = 600.0  # how long to wait for rollouts before saying that nobody carries them out
    # Where several policies are trained from one log: submit nothing and learn from the rollouts that another policy's
    # trainer submits. One of the trainers submits and evaluates; the others follow.
    follow: bool = False
    sft: SftSection = msgspec.field(default_factory=SftSection)
    rl: RlSection = msgspec.field(default_factory=RlSection)
    eval: EvalSection = msgspec.field(default_factory=EvalSection)

    def __post_init__(self) -> None:
        if self.follow and (self.sft.rollouts or self.rl.curriculum):
            what = "sft.rollouts" if self.sft.rollouts else "rl.curriculum"
            raise ValueError(
                f"follow = true submits no rollouts, and {what} asks for some: the trainer followed has them"
            )


def check_schedule(schedule: Schedule, warmup_updates: int, total_updates: int, key: str) -> None:
    """Raise ValueError for a schedule that has no way down after its warm-up. key: which says total_updates."""
    if schedule != "constant" and total_updates <= warmup_updates:
        raise ValueError(
            f"schedule = {schedule!r} goes down from update {warmup_updates} (warmup_updates) to {total_updates} ({key}), "
            f"which leaves no way: warm up for less, raise {key}, or say schedule = 'constant'"
        )


def answering_model(policy: PolicySection, credit: CreditSection) -> str:
    """Return what every call of a rollout is answered by; "" where several policies are trained: then agents name theirs."""
    return "" if len(credit.policies) > 1 else policy.name


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
