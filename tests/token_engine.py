"""An engine by token ids for tests: real tokenizers and chat templates, replies as they are told, vLLM's shapes.

It says its replies one character a token, where its tokenizer would have merged them: so a history that is tokenised
again is never the history that was sampled, and a test sees it. As vLLM with a parser, its derender shows special
tokens, and its chat route does not show the one at the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import PreTrainedTokenizerFast

from lightning_bus.config import GatewaySection
from lightning_bus.gateway.app import build_app
from tests.chat_templates import TEMPLATES, tokenizer
from tests.gateway_fixtures import PATIENCE_S, SECRET, Bus, Engine, World, serving

Body = dict[str, Any]


@dataclass
class TokenEngine:
    """The engine. `replies` are said in turn; what is asked for beyond them is answered with "answer N"."""

    template: str = "chatml"
    replies: list[str] = field(default_factory=list[str])
    version: str = "1"
    model: str = "policy"
    context_tokens: int = 100_000
    abort_after: list[int] = field(default_factory=list[int])  # of the next answers: cut off after so many tokens
    breaks_off: int = 0  # so many streams break off before they have said anything
    missing: set[str] = field(default_factory=set[str])  # routes that it does not have
    asked: list[tuple[str, Body]] = field(default_factory=list[tuple[str, Body]])
    said: int = 0
    on_generate: Callable[[], None] = lambda: None

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return tokenizer(self.template)

    @property
    def stop_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(TEMPLATES[self.template][1])

    def posts(self, path: str) -> list[Body]:
        return [body for target, body in self.asked if target == path]

    # -- the three steps

    def ids(self, body: Body) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            body["messages"], tools=body.get("tools"), tokenize=False,
            add_generation_prompt=body.get("add_generation_prompt", True), **(body.get("chat_template_kwargs") or {}),
        )  # fmt: skip
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def render(self, body: Body) -> Body:
        ids = self.ids(body)
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        sampling = {
            "temperature": body.get("temperature", 1.0), "top_p": body.get("top_p", 1.0), "n": body.get("n") or 1,
            "max_tokens": min(asked or self.context_tokens, self.context_tokens - len(ids)), "output_kind": 2,
            "logprobs": (body.get("top_logprobs") or 0) if body.get("logprobs") else None, "stop": body.get("stop"),
            "seed": body.get("seed"), "skip_clone": True, "repetition_penalty": 1.0,
        }  # fmt: skip
        return {
            "request_id": "chatcmpl-x", "token_ids": ids, "sampling_params": sampling, "model": body["model"],
            "stream": bool(body.get("stream")), "cache_salt": body.get("cache_salt"), "features": None,
        }  # fmt: skip

    def choices(self, body: Body) -> list[Body]:
        """Generate: the whole of each choice."""
        sampling = body["sampling_params"]
        result: list[Body] = []
        for index in range(sampling.get("n") or 1):
            text = self.replies.pop(0) if self.replies else f"answer {self.said}"
            self.said += 1
            ids = [one for char in text for one in self.tokenizer(char, add_special_tokens=False)["input_ids"]]
            reason, stop_reason = "stop", None
            stops = sampling.get("stop") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                if stop in text:
                    ids, stop_reason = ids[: text.index(stop) + len(stop)], stop
            if stop_reason is None:
                ids.append(self.stop_id)
            if (most := sampling.get("max_tokens")) is not None and len(ids) > most:
                ids, reason, stop_reason = ids[:most], "length", None
            if self.abort_after:
                cut = self.abort_after.pop(0)
                self.replies.insert(0, text[cut:])
                ids, reason, stop_reason = ids[:cut], "abort", None
            versions = [{"version": self.version, "start": 0, "end": len(ids)}]
            logprobs = {"content": [self._logprob(token, body, sampling) for token in ids]}
            result.append(
                {
                    "index": index, "finish_reason": reason, "stop_reason": stop_reason, "token_ids": ids,
                    "logprobs": logprobs, "weight_versions": versions,
                }
            )  # fmt: skip
        return result

    def _logprob(self, token: int, body: Body, sampling: Body) -> Body:
        made: Body = {"logprob": -token / 1000}
        if body.get("output_mode") == "text":
            text = self.tokenizer.decode([token])
            return {**made, "token": text, "bytes": list(text.encode()), "top_logprobs": [{**made, "token": text}]}
        return {**made, "token_id": token, "rank": 1, "top_logprobs": []}

    def message(self, ids: list[int], stops_hidden: str = "") -> Body:
        text = self.tokenizer.decode(ids, skip_special_tokens=False).replace(stops_hidden or "\0", "")
        reasoning, found, rest = text.partition("</think>")
        message: Body = {"role": "assistant", "content": text}
        if found:
            message = {"role": "assistant", "content": rest.lstrip(), "reasoning": reasoning.removeprefix("<think>")}
        calls = re.findall(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", message["content"], re.DOTALL)
        if calls:
            message["content"] = message["content"].partition("<tool_call>")[0].strip() or None
            message["tool_calls"] = []
            for call in calls:
                made = json.loads(call)
                arguments = json.dumps(made["arguments"])
                ident = f"call-{self.said}-{len(message['tool_calls'])}"
                message["tool_calls"].append(
                    {"id": ident, "type": "function", "function": {"name": made["name"], "arguments": arguments}}
                )
        return message

    # -- the routes

    def app(self) -> Starlette:
        async def get(request: Request) -> Response:
            if request.url.path == "/weight_info":
                return JSONResponse({"weight_version": self.version})
            return JSONResponse({"data": [{"id": self.model, "object": "model"}]})

        posts = {
            "/v1/chat/completions/render": self._render, "/inference/v1/generate": self._generate,
            "/v1/chat/completions/derender": self._derender, "/v1/chat/completions": self._chat,
        }  # fmt: skip
        routes = [Route(path, get) for path in ("/health", "/weight_info", "/v1/models")]
        routes += [
            Route(path, self._counted(path, answer), methods=["POST"])
            for path, answer in posts.items()
            if path not in self.missing
        ]
        return Starlette(routes=routes)

    def _counted(self, path: str, answer: Callable[[Body], Response]) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Response:
            body = await request.json()
            if not body:
                return JSONResponse({"error": {"message": "nothing was sent"}}, 400)
            self.asked.append((path, body))
            return answer(body)

        return handle

    def _render(self, body: Body) -> Response:
        return JSONResponse(self.render(body))

    def _generate(self, body: Body) -> Response:
        self.on_generate()
        if len(body["token_ids"]) >= self.context_tokens:
            return JSONResponse({"error": {"message": "the prompt is too long"}}, 400)
        choices = self.choices(body)
        if body.get("stream"):
            return StreamingResponse(self._events(body, choices), media_type="text/event-stream")
        return JSONResponse({"request_id": "generate-x", "choices": choices, "usage": self._usage(body, choices)})

    async def _events(self, body: Body, choices: list[Body]) -> AsyncIterator[str]:
        if self.breaks_off:
            self.breaks_off -= 1
            raise ConnectionError("the engine was killed")
        for choice in choices:
            ids, content = choice["token_ids"], choice["logprobs"]["content"]
            for at, token in enumerate(ids):
                last = at == len(ids) - 1
                piece = {"index": choice["index"], "token_ids": [token], "logprobs": {"content": [content[at]]}}
                if last:
                    piece |= {name: choice[name] for name in ("finish_reason", "stop_reason", "weight_versions")}
                yield f"data: {json.dumps({'request_id': 'generate-x', 'choices': [piece]})}\n\n"
            if not ids:
                yield f"data: {json.dumps({'choices': [{**choice, 'logprobs': None}]})}\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': self._usage(body, choices)})}\n\n"
        yield "data: [DONE]\n\n"

    def _usage(self, body: Body, choices: list[Body]) -> Body:
        made = sum(len(choice["token_ids"]) for choice in choices)
        asked = len(body["token_ids"])
        return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}

    def _derender(self, body: Body) -> Response:
        assert body["chat_request"]["messages"] and body["prompt_token_ids"]
        if not body.get("stream"):
            choices = body["generate_response"]["choices"]
            assert all(choice["token_ids"] for choice in choices)
            return JSONResponse(self._completion([{**choice, "logprobs": None} for choice in choices], body["model"]))
        state = body["stream_state"] or {"ids": [], "text": ""}
        [choice] = body["generate_chunk"]["choices"]
        ids = [*state["ids"], *choice.get("token_ids", [])]
        message = self.message(ids)
        ended = choice.get("finish_reason")
        delta: Body = {"role": None if state["ids"] else "assistant", "content": None, "tool_calls": []}
        shown = (message["content"] or "") if ended or "<" not in (message["content"] or "") else state["text"]
        delta["content"] = shown[len(state["text"]) :] or None
        if ended and message.get("tool_calls"):
            delta["tool_calls"] = [{"index": at, **call} for at, call in enumerate(message["tool_calls"])]
            ended = "tool_calls"
        made = {"index": choice.get("index", 0), "delta": delta, "logprobs": None, "finish_reason": ended}
        chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": body["model"], "choices": [made]}
        return JSONResponse({"chunk": chunk, "stream_state": {"ids": ids, "text": shown}})

    def _completion(self, choices: list[Body], model: str, hidden: str = "") -> Body:
        made = [
            {
                "index": choice.get("index", 0), "message": self.message(choice["token_ids"], hidden),
                "logprobs": choice["logprobs"], "finish_reason": choice.get("finish_reason"),
            }
            for choice in choices
        ]  # fmt: skip
        return {"id": "x", "object": "chat.completion", "created": 1, "model": model, "choices": made}

    def _chat(self, body: Body) -> Response:
        rendered = self.render(body)
        choices = self.choices(rendered)
        answer = self._completion(choices, body["model"], choices[0]["stop_reason"] or TEMPLATES[self.template][1])
        for made, choice in zip(answer["choices"], choices, strict=True):
            made["token_ids"] = choice["token_ids"]
            if made["message"].get("tool_calls"):
                made["finish_reason"] = "tool_calls"
        answer |= {"prompt_token_ids": rendered["token_ids"], "usage": self._usage(rendered, choices)}
        if not body.get("stream"):
            return JSONResponse(answer)
        for made in answer["choices"]:
            made["delta"] = made.pop("message")
            for at, call in enumerate(made["delta"].get("tool_calls", [])):
                call["index"] = at
        events = [{**answer, "usage": None}, {**answer, "choices": []}]
        return Response("".join(f"data: {json.dumps(one)}\n\n" for one in events) + "data: [DONE]\n\n")


@contextmanager
def token_world(*engines: TokenEngine, **section: Any) -> Iterator[World]:
    """Serve engines, a stub bus and a gateway before them. `World.engine` is a stub that nobody asks."""
    bus = Bus()
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(engine.app())) for engine in engines]
        limits = {"admission_wait_s": PATIENCE_S, "request_limit_s": PATIENCE_S, **section}
        app = build_app(bus, section=GatewaySection(upstreams=urls, **limits), secret=SECRET)
        world = World(Engine(), bus, stack.enter_context(serving(app)), urls[0])
        stack.push(world.closing)
        yield world
