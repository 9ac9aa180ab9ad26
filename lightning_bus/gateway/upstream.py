"""Where model calls go: the engines behind the gateway, and what happens while one of them is down.

A call goes to the engines that serve its model. Of those a rollout sticks to one (rendezvous hash), so the engine's
prefix cache sees a conversation whole; when that engine is down the next in the rollout's own order answers. A call of
no rollout goes to the engine with the fewest calls. What always holds: a call is sent only to an engine that is ready
(see `engines`); it is repeated only while nothing of its answer has left the gateway, so repeating is invisible; every
wait has a limit; and messages name engines by number, because agents are not to know where they are.

    choose ──► ask ──► answer
       ▲        │ cannot connect, broke off, 503, or another 5xx while there is an engine not yet asked
       └─ wait ─┘ …at most admission_wait_s, then BusyError

Connections are kept in a stack for each engine, and there are as many as there are calls at once.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import anyio
import msgspec

from lightning_bus.clock import monotonic_s
from lightning_bus.errors import BrokenError, BusyError, ConfigError
from lightning_bus.gateway.dialects import Json, dicts
from lightning_bus.gateway.engines import MODELS, Answer, Engine, engine_at, object_of
from lightning_bus.gateway.http_client import Gone
from lightning_bus.spans import WEIGHT_VERSIONS, Span

DOWN_S = 0.5  # an engine that answered 503 is passed over this long while another one is up
BACKOFF_S_MIN, BACKOFF_S_MAX = 0.05, 1.0
RETRY_AFTER_S_MAX = 2.0  # an engine may ask for more, but a swap of weights is over sooner than it can know

_log = logging.getLogger("lightning_bus.gateway")


class Upstreams:
    """The engines behind one gateway."""

    def __init__(self, urls: Sequence[str], *, admission_wait_s: float, request_limit_s: float) -> None:
        if not urls:
            raise ConfigError("gateway.upstreams is empty. Name at least one engine, such as http://127.0.0.1:4752.")
        self.engines = [engine_at(url, f"engine {number}") for number, url in enumerate(urls, 1)]
        self._admission_wait_s = admission_wait_s
        self._request_limit_s = request_limit_s

    async def engine_for(self, key: str, model: str) -> Engine:
        """Return the engine that calls of this rollout and model go to now; one that is not ready when none is."""
        if (engine := self._choose(key, model, ())) is None:
            await self._probe_doubtful(model)
            engine = self._choose(key, model, ()) or self._serving(model)[0]
        return engine

    async def call(
        self, key: str, method: str, target: str, body: bytes = b"", *, model: str = "", stream: bool = False,
        salted: bool = False, engine: Engine | None = None,
    ) -> Answer:  # fmt: skip
        """Return an engine's answer, whatever its status but 503. Close it when it was asked for as a stream.

        key     the rollout; calls with one key go to one engine, those with none to the least busy
        target  path below the engine's URL, such as "/v1/chat/completions"
        model   only engines that serve it are asked; all of them where none is known to
        salted  add the weights' version to the cache_salt of the body, a JSON object
        engine  to be asked before any other, if it is well

        Raises BusyError when no engine took the call within admission_wait_s, and BrokenError when one took it and
        did not answer within request_limit_s.
        """
        give_up_s = monotonic_s() + self._admission_wait_s
        backoff_s = BACKOFF_S_MIN
        asked = 0
        failed: list[Engine] = []  # answered this call with a 5xx
        while True:
            wait_s = backoff_s
            chosen = self._choose(key, model, failed, engine)
            if chosen is None:
                await self._probe_doubtful(model)
                chosen = self._choose(key, model, failed, engine)
            if chosen is None:
                chosen = self._serving(model)[0]
                why = chosen.unwell or "was passed over"
            else:
                asked += 1
                try:
                    said = _salted(body, chosen.version) if salted and chosen.version else body
                    answer = await chosen.ask(method, target, said, limit_s=self._request_limit_s, stream=stream)
                    if answer.status >= 500 and answer.status != 503:
                        chosen.doubt()
                        failed.append(chosen)
                        if self._choose(key, model, failed):
                            continue
                    if answer.status != 503:
                        answer.asked = asked
                        return answer
                    why = f"answered 503 {answer.body[:200].decode(errors='replace')}"
                    wait_s = max(backoff_s, min(answer.retry_after_s, RETRY_AFTER_S_MAX))
                    chosen.down_until_s = monotonic_s() + DOWN_S
                except Gone as exc:
                    why = str(exc)
                    chosen.doubt()
                _log.info("%s (%s) is passed over: it %s", chosen.name, chosen.url, why)
                if self._choose(key, model, failed):
                    continue
            if monotonic_s() + wait_s > give_up_s:
                raise BusyError(
                    f"{chosen.name} took no call within {self._admission_wait_s:g} s ({why}). It may be restarting; "
                    "try again, or raise [gateway] admission_wait_s."
                )
            await anyio.sleep(wait_s)
            chosen.down_until_s = 0.0
            backoff_s = min(2 * backoff_s, BACKOFF_S_MAX)

    async def models(self) -> Json:
        """Return the models of all engines that are well, each once, in OpenAI's words. Raises BusyError."""
        answers: dict[str, Answer] = {}

        async def one(engine: Engine) -> None:
            try:
                answers[engine.name] = await engine.ask("GET", MODELS, limit_s=self._request_limit_s)
            except (Gone, BrokenError):
                engine.doubt()

        async with anyio.create_task_group() as tasks:
            for engine in self.engines:
                if engine.is_ready(monotonic_s()):
                    tasks.start_soon(one, engine)
        first = answers or {"": await self.call("", "GET", MODELS)}
        listed: dict[str, Json] = {}
        for answer in first.values():
            for model in dicts((object_of(answer.body) or {}).get("data")):
                listed.setdefault(str(model.get("id")), model)
        return {"object": "list", "data": list(listed.values())}

    async def probe(self) -> dict[str, str]:
        """Ask every engine how it is. Returns, by name, "ok" or why it is not; calls go by it until the next time."""
        async with anyio.create_task_group() as tasks:
            for engine in self.engines:
                tasks.start_soon(engine.probe)
        return {engine.name: engine.unwell or "ok" for engine in self.engines}

    async def watch(self, every_s: float) -> None:
        """Probe for ever, so that a call need not be the first to find an engine gone."""
        while True:
            await self.probe()
            await anyio.sleep(every_s)

    async def aclose(self) -> None:
        """Close the idle connections."""
        for engine in self.engines:
            while engine.idle:
                engine.idle.pop().close()

    async def _probe_doubtful(self, model: str) -> None:
        now_s = monotonic_s()
        async with anyio.create_task_group() as tasks:
            for engine in self._serving(model):
                if not engine.is_ready(now_s):
                    tasks.start_soon(engine.probe)

    def _choose(self, key: str, model: str, failed: Sequence[Engine], first: Engine | None = None) -> Engine | None:
        """The first engine in the call's order that is ready, a well one before a slow one; None where none is."""
        now_s = monotonic_s()
        ready = [
            one
            for one in self._serving(model)
            if one.is_ready(now_s) and one.down_until_s <= now_s and one not in failed
        ]
        ready = [one for one in ready if not one.unwell] or ready
        if not ready:
            return None
        if len(ready) == 1:
            return ready[0]
        if first in ready:
            return first
        return self._ranked(ready, key)[0]

    def _serving(self, model: str) -> list[Engine]:
        """The engines known to serve a model; all of them where none is."""
        return [one for one in self.engines if model in one.models] or self.engines

    def _ranked(self, engines: Sequence[Engine], key: str) -> list[Engine]:
        """Engines in this rollout's order: each rollout has its own, and it survives engines coming and going."""
        if not key:
            return sorted(engines, key=lambda engine: engine.in_flight)
        return sorted(engines, key=lambda e: hashlib.blake2b(f"{e.url} {key}".encode(), digest_size=8).digest())


def _salted(body: bytes, version: str) -> bytes:
    """Keys and values cached under other weights must not be used: vLLM shares its prefix cache by salt."""
    if b'"cache_salt"' in body:  # perhaps the agent's own, to share with nobody else: then both count
        asked = object_of(body) or {}
        if "cache_salt" in asked:
            own = asked["cache_salt"]
            return msgspec.json.encode({**asked, "cache_salt": f"{version} {own}" if own else version})
    return b'%s,"cache_salt":"%s"}' % (body[:-1], version.encode())


def learn_version(engine: Engine, spans: Sequence[Span]) -> None:
    """Remember which weights the engine answers with, for the salt of the next call's prefix cache.

    Keys and values computed under old weights would give the new version's name to log-probs that are not its own.
    Versions of the policy are numbers; a scripted model's is not, and says nothing of the policy's.
    """
    versions = spans[-1].attributes.get(WEIGHT_VERSIONS)
    if versions and versions[-1][0].isdecimal():
        engine.version = versions[-1][0]
