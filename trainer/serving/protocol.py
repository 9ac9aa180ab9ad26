"""The bodies of the serving routes, and the one shape every refusal has.

Always holds: a body is checked whole before anything is done with it; unknown fields are accepted, because agents
send what OpenAI's API knows and what we have no use for; `null` means the field was left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from trainer.serving.errors import (
    BadRequestError,
    EngineFailedError,
    QueueFullError,
    ServingError,
    WeightsRefusedError,
    WeightUpdateError,
)
from trainer.serving.request import VersionSpan
from trainer.serving.sampling import SamplingParams
from trainer.serving.text import TextState

CHOICES_MAX = 128  # completions of one request; more would sit in the queue behind each other anyway

Count = Annotated[int, msgspec.Meta(ge=1, le=CHOICES_MAX)]
Body = TypeVar("Body", bound=msgspec.Struct)


class StreamState(TextState, kw_only=True, forbid_unknown_fields=True):
    """What the caller of a streamed derender carries from chunk to chunk; nothing of it is kept here."""

    role_sent: bool = False


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Sampling(msgspec.Struct, kw_only=True):
    """What chat, completions and generate bodies have in common."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    n: Count | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    seed: int | None = None

    def params(self, *, top_logprobs: int = 0, max_tokens: int | None = None) -> SamplingParams:
        """As the engine wants them; left-out values are OpenAI's defaults. Raises BadRequestError."""
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            max_tokens=self.max_tokens if max_tokens is None else max_tokens,
            seed=self.seed,
            stop=self.stops(),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            top_logprobs=top_logprobs,
        )

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatBody(Sampling, kw_only=True):
    """A chat request. tool_choice "none" hides the tools; any other value offers them, and the model chooses."""

    model: str
    messages: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    max_completion_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    priority: int | None = None  # taken in for vLLM's sake; here the queue is first come, first served
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def chat_params(self) -> SamplingParams:
        """As `params`, by the fields that only chat has."""
        top_logprobs = (self.top_logprobs or 0) if self.logprobs else 0
        return self.params(top_logprobs=top_logprobs, max_tokens=self.max_completion_tokens)

    def offered_tools(self) -> list[dict[str, Any]] | None:
        return None if self.tool_choice == "none" else self.tools


class CompletionBody(Sampling, kw_only=True):
    model: str
    prompt: str | list[int]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: int | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None


class GenerateSampling(Sampling, kw_only=True):
    logprobs: int | None = None
    skip_special_tokens: bool | None = None


class GenerateBody(msgspec.Struct, kw_only=True):
    """Ids to continue; what /v1/chat/completions/render answers is one."""

    token_ids: list[int]
    sampling_params: GenerateSampling
    model: str | None = None
    request_id: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    output_mode: Literal["tokens", "text"] | None = None
    cache_salt: str | None = None
    priority: int | None = None
    return_token_ids: bool | None = None


class IdLogprob(msgspec.Struct):
    token_id: int
    logprob: float
    rank: int | None = None


class IdLogprobs(IdLogprob):
    """Log-probs of one position. top_logprobs begins with the sampled token, the likeliest follow by rank."""

    top_logprobs: list[IdLogprob] = []


class IdLogprobsContent(msgspec.Struct):
    content: list[IdLogprobs] | None = None


class GeneratedChoice(msgspec.Struct, kw_only=True):
    """A choice of /inference/v1/generate, or one chunk of it."""

    index: int
    token_ids: list[int] | None = None
    logprobs: IdLogprobsContent | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    weight_versions: list[VersionSpan] | None = None


class Generated(msgspec.Struct, kw_only=True):
    """What /inference/v1/generate answered, whole or in one chunk."""

    choices: list[GeneratedChoice]
    request_id: str | None = None
    output_mode: Literal["tokens"] = "tokens"  # text is derendered already, and its stop strings are gone
    prompt_token_ids: list[int] | None = None
    usage: dict[str, Any] | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    """A text, or a conversation as the chat route would render it, whose token ids are asked for."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True  # of a text; a template says itself what it begins with
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True


class DerenderBody(msgspec.Struct, kw_only=True):
    """Ids to turn into a chat answer: `generate_response` whole, or with `stream` one `generate_chunk` after another."""

    stream: bool = False
    model: str | None = None
    generate_response: Generated | None = None
    generate_chunk: Generated | None = None
    stream_state: StreamState | None = None
    prompt_tokens: int | None = None
    prompt_token_ids: list[int] | None = None
    chat_request: ChatBody | None = None


class InitTransferBody(msgspec.Struct):
    init_info: dict[str, Any]


class UpdateInfo(msgspec.Struct):
    path: str = ""
    version: str = ""
    names: list[str] = msgspec.field(default_factory=list)
    dtype_names: list[str] = msgspec.field(default_factory=list)
    shapes: list[list[int]] = msgspec.field(default_factory=list)
    bytes: int = 0
    base: str = ""
    stamp: str = ""
    checksum: str = ""
    abandon: bool = False  # nothing is brought: an update that a dead trainer left open ends


class UpdateBody(msgspec.Struct):
    update_info: UpdateInfo


class FinishBody(msgspec.Struct):
    weight_version: str | None = None


class VersionBody(msgspec.Struct):
    new_version: str


class CheckerBody(msgspec.Struct):
    action: Literal["checksum", "compare"]
    baseline: dict[str, str] | None = None


async def read_body(request: HttpRequest, kind: type[Body]) -> Body:
    """The body as `kind`. Raises BadRequestError naming the field that does not fit."""
    raw = await request.body()
    try:
        return msgspec.json.decode(raw or b"{}", type=kind)
    except msgspec.DecodeError as exc:
        path = str(exc).rpartition("`$.")[2].rstrip("`") if "`$." in str(exc) else None
        raise BadRequestError(f"{request.url.path}: {exc}", param=path) from exc


def json_response(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status_code=status, media_type="application/json")


def error_body(message: str, status: int, param: str | None = None) -> dict[str, object]:
    """OpenAI's error object; `type` sorts refusals the way the official client does."""
    kinds = {400: "BadRequestError", 404: "NotFoundError", 503: "ServiceUnavailableError"}
    kind = kinds.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


async def on_serving_error(_: HttpRequest, exc: Exception) -> Response:
    """Translate what the engine raises; installed for every route."""
    assert isinstance(exc, ServingError)
    status, param, headers = status_of(exc), None, {}
    if isinstance(exc, BadRequestError):
        param = exc.param
    if isinstance(exc, QueueFullError):
        headers["Retry-After"] = str(exc.retry_after_s)
    return JSONResponse(error_body(str(exc), status, param), status_code=status, headers=headers)


def status_of(exc: ServingError) -> int:
    """400 fix the call, 503 try again, 500 it was lost, or a weight step came out of order as in vLLM."""
    if isinstance(exc, UnknownModelError | NoWeightsError):
        return HTTPStatus.NOT_FOUND
    if isinstance(exc, BadRequestError | WeightsRefusedError):
        return HTTPStatus.BAD_REQUEST
    if isinstance(exc, QueueFullError):
        return HTTPStatus.SERVICE_UNAVAILABLE
    assert isinstance(exc, EngineFailedError | WeightUpdateError), exc
    return HTTPStatus.INTERNAL_SERVER_ERROR


class UnknownModelError(BadRequestError):
    """The request names a model that is not served here."""

    def __init__(self, model: str, served: Sequence[str]) -> None:
        super().__init__(f"The model {model!r} does not exist here. Served: {', '.join(served)}.", param="model")


class NoWeightsError(BadRequestError):
    """The model is a script: it answers messages, and there is nothing to render for or to continue."""

    def __init__(self, model: str) -> None:
        super().__init__(
            f"The scripted model {model!r} has no weights and answers messages only. Use /v1/chat/completions.",
            param="model",
        )
