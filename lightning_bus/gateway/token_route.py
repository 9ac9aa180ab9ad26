"""A chat call by its token ids: the prompt's to the answer's, and those to words.

    prompt (see `prompts`) ──► generate ──► derender ──► chat completion, or chunks of one

What always holds: what is generated on and what is recorded are the same ids; and an answer that a pause cut off is
gone on with or asked for again, and never given to an agent as an answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import anyio

from lightning_bus.clock import monotonic_s
from lightning_bus.errors import BrokenError
from lightning_bus.gateway import rendering as r
from lightning_bus.gateway.dialects import Json, array, dicts
from lightning_bus.gateway.engines import Answer, Engine, object_of
from lightning_bus.gateway.metrics import Meters
from lightning_bus.gateway.prompts import Prompt, Prompts, model_of
from lightning_bus.gateway.recording import Call
from lightning_bus.gateway.upstream import Upstreams
from lightning_bus.spans import CONTINUED

CUT_OFF_MAX = 8  # pauses that may cut one answer off; each swap of weights is at most one
CUT_OFF_WAIT_S = 0.05  # before an engine that has just cut an answer off is asked again


class TokenRoute:
    """Asks engines by token ids."""

    def __init__(self, upstreams: Upstreams, meters: Meters) -> None:
        self.prompts = Prompts(upstreams, meters)
        self._upstreams = upstreams
        self._meters = meters

    async def whole(self, call: Call, prompt: Prompt, *, show_logprobs: bool) -> tuple[Answer, Json | None]:
        """Return the engine's answer, and the chat completion that it is; None for the latter when it refused."""
        before: Json = {}
        for cut_off in range(CUT_OFF_MAX + 1):
            answer = await self._generate(call, prompt, before, text=show_logprobs)
            if answer.status != 200:
                return answer, None
            generated = object_of(answer.body) or {}
            choices = dicts(generated.get("choices"))
            if before:
                choices = [
                    r.followed_by(before, r.later(choice, before, len(array(before.get("token_ids")))))
                    for choice in choices[:1]
                ]
                generated = {**generated, "choices": choices, "usage": None}
            if not any(choice.get("finish_reason") == r.ABORTED for choice in choices):
                break
            self._meters.asked_again.inc()
            await anyio.sleep(CUT_OFF_WAIT_S * 2**cut_off)
            before = choices[0] if len(choices) == 1 and r.can_go_on(prompt.rendered) else {}
            if before and _is_used_up(call, prompt, before):
                before["finish_reason"] = "length"
                break
        else:
            raise cut_off_too_often(prompt.engine)
        prompt.ended(choices)
        worded = await self._derender(call, prompt, r.derender_body(call.request, generated, prompt.ids))
        chat = object_of(worded.body)
        if worded.status != 200 or chat is None:
            return worded, None
        ident = prompt.rendered.get("request_id")
        return answer, r.completion(call.request, chat, generated, prompt.ids, ident=ident, show_logprobs=show_logprobs)

    async def stream(self, call: Call, prompt: Prompt, *, show_logprobs: bool) -> Answer | TokenStream:
        """Return a stream whose engine has begun to answer, or the answer with which it refused."""
        answer = await self._generate(call, prompt, {}, text=show_logprobs)
        if answer.status != 200:
            return answer

        async def again(before: Json) -> Answer:
            self._meters.asked_again.inc()
            return await self._generate(call, prompt, before, text=show_logprobs)

        async def word(body: bytes) -> Answer:
            return await self._derender(call, prompt, body)

        return TokenStream(call, prompt, answer, again, word, show_logprobs=show_logprobs)

    # -- ids to ids, ids to messages

    async def _generate(self, call: Call, prompt: Prompt, before: Json, *, text: bool) -> Answer:
        """Ask for an answer, or for what follows `before` of it."""
        while True:
            done = array(before.get("token_ids"))
            ids = [*prompt.ids, *done] if done else prompt.ids
            body = r.generate_body(prompt.rendered, ids, asked=call.request, done=len(done), text=text)
            answer = await self._post(
                call, prompt.engine, r.GENERATE, body, stream=bool(call.request["stream"]), salted=True
            )
            prompt.engine = answer.engine
            longer = len(prompt.ids) > len(prompt.rendered_ids)
            if answer.status != 400 or prompt.source != CONTINUED or not longer or done:
                return answer
            # Recorded ids hold what a template leaves out of earlier turns; the context may be too short for that.
            prompt.begin_anew()

    async def _derender(self, call: Call, prompt: Prompt, body: bytes) -> Answer:
        began_s = monotonic_s()
        answer = await self._post(call, prompt.engine, r.DERENDER, body)
        self._meters.derender_s.observe(monotonic_s() - began_s)
        return answer

    async def _post(
        self, call: Call, engine: Engine, target: str, body: bytes, *, stream: bool = False, salted: bool = False
    ) -> Answer:
        answer = await self._upstreams.call(
            call.rollout_id, "POST", target, body, model=model_of(call), engine=engine, stream=stream, salted=salted
        )
        if answer.asked > 1:
            self._meters.asked_again.inc(answer.asked - 1)
        return answer


class TokenStream:
    """A stream of ids on its way into words, in chunks of a chat completion.

    Chunks that came while one was being put into words are put into words together, so that a slow derender makes
    fewer and larger chunks and never a queue.
    """

    def __init__(
        self, call: Call, prompt: Prompt, answer: Answer, again: Callable[[Json], Awaitable[Answer]],
        word: Callable[[bytes], Awaitable[Answer]], *, show_logprobs: bool,
    ) -> None:  # fmt: skip
        self._call = call
        self._prompt = prompt
        self._answer = answer
        self._again = again
        self._word = word
        self._show_logprobs = show_logprobs
        self._ident = str(prompt.rendered.get("request_id") or "")
        self._words = r.ChunkWords(call.request, prompt.ids, self._ident)
        self._stops = r.StopStrings(call.request)
        self._first = True
        # Of the only choice; with several, nothing is gone on with. What was known when the engine was asked last is
        # in _earlier, and the first _shift ids.
        self._so_far: Json = {"token_ids": [], "weight_versions": []}
        self._earlier = self._so_far
        self._shift = 0
        self._aborted = False

    @property
    def engine(self) -> Engine:
        return self._answer.engine

    def close(self) -> None:
        self._answer.close()

    async def chunks(self) -> AsyncIterator[list[Json]]:
        """The chunks, as many at a time as came together. Raises BrokenError when the engine breaks off."""
        for cut_off in range(CUT_OFF_MAX + 1):
            self._shift, self._earlier = len(self._so_far["token_ids"]), {**self._so_far}
            self._aborted = False
            try:
                async for events in self._answer.events():
                    if failed := next((event for event in events if "error" in event), None):
                        yield [failed]
                        return
                    if chunks := await self._worded(events):
                        yield chunks
            except BrokenError:
                # Of nothing, nothing has left: another engine may answer. Ids without their weights are not gone on with.
                if self._so_far["token_ids"] or self._answer.is_late:
                    raise
                self._aborted = True
            if not self._aborted:
                return
            await self._go_on(cut_off)
        raise cut_off_too_often(self.engine)

    async def _worded(self, events: list[Json]) -> list[Json]:
        """Return what came together as chunks, and note what an answer would be gone on with from."""
        chunks: list[Json] = []
        for piece in r.joined(choice for event in events for choice in dicts(event.get("choices"))):
            if piece.get("weight_versions"):
                piece = r.later(piece, self._earlier, self._shift)
                self._so_far["weight_versions"] = piece["weight_versions"]
            self._so_far["token_ids"] += array(piece.get("token_ids"))
            if piece.get("finish_reason") == r.ABORTED:
                if r.can_go_on(self._prompt.rendered) and _is_used_up(self._call, self._prompt, self._so_far):
                    piece["finish_reason"] = "length"
                else:
                    self._aborted = True
                    piece = {**piece, "finish_reason": None, "weight_versions": None}
            self._prompt.ended([piece])
            if piece.get("token_ids") or piece.get("finish_reason"):
                chunks.append(await self._chunk(piece))
        usage = next((event["usage"] for event in events if event.get("usage")), None)
        if usage is not None and not self._aborted:
            chunks.append(self._usage(usage))
        return chunks

    async def _go_on(self, cut_off: int) -> None:
        self._answer.close()
        if self._so_far["token_ids"] and not r.can_go_on(self._prompt.rendered):
            raise BrokenError(
                f"{self.engine.name} was paused in the middle of the answer, and an answer with such sampling cannot be "
                "gone on with. Ask again, or have weights pushed with push_mode keep or drain."
            )
        await anyio.sleep(CUT_OFF_WAIT_S * 2**cut_off)
        answer = await self._again(self._so_far)
        if answer.status != 200:
            raise BrokenError(f"{answer.engine.name} answered {answer.status} when asked to go on with an answer")
        self._answer = answer

    async def _chunk(self, piece: Json) -> Json:
        worded = await self._word(self._words.body(piece))
        answer = object_of(worded.body)
        if worded.status != 200 or answer is None:
            said = worded.body[:200].decode(errors="replace")
            raise BrokenError(f"{worded.engine.name} could not put ids into words: it answered {worded.status} {said}")
        chunk = self._words.answered(piece, answer)
        for choice in dicts(chunk.get("choices")):
            self._stops.push(choice, piece.get("stop_reason"))
        r.chunk_with_ids(chunk, piece, self._call.request, show_logprobs=self._show_logprobs)
        if self._first:
            self._first = False
            chunk["prompt_token_ids"] = self._prompt.ids
        return chunk

    def _usage(self, usage: Json) -> Json:
        counted = {**usage}
        if done := self._shift:
            counted["prompt_tokens"] = len(self._prompt.ids)
            counted["completion_tokens"] = int(usage.get("completion_tokens") or 0) + done
            counted["total_tokens"] = counted["prompt_tokens"] + counted["completion_tokens"]
        return {
            "id": self._ident, "object": "chat.completion.chunk", "model": model_of(self._call), "choices": [],
            "created": self._call.start_ns // 10**9, "usage": counted,
        }  # fmt: skip


def _is_used_up(call: Call, prompt: Prompt, choice: Json) -> bool:
    left = r.tokens_left(prompt.rendered, call.request, len(array(choice.get("token_ids"))))
    return left is not None and left <= 0


def cut_off_too_often(engine: Engine) -> BrokenError:
    return BrokenError(
        f"{engine.name} was paused {CUT_OFF_MAX + 1} times in the middle of this answer. Push weights more seldom, or "
        "with push_mode keep."
    )
