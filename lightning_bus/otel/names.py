"""Every attribute name that a span may carry and that means something to us, in one place.

GenAI and exception names are OpenTelemetry's semantic conventions; `lightning.*` is ours. Those that model calls and
rewards are made of are defined where the record is, in `lightning_bus.spans`; here they stand again, so that this is
the whole list. Agent Lightning 0.3 wrote `agentlightning.*`; `translate` turns its names into ours, so spans of its
users mean the same here.
"""

from __future__ import annotations

from lightning_bus.spans import (
    AGENT_NAME,
    CHOICE,
    CHOICE_COUNT,
    FINISH_REASONS,
    FIRST_TOKEN_MS,
    FREQUENCY_PENALTY,
    INPUT_TOKENS,
    LOGPROBS,
    MAX_TOKENS,
    OPERATION,
    ORIGINAL_REQUEST,
    OUTPUT_TOKENS,
    PRESENCE_PENALTY,
    PROMPT_IDS,
    REQUEST_BODY,
    REQUEST_MODEL,
    RESPONSE_BODY,
    RESPONSE_IDS,
    RETRY_COUNT,
    REWARD,
    REWARD_NAME,
    REWARD_SPAN_NAME,
    ROUTE,
    SEED,
    SKEWED,
    STOP,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    UNTRAINABLE,
    USER_AGENT,
    WEIGHT_VERSIONS,
)

__all__ = [
    "AGENT_NAME", "ANNOTATION_SPAN_NAME", "ATTEMPT", "CHOICE", "CHOICE_COUNT", "EVENTS", "EXCEPTION_MESSAGE",
    "EXCEPTION_SPAN_NAME", "EXCEPTION_STACKTRACE", "EXCEPTION_TYPE", "FINISH_REASONS", "FIRST_TOKEN_MS",
    "FREQUENCY_PENALTY", "INPUT_TOKENS", "KIND", "LINKS", "LOGPROBS", "MAX_TOKENS", "MESSAGE_BODY",
    "MESSAGE_SPAN_NAME", "OBJECT_JSON", "OBJECT_SPAN_NAME", "OBJECT_TYPE", "OPERATION", "OPERATION_INPUT",
    "OPERATION_OUTPUT", "ORIGINAL_REQUEST", "OUTPUT_TOKENS", "PRESENCE_PENALTY", "PROMPT_IDS", "REQUEST_BODY",
    "REQUEST_MODEL", "RESOURCE", "RESPONSE_BODY", "RESPONSE_IDS", "RETRY_COUNT", "REWARD", "REWARD_DIMENSION",
    "REWARD_MALFORMED", "REWARD_NAME", "REWARD_SPAN", "REWARD_SPAN_NAME", "ROLLOUT_ID", "ROUTE", "SCOPE", "SEED",
    "SEQUENCE", "SKEWED", "STOP", "TEMPERATURE", "TOKEN", "TOP_K", "TOP_P", "UNTRAINABLE", "USER_AGENT",
    "VERDICT", "VERDICT_REWARDS", "WEIGHT_VERSIONS", "translate",
]  # fmt: skip

# Whose span it is: attributes of a resource or of a span on its way in. The record has fields for them.
ROLLOUT_ID = "lightning.rollout_id"
ATTEMPT = "lightning.attempt"
SEQUENCE = "lightning.sequence"
TOKEN = "lightning.token"  # the attempt's API key, for what comes through a collector; never recorded

# What emitters write.
REWARD_DIMENSION = "lightning.reward.dimension."  # + name: the other numbers of a reward that has several
REWARD_SPAN = "lightning.reward.span_id"  # hex; the span that the reward is for, where it is not for the rollout
REWARD_MALFORMED = "lightning.reward.malformed"  # what came as a reward and is no finite number
VERDICT = "lightning.verdict"  # the code of the reward hook that gave this reward, after its rollout had ended
VERDICT_REWARDS = "lightning.verdict.rewards"  # [[span id, value, source], …], where it gave rewards for spans
ANNOTATION_SPAN_NAME = "lightning.annotation"
MESSAGE_SPAN_NAME = "lightning.message"
MESSAGE_BODY = "lightning.message.body"
OBJECT_SPAN_NAME = "lightning.object"
OBJECT_TYPE = "lightning.object.type"
OBJECT_JSON = "lightning.object.json"
EXCEPTION_SPAN_NAME = "lightning.exception"
OPERATION_INPUT = "lightning.operation.input"  # + .name for each argument
OPERATION_OUTPUT = "lightning.operation.output"

# What OpenTelemetry has and the record has no field for.
EXCEPTION_TYPE = "exception.type"
EXCEPTION_MESSAGE = "exception.message"
EXCEPTION_STACKTRACE = "exception.stacktrace"
SCOPE = "otel.scope.name"  # the instrumentation that made the span
KIND = "lightning.otel.kind"  # server, client, producer, consumer; absent: internal
EVENTS = "lightning.otel.events"  # [[name, time_ns, attributes], …]
LINKS = "lightning.otel.links"  # [[trace id, span id, attributes], …], ids in hex
RESOURCE = "lightning.otel.resource"  # {name: value}, without what says whose span it is

_THEIRS = "agentlightning."
_RENAMED = {
    "agentlightning.rollout_id": ROLLOUT_ID,
    "agentlightning.attempt_id": ATTEMPT,
    "agentlightning.span_sequence_id": SEQUENCE,
}


def translate(name: str) -> str:
    """Return our name for an attribute's or a span's name of Agent Lightning's; any other as it is."""
    if not name.startswith(_THEIRS):
        return name
    return _RENAMED.get(name) or "lightning." + name[len(_THEIRS) :]
