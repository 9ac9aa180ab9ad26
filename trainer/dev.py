"""The whole ring on a few tasks, in this process and in seconds: to see what an agent does before anything is trained.

    report = dev(agent, tasks)        broker, gateway, a scripted model and the agent, all real; no weights, no GPU
    print(report)

What always holds: each task is tried `group_size` times, and an attempt that fails is not repeated; whatever the agent
does, even raise or exit, is in the report; nothing is left behind. The model is a function, (messages, tools) to its
reply; its tokens are bytes, so what is recorded and merged looks as it will look with a policy.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskStatus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_bus import (
    Client,
    ConfigError,
    LogReader,
    Submission,
    embedded_bus,
    is_model_call,
    model_call,
    serve_http,
)
from lightning_bus.adapters import Assembler, FinishedRollout, scored
from trainer.serving.scripted import build_scripted_app

AGENTS_GROUP = "lightning_bus.agents"
MODEL = "policy"
ATTEMPTS_AT_ONCE = 8
SHOWN_CHARS = 400  # of a prompt or an answer; its end says more than its beginning

Model = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None], Mapping[str, Any] | str]


@dataclass(frozen=True, slots=True)
class DevCall:
    """A model call: what the model was shown, what it answered, and how long that took."""

    prompt: str
    answer: str
    seconds: float


@dataclass(frozen=True, slots=True)
class DevRollout:
    """One try of one task. error: the agent's traceback; "" where it returned."""

    task: Any
    reward: float | None
    calls: list[DevCall]
    error: str
    rows: int  # training rows that its calls make; 1 where each prompt continues the one before


@dataclass(slots=True)
class DevReport:
    """What happened. `print` it, or look into `rollouts`."""

    rollouts: list[DevRollout] = field(default_factory=list[DevRollout])
    advice: list[str] = field(default_factory=list[str])  # what would keep this agent from learning
    error: str = ""  # why there are no rollouts

    @property
    def ok(self) -> bool:
        """True when every rollout returned, after at least one model call, with a reward."""
        return not self.error and all(not one.error and one.calls and one.reward is not None for one in self.rollouts)

    @property
    def rewards(self) -> list[float | None]:
        return [one.reward for one in self.rollouts]

    def __str__(self) -> str:
        lines = [f"could not run: {self.error}"] if self.error else []
        for number, one in enumerate(self.rollouts, start=1):
            lines.append(f"── rollout {number}: task {one.task!r:.200}")
            for call in one.calls:
                lines.append(f"   model call, {1000 * call.seconds:.0f} ms")
                lines += [f"     │ {line}" for line in _end_of(call.prompt).splitlines()]
                lines += [f"     → {line}" for line in _end_of(call.answer).splitlines()]
            lines.append("   failed:" if one.error else f"   reward {one.reward}, {one.rows} training rows")
            lines += [f"     {line}" for line in one.error.rstrip().splitlines()]
        return "\n".join([*lines, *(f"note: {one}" for one in self.advice)])


async def dev(
    agent: Callable[..., Any] | str,
    tasks: Sequence[Any],
    *,
    model: Model | None = None,
    group_size: int = 1,
    limit_s: float = 60.0,
) -> DevReport:
    """Carry out the tasks with a scripted model and return what happened. Raises nothing but cancellation.

    model       (messages, tools) → the assistant's message, or its text. Default: `calls_first_tool`
    group_size  how often each task is tried
    limit_s     for one attempt
    """
    report = DevReport()
    try:
        await _carry_out(report, agent, tasks, model or calls_first_tool, group_size, limit_s)
    except Exception as exc:
        report.error = f"{type(_first(exc)).__name__}: {_first(exc)}"
    report.advice += _advice(report, group_size)
    return report


def calls_first_tool(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> Mapping[str, Any]:
    """A model that calls the first tool it is offered, once, and then answers with what the tool said."""
    last = messages[-1]
    if tools and last.get("role") != "tool":
        function = tools[0]["function"]
        properties: Mapping[str, Any] = function.get("parameters", {}).get("properties", {})
        arguments = {name: _example(kind.get("type", "string")) for name, kind in properties.items()}
        call = {"name": function["name"], "arguments": json.dumps(arguments)}
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": f"call_{len(messages)}", "type": "function", "function": call}],
        }
    return {"role": "assistant", "content": f"Scripted answer to: {last.get('content')}"}


# -- the ring -----------------------------------------------------------------------------------------------------


async def _carry_out(
    report: DevReport,
    agent: Callable[..., Any] | str,
    tasks: Sequence[Any],
    model: Model,
    group_size: int,
    limit_s: float,
) -> None:
    check, run = agent_entry("check"), agent_entry("run")
    check(agent)
    if not tasks:
        raise ConfigError("there are no tasks to try: pass some")
    submissions = [
        Submission(
            f"dev-{index:03d}-{member}", msgspec.msgpack.encode(task), f"dev-{index:03d}", MODEL, max_attempts=1,
            timeout_s=limit_s,
        )
        for index, task in enumerate(tasks)
        for member in range(group_size)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="lightning-bus-dev-") as place:
        directory = Path(place)
        tokenizer = byte_tokenizer()
        tokenizer.save_pretrained(directory / "policy")
        async with (
            _served(build_scripted_app(directory / "policy", {MODEL: _as_script(model)})) as engine,
            embedded_bus(directory, [engine]) as bus,
            anyio.create_task_group() as working,
            Client(bus.bus_address, role="trainer") as client,
        ):
            working.start_soon(
                lambda: run(
                    agent,
                    bus_address=bus.bus_address,
                    gateway_url=bus.gateway_url,
                    concurrency=ATTEMPTS_AT_ONCE,
                    attempt_limit_s=limit_s,
                )
            )
            await client.submit(submissions)
            await client.wait([one.rollout_id for one in submissions])
            working.cancel_scope.cancel()
        report.rollouts += [_told(one, tokenizer) for one in _finished(directory / "log")]


@asynccontextmanager
async def _served(app: Any) -> AsyncGenerator[str]:
    async def serve(*, task_status: TaskStatus[str]) -> None:
        await serve_http(app, "127.0.0.1:0", key="the scripted model", started=task_status.started)

    async with anyio.create_task_group() as tasks:
        yield await tasks.start(serve)
        tasks.cancel_scope.cancel()


def _finished(log: Path) -> list[FinishedRollout]:
    assembler = Assembler()
    with LogReader(log) as reader:
        ended = [one for record in reader.records() if (one := assembler.feed(record)) is not None]
    return sorted(ended, key=lambda one: one.rollout_id)


def _told(rollout: FinishedRollout, tokenizer: PreTrainedTokenizerBase) -> DevRollout:
    calls: list[DevCall] = []
    for span in rollout.spans:
        if is_model_call(span):
            call = model_call(span)
            prompt, answer = (
                tokenizer.decode(call.prompt_ids_P.tolist()),
                tokenizer.decode(call.response_ids_R.tolist()),
            )
            calls.append(DevCall(str(prompt), str(answer), (span.end_ns - span.start_ns) / 1e9))
    made, _ = scored([rollout], any_model=True)
    return DevRollout(rollout.task, rollout.reward, calls, rollout.error, sum(len(one.rows) for one in made))


def _advice(report: DevReport, group_size: int) -> list[str]:
    ended = [one for one in report.rollouts if not one.error]
    advice: list[str] = []
    silent = sum(not one.calls for one in ended)
    if silent:
        advice.append(
            f"{silent} of {len(ended)} rollouts made no model call, so there is nothing to train: give your client "
            "base_url and api_key, or let the agent read OPENAI_BASE_URL"
        )
    if any(one.reward is None for one in ended):
        advice.append("a rollout returned None: return a number, or emit a reward, else nothing is learnt from it")
    forked = sum(one.rows > 1 for one in ended)
    if forked:
        advice.append(
            f"{forked} of {len(ended)} rollouts make several training rows, because a prompt does not continue the one "
            "before. That is right for several agents or a history that is cut; otherwise it costs time"
        )
    if group_size > 1 and len(ended) > 1 and len({one.reward for one in ended}) == 1:
        advice.append(f"every rollout earned {ended[0].reward}: where rewards never differ, nothing is learnt")
    return advice


# -- the model ----------------------------------------------------------------------------------------------------

START, END = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """\
{%- if tools %}{{- '<|im_start|>system\\nTools: ' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {%- if call.function.arguments is string %}{{- call.function.arguments }}{%- else %}
            {{- call.function.arguments | tojson }}{%- endif %}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes, with a chat template of ChatML's kind."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _as_script(model: Model) -> Callable[..., Any]:
    def script(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> Any:
        said = model(messages, tools)
        return {"role": "assistant", "content": said} if isinstance(said, str) else said

    return script


def _example(kind: str) -> Any:
    return {"integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}}.get(kind, "example")


def agent_entry(name: str) -> Callable[..., Any]:
    """Return what workers/ announces for running agents in this process. Raises ConfigError where it is not installed."""
    for entry in entry_points(group=AGENTS_GROUP):
        if entry.name == name:
            return entry.load()
    raise ConfigError("no installed package runs agents: install lightning-bus again (pip install -e .)")


def _end_of(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else "… " + text[-SHOWN_CHARS:]


def _first(exc: BaseException) -> BaseException:
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc
