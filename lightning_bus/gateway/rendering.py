"""The words of token in, token out: what render, generate and derender are asked, and what their answers mean.

    /v1/chat/completions/render → /inference/v1/generate → /v1/chat/completions/derender

vLLM's shapes (0.32). Pure. What always holds: ids, log-probs and weight versions in the chat completion made here are
those that generate gave; render and derender give words only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import Raw

from lightning_bus.gateway.conversations import context_of
from lightning_bus.gateway.dialects import Json, array, dictionary, dicts, encode

RENDER = "/v1/chat/completions/render"
GENERATE = "/inference/v1/generate"
DERENDER = "/v1/chat/completions/derender"
NO_SUCH_ROUTE = (403, 404, 405, 501)  # vLLM answers 403 where it was started without its scale-out routes
ABORTED = "abort"  # how vLLM says that a pause cut an answer off

# What only the chat route can do, or would answer in fields that generate does not have.
_CHAT_ONLY = (
    "echo", "use_beam_search", "prompt_logprobs", "logprob_token_ids", "return_tokens_as_token_ids",
    "return_prompt_text", "truncate_prompt_tokens", "kv_transfer_params", "ec_transfer_params",
)  # fmt: skip
# Sampling that knows nothing of the tokens before, so that an answer cut off can be gone on with from its ids.
_MEMORYLESS = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens", "logprobs", "stop_token_ids",
     "ignore_eos", "logit_bias", "allowed_token_ids", "skip_special_tokens", "spaces_between_special_tokens",
     "detokenize", "output_kind", "skip_clone"}
)  # fmt: skip
_NEUTRAL: dict[str, Any] = {"n": 1, "repetition_penalty": 1}
_NOT_GENERATED = frozenset({"request_id", "token_offsets", "stream_options", "return_token_ids"})


def needs_chat(request: Json) -> bool:
    """True for a request that only the chat route answers."""
    return any(request.get(name) for name in _CHAT_ONLY)


def is_prefilled(request: Json) -> bool:
    """True for a request that goes on with a message already begun, so that its answer is no message of its own."""
    return bool(request.get("continue_final_message")) or request.get("add_generation_prompt") is False


def render_body(request: Json, messages: object) -> bytes:
    """Ask what a chat request with these messages is in ids."""
    return encode({**_unstreamed(request), "messages": messages})


def history_body(request: Json, messages: Sequence[Json]) -> bytes:
    """Ask what messages alone are in ids, nobody's turn being opened after them."""
    return encode({**context_of(request), "messages": messages, "add_generation_prompt": False})


def generate_body(
    rendered: Json, prompt_ids: Sequence[int], *, asked: Json, done: int = 0, text: bool = False
) -> bytes:
    """Ask for an answer to these ids.

    rendered  what render gave for the request: its sampling, in the engine's words
    asked     the chat request
    done      so many tokens of the answer are at the end of prompt_ids already
    text      give the tokens' text too, which log-probs are shown to agents with
    """
    sampling = {name: value for name, value in dictionary(rendered.get("sampling_params")).items() if value is not None}
    left = tokens_left(rendered, asked, done)
    if left is None:
        sampling.pop("max_tokens", None)  # the engine reckons it from the ids that it gets
    else:
        sampling["max_tokens"] = max(1, left)
    if done and sampling.get("min_tokens"):
        sampling["min_tokens"] = max(0, int(sampling["min_tokens"]) - done)
    body = {name: value for name, value in rendered.items() if value is not None and name not in _NOT_GENERATED}
    body |= {"token_ids": prompt_ids, "sampling_params": sampling, "stream": bool(asked.get("stream"))}
    if asked.get("stream"):
        body["stream_options"] = {"include_usage": True}
    if rendered.get("features"):
        body["return_token_ids"] = True  # images take more ids than they were rendered as
    body["output_mode"] = "text" if text else "tokens"
    return encode(body)


def tokens_left(rendered: Json, asked: Json, done: int) -> int | None:
    """How many tokens an answer may still have; None: as many as the model's context holds."""
    most = asked.get("max_completion_tokens") or asked.get("max_tokens")
    if not isinstance(most, int):
        return None
    return int(dictionary(rendered.get("sampling_params")).get("max_tokens") or most) - done


def can_go_on(rendered: Json) -> bool:
    """True when an answer that was cut off can be gone on with from its ids and mean the same."""
    for name, value in dictionary(rendered.get("sampling_params")).items():
        if name not in _MEMORYLESS and value not in (None, 0, False, [], {}, "", _NEUTRAL.get(name)):
            return False
    return not rendered.get("features")


def stop_id_of(choice: Json) -> int | None:
    """Return the id with which a generated choice ended; None when it was cut off or ended by a stop string."""
    ids, reason = array(choice.get("token_ids")), choice.get("stop_reason")
    if choice.get("finish_reason") != "stop" or not ids or isinstance(reason, str):
        return None
    return int(ids[-1]) if reason is None or reason == ids[-1] else None


def derender_body(request: Json, generated: Json, prompt_ids: Sequence[int]) -> bytes:
    """Ask what generated ids are as a chat completion."""
    ids = Raw(encode(prompt_ids))
    choices = [_shown(choice, request, empty=False) for choice in dicts(generated.get("choices"))]
    response = {"request_id": generated.get("request_id") or "", "choices": choices, "prompt_token_ids": ids}
    return encode(
        {
            "model": request.get("model"), "generate_response": response, "prompt_tokens": len(prompt_ids),
            "prompt_token_ids": ids, "chat_request": _unstreamed(request),
        }
    )  # fmt: skip


class ChunkWords:
    """Asks, chunk by chunk, what the further ids of one request's choices are. Keeps what derender wants carried."""

    def __init__(self, request: Json, prompt_ids: Sequence[int], ident: str) -> None:
        self._same: Json = {
            "stream": True, "model": request.get("model"), "prompt_tokens": len(prompt_ids),
            "prompt_token_ids": Raw(encode(prompt_ids)), "chat_request": Raw(encode(_unstreamed(request))),
        }  # fmt: skip
        self._ident = ident
        self._request = request
        self._states: dict[int, Any] = {}

    def body(self, choice: Json) -> bytes:
        chunk = {"request_id": self._ident, "choices": [_shown(choice, self._request, empty=True)]}
        return encode({**self._same, "generate_chunk": chunk, "stream_state": self._states.get(index_of(choice))})

    def answered(self, choice: Json, answer: Json) -> Json:
        """Return the chunk of a chat completion that an answer holds, without what it leaves unsaid."""
        self._states[index_of(choice)] = answer.get("stream_state")
        chunk = {name: value for name, value in dictionary(answer.get("chunk")).items() if value is not None}
        for made in dicts(chunk.get("choices")):
            delta = dictionary(made.get("delta"))
            made["delta"] = {name: value for name, value in delta.items() if value is not None and value != []}
        return chunk


def completion(
    request: Json, answer: Json, generated: Json, prompt_ids: Sequence[int], *, ident: object, show_logprobs: bool
) -> Json:
    """Return the chat completion: derender's words, with generate's ids, log-probs and weight versions."""
    made = {index_of(choice): choice for choice in dicts(generated.get("choices"))}
    for choice in dicts(answer.get("choices")):
        source = made.get(index_of(choice), {})
        _carry(choice, source, request, show_logprobs)
        message = dictionary(choice.get("message"))
        if stop_id_of(source) is not None and len(array(source.get("token_ids"))) == 1:
            message["content"] = ""  # it said nothing but that it was done
        _without_stop(message, source.get("stop_reason"), request)
        calls = array(message.get("tool_calls"))
        if calls and request.get("parallel_tool_calls") is False:
            message["tool_calls"] = calls[:1]
        forced = request.get("tool_choice")
        if calls and not isinstance(forced, dict) and (forced != "required" or source.get("finish_reason") == "stop"):
            choice["finish_reason"] = "tool_calls"
    answer["prompt_token_ids"] = generated.get("prompt_token_ids") or prompt_ids
    counts = [len(prompt_ids), sum(len(array(choice.get("token_ids"))) for choice in made.values())]
    reckoned = {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)}
    answer["usage"] = generated.get("usage") or reckoned
    answer["id"] = ident or answer.get("id")
    return answer


def chunk_with_ids(chunk: Json, choice: Json, request: Json, *, show_logprobs: bool) -> Json:
    """Lay generate's ids, log-probs and weight versions over derender's chunk. Changes and returns it."""
    for made in dicts(chunk.get("choices")):
        _carry(made, choice, request, show_logprobs)
    return chunk


def _carry(choice: Json, source: Json, request: Json, show_logprobs: bool) -> None:
    choice["token_ids"] = source.get("token_ids")
    choice["logprobs"] = source.get("logprobs")
    if source.get("weight_versions") is not None:
        choice["weight_versions"] = source["weight_versions"]
    if show_logprobs and not request.get("top_logprobs"):
        for token in dicts(dictionary(choice["logprobs"]).get("content")):
            token["top_logprobs"] = []


def joined(choices: Iterable[Json]) -> list[Json]:
    """Return pieces of choices, in the order in which they came, as one for each choice that has any."""
    whole: dict[int, Json] = {}
    for piece in choices:
        index = index_of(piece)
        if index in whole:
            whole[index] = followed_by(whole[index], piece)
        else:
            whole[index] = piece
    return list(whole.values())


def followed_by(choice: Json, more: Json) -> Json:
    """Return a choice and what came after it as one. `more` tells of the whole how it ended and which weights made it."""
    content = [
        *array(dictionary(choice.get("logprobs")).get("content")),
        *array(dictionary(more.get("logprobs")).get("content")),
    ]
    return {
        **choice, **more,
        "token_ids": [*array(choice.get("token_ids")), *array(more.get("token_ids"))],
        "logprobs": {"content": content} if choice.get("logprobs") or more.get("logprobs") else None,
    }  # fmt: skip


def later(choice: Json, before: Json, shift: int) -> Json:
    """Return a choice generated after `shift` tokens of `before`, its weight versions those of both."""
    versions = [
        {**part, "start": int(part["start"]) + shift, "end": int(part["end"]) + shift}
        for part in dicts(choice.get("weight_versions"))
    ]
    return {**choice, "weight_versions": [*array(before.get("weight_versions")), *versions]}


def index_of(choice: Json) -> int:
    return int(choice.get("index") or 0)


class StopStrings:
    """Keeps back as much of a stream's text as might be the beginning of a stop string, which agents do not see."""

    def __init__(self, request: Json) -> None:
        stops = request.get("stop")
        named = [stops] if isinstance(stops, str) else [str(stop) for stop in array(stops)]
        hidden = named and not request.get("include_stop_str_in_output")
        self._most = max(len(stop) for stop in named) - 1 if hidden else 0
        self._hides = bool(hidden)
        self._held: dict[int, str] = {}

    def push(self, choice: Json, stop_reason: object) -> None:
        """Take out of a chunk's text what must wait, and put in what need not any more. Changes `choice`."""
        if not self._hides:
            return
        index, delta = index_of(choice), dictionary(choice.get("delta"))
        text = self._held.pop(index, "") + str(delta.pop("content", ""))
        if choice.get("finish_reason"):
            if isinstance(stop_reason, str) and (at := text.rfind(stop_reason)) >= 0:
                text = text[:at]
        elif self._most:
            self._held[index] = text[-self._most :]
            text = text[: -self._most]
        if text:
            delta["content"] = text


def _without_stop(message: Json, stop_reason: object, request: Json) -> None:
    """Cut the stop string off: derender sees only ids, and those hold it."""
    content = message.get("content")
    if isinstance(stop_reason, str) and isinstance(content, str) and not request.get("include_stop_str_in_output"):
        at = content.rfind(stop_reason)
        if at >= 0:
            message["content"] = content[:at]


def _shown(choice: Json, request: Json, *, empty: bool) -> Json:
    """A generated choice as derender is to see it: without log-probs, and without the id that only ends it.

    vLLM's derender keeps special tokens where it has a parser, and would show the end to the agent. It takes no choice
    without ids, unless it is a chunk (`empty`).
    """
    names = ("index", "finish_reason", "stop_reason", "token_ids")
    shown = {name: choice[name] for name in names if choice.get(name) is not None}
    ids = array(choice.get("token_ids"))
    if stop_id_of(choice) is not None and (empty or len(ids) > 1) and not request.get("include_stop_str_in_output"):
        shown["token_ids"] = ids[:-1]
    return shown


def _unstreamed(request: Json) -> Json:
    return {name: value for name, value in request.items() if name not in ("stream", "stream_options")}
