"""What the gateway remembers of each attempt's conversations, so that the next prompt begins with the exact ids.

A turn is one answered call: its messages, the answer as the agent was given it, and the ids of all of it. A request
whose messages extend a turn's is answered on that turn's ids, and only what is new is rendered (see `seams`):

    turn: messages, answer, ids ──► turn: the messages since, its answer, the ids since ──► …
                                └─► turn: another branch

What always holds: recorded ids are never changed or tokenised again; a turn is found by what its messages mean (see
`canonical`) together with everything else that a template is given, so another tool list is another conversation; and
memory is bounded: the attempt that called longest ago is forgotten first, which costs it a row of training, no more.
Pure: no clock, no sockets.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from lightning_bus.gateway.dialects import Json, dictionary, dicts

BYTES_MAX = 256 << 20  # of all attempts together
ATTEMPT_BYTES_MAX = 32 << 20  # one attempt beyond it begins anew
ALIKE_MAX = 4  # turns of one meaning, such as the same question answered twice: the newest
STOPS_MAX = 64  # models, and ids of each

Attempt = tuple[str, int]

_decode = msgspec.json.Decoder().decode
_decode_messages = msgspec.json.Decoder(list[dict[str, Any]]).decode
_encode = msgspec.json.Encoder().encode
_encode_sorted = msgspec.json.Encoder(order="sorted").encode

# What a request says beside its messages that no template is given. Anything not named here belongs to the context.
_OF_SAMPLING = frozenset(
    {"messages", "temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens", "min_tokens", "n",
     "stop", "stop_token_ids", "seed", "stream", "stream_options", "stream_interval", "logprobs", "top_logprobs",
     "return_token_ids", "frequency_penalty", "presence_penalty", "repetition_penalty", "length_penalty", "logit_bias",
     "bad_words", "allowed_token_ids", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens",
     "include_stop_str_in_output", "include_reasoning", "thinking_token_budget", "parallel_tool_calls", "tool_choice",
     "response_format", "structured_outputs", "repetition_detection", "user", "metadata", "store", "service_tier",
     "prediction", "safety_identifier", "prompt_cache_key", "cache_salt", "request_id", "session_id", "priority",
     "vllm_xargs", "watermarking"}
)  # fmt: skip


def context_of(request: Json) -> Json:
    """Return what a template is given beside the messages: model, tools, its own arguments.

    Of tool_choice only whether it is "none" counts, because that may hide the tools; agents force a tool on the first
    turn and not on the next, which no template that we know of shows.
    """
    context = {name: value for name, value in request.items() if name not in _OF_SAMPLING and value is not None}
    if request.get("tool_choice") == "none":
        context["tool_choice"] = "none"
    return context


class Chain:
    """A running digest of a conversation: equal after each message exactly where the meaning is equal so far.

    Ids of tool calls count only by the order in which they came: some frameworks give their own.
    """

    def __init__(self, request: Json) -> None:
        self._ids: dict[str, str] = {}
        self._calls = 0
        self.digests = [_digest(b"", _encode_sorted(context_of(request)))]
        for message in dicts(request.get("messages")):
            for call in dicts(message.get("tool_calls")):
                self._calls += 1
                self._ids[str(call.get("id"))] = f"call {self._calls}"
            self.digests.append(self.after(message))

    def after(self, message: Json) -> bytes:
        """Return the digest of the conversation with this message at its end."""
        meant = canonical(message)
        if "tool_call_id" in meant:
            meant["tool_call_id"] = self._ids.get(str(meant["tool_call_id"]), meant["tool_call_id"])
        return _digest(self.digests[-1], _encode_sorted(meant))


def canonical(message: Json) -> Json:
    """Return what a message means, for comparison only.

    Agents echo the assistant's with small changes: arguments serialised again, null for "", fields added or left out,
    reasoning left out, whitespace at the ends gone. Of any other message every field counts.
    """
    content = message.get("content")
    texts = [part.get("text") for part in dicts(content) if part.get("type") in ("text", "output_text")]
    all_text = isinstance(content, list) and len(texts) == len(cast(list[Any], content))
    if message.get("role") != "assistant":
        other = {name: value for name, value in message.items() if value is not None}
        if all_text and len(texts) == 1:
            other["content"] = texts[0]
        return other
    if all_text:
        content = "".join(str(text) for text in texts)
    said = content.strip() if isinstance(content, str) else cast(object, content) or ""
    meant: Json = {"role": "assistant", "content": said}
    calls = [dictionary(call.get("function")) for call in dicts(message.get("tool_calls"))]
    if calls:
        meant["tool_calls"] = [[call.get("name"), _arguments(call.get("arguments"))] for call in calls]
    if message.get("function_call"):
        meant["function_call"] = message["function_call"]
    return meant


def spoken(answer: Json) -> Json:
    """Return an answer's message as a template is to be given it in a later turn: without what is empty or unsaid."""
    message: Json = {"role": "assistant", "content": answer.get("content")}
    if answer.get("tool_calls"):
        message["tool_calls"] = [
            {"id": call.get("id"), "type": "function", "function": call.get("function")}
            for call in dicts(answer["tool_calls"])
        ]
    elif message["content"] is None:
        message["content"] = ""
    return message


@dataclass(slots=True, eq=False)
class Turn:
    """One answered call. It holds what its parent does not, so a conversation takes memory once, not once a turn."""

    parent: Turn | None
    messages_json: bytes  # since the parent's; the answer is the last
    ids: array[int]  # since the parent's; the answer's are the last
    length: int  # of all ids, the parent's included
    call_ids: tuple[str, ...]  # of the answer's tool calls
    stop_id: int | None  # with which the answer ended; None: it was cut off, or ended by a stop string
    ends: Mapping[int, int]  # ids that close answers → how many the whole rendered prompt held

    def all_ids(self) -> list[int]:
        return [token for turn in self._line() for token in turn.ids]

    def all_messages(self) -> list[Json]:
        return [message for turn in self._line() for message in _decode_messages(turn.messages_json)]

    def _line(self) -> list[Turn]:
        line: list[Turn] = []
        turn: Turn | None = self
        while turn is not None:
            line.append(turn)
            turn = turn.parent
        return line[::-1]

    @property
    def bytes(self) -> int:
        return len(self.messages_json) + 4 * len(self.ids) + 500  # and the objects around them


@dataclass(slots=True, frozen=True, eq=False)
class Found:
    """A turn that a request extends."""

    turn: Turn
    messages: list[Json]  # the turn's own, as they were said then
    new: list[Json]  # the request's further ones, their tool call ids those of the turn's


@dataclass(slots=True, eq=False)
class _OfAttempt:
    turns: dict[bytes, list[Turn]] = field(default_factory=dict[bytes, list[Turn]])
    bytes: int = 0


class Conversations:
    """The turns of every attempt that calls."""

    def __init__(self, *, bytes_max: int = BYTES_MAX, attempt_bytes_max: int = ATTEMPT_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._attempt_bytes_max = attempt_bytes_max
        self._attempts: OrderedDict[Attempt, _OfAttempt] = OrderedDict()
        self._stops: OrderedDict[str, dict[int, None]] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._attempts)

    def find(self, attempt: Attempt, request: Json, chain: Chain) -> Found | None:
        """Return the longest conversation of the attempt that the request extends; None when there is none."""
        known = self._attempts.get(attempt)
        if known is None:
            return None
        self._attempts.move_to_end(attempt)
        messages = dicts(request.get("messages"))
        for length in range(len(messages), 0, -1):
            alike = known.turns.get(chain.digests[length]) if messages[length - 1].get("role") == "assistant" else None
            if alike:
                echoed = _call_ids(messages[length - 1])
                turn = next((turn for turn in reversed(alike) if turn.call_ids == echoed), alike[-1])
                said = turn.all_messages()
                return Found(turn, said, _with_ids_of(said, messages[:length], messages[length:]))
        return None

    def remember(
        self, attempt: Attempt, chain: Chain, new: Sequence[Json], answer: Json, *, prompt_ids: Sequence[int],
        response_ids: Sequence[int], stop_id: int | None, ends: Mapping[int, int], parent: Turn | None = None,
    ) -> None:  # fmt: skip
        """Remember an answered call.

        chain       of the request
        new         messages since the parent's; all of the request's when there is no parent
        prompt_ids  all of them: they begin with the parent's
        """
        known = self._attempts.setdefault(attempt, _OfAttempt())
        if known.bytes > self._attempt_bytes_max:
            self._forget(attempt)
            known = self._attempts.setdefault(attempt, _OfAttempt())
        self._attempts.move_to_end(attempt)
        begin = 0 if parent is None else parent.length
        said = spoken(answer)
        turn = Turn(
            parent=parent,
            messages_json=_encode([*new, said]),
            ids=array("I", [*prompt_ids[begin:], *response_ids]),
            length=len(prompt_ids) + len(response_ids),
            call_ids=_call_ids(said),
            stop_id=stop_id,
            ends=ends,
        )
        alike = known.turns.setdefault(chain.after(said), [])
        alike.append(turn)
        del alike[:-ALIKE_MAX]
        known.bytes += turn.bytes
        self.bytes += turn.bytes
        while self.bytes > self._bytes_max and len(self._attempts) > 1:
            self._forget(next(iter(self._attempts)))

    def is_over(self, attempt: Attempt) -> None:
        """Forget an attempt that will not call again."""
        if attempt in self._attempts:
            self._forget(attempt)

    def learn_stop(self, model: str, stop_id: int | None) -> None:
        """Remember an id with which this model's answers end; None: nobody could say one."""
        stops = self._stops.setdefault(model, {})
        self._stops.move_to_end(model)
        if stop_id is not None and len(stops) < STOPS_MAX:
            stops[stop_id] = None
        while len(self._stops) > STOPS_MAX:
            self._stops.popitem(last=False)

    def stops(self, model: str) -> Collection[int] | None:
        """Return the ids with which answers of this model end; None when nobody has asked yet."""
        known = self._stops.get(model)
        return None if known is None else known.keys()

    def _forget(self, attempt: Attempt) -> None:
        self.bytes -= self._attempts.pop(attempt).bytes


# -- messages ----------------------------------------------------------------------------------------------------------


def _with_ids_of(said: Sequence[Json], echoed: Sequence[Json], new: Sequence[Json]) -> list[Json]:
    """Return new messages, the answers to tool calls named as the calls were when they were made."""
    ids: dict[str, str] = {}
    for was, now in zip(said, echoed, strict=True):
        ids.update(zip(_call_ids(now), _call_ids(was), strict=False))
    return [
        {**message, "tool_call_id": ids[str(message["tool_call_id"])]}
        if str(message.get("tool_call_id")) in ids
        else message
        for message in new
    ]


def _call_ids(message: Json) -> tuple[str, ...]:
    return tuple(str(call.get("id")) for call in dicts(message.get("tool_calls")))


def _arguments(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return _decode(value)
    except (msgspec.DecodeError, RecursionError):
        return value


def _digest(before: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(before + data, digest_size=16).digest()
