"""A chat call's messages as ids: those recorded of its conversation, and only what is new rendered.

    request ──► does it extend an answer that is remembered? ──► its ids + what is new      CONTINUED
                └─ no, or the template makes no sense of it ──► all messages rendered        RENDERED

What always holds: an engine without the routes that this takes is asked by its chat route, which is remembered until
that engine is down; and whatever is not sure is rendered whole, which costs a row of training and nothing else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import anyio

from lightning_bus.clock import monotonic_s
from lightning_bus.errors import BrokenError, BusyError
from lightning_bus.gateway import rendering as r
from lightning_bus.gateway.conversations import Chain, Conversations, Found, Turn
from lightning_bus.gateway.dialects import Json, array, dicts
from lightning_bus.gateway.engines import Answer, Engine, object_of
from lightning_bus.gateway.http_client import Gone
from lightning_bus.gateway.metrics import Meters
from lightning_bus.gateway.recording import Call
from lightning_bus.gateway.seams import closing_id, example, suffix_after, suffix_by_example
from lightning_bus.gateway.upstream import Upstreams
from lightning_bus.spans import CONTINUED, RENDERED

ROUTE_CHECK_LIMIT_S = 5.0
_ANSWERED = ("stop", "tool_calls", "length")


@dataclass(slots=True, eq=False)
class Prompt:
    """A call's messages as ids."""

    ids: list[int]
    source: str  # CONTINUED or RENDERED
    rendered: Json  # the generate request that render made of it
    engine: Engine
    messages: list[Json]
    rendered_ids: list[int]
    chain: Chain | None = None  # None: such a call is not remembered
    parent: Turn | None = None  # whose ids begin it
    new: list[Json] = field(default_factory=list[Json])  # messages since the parent's
    stop_ids: dict[int, int] = field(default_factory=dict[int, int])  # with which its choices ended

    def begin_anew(self) -> None:
        """Use what was rendered instead of the recorded ids."""
        self.ids, self.source, self.parent, self.new = self.rendered_ids, RENDERED, None, self.messages

    def ended(self, choices: Iterable[Json]) -> None:
        """Note with which ids choices ended, before anybody gives the end another name."""
        for choice in choices:
            if (stop_id := r.stop_id_of(choice)) is not None:
                self.stop_ids[r.index_of(choice)] = stop_id


class Prompts:
    """Makes prompts, and remembers what was answered to them."""

    def __init__(self, upstreams: Upstreams, meters: Meters) -> None:
        self._upstreams = upstreams
        self._meters = meters
        self._conversations = Conversations()

    async def of(self, call: Call) -> Prompt | Answer | None:
        """Return a call's messages as ids; the engine's answer when it refuses it; None to ask the chat route.

        Raises BusyError and BrokenError as `Upstreams.call` does.
        """
        if r.needs_chat(call.request):
            return None
        model = model_of(call)
        engine = await self._upstreams.engine_for(call.rollout_id, model)
        if engine.token_routes.get(model) is False:
            return None
        began_s = monotonic_s()
        messages = call.request.get("messages")
        chain = None
        if call.rollout_id and not r.is_prefilled(call.request) and len(dicts(messages)) == len(array(messages)):
            chain = Chain(call.request)
        prompt = await self._continued(call, engine, chain) or await self._rendered(call, engine, chain)
        self._meters.render_s.observe(monotonic_s() - began_s)
        return prompt

    def remember(self, call: Call, prompt: Prompt, completion: Json) -> None:
        """Remember an answer that the agent is about to be given, so that its next request can go on from its ids."""
        if prompt.chain is None:
            return
        model = model_of(call)
        for stop_id in prompt.stop_ids.values():
            self._conversations.learn_stop(model, stop_id)
        ends = {stop: prompt.rendered_ids.count(stop) for stop in self._conversations.stops(model) or ()}
        for choice in dicts(completion.get("choices")):
            if array(choice.get("token_ids")) and choice.get("finish_reason") in _ANSWERED:
                self._conversations.remember(
                    (call.rollout_id, call.attempt), prompt.chain, prompt.new, choice.get("message") or {},
                    prompt_ids=prompt.ids, response_ids=choice["token_ids"],
                    stop_id=prompt.stop_ids.get(r.index_of(choice)), ends=ends, parent=prompt.parent,
                )  # fmt: skip

    def is_over(self, rollout_id: str, attempt: int) -> None:
        """Forget an attempt that will not call again."""
        self._conversations.is_over((rollout_id, attempt))

    # -- messages to ids

    async def _rendered(self, call: Call, engine: Engine, chain: Chain | None) -> Prompt | Answer | None:
        """Render all of the agent's messages."""
        model = model_of(call)
        messages = array(call.request.get("messages"))
        answer = await self._post(call, engine, r.RENDER, r.render_body(call.request, call.request.get("messages")))
        engine = answer.engine
        rendered = object_of(answer.body) or {}
        ids = array(rendered.get("token_ids"))
        if answer.status in r.NO_SUCH_ROUTE or (answer.status == 200 and not ids):
            # A model that this engine does not know is no word on its routes.
            if answer.status != 404 or not engine.models or model in engine.models:
                engine.learn_route(model, False)
            return None
        if answer.status != 200:
            return answer
        if model not in engine.token_routes:
            engine.learn_route(model, await _has_the_others(engine))
        if not engine.token_routes.get(model):
            return None
        if chain is not None and self._conversations.stops(model) is None:
            await self._learn_closing(call, engine)
        return Prompt(
            ids, RENDERED, _without_ids(rendered), engine, messages, ids, None if rendered.get("features") else chain,
            new=messages,
        )  # fmt: skip

    async def _continued(self, call: Call, engine: Engine, chain: Chain | None) -> Prompt | None:
        """Render what is new since a recorded answer; None when there is none, or the template makes no sense of it."""
        found = chain and self._conversations.find((call.rollout_id, call.attempt), call.request, chain)
        if not found:
            return None
        messages = [*found.messages, *found.new]
        full, history = await self._render_both(call, engine, messages, found.messages)
        if full is None or history is None or full.get("features"):
            return None
        full_ids = array(full.get("token_ids"))
        stops = self._conversations.stops(model_of(call)) or ()
        suffix = suffix_after(found.turn, array(history.get("token_ids")), full_ids, stops)
        if suffix is None:
            suffix = await self._suffix_by_example(call, engine, found)
        if not suffix:
            return None
        ids = [*found.turn.all_ids(), *suffix]
        return Prompt(
            ids, CONTINUED, _without_ids(full), engine, messages, full_ids, chain, found.turn, found.new
        )  # fmt: skip

    async def _suffix_by_example(self, call: Call, engine: Engine, found: Found) -> list[int] | None:
        said = example(found.messages[-1])
        full, history = await self._render_both(call, engine, [*said, *found.new], said)
        if full is None or history is None:
            return None
        stops = self._conversations.stops(model_of(call)) or ()
        return suffix_by_example(found.turn, array(history.get("token_ids")), array(full.get("token_ids")), stops)

    async def _learn_closing(self, call: Call, engine: Engine) -> None:
        """Find out how the template closes an answer, before one is cut off and must be closed by us. Once a model."""
        bodies = [r.history_body(call.request, example({}, word)) for word in "xy"]
        answers = await _together(*(partial(self._post, call, engine, r.RENDER, body) for body in bodies))
        one, other = (array((object_of(answer.body) or {}).get("token_ids")) for answer in answers)
        self._conversations.learn_stop(model_of(call), closing_id(one, other))

    async def _render_both(
        self, call: Call, engine: Engine, messages: list[Json], history: list[Json]
    ) -> tuple[Json | None, Json | None]:
        """Render messages to be answered, and those of them that have been; None for what the engine refuses."""
        bodies = [r.render_body(call.request, messages), r.history_body(call.request, history)]
        answers = await _together(*(partial(self._post, call, engine, r.RENDER, body) for body in bodies))
        full, alone = (object_of(answer.body) if answer.status == 200 else None for answer in answers)
        return full, alone

    async def _post(self, call: Call, engine: Engine, target: str, body: bytes) -> Answer:
        answer = await self._upstreams.call(call.rollout_id, "POST", target, body, model=model_of(call), engine=engine)
        self._meters.asked_again.inc(answer.asked - 1)
        return answer


def model_of(call: Call) -> str:
    return str(call.request.get("model") or "")


def _without_ids(rendered: Json) -> Json:
    return {name: value for name, value in rendered.items() if name != "token_ids"}


async def _has_the_others(engine: Engine) -> bool:
    """True when an engine that renders also generates and derenders: asked for nothing, it says what is missing."""
    try:
        for target in (r.GENERATE, r.DERENDER):
            answer = await engine.ask("POST", target, b"{}", limit_s=ROUTE_CHECK_LIMIT_S)
            if answer.status in r.NO_SUCH_ROUTE or answer.status >= 500:
                return False
    except (Gone, BrokenError):
        return False
    return True


async def _together(*calls: Callable[[], Awaitable[Answer]]) -> list[Answer]:
    """Await several at once, in their order. Raises the first one's error as it is, not a group of them."""
    results: dict[int, Answer] = {}
    failures: list[BusyError | BrokenError] = []

    async def one(at: int, call: Callable[[], Awaitable[Answer]]) -> None:
        try:
            results[at] = await call()
        except (BusyError, BrokenError) as exc:
            failures.append(exc)

    async with anyio.create_task_group() as tasks:
        for at, call in enumerate(calls):
            tasks.start_soon(one, at, call)
    if failures:
        raise failures[0]
    return [results[at] for at in range(len(calls))]
