"""The span: the one record that everything an agent did becomes.

A span is an OpenTelemetry span plus the rollout and attempt that it belongs to. What we add lives in its attributes,
under the names listed here and nowhere else, so a span survives a trip through any OpenTelemetry collector. Token
ids and log-probs travel as packed little-endian u4/f4 bytes: five times faster to encode than lists, and exact.

A model call is a span that carries prompt token ids, response token ids, their log-probs and the weight versions
that produced them. A reward is a number tied to a rollout, or to one span of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast, overload

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from lightning_bus.errors import RemoteProtocolError

# Attribute names. GenAI semantic conventions where they exist, `lightning.*` otherwise.
OPERATION = "gen_ai.operation.name"
REQUEST_MODEL = "gen_ai.request.model"
TEMPERATURE = "gen_ai.request.temperature"
TOP_P = "gen_ai.request.top_p"
MAX_TOKENS = "gen_ai.request.max_tokens"
TOP_K = "gen_ai.request.top_k"
FREQUENCY_PENALTY = "gen_ai.request.frequency_penalty"
PRESENCE_PENALTY = "gen_ai.request.presence_penalty"
SEED = "gen_ai.request.seed"
STOP = "gen_ai.request.stop_sequences"
CHOICE_COUNT = "gen_ai.request.choice.count"
USER_AGENT = "user_agent.original"
FINISH_REASONS = "gen_ai.response.finish_reasons"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
AGENT_NAME = "gen_ai.agent.name"
PROMPT_IDS = "lightning.prompt_token_ids"  # packed <u4
RESPONSE_IDS = "lightning.response_token_ids"  # packed <u4, the end token included where the engine sampled it
LOGPROBS = "lightning.response_logprobs"  # packed <f4, of the sampled tokens, after temperature
WEIGHT_VERSIONS = "lightning.weight_versions"  # [[version, start, end], …] over the response tokens
UNTRAINABLE = "lightning.untrainable"  # why this call cannot be trained on; absent when it can
SKEWED = (
    "lightning.sampling_skewed"  # names of parameters that make the sampled distribution another than log-probs are of
)
REQUEST_BODY = "lightning.request"  # the request as JSON, as the engine was asked
ORIGINAL_REQUEST = "lightning.original_request"  # as the agent sent it; absent where the engine was asked in its words
ROUTE = "lightning.route"  # of the API that the agent spoke; absent: /v1/chat/completions
CHOICE = "lightning.choice"  # which of several answers to one request; absent: the first
RESPONSE_BODY = "lightning.response"  # the response's message as JSON
PROMPT_SOURCE = "lightning.prompt_source"  # CONTINUED, RENDERED or CHAT; absent: not a chat call
RETRY_COUNT = "lightning.client_retry_count"  # > 0 when the client's SDK sent the same request again
FIRST_TOKEN_MS = "lightning.time_to_first_token_ms"
REWARD = "lightning.reward"
REWARD_NAME = "lightning.reward.name"

CONTINUED = "continued"  # the ids recorded of the conversation so far, and only what is new rendered
RENDERED = "rendered"  # all messages rendered: a conversation begins, or forks
CHAT = "chat"  # by the engine's chat route, which renders by itself and knows no weight versions

MODEL_CALL_NAME = "chat"
REWARD_SPAN_NAME = "lightning.reward"

_I4 = np.dtype("<i4")
_F4 = np.dtype("<f4")


class Span(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One thing that happened, from `start_ns` to `end_ns` (wall clock). Fields may be appended, never reordered."""

    span_id: bytes  # 8 bytes
    trace_id: bytes  # 16 bytes
    parent_id: bytes | None
    name: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any] = {}
    rollout_id: str = ""
    attempt: int = 0
    sequence: int = 0  # order in which its producer finished it, within the attempt
    error: str = ""  # empty, or what went wrong


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Span])


def encode_spans(spans: Sequence[Span]) -> bytes:
    """Return the chunk body that the log keeps: a MessagePack array of spans."""
    return _encoder.encode(spans)


def decode_spans(body: bytes | memoryview) -> list[Span]:
    """Return the spans of a chunk body. Raises RemoteProtocolError, naming the field, when it is not one."""
    try:
        return _decoder.decode(body)
    except msgspec.DecodeError as exc:
        raise RemoteProtocolError(f"a chunk of {len(body)} bytes does not hold spans: {exc}") from exc


def pack_ids(ids: Iterable[int]) -> bytes:
    """Return token ids as packed little-endian u4."""
    return np.asarray(list(ids), dtype="<u4").tobytes()


def pack_logprobs(logprobs: Iterable[float]) -> bytes:
    """Return log-probs as packed little-endian f4. What f4 cannot hold becomes infinite, so the call is untrainable."""
    with np.errstate(over="ignore"):
        return np.asarray(list(logprobs), dtype="<f4").tobytes()


class CallAttributes(msgspec.Struct, frozen=True, gc=False):
    """The attributes of a span that say what a model was asked and answered; a tenth of what a call carries."""

    operation: object = msgspec.field(name=OPERATION, default=None)
    model: object = msgspec.field(name=REQUEST_MODEL, default=None)
    prompt: bytes | UnsetType = msgspec.field(name=PROMPT_IDS, default=UNSET)
    response: bytes = msgspec.field(name=RESPONSE_IDS, default=b"")
    logprobs: bytes = msgspec.field(name=LOGPROBS, default=b"")
    weight_versions: list[tuple[str, int, int]] = msgspec.field(
        name=WEIGHT_VERSIONS, default_factory=list[tuple[str, int, int]]
    )
    temperature: float = msgspec.field(name=TEMPERATURE, default=1.0)
    untrainable: str | UnsetType = msgspec.field(name=UNTRAINABLE, default=UNSET)
    finish_reasons: object = msgspec.field(name=FINISH_REASONS, default=None)
    choice: object = msgspec.field(name=CHOICE, default=None)
    retry_count: object = msgspec.field(name=RETRY_COUNT, default=None)
    reward: object = msgspec.field(name=REWARD, default=None)


class ModelCall(msgspec.Struct, frozen=True, array_like=True, eq=False, gc=False):
    """One call of the policy, as the log has it: a Span, of whose attributes only these few were decoded.

    P prompt tokens, R response tokens. Arrays are views of what was recorded, made when they are asked for.
    """

    span_id: bytes
    trace_id: bytes
    parent_id: bytes | None
    name: str
    start_ns: int
    end_ns: int
    attributes: CallAttributes = CallAttributes()
    rollout_id: str = ""
    attempt: int = 0
    sequence: int = 0
    error: str = ""

    @property
    def prompt_ids(self) -> bytes:
        """The prompt's ids, packed."""
        return self.attributes.prompt or b""

    @property
    def prompt_ids_P(self) -> NDArray[np.int32]:
        return np.frombuffer(self.attributes.prompt or b"", _I4)

    @property
    def response_ids_R(self) -> NDArray[np.int32]:
        return np.frombuffer(self.attributes.response, _I4)

    @property
    def logprobs_R(self) -> NDArray[np.float32]:
        return np.frombuffer(self.attributes.logprobs, _F4)

    @property
    def weight_versions(self) -> list[tuple[str, int, int]]:
        """(version, start, end) over the response tokens."""
        return self.attributes.weight_versions

    @property
    def temperature(self) -> float:
        return self.attributes.temperature

    @property
    def tokens(self) -> int:
        """How many tokens prompt and response have together."""
        return (len(self.prompt_ids) + len(self.attributes.response)) // 4

    @property
    def untrainable(self) -> str:
        """Why the call cannot be trained on; empty when it can."""
        known = self.attributes
        if known.untrainable:
            return known.untrainable
        if not known.prompt or not known.response:
            return "token ids missing"
        if len(known.logprobs) != len(known.response):
            return f"{len(known.logprobs) // 4} log-probs for {len(known.response) // 4} tokens"
        return "" if _all_finite(known.logprobs) else "log-probs not finite"


def is_model_call(span: Span) -> bool:
    """True for spans that record a call of a model from the engine's side, where it is known what can be trained on.

    An instrumented client makes a span of the same call under the same operation; it has neither ids nor a reason.
    """
    attributes = span.attributes
    return attributes.get(OPERATION) == MODEL_CALL_NAME and (PROMPT_IDS in attributes or UNTRAINABLE in attributes)


def model_call(span: Span) -> ModelCall:
    """Return the typed view of a model-call span.

    Never guesses: missing ids, log-probs of another length, values that are not finite, or attributes of another
    type make the call untrainable and say so, with the others as they were found.
    """
    get = span.attributes.get
    malformed: list[str] = []
    prompt, response, logprobs = (
        _packed(get(name, b""), name, malformed) for name in (PROMPT_IDS, RESPONSE_IDS, LOGPROBS)
    )
    weight_versions: list[tuple[str, int, int]] = []
    temperature = 1.0
    try:
        weight_versions = [(str(v), int(a), int(b)) for v, a, b in get(WEIGHT_VERSIONS, ())]
    except (TypeError, ValueError, OverflowError):
        malformed.append(WEIGHT_VERSIONS)
    try:
        temperature = float(get(TEMPERATURE, 1.0))
    except (TypeError, ValueError):
        malformed.append(TEMPERATURE)
    untrainable = str(get(UNTRAINABLE, ""))
    if malformed and not untrainable:
        untrainable = f"malformed: {', '.join(malformed)}"
    known = CallAttributes(
        get(OPERATION), get(REQUEST_MODEL), prompt, response, logprobs, weight_versions, temperature, untrainable,
        get(FINISH_REASONS), get(CHOICE), get(RETRY_COUNT), get(REWARD),
    )  # fmt: skip
    return ModelCall(
        span.span_id, span.trace_id, span.parent_id, span.name, span.start_ns, span.end_ns, known, span.rollout_id,
        span.attempt, span.sequence, span.error,
    )  # fmt: skip


class RecordedSpans(Sequence[Span]):
    """The spans of chunk bodies, decoded when they are first looked at, which takes twice as long as their calls do.

    calls     their model calls, as `model_call` makes them
    rewarded  whether any of them carries a reward
    """

    __slots__ = ("_bodies", "_spans", "calls", "rewarded")

    def __init__(self, bodies: Iterable[bytes]) -> None:
        """Raises RemoteProtocolError, naming the field, for a body that does not hold spans."""
        self._bodies = tuple(bodies)
        self._spans: list[Span] | None = None
        self.calls: list[ModelCall] = []
        self.rewarded = False
        for body in self._bodies:
            try:
                found = _call_decoder.decode(body)
            except msgspec.DecodeError:  # of another type somewhere
                return self._look_at_spans()
            for call in found:
                known = call.attributes
                prompt = known.prompt
                if known.operation == MODEL_CALL_NAME and (prompt is not UNSET or known.untrainable is not UNSET):
                    if (len(prompt or b"") | len(known.response) | len(known.logprobs)) & 3:
                        return self._look_at_spans()
                    self.calls.append(call)
                if known.reward is not None:
                    self.rewarded = True

    def _look_at_spans(self) -> None:
        """What does not fit the types is looked at span by span, where each finds its reason."""
        self.calls = [model_call(span) for span in self if is_model_call(span)]
        self.rewarded = any(REWARD in span.attributes for span in self)

    def _decoded(self) -> list[Span]:
        if self._spans is None:
            self._spans = [span for body in self._bodies for span in decode_spans(body)]
        return self._spans

    def __len__(self) -> int:
        return len(self._decoded())

    @overload
    def __getitem__(self, at: int) -> Span: ...
    @overload
    def __getitem__(self, at: slice) -> list[Span]: ...
    def __getitem__(self, at: int | slice) -> Span | list[Span]:
        return self._decoded()[at]

    def __iter__(self) -> Iterator[Span]:
        return iter(self._decoded())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._decoded() == list(cast("Sequence[object]", other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"RecordedSpans({self._decoded()!r})"


_call_decoder = msgspec.msgpack.Decoder(list[ModelCall])


def calls_of(spans: Iterable[Span]) -> list[ModelCall]:
    """Return the model calls among spans, in their order."""
    return spans.calls if isinstance(spans, RecordedSpans) else [model_call(one) for one in spans if is_model_call(one)]


def rewarded_of(spans: Iterable[Span]) -> Sequence[Span]:
    """Return the spans that may carry a reward, in their order: usually none, which is known without decoding them."""
    if isinstance(spans, RecordedSpans) and not spans.rewarded:
        return ()
    return [span for span in spans if REWARD in span.attributes]


def why_untrainable(calls: Sequence[ModelCall]) -> list[str]:
    """Return why each call cannot be trained on, "" where it can; the log-probs of all are looked at in one go."""
    for call in calls:
        known = call.attributes
        size = len(known.response)
        if known.untrainable or not known.prompt or not size or len(known.logprobs) != size:
            return [call.untrainable for call in calls]
    if _all_finite(b"".join([call.attributes.logprobs for call in calls])):
        return [""] * len(calls)
    return [call.untrainable for call in calls]


def reward_of(span: Span) -> float | None:
    """Return the reward that a span carries, or None. What is no finite number is none."""
    value = span.attributes.get(REWARD)
    if value is None:  # almost always, and the check below takes five times as long
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _packed(value: object, name: str, malformed: list[str]) -> bytes:
    """Return a packed attribute; an empty one, and its name noted, when it is not packed 4-byte values."""
    if isinstance(value, bytes) and not len(value) & 3:
        return value
    malformed.append(name)
    return b""


def _all_finite(logprobs: bytes) -> bool:
    # Looking for a False among the answers' bytes takes half the time of .all(), which starts a reduction for it.
    return b"\0" not in np.isfinite(np.frombuffer(logprobs, _F4)).tobytes()
