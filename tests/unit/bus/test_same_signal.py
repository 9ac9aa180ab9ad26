"""One rollout, told in four ways: what is learnt from it is the same.

The gateway alone (a plain OpenAI client), the light tracer, OpenTelemetry's SDK through our tracer, and a stock SDK that
exports OTLP. The gateway, its engines by token ids and its OTLP door are the real ones. Compared is everything that a
trainer sees: token ids, masks, log-probs, temperatures, weight versions, agents, rewards and what was left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np
from opentelemetry import propagate
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from lightning_bus import CreditSection, Status, tokens
from lightning_bus import spans as s
from lightning_bus.adapters import FinishedRollout, RewardsSection, RuleSection, ScoredRollout, scored
from lightning_bus.otel import OtelTracer, SpanExporter, Tracer, emit_reward
from lightning_bus.otel import names as n
from lightning_bus.otel.rewards import final_reward
from lightning_bus.otel.traceparent import root_of_attempt
from tests.gateway_fixtures import SECRET, World
from tests.token_engine import TokenEngine, token_world

CLAIMS = tokens.Claims("r-1", 1)
TOOLS: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "add", "arguments":  {"a":2,"b":2}}\n</tool_call>'
CREDIT = CreditSection(agents={"writer": "policy", "rewriter": "policy", "checker": "fixed"})
RULES = [
    RuleSection(on="tool_error", value=-0.5, pattern="error"),
    RuleSection(on="tool_ok", value=0.25),
    RuleSection(on="format_ok", value=0.125, pattern="(?s).*answer.*", agents=["writer"]),
    RuleSection(on="tokens", over=10, value=-0.01, agents=["rewriter"]),
]


class Told:
    """How an agent tells what it does: opening spans, naming agents, emitting rewards. This one tells nothing."""

    names_agents_in_requests = True

    def __init__(self, world: World) -> None:
        self.url, self.key = world.url, tokens.mint(SECRET, CLAIMS)

    @contextmanager
    def rollout(self) -> Iterator[None]:
        yield

    def span(self, name: str, attributes: dict[str, Any]) -> AbstractContextManager[Any]:
        return nullcontext()

    def reward(self, value: float, of: Any = None) -> None: ...

    def headers(self) -> dict[str, str]:
        return {}


class Light(Told):
    """Our tracer, whose spans go to the gateway by our exporter."""

    names_agents_in_requests = False

    def tracer(self) -> Tracer:
        return Tracer()

    @contextmanager
    def rollout(self) -> Iterator[None]:
        with SpanExporter(self.url, token=self.key) as store:
            with self.tracer().trace_context("solve", store=store, rollout_id="r-1", attempt_id=1) as self.made:
                yield

    def span(self, name: str, attributes: dict[str, Any]) -> AbstractContextManager[Any]:
        return self.made.start_as_current_span(name, attributes=attributes)

    def reward(self, value: float, of: Any = None) -> None:
        emit_reward(value, span=of)


class Otel(Light):
    """The same by OpenTelemetry's SDK."""

    def tracer(self) -> Tracer:
        return OtelTracer(provider=TracerProvider(), instrument=False)


class Stock(Told):
    """An SDK that knows nothing of us: OTLP/HTTP to the gateway, W3C Trace Context in its requests."""

    names_agents_in_requests = False

    @contextmanager
    def rollout(self) -> Iterator[None]:
        provider = TracerProvider()
        exporter = OTLPSpanExporter(
            f"{self.url}/rollout/r-1/attempt/1/v1/traces", headers={"authorization": f"Bearer {self.key}"}
        )
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        self.made = provider.get_tracer("an.agent")
        trace_id, root_id = root_of_attempt("r-1", 1)
        above = propagate.extract({"traceparent": f"00-{trace_id.hex()}-{root_id.hex()}-01"})
        with self.made.start_as_current_span("solve", context=above):
            yield
        provider.shutdown()

    def span(self, name: str, attributes: dict[str, Any]) -> AbstractContextManager[Any]:
        return self.made.start_as_current_span(name, attributes=attributes)

    def reward(self, value: float, of: Any = None) -> None:
        about = {} if of is None else {n.REWARD_SPAN: f"{of.get_span_context().span_id:016x}"}
        with self.made.start_as_current_span("reward", attributes={s.REWARD: value, **about}):
            pass

    def headers(self) -> dict[str, str]:
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        return carrier


def agent(world: World, told: Told, engine: TokenEngine) -> None:
    """A writer that uses tools, a checker on another model, a rewriter that goes on where the writer was."""
    client = world.client(CLAIMS)

    def ask(who: str, messages: list[Any], model: str = "policy", **how: Any) -> dict[str, Any]:
        headers = told.headers() | ({"x-agent-name": who} if told.names_agents_in_requests else {})
        answer = client.chat.completions.create(model=model, messages=messages, extra_headers=headers, **how)
        return answer.choices[0].message.to_dict()

    talk: list[Any] = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "2 + 2?"}]
    with told.rollout():
        with told.span("draft", {n.AGENT_NAME: "writer"}) as drafting:
            for result in ("error: no such thing", "the result is 4"):
                talk.append(ask("writer", talk, tools=TOOLS, temperature=0.7))
                (call,) = talk[-1]["tool_calls"]
                known = {"gen_ai.tool.name": "add", "gen_ai.tool.call.id": call["id"]}
                with told.span("execute_tool add", {s.OPERATION: "execute_tool", **known}) as tool:
                    if tool is not None:
                        tool.set_attribute("gen_ai.tool.call.result", result)
                talk.append({"role": "tool", "tool_call_id": call["id"], "content": result})
            talk.append(ask("writer", talk, tools=TOOLS))
        told.reward(0.75, of=drafting)
        with told.span("check", {n.AGENT_NAME: "checker"}):
            verdict = ask("checker", [{"role": "user", "content": "judge the answer"}], "fixed")
        engine.version = "8"
        with told.span("mend", {n.AGENT_NAME: "rewriter"}):
            talk.append({"role": "user", "content": verdict["content"]})
            ask("rewriter", talk, tools=TOOLS, temperature=0.5)
            ask("rewriter", [{"role": "user", "content": "the whole text"}], max_tokens=3)
        told.reward(1.0)


@cache
def recorded(tell: type[Told]) -> list[s.Span]:
    """Have the agent tell its work in this way, and return what was recorded."""
    engine = TokenEngine(replies=[CALL, CALL, "the answer is 4", "the answer is 8", "too long"], version="7")
    with token_world(engine, TokenEngine(model="fixed", replies=["fine"], version="100")) as world:
        agent(world, tell(world), engine)
    return world.bus.spans


def learnt(tell: type[Told], policy: str | None, *, emitted: bool) -> Any:
    """Return what a trainer of this policy gets of the rollout, told in this way.

    emitted  with the rewards that the agent emitted; else its rollout's is what it returned, and those of calls by rules
    """
    spans = recorded(tell)
    reward = final_reward(spans) if emitted else 1.0
    rollout = FinishedRollout("r-1", "g", {}, Status.SUCCEEDED, 1, reward, "", spans, 0, 1)
    rewards = RewardsSection(rules=RULES, emitted="spans" if emitted else "final")
    (made,), dropped = scored([rollout], CREDIT, rewards, policy=policy)
    return facts(made), dropped


def facts(made: ScoredRollout) -> Any:
    """Everything of a scored rollout but ids and times."""
    assert made.transitions is not None
    assert made.episode is not None
    turns = [
        (
            turn.agent, turn.policy, turn.left_out, turn.reward, sorted((one.value, one.source) for one in turn.rewards),
            turn.state_P.tolist(), turn.action_R.tolist(), turn.call.logprobs_R.tolist(), turn.call.weight_versions,
            turn.call.temperature, None if turn.next_state_P is None else turn.next_state_P.tolist(),
        )
        for turn in made.transitions.turns
    ]  # fmt: skip
    rows = [
        (
            row.token_ids.tolist(), row.trained.tolist(), row.logprobs.tolist(), row.temperatures.tolist(), row.policy,
            row.version_oldest, row.version_newest, row.sampled, len(row.span_ids),
        )
        for row in made.rows
    ]  # fmt: skip
    return turns, rows, made.reward, made.total, made.episode.rewards_T.tolist(), made.transitions.merged


def test_a_rollout_teaches_the_same_however_it_was_told() -> None:
    (turns, rows, _, _, _, merged), dropped = learnt(Told, "policy", emitted=False)
    assert all(s.is_model_call(span) for span in recorded(Told))
    assert [turn[0] for turn in turns] == ["writer"] * 3 + ["rewriter"] * 2
    assert [(oldest, newest, calls) for *_, oldest, newest, _, calls in rows] == [(7, 8, 4), (8, 8, 1)]
    assert merged.tokens_saved > 0
    assert set(rows[0][3]) == {1.0, float(np.float32(0.7)), 0.5}
    assert dropped == {"other policy": 1}
    assert {source for turn in turns for _, source in turn[4]} == {"tool_error", "tool_ok", "format_ok", "tokens"}
    for tell in (Light, Otel, Stock):
        assert len(recorded(tell)) > len(recorded(Told))
        for policy in (None, "policy", "fixed"):
            assert learnt(tell, policy, emitted=False) == learnt(Told, policy, emitted=False), (tell.__name__, policy)


def test_what_is_emitted_counts_the_same_by_every_tracer() -> None:
    light = learnt(Light, "policy", emitted=True)
    (turns, _, reward, *_), _ = light
    assert reward == 1.0
    assert sum(value for turn in turns for value, source in turn[4] if source == "emitted") == 0.75
    for tell in (Otel, Stock):
        assert learnt(tell, "policy", emitted=True) == light, tell.__name__
