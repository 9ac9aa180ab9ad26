"""One model call: an engine is asked, the call is recorded, the agent is answered.

By token ids where the engine works by them (see `token_route`), else by the route of the agent's own words. What always
holds: whatever an engine answers, a span says what became of the call, and the agent gets an answer or a refusal only
when that span is durable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import anyio
import msgspec
from starlette.responses import Response

from lightning_bus import spans as s
from lightning_bus.clock import wall_ns
from lightning_bus.errors import BrokenError, BusyError
from lightning_bus.gateway import recording
from lightning_bus.gateway.dialects import CHAT, Dialect, Json, array, dicts
from lightning_bus.gateway.engines import Answer, object_of
from lightning_bus.gateway.metrics import Meters
from lightning_bus.gateway.openai_responses import TEXT_LOGPROBS
from lightning_bus.gateway.prompts import Prompt
from lightning_bus.gateway.recording import Call
from lightning_bus.gateway.refusals import by_engine, error, unanswered
from lightning_bus.gateway.rendering import ABORTED
from lightning_bus.gateway.streaming import ChatStream, Record, Relay, Source, span_id
from lightning_bus.gateway.token_route import CUT_OFF_MAX, CUT_OFF_WAIT_S, TokenRoute, cut_off_too_often
from lightning_bus.gateway.upstream import Upstreams, learn_version

_encode = msgspec.json.Encoder().encode


class Calls:
    """Asks engines for one gateway. `record` makes spans durable, or returns what the agent gets instead."""

    def __init__(self, upstreams: Upstreams, tokens: TokenRoute, meters: Meters, record: Record) -> None:
        self._upstreams = upstreams
        self._tokens = tokens
        self._meters = meters
        self._record = record

    async def whole(self, call: Call, dialect: Dialect, asked: Json) -> Response:
        """Ask for the answer in one piece, record it, return it."""
        prompt: Prompt | Answer | None = None
        try:
            prompt, call = await self._prompt(call, dialect)
            if isinstance(prompt, Answer):
                return await self._engine_refused(prompt, call)
            if prompt is not None:
                answer, body = await self._tokens.whole(call, prompt, show_logprobs=_wants_logprobs(asked))
                call = replace(call, prompt_source=prompt.source)
            else:
                answer = await self._ask(call, dialect)
                body = object_of(answer.body)
        except (BusyError, BrokenError) as exc:
            return await self.record_failure(call, str(exc)) or unanswered(exc)
        end_ns = wall_ns()
        if answer.status != 200:
            return await self._engine_refused(answer, call)
        if body is None:
            why = f"{answer.engine.name} answered 200 with what is not a JSON object: {answer.body[:200]!r}"
            return await self.record_failure(call, why) or error(502, why, "server_error")
        spans = recording.answered_spans(call, dialect.as_chat(body), end_ns, span_id)
        learn_version(answer.engine, spans)
        refusal = await self._record(spans, call)
        if refusal is not None:
            return refusal
        if prompt is not None:
            self._tokens.prompts.remember(call, prompt, body)
        try:
            told = dialect.answer(body, asked, spans[0].span_id.hex())
        except (LookupError, TypeError, ValueError, AttributeError):
            why = f"{answer.engine.name} answered 200 with what is no completion: {answer.body[:200]!r}"
            return error(502, why, "server_error")
        return Response(_encode(told), media_type="application/json")

    async def stream(self, call: Call, dialect: Dialect, asked: Json, ended: Callable[[], None]) -> Response:
        """Ask for a stream; once the engine has begun to answer, the rest is `Relay`'s."""
        source: Source | Answer
        try:
            prompt, call = await self._prompt(call, dialect)
            if isinstance(prompt, Answer):
                return await self._engine_refused(prompt, call)
            if prompt is not None:
                source = await self._tokens.stream(call, prompt, show_logprobs=_wants_logprobs(asked))
                call = replace(call, prompt_source=prompt.source)
            else:
                answer = await self._ask(call, dialect, stream=True)
                source = ChatStream(answer) if answer.status == 200 else answer
        except (BusyError, BrokenError) as exc:
            return await self.record_failure(call, str(exc)) or unanswered(exc)
        if isinstance(source, Answer):
            return await self._engine_refused(source, call)

        def whole(answer: Json) -> None:
            if prompt is not None:
                self._tokens.prompts.remember(call, prompt, answer)

        ident = span_id().hex()
        return Relay(self._record, source, call, dialect, asked, ident, whole=whole, ended=ended)

    async def _prompt(self, call: Call, dialect: Dialect) -> tuple[Prompt | Answer | None, Call]:
        """Return the call's prompt in ids if its engine works by ids, and the call with where the prompt came from."""
        if dialect.target != CHAT:
            return None, call
        prompt = await self._tokens.prompts.of(call)
        return prompt, replace(call, prompt_source=prompt.source if isinstance(prompt, Prompt) else s.CHAT)

    async def _ask(self, call: Call, dialect: Dialect, *, stream: bool = False) -> Answer:
        """Ask an engine in one step. What a pause cut off is asked for again, as long as nobody has seen any of it."""
        model = str(call.request.get("model") or "")
        cut_off = 0
        while True:
            answer = await self._upstreams.call(
                call.rollout_id, "POST", dialect.target, call.request_json, model=model, stream=stream, salted=True
            )
            self._meters.asked_again.inc(answer.asked - 1)
            choices = () if stream else dicts((object_of(answer.body) or {}).get("choices"))
            if not any(choice.get("finish_reason") == ABORTED for choice in choices):
                return answer
            if cut_off == CUT_OFF_MAX:
                raise cut_off_too_often(answer.engine)
            self._meters.asked_again.inc()
            await anyio.sleep(CUT_OFF_WAIT_S * 2**cut_off)
            cut_off += 1

    async def _engine_refused(self, answer: Answer, call: Call) -> Response:
        why = f"engine answered {answer.status}: {answer.body[:500].decode(errors='replace')}"
        return await self.record_failure(call, why) or by_engine(answer.status, answer.body)

    async def record_failure(self, call: Call, why: str) -> Response | None:
        return await self._record([recording.failed_span(call, why, wall_ns(), span_id())], call)


def _wants_logprobs(asked: Json) -> bool:
    """True when the agent is to see log-probs itself, in whatever API it asked."""
    return bool(asked.get("logprobs") or asked.get("top_logprobs") or TEXT_LOGPROBS in array(asked.get("include")))
