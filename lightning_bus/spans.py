"""The span: the one record that everything an agent did becomes.

A span is an OpenTelemetry span plus the rollout and attempt that it belongs to. What we add lives in its attributes,
under the names listed here and nowhere else, so a span survives a trip through any OpenTelemetry collector. Token
ids and log-probs travel as packed little-endian u4/f4 bytes: five times faster to encode than lists, and exact.

A model call is a span that carries prompt token ids, response token ids, their log-probs and the weight versions
that produced them. A reward is a number tied to a rollout, or to one span of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
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
_frombuffer = np.frombuffer


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


class ModelCall(msgspec.Struct, frozen=True, eq=False, gc=False):
    """One call of the policy, as the log has it. P prompt tokens, R response tokens."""

    span: Span
    prompt_ids_P: NDArray[np.int32]
    response_ids_R: NDArray[np.int32]
    logprobs_R: NDArray[np.float32]
    weight_versions: list[tuple[str, int, int]]  # (version, start, end) over the response tokens
    temperature: float
    untrainable: str  # empty when the call can be trained on


def is_model_call(span: Span) -> bool:
    """True for spans that record a call of a model from the engine's side, where it is known what can be trained on.

    An instrumented client makes a span of the same call under the same operation; it has neither ids nor a reason.
    """
    attributes = span.attributes
    return attributes.get(OPERATION) == MODEL_CALL_NAME and (PROMPT_IDS in attributes or UNTRAINABLE in attributes)


def model_call(span: Span) -> ModelCall:
    """Return the typed view of a model-call span.

    Never guesses: missing ids, log-probs of another length, values that are not finite, or attributes of another
    type make the call untrainable and say so, with the arrays as they were found.
    """
    attributes = span.attributes
    malformed: list[str] = []
    get = attributes.get
    prompt, response, logprobs = get(PROMPT_IDS, b""), get(RESPONSE_IDS, b""), get(LOGPROBS, b"")
    # All three at once: this runs for every call of a log, and three calls of a function would be a fifth of it.
    if (
        type(prompt) is type(response) is type(logprobs) is bytes
        and not (len(prompt) | len(response) | len(logprobs)) & 3
    ):
        prompt_ids_P, response_ids_R = _frombuffer(prompt, _I4), _frombuffer(response, _I4)
        logprobs_R = _frombuffer(logprobs, _F4)
    else:
        prompt_ids_P = _packed(prompt, PROMPT_IDS, _I4, malformed)
        response_ids_R = _packed(response, RESPONSE_IDS, _I4, malformed)
        logprobs_R = _packed(logprobs, LOGPROBS, _F4, malformed)
    weight_versions: list[tuple[str, int, int]] = []
    temperature = 1.0
    try:
        weight_versions = [(str(v), int(a), int(b)) for v, a, b in get(WEIGHT_VERSIONS, ())]
    except (TypeError, ValueError):
        malformed.append(WEIGHT_VERSIONS)
    try:
        temperature = float(get(TEMPERATURE, 1.0))
    except (TypeError, ValueError):
        malformed.append(TEMPERATURE)
    untrainable = str(get(UNTRAINABLE, ""))
    if not untrainable:
        if malformed:
            untrainable = f"malformed: {', '.join(malformed)}"
        elif not len(prompt_ids_P) or not len(response_ids_R):
            untrainable = "token ids missing"
        elif len(logprobs_R) != len(response_ids_R):
            untrainable = f"{len(logprobs_R)} log-probs for {len(response_ids_R)} tokens"
        elif not _all_finite(logprobs_R):
            untrainable = "log-probs not finite"
    return ModelCall(
        span, prompt_ids_P, response_ids_R, logprobs_R, weight_versions, temperature, untrainable
    )  # by place: this runs once for every call in the log, and names cost a tenth of it


def reward_of(span: Span) -> float | None:
    """Return the reward that a span carries, or None. What is no finite number is none."""
    value = span.attributes.get(REWARD)
    if value is None:  # almost always, and the check below takes five times as long
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _packed(value: object, name: str, dtype: np.dtype[Any], malformed: list[str]) -> NDArray[Any]:
    """Return a packed attribute as an array; an empty one, and its name noted, when it is not packed 4-byte values."""
    if not isinstance(value, bytes) or len(value) % 4:
        malformed.append(name)
        value = b""
    return np.frombuffer(value, dtype)


def _all_finite(values: NDArray[np.float32]) -> bool:
    # Looking for a False among the answers' bytes takes half the time of .all(), which starts a reduction for it.
    return b"\0" not in np.isfinite(values).tobytes()
