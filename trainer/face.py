"""The Python face: an agent, tasks and an algorithm in; a better policy out.

    from trainer import GRPO, Trainer

    trainer = Trainer(algorithm=GRPO(), n_workers=4, policy="Qwen3-0.6B", settings={"train.rl.steps_max": 200})
    trainer.dev(agent, train_tasks[:3])                        # seconds, no weights: does the agent work?
    result = trainer.fit(agent, train_tasks, val_tasks)        # everything on this machine
    result = trainer.fit(agent, train_tasks, val_tasks, backend="tcp://bus:4750", engines=["http://gpu:4752"])

The trainer itself runs in this process, so the algorithm may be any object and its errors surface here. Everything else
is processes: those of `lightning-bus up`, or, with a backend, whatever runs there. A run's files, its resolved run.toml
among them, lie in <directory>/<name>; stopped or cut off, `fit(resume=True)` goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import tomli_w

from lightning_bus import (
    BrokerSection,
    ConfigError,
    GatewaySection,
    RunFile,
    client_address,
    load_run,
)
from trainer.algorithms.base import Algorithm
from trainer.algorithms.chosen import can_be_described, described
from trainer.beside import (
    Agent,
    Watch,
    fail_with,
    free_ports,
    holding_key,
    name_of,
    run_here,
    run_to_end,
    up,
    wait_ready,
    worker,
)
from trainer.config import PolicySection, ServeSection, TrainSection, replica_urls
from trainer.dev import DevReport, Model, agent_entry
from trainer.dev import dev as run_dev
from trainer.loading import json_lines
from trainer.ranks import join
from trainer.serving.serve import ensure_policy
from trainer.settings import as_tables, merge, refuse_said_elsewhere
from trainer.training import settled, train, train_along


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to.

    rewards     mean reward of each step
    evals       held-out success by policy version
    checkpoint  the trained policy: a Hugging Face directory
    metrics     metrics.jsonl; `lines()` reads it
    summary     what summary.json holds
    """

    directory: Path
    rewards: list[float]
    evals: dict[int, float]
    checkpoint: Path
    metrics: Path
    summary: dict[str, Any] = field(repr=False)

    def lines(self, phase: str = "") -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, or those of one phase."""
        with self.metrics.open(encoding="utf-8") as file:
            return [line for line in map(json.loads, file) if phase in ("", line["phase"])]


class Trainer:
    """Trains the model behind an agent."""

    def __init__(
        self,
        *,
        algorithm: Algorithm | str = "",
        n_workers: int = 1,
        policy: str | Callable[[Path, int], Any] = "",
        name: str = "fit",
        directory: str | Path = "runs",
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """algorithm  an object such as GRPO(), or a name of docs/training.md; default: as [train.rl] says
        n_workers  processes that run the agent, each with [worker] concurrency attempts at a time
        policy     a Hugging Face directory, "module:function", or a function (directory, seed) that writes one
        name       of the run; its files go to <directory>/<name>
        settings   keys of RUN.toml, with dots or as tables: {"train.rl.lr": 1e-5, "serve": {"engine": "vllm"}}

        Raises ConfigError for n_workers below 1, and for settings that are arguments here or of `fit`.
        """
        if n_workers < 1:
            raise ConfigError(f"n_workers is {n_workers}: an agent needs one at least")
        self.algorithm = algorithm
        self.n_workers = n_workers
        self.policy = policy
        self.directory = Path(directory) / name
        self.seed = seed
        self.settings = as_tables(settings or {})
        refuse_said_elsewhere(self.settings, policy=policy, algorithm=algorithm)

    def fit(
        self,
        agent: Agent | None = None,
        train_tasks: Sequence[Any] = (),
        val_tasks: Sequence[Any] = (),
        *,
        backend: str = "",
        gateway: str = "",
        engines: Sequence[str] = (),
        key: str | Path | None = None,
        resume: bool = False,
        progress: Callable[[str], None] | None = print,
    ) -> Result:
        """Train until [train.rl] steps_max or stop_reward, and return what came of it.

        agent        a function or "module:function", as `lightning-bus worker` takes it. One that other processes can
                     import runs in n_workers of them; one of __main__, of a notebook, or made inside a function runs in
                     threads of this process. None: workers run elsewhere, at the backend
        train_tasks  what the agent is given, one each; anything that JSON can say
        val_tasks    held out: never trained on
        backend      address of a running broker of this run alone, with workers, gateway and engines beside it.
                     Default: everything is started here, and ended again
        gateway      URL of the backend's gateway; wanted where the agent runs here
        engines      base URLs of the engines to push weights to; default: those of [serve]
        key          key file, where the broker wants one: a trainer's, or an admin's where the agent runs here as well
        resume       go on with the run in this directory; settings and an algorithm that are given replace what it had
        progress     receives a line now and then; None: silence

        Several processes train together where settings say train.processes, or where torchrun started several of this
        script: then the first does all that is said here, the others call `fit` to train with it, and all return the
        same.

        Raises ConfigError for what cannot work, before anything starts, and what ended the run otherwise.
        """
        say = progress or _silent
        if int(os.environ.get("RANK", "0")):
            return self._follow(resume=resume)
        if backend and agent is not None and not gateway:
            raise ConfigError("the agent is to run here: pass gateway=, the URL of the backend's gateway")
        with self._nothing_left_of_what_is_refused():
            file = self._prepared(agent, train_tasks, val_tasks, here=not backend, resume=resume)
            ensure_policy(self._policy_section(file), file.directory, self.seed)
        importable = agent if isinstance(agent, str) else agent and name_of(agent)
        if agent is not None and not importable:
            say(f"{_shown(agent)} cannot be imported by other processes: it runs in threads of this one")
        bus_address = backend or client_address(file.section(BrokerSection).bind)
        urls = list(engines) or replica_urls(file.section(ServeSection))
        gateway_url = gateway or "http://" + client_address(file.section(GatewaySection).bind)
        watch, made = Watch(file.directory, say), dict[str, Any]()
        role = "trainer" if agent is None or importable else "admin"  # which leases as well
        with ExitStack() as stack:
            stack.enter_context(holding_key(role, None if key is None else Path(key), file))
            daemon = None if backend else stack.enter_context(up(file.directory))
            if backend and importable:
                for _ in range(self.n_workers):
                    stack.enter_context(worker(file, importable, backend, gateway, key))

            async def main() -> None:
                async with anyio.create_task_group() as beside:
                    beside.start_soon(watch.run)
                    await wait_ready(bus_address, [gateway_url] if agent else [], urls, daemon)
                    say(f"training {file.directory}: everything is up")
                    if daemon is not None:
                        beside.start_soon(fail_with, daemon)
                    if agent is not None and not importable:
                        beside.start_soon(run_here, agent, bus_address, gateway_url, file, self.n_workers)
                    made.update(await train(file, bus_address=bus_address, engine_urls=urls, algorithm=self._object()))
                    beside.cancel_scope.cancel()

            try:
                run_to_end(main)
            except KeyboardInterrupt:
                say(f"stopped; {file.directory} goes on by fit(resume=True)")
                raise
        watch.look()
        say(
            f"done: {file.directory / 'checkpoint'} is the policy now, {file.directory / 'metrics.jsonl'} how it came to be"
        )
        return _result(file.directory, made)

    def dev(
        self,
        agent: Agent,
        train_tasks: Sequence[Any],
        *,
        model: Model | None = None,
        group_size: int = 1,
        limit_s: float = 60.0,
        progress: Callable[[str], None] | None = print,
    ) -> DevReport:
        """Carry out a few tasks in this process with a scripted model, and return, and tell, what happened.

        No weights, no GPU, seconds. Raises nothing of the agent's: its tracebacks are in the report. See `trainer.dev`.
        """

        async def main() -> DevReport:
            return await run_dev(agent, train_tasks, model=model, group_size=group_size, limit_s=limit_s)

        report = run_to_end(main)
        (progress or _silent)(str(report))
        return report

    def _follow(self, *, resume: bool) -> Result:
        """Train with the first process, which torchrun started beside this one, until it is done."""
        run_toml = self.directory / "run.toml"
        device = self.settings.get("train", {}).get("device")
        if device is None:
            device = load_run(run_toml).section(TrainSection).device if resume else "auto"
        world = join(device)  # the first process does once it has prepared the run
        file = load_run(run_toml)
        train_along(world, file, self._object())
        return _result(file.directory, json.loads((file.directory / "summary.json").read_text(encoding="utf-8")))

    # -- the run's files ----------------------------------------------------------------------------------------------

    def _prepared(
        self, agent: Agent | None, train_tasks: Sequence[Any], val_tasks: Sequence[Any], *, here: bool, resume: bool
    ) -> RunFile:
        """Return the run file, having written it and the tasks into the run's directory."""
        if agent is not None:
            agent_entry("check")(agent)
        elif here:
            raise ConfigError("no agent is given, and without a backend nobody else runs one: pass it")
        run_toml = self.directory / "run.toml"
        if resume:
            if not run_toml.exists():
                raise ConfigError(f"{self.directory} holds no run to go on with: leave resume out")
            # The agent may be found elsewhere now than when the run began: in a module rather than in a notebook.
            table = tomllib.loads(run_toml.read_text(encoding="utf-8"))
            if self.algorithm:
                table.get("train", {}).get("rl", {}).pop("options", None)  # of the one that it had
                merge(table, {"train": {"rl": self._algorithm()}})
            merge(table, {"worker": self._worker(agent, here=here)})
            merge(table, self.settings)
            # Whole at any time, for other ranks read it; and what it was until what is to replace it is known to work.
            partial = self.directory / ".run.toml.partial"
            partial.write_text(tomli_w.dumps(table), encoding="utf-8")
            self._checked(load_run(partial))
            os.replace(partial, run_toml)
            return load_run(run_toml)
        if self.directory.exists():
            raise ConfigError(
                f"{self.directory} already exists: go on with that run by fit(resume=True), or choose another name"
            )
        if not train_tasks or not val_tasks:
            raise ConfigError("fit wants train_tasks and val_tasks, one of each at least")
        if not self.policy and "model" not in self.settings.get("policy", {}):
            raise ConfigError(
                'which model? Pass policy=: a Hugging Face directory, "module:function", or a function (directory, seed) '
                "that writes one"
            )
        (self.directory / "logs").mkdir(parents=True)
        for name, tasks in (("train_tasks", train_tasks), ("val_tasks", val_tasks)):
            (self.directory / f"{name}.jsonl").write_text(json_lines(tasks, name), encoding="utf-8")
        run_toml.write_text(tomli_w.dumps(self._table(agent, here=here)), encoding="utf-8")
        return self._checked(load_run(run_toml))

    @contextmanager
    def _nothing_left_of_what_is_refused(self) -> Iterator[None]:
        """Take a run's directory away again if it was made in this context and what it is for raised."""
        existed = self.directory.exists()
        try:
            yield
        except BaseException:
            if not existed:
                shutil.rmtree(self.directory, ignore_errors=True)
            raise

    def _object(self) -> Algorithm | None:
        return self.algorithm if isinstance(self.algorithm, Algorithm) else None

    def _checked(self, file: RunFile) -> RunFile:
        """Return the run file, looked at before anything starts. Raises ConfigError for what cannot be trained so.

        Also where further processes would be started that lack the algorithm.
        """
        settled(file, self._object())
        processes = file.section(TrainSection).processes
        if processes > 1 and isinstance(self.algorithm, Algorithm) and not can_be_described(self.algorithm):
            raise ConfigError(
                f"train.processes is {processes}, and the other processes cannot make this "
                f"{type(self.algorithm).__name__}: they need a dataclass that they can import, with fields that TOML "
                "can say. Or leave train.processes out and start this script by torchrun"
            )
        return file

    def _table(self, agent: Agent | None, *, here: bool) -> dict[str, Any]:
        """Return run.toml: what was passed, over free ports and the settings."""
        bus, gateway, engine = free_ports(3)
        table: dict[str, Any] = {
            "run": {"name": self.directory.name, "directory": str(self.directory.parent), "seed": self.seed},
            "policy": {"model": self.policy if isinstance(self.policy, str) else str(self.directory / "policy")},
            "train": {
                "tasks": str(self.directory / "train_tasks.jsonl"),
                "held_out": str(self.directory / "val_tasks.jsonl"),
            },
            "worker": self._worker(agent, here=here),
        }
        if here:
            table["broker"] = {"bind": f"tcp://127.0.0.1:{bus}"}
            table["gateway"] = {"bind": f"127.0.0.1:{gateway}", "upstreams": [f"http://127.0.0.1:{engine}"]}
            table["serve"] = {"bind": f"127.0.0.1:{engine}"}
        # So that whoever reads the run's file, or goes on with it from the command line, has the same algorithm.
        if self.algorithm:
            table["train"]["rl"] = self._algorithm()
        merge(table, self.settings)
        return table

    def _algorithm(self) -> dict[str, Any]:
        """Return the keys of [train.rl] that say which it is."""
        return {"algorithm": self.algorithm} if isinstance(self.algorithm, str) else described(self.algorithm)

    def _worker(self, agent: Agent | None, *, here: bool) -> dict[str, Any]:
        """Return the keys of [worker] that say where the agent is found, and in how many processes `up` runs it."""
        importable = agent if isinstance(agent, str) else agent and name_of(agent)
        return {"agent": importable or "", "processes": self.n_workers if importable and here else 0}

    def _policy_section(self, file: RunFile) -> PolicySection:
        """Return [policy], having written the policy where a function makes it that only this process knows."""
        section = file.section(PolicySection)
        target = file.directory / "policy"
        if callable(self.policy) and not target.exists():
            partial = target.with_name(".policy.partial")
            partial.mkdir(exist_ok=True)
            self.policy(partial, self.seed)
            os.replace(partial, target)
        return section


def _result(directory: Path, summary: dict[str, Any]) -> Result:
    result = Result(directory, [], {}, directory / "checkpoint", directory / "metrics.jsonl", summary)
    result.rewards.extend(line["reward_mean"] for line in result.lines("rl"))
    result.evals.update({line["version"]: line["held_out_success"] for line in result.lines("eval")})
    return result


def _shown(agent: Agent) -> str:
    return agent if isinstance(agent, str) else f"agent {getattr(agent, '__qualname__', repr(agent))}"


def _silent(_: str) -> None:
    pass
