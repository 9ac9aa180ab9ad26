"""A recorded run of several agents, made through the real tracer and the gateway's real recording code, without network.

A writer drafts a query, a checker judges it, a rewriter mends it: the writer and the rewriter are to be trained, the
checker is fixed and runs on another model. Two tasks, three rollouts each. Among them: a rewriter that continues the
writer's conversation token by token (one row) and one whose history was re-rendered (a fork), two searches in
parallel branches of one conversation, a client that asked again, an answer that was cut off, a call without token ids, a
reward for a single span, and an attempt that failed.

    python -m tests.golden.multi_agent        writes multi_agent.msgpack anew

Span ids and times are numbered in the order of recording, so the file is the same whenever it is made.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from lightning_bus.adapters import FinishedRollout
from lightning_bus.gateway.recording import Call, answered_spans, prepare
from lightning_bus.lifecycle import Status
from lightning_bus.otel import Tracer, emit_reward
from lightning_bus.otel import names as n
from lightning_bus.otel.context import here, parent_of
from lightning_bus.otel.rewards import final_reward
from lightning_bus.spans import Span
from lightning_bus.tokens import Claims
from tests.unit.otel.collected import Collected

GOLDEN = Path(__file__).with_name("multi_agent.msgpack")
TRAINED = ["writer", "rewriter"]
END, ROLES = 2, {"system": 3, "user": 4, "assistant": 5, "tool": 6}
Message = dict[str, str]


class Recorder:
    """One attempt: a tracer, and the gateway's side of its model calls."""

    def __init__(self, rollout_id: str) -> None:
        self.rollout_id = rollout_id
        self.store = Collected()
        self.tracer = Tracer()
        self._ids = count(1)

    def ask(
        self, messages: list[Message], answer: str, *, agent: str = "", model: str = "policy", retry: int = 0,
        finish: str = "stop", version: int = 7, edit: Callable[[dict[str, Any]], None] = lambda engine: None,
    ) -> list[Message]:  # fmt: skip
        """Have the engine say `answer`, record the call as the gateway does, and return the conversation after it."""
        trace_id, parent_id = parent_of(here())
        request = prepare({"model": model, "messages": messages}, Claims(self.rollout_id, 1))
        call = Call(
            self.rollout_id, 1, trace_id, parent_id, request, json.dumps(request).encode(), 0, retry, agent_name=agent
        )
        said = [*words(answer), END] if finish == "stop" else words(answer)
        engine: dict[str, Any] = {
            "prompt_token_ids": rendered(messages),
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": answer},
                    "finish_reason": finish,
                    "token_ids": said,
                    "logprobs": {"content": [{"logprob": -token / 1000} for token in said]},
                    "weight_versions": [{"version": str(version), "start": 0, "end": len(said)}],
                }
            ],
            "usage": {"prompt_tokens": len(rendered(messages)), "completion_tokens": len(said)},
        }
        edit(engine)
        for span in answered_spans(call, engine, 0, lambda: b"model" + next(self._ids).to_bytes(3, "big")):
            self.store.put(span)
        return [*messages, {"role": "assistant", "content": answer}]


def words(text: str) -> list[int]:
    return [10 + zlib.crc32(word.encode()) % 900 for word in text.split()]


def rendered(messages: list[Message]) -> list[int]:
    """The prompt's ids: an assistant's message reads as it was generated, so a conversation continues exactly."""
    ids = [token for one in messages for token in (ROLES[one["role"]], *words(one["content"]), END)]
    return [*ids, ROLES["assistant"]]


def pipeline(
    on: Recorder, question: str, draft: str, verdict: str, final: str | None, reward: float, **how: Any
) -> None:
    """Writer, checker, rewriter, as an orchestration would call them."""
    with on.tracer.trace_context("pipeline", store=on.store, rollout_id=on.rollout_id):
        asked: list[Message] = [{"role": "system", "content": "write sql"}, {"role": "user", "content": question}]
        with on.tracer.span("draft", {n.AGENT_NAME: "writer"}) as drafting:
            if how.get("retried"):
                on.ask(asked, "select nothing at all")
            talk = on.ask(asked, draft, retry=int(how.get("retried", False)), finish=how.get("finish", "stop"))
            with on.tracer.span("execute_tool sql", {"gen_ai.tool.name": "sql"}) as tool:
                tool.set_attribute("gen_ai.tool.call.result", how.get("rows", "3 rows"))
        with on.tracer.span("check"):
            # Its name comes with the request alone, as where only the gateway sees an agent.
            judged: list[Message] = [{"role": "user", "content": f"judge {draft}"}]
            on.ask(judged, verdict, agent="checker", model="fixed")
        if how.get("searched"):
            with on.tracer.span("search", {n.AGENT_NAME: "writer"}):
                for term in ("tables", "columns"):  # both go on from the same draft
                    with on.tracer.span(f"look up {term}"):
                        on.ask([*talk, {"role": "tool", "content": term}], f"see {term}")
        if final is not None:
            with on.tracer.span("mend", {n.AGENT_NAME: "rewriter"}) as mending:
                if how.get("rendered_anew"):
                    talk = [*asked, {"role": "assistant", "content": draft.upper()}]
                on.ask(
                    [*talk, {"role": "tool", "content": verdict}],
                    final,
                    version=8,
                    edit=how.get("edit", lambda engine: None),
                )
            emit_reward(0.25, name="judged better", span=mending)
        else:
            emit_reward(0.1, name="accepted", span=drafting)
        if not how.get("failed"):
            emit_reward(reward)


def without_ids(engine: dict[str, Any]) -> None:
    del engine["choices"][0]["token_ids"]


def record() -> list[FinishedRollout]:
    """Carry out the run and return its rollouts, with ids and times numbered."""
    scenes: list[tuple[str, dict[str, Any]]] = [
        ("count-0", {"draft": "select all", "verdict": "wrong count", "final": "select count", "reward": 1.0}),
        ("count-1", {"draft": "select some", "verdict": "wrong", "final": "select them", "reward": 0.0, "rendered_anew": True}),
        ("count-2", {"draft": "select count", "verdict": "fine", "final": None, "reward": 1.0, "retried": True}),
        ("join-0", {"draft": "join on id", "verdict": "slow", "final": "join on key", "reward": 0.5, "searched": True}),
        ("join-1", {"draft": "join and join and", "verdict": "cut off", "final": "join", "reward": 0.0, "finish": "length", "edit": without_ids}),
        ("join-2", {"draft": "join", "verdict": "no", "final": "join left", "reward": 0.0, "failed": True}),
    ]  # fmt: skip
    rollouts: list[FinishedRollout] = []
    for at, (name, how) in enumerate(scenes):
        on = Recorder(name)
        pipeline(on, f"question {name.partition('-')[0]}", **how)
        spans = numbered(on.store.spans, at)
        status = Status.FAILED if how.get("failed") else Status.SUCCEEDED
        reward = final_reward(spans) if status is Status.SUCCEEDED else None
        group, labels = name.partition("-")[0], {"phase": "train"}
        rollouts.append(
            FinishedRollout(
                name, group, labels, status, 1, reward, "boom" if how.get("failed") else "", spans, at, at + 1
            )
        )
    return rollouts


def numbered(spans: list[Span], rollout: int) -> list[Span]:
    """Return the spans with ids and times that follow from the order in which they were recorded, a parent's after its children's."""
    ids = {span.span_id: bytes((1, rollout, at, *5 * (0,))) for at, span in enumerate(spans)}
    first_under: dict[bytes, int] = {}  # a span begins with the first that was recorded under it
    for at, span in enumerate(spans):
        first_under.setdefault(span.parent_id or b"", first_under.get(span.span_id, at))
    result: list[Span] = []
    for at, span in enumerate(spans):
        attributes = dict(span.attributes)
        if n.REWARD_SPAN in attributes:
            attributes[n.REWARD_SPAN] = ids[bytes.fromhex(attributes[n.REWARD_SPAN])].hex()
        began = 1_000_000 * first_under.get(span.span_id, at)
        result.append(
            msgspec.structs.replace(
                span, span_id=ids[span.span_id], parent_id=ids.get(span.parent_id or b""), start_ns=began,
                end_ns=1_000_000 * (at + 1), attributes=attributes,
            )
        )  # fmt: skip
    return result


def load() -> list[FinishedRollout]:
    """Return the recorded run."""
    return msgspec.msgpack.decode(GOLDEN.read_bytes(), type=list[FinishedRollout])


if __name__ == "__main__":
    GOLDEN.write_bytes(msgspec.msgpack.encode(record()))
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")
