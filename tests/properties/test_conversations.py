"""Random conversations, with branches, retries, echoes and edits, over engines by token ids.

Watched: every prompt that goes on from a recorded answer begins with that answer's exact ids, and what follows them
says, word for word, what the template says of the new messages; a prompt that does not go on is the template's own;
every sampled token is in exactly one row of training. Unwatched: streams, engines that fail.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bus.adapters.transitions import transitions_of
from lightning_bus.gateway.engines import Answer, Engine
from lightning_bus.gateway.metrics import Meters
from lightning_bus.gateway.prompts import Prompt
from lightning_bus.gateway.recording import Call, answered_spans, prepare
from lightning_bus.gateway.token_route import TokenRoute
from lightning_bus.gateway.upstream import Upstreams
from lightning_bus.spans import CONTINUED, Span
from lightning_bus.tokens import Claims
from tests.chat_templates import TEMPLATES
from tests.token_engine import TokenEngine

WORDS = ["the answer", " question", "<tool>", "é", "\n", "12", "  ", "<think>a</think>", "You are helpful."]
text = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map("".join)


class Direct:
    """`Upstreams` without sockets: one engine, asked by calling it."""

    def __init__(self, engine: TokenEngine) -> None:
        self._engine = engine
        self.known = Engine("http://engine", "engine 1", cast(Any, None))
        self.known.learn_route(engine.model, True)

    async def engine_for(self, key: str, model: str) -> Engine:
        return self.known

    async def call(self, key: str, method: str, target: str, body: bytes = b"", **more: Any) -> Answer:
        asked = json.loads(body)
        answers = {
            "/v1/chat/completions/render": self._engine._render,
            "/inference/v1/generate": self._engine._generate,
            "/v1/chat/completions/derender": self._engine._derender,
        }  # fmt: skip
        response = answers[target](asked)
        return Answer(self.known, response.status_code, "application/json", bytes(response.body), 0.0, 1.0, None)


class Agent:
    """Talks to one attempt's gateway, and keeps every conversation that it ever had."""

    def __init__(self, template: str) -> None:
        self.engine = TokenEngine(template)
        direct = Direct(self.engine)
        self.route = TokenRoute(cast(Upstreams, direct), Meters())
        self.spans: list[Span] = []
        self.heads: list[tuple[list[Any], list[int]]] = []  # messages with their answer, and the ids of it all

    def say(self, messages: list[Any], reply: str, tokens_max: int | None) -> Prompt:
        self.engine.replies[:] = [reply]
        asked = {"model": "policy", "messages": messages, **({"max_tokens": tokens_max} if tokens_max else {})}
        sent = prepare(asked, Claims("r", 1))
        call = Call("r", 1, b"t" * 16, None, sent, json.dumps(sent).encode(), 0)

        async def ask() -> tuple[Prompt, dict[str, Any]]:
            prompt = await self.route.prompts.of(call)
            assert isinstance(prompt, Prompt)
            _, body = await self.route.whole(call, prompt, show_logprobs=False)
            assert body is not None
            self.route.prompts.remember(call, prompt, body)
            return prompt, body

        prompt, body = anyio.run(ask)
        self.spans += answered_spans(call, body, 1, lambda: len(self.spans).to_bytes(8, "big"))
        [choice] = body["choices"]
        self.heads.append(([*messages, choice["message"]], [*prompt.ids, *choice["token_ids"]]))
        return prompt


def suffix(engine: TokenEngine, before: Sequence[Any], after: Sequence[Any]) -> str:
    """What the template writes between the end of an answer's text and the end of the next prompt."""
    marked = [*before[:-1], {**before[-1], "content": "\u2021", "reasoning": None}]
    whole = engine.tokenizer.decode(engine.ids({"messages": [*marked, *after]}))
    return whole.partition("\u2021")[2]


@pytest.mark.parametrize("template", list(TEMPLATES))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_recorded_ids_are_never_changed_and_what_is_new_is_what_the_template_says(
    template: str, data: st.DataObject
) -> None:
    agent = Agent(template)
    for _ in range(data.draw(st.integers(2, 7), "calls")):
        how = (
            data.draw(st.sampled_from(["echoed", "echoed loosely", "edited", "begun"]), "how")
            if agent.heads
            else "begun"
        )
        question = {"role": "user", "content": data.draw(text, "question")}
        before: list[Any] = [] if how == "begun" else [*data.draw(st.sampled_from(agent.heads), "head")[0]]
        if how == "edited":
            before[-2] = {"role": "user", "content": f"another question {len(agent.heads)}"}
        if how == "echoed loosely":
            before[-1] = {"role": "assistant", "content": (before[-1]["content"] or "").strip(), "refusal": None}
        tokens_max = data.draw(st.none() | st.integers(1, 9), "tokens_max")
        prompt = agent.say([*before, question], data.draw(text, "reply"), tokens_max)
        if prompt.source != CONTINUED:
            assert how in ("begun", "edited")
            assert prompt.ids == agent.engine.ids({"messages": [*before, question]})
            continue
        assert prompt.parent is not None
        recorded = prompt.parent.all_ids()
        assert prompt.ids[: len(recorded)] == recorded
        assert any(ids == recorded for _, ids in agent.heads)
        said = suffix(agent.engine, prompt.messages[: -len(prompt.new)], prompt.new)
        end = TEMPLATES[template][1]
        added = agent.engine.tokenizer.decode(prompt.ids[len(recorded) :])
        assert (end if recorded[-1] == agent.engine.stop_id else "") + added == said
    found = transitions_of("r", 1, "g", agent.spans)
    assert not found.dropped
    assert sum(int(row.trained.sum()) for row in found.rows) == sum(
        len(span.attributes["lightning.response_token_ids"]) // 4 for span in agent.spans
    )
