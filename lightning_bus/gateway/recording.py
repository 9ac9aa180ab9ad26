"""One model call → model-call spans. Pure: request, answer and times come in, spans go out.

What always holds: ids and log-probs are the engine's own, never re-tokenised and never guessed. Where the engine did
not give them, or gave other counts than it reports, the span says in UNTRAINABLE why it cannot be trained on, and
keeps what there is. Whatever API the agent spoke, what is read here is a chat completion (see `dialects`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lightning_bus import spans as s
from lightning_bus.gateway.dialects import CHAT, COMPLETIONS, Json, array, dictionary, dicts
from lightning_bus.spans import Span
from lightning_bus.tokens import Claims

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Call:
    """A model call as it was asked."""

    rollout_id: str
    attempt: int
    trace_id: bytes  # 16 bytes
    parent_id: bytes | None
    request: Json  # as sent to the engine
    request_json: bytes
    start_ns: int
    retry_count: int = 0
    route: str = CHAT  # of the API that the agent spoke
    original_json: bytes = b""  # as the agent sent it, where the engine is asked otherwise
    agent_name: str = ""
    user_agent: str = ""
    prompt_source: str = ""  # how its prompt came to be ids; empty: not a chat call


def prepare(request: Json, claims: Claims, *, target: str = CHAT) -> Json:
    """Return what to send to the engine for a request in its words.

    target  the engine's route, which decides how log-probs are asked for

    The rollout's model and overrides are laid over the request. Temperature and top_p are spelled out where the agent
    left them to the server, because a server may have defaults of its own and the log must know what was used.
    """
    stream = bool(request.get("stream"))
    sent = {**request, **claims.overrides}
    if claims.model:
        sent["model"] = claims.model
    for name in ("temperature", "top_p"):
        if sent.get(name) is None:
            sent[name] = 1.0
    sent["stream"] = stream  # how the agent reads is its own affair
    if target == COMPLETIONS:
        sent["logprobs"] = sent.get("logprobs") or 0  # of the sampled tokens, and of so many others
    else:
        sent["logprobs"] = True
    sent["return_token_ids"] = True
    if stream:
        sent["stream_options"] = {**dictionary(sent.get("stream_options")), "include_usage": True}
    return sent


def skewing_parameters(request: Mapping[str, Any]) -> list[str]:
    """Names of the sampling parameters set so that the sampled distribution is not softmax(logits / temperature)."""
    return [name for name, neutral in _NEUTRAL.items() if request.get(name) not in (None, *neutral)]


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    # What allows some tokens only, at some places: the mass of the others is shared out among them.
    "bad_words": ([],),
    "allowed_token_ids": (),
    "structured_outputs": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),  # vLLM spells a tool that must be called by a grammar
}


def model_call_spans(
    call: Call,
    response: Json,
    end_ns: int,
    new_span_id: Callable[[], bytes],
    *,
    first_token_ns: int = 0,
    interrupted: str = "",
) -> list[Span]:
    """Return one span for each choice of the engine's answer.

    interrupted  why the answer is not whole, if it is not; such a call is never trained on
    """
    choices = dicts(response.get("choices"))
    if not choices:
        return [failed_span(call, interrupted or "no choices in the answer", end_ns, new_span_id())]
    usage = dictionary(response.get("usage"))
    counted = sum(len(array(choice.get("token_ids"))) for choice in choices)
    reported = usage.get("completion_tokens")
    result: list[Span] = []
    for at, choice in enumerate(choices):
        # A completion may have several prompts, and says with each choice which was its own.
        prompt_ids = choice.get("prompt_token_ids") or response.get("prompt_token_ids")
        token_ids = choice.get("token_ids")
        logprobs = _logprobs(choice)
        attributes = _asked(call)
        untrainable = interrupted or _untrainable(prompt_ids, token_ids, logprobs)
        if not untrainable and isinstance(reported, int) and reported != counted:
            # A parser in the engine may swallow tokens of a stream, their ids and log-probs together.
            untrainable = "token ids missing: the engine counted more tokens than it gave"
        try:
            attributes[s.PROMPT_IDS] = s.pack_ids(array(prompt_ids))
            attributes[s.RESPONSE_IDS] = s.pack_ids(array(token_ids))
            attributes[s.LOGPROBS] = s.pack_logprobs(logprobs or ())
        except (TypeError, ValueError, OverflowError):
            untrainable = "token ids or log-probs malformed"
        attributes[s.INPUT_TOKENS] = len(array(prompt_ids)) or usage.get("prompt_tokens", 0)
        attributes[s.OUTPUT_TOKENS] = len(array(token_ids)) or usage.get("completion_tokens", 0)
        versions = _versions(choice)
        if versions:
            attributes[s.WEIGHT_VERSIONS] = versions
        if choice.get("finish_reason"):
            attributes[s.FINISH_REASONS] = [str(choice["finish_reason"])]
        attributes[s.RESPONSE_BODY] = _encode(choice.get("message") or {}).decode()
        if first_token_ns:
            attributes[s.FIRST_TOKEN_MS] = (first_token_ns - call.start_ns) / 1e6
        if at:
            attributes[s.CHOICE] = at
        if untrainable:
            attributes[s.UNTRAINABLE] = untrainable
        result.append(_span(call, attributes, end_ns, new_span_id(), error=interrupted))
    return result


def answered_spans(
    call: Call, answer: Json, end_ns: int, new_span_id: Callable[[], bytes], *, first_token_ns: int = 0,
    interrupted: str = "",
) -> list[Span]:  # fmt: skip
    """As `model_call_spans`, for an engine that may answer anything: what makes no sense is a failed call."""
    try:
        return model_call_spans(
            call, answer, end_ns, new_span_id, first_token_ns=first_token_ns, interrupted=interrupted
        )
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as exc:
        why = interrupted or f"the engine's answer makes no sense ({type(exc).__name__}: {exc})"
        return [failed_span(call, why, end_ns, new_span_id())]


def failed_span(call: Call, error: str, end_ns: int, span_id: bytes) -> Span:
    """Return the span of a call that the engine did not answer."""
    return _span(call, {**_asked(call), s.UNTRAINABLE: "no answer"}, end_ns, span_id, error=error)


@dataclass(slots=True)
class StreamRecord:
    """Chunks of a stream, put together again into the answer that they would have been without streaming."""

    answer: Json = field(default_factory=dict[str, Any])
    choices: dict[int, Json] = field(default_factory=dict[int, Json])

    def add(self, chunk: Json) -> None:
        for name in ("prompt_token_ids", "usage", "model", "created"):
            if chunk.get(name) is not None:
                self.answer[name] = chunk[name]
        for fields in dicts(chunk.get("choices")):
            choice = self.choices.setdefault(int(fields.get("index") or 0), {"message": {}})
            _merge_delta(choice["message"], dictionary(fields.get("delta")))
            if fields.get("token_ids") is not None:
                choice.setdefault("token_ids", []).extend(array(fields["token_ids"]))
            content = dictionary(fields.get("logprobs")).get("content")
            if content is not None:
                choice.setdefault("logprobs", {"content": []})["content"].extend(array(content))
            if fields.get("weight_versions") is not None:
                choice.setdefault("weight_versions", []).extend(array(fields["weight_versions"]))
            for name in ("finish_reason", "stop_reason", "prompt_token_ids"):
                if fields.get(name) is not None:
                    choice[name] = fields[name]

    @property
    def finished(self) -> bool:
        """True when every choice has said why it ended."""
        return bool(self.choices) and all(choice.get("finish_reason") for choice in self.choices.values())

    def response(self) -> Json:
        """Return the answer so far."""
        return {**self.answer, "choices": [{"index": i, **choice} for i, choice in sorted(self.choices.items())]}


def _merge_delta(message: Json, delta: Json) -> None:
    """Add one delta to a message: text is joined, tool calls are matched by their index."""
    for name, value in delta.items():
        if name == "tool_calls":
            calls: list[Json] = message.setdefault("tool_calls", [])
            for piece in dicts(value):
                index = int(piece.get("index") or 0)
                while len(calls) <= index:
                    calls.append({"function": {"name": "", "arguments": ""}})
                target = calls[index]
                for key in ("id", "type"):
                    if piece.get(key):
                        target[key] = piece[key]
                for key, text in dictionary(piece.get("function")).items():
                    if isinstance(text, str):
                        target["function"][key] = target["function"].get(key, "") + text
        elif name == "role" or not isinstance(value, str):
            if value is not None:
                message[name] = value
        else:
            message[name] = (message.get(name) or "") + value


def _asked(call: Call) -> Json:
    """The attributes that are known before the engine answers."""
    request = call.request
    attributes: Json = {
        s.OPERATION: s.MODEL_CALL_NAME,
        s.REQUEST_MODEL: str(request.get("model", "")),
        s.TEMPERATURE: _number(request.get("temperature"), 1.0),
        s.TOP_P: _number(request.get("top_p"), 1.0),
        s.REQUEST_BODY: call.request_json.decode(),
    }
    tokens_max = request.get("max_completion_tokens") or request.get("max_tokens")
    if isinstance(tokens_max, int):
        attributes[s.MAX_TOKENS] = tokens_max
    for name, attribute in _OTHER_PARAMETERS.items():
        if isinstance(request.get(name), int | float):
            attributes[attribute] = request[name]
    stop = request.get("stop")
    if stop:
        attributes[s.STOP] = [stop] if isinstance(stop, str) else [str(one) for one in array(stop)]
    if skewed := skewing_parameters(request):
        attributes[s.SKEWED] = skewed
    if call.route != CHAT:
        attributes[s.ROUTE] = call.route
    if call.original_json:
        attributes[s.ORIGINAL_REQUEST] = call.original_json.decode()
    if call.agent_name:
        attributes[s.AGENT_NAME] = call.agent_name
    if call.user_agent:
        attributes[s.USER_AGENT] = call.user_agent
    if call.prompt_source:
        attributes[s.PROMPT_SOURCE] = call.prompt_source
    if call.retry_count:
        attributes[s.RETRY_COUNT] = call.retry_count
    return attributes


_OTHER_PARAMETERS = {
    "top_k": s.TOP_K, "frequency_penalty": s.FREQUENCY_PENALTY, "presence_penalty": s.PRESENCE_PENALTY,
    "seed": s.SEED, "n": s.CHOICE_COUNT,
}  # fmt: skip


def _span(call: Call, attributes: Json, end_ns: int, span_id: bytes, *, error: str = "") -> Span:
    return Span(
        span_id=span_id,
        trace_id=call.trace_id,
        parent_id=call.parent_id,
        name=f"{s.MODEL_CALL_NAME} {attributes[s.REQUEST_MODEL]}".rstrip(),
        start_ns=call.start_ns,
        end_ns=max(end_ns, call.start_ns),
        attributes=attributes,
        rollout_id=call.rollout_id,
        attempt=call.attempt,
        error=error,
    )


def _untrainable(prompt_ids: object, token_ids: object, logprobs: list[float] | None) -> str:
    if not prompt_ids or not token_ids:
        return "token ids missing"
    if logprobs is None:
        return "log-probs missing"
    if len(logprobs) != len(array(token_ids)):
        return f"{len(logprobs)} log-probs for {len(array(token_ids))} tokens"
    return ""


def _logprobs(choice: Json) -> list[float] | None:
    content = dictionary(choice.get("logprobs")).get("content")
    if content is None:
        return None
    return [dictionary(token).get("logprob", float("nan")) for token in array(content)]


def _versions(choice: Json) -> list[list[Any]]:
    """[[version, start, end], …] over the response tokens."""
    parts = dicts(choice.get("weight_versions"))
    return [
        [str(part["version"]), int(part["start"]), int(part["end"])] for part in parts if _VERSION_FIELDS <= part.keys()
    ]


_VERSION_FIELDS = {"version", "start", "end"}


def _number(value: object, default: float) -> float:
    return float(value) if isinstance(value, int | float) else default
