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
from trainer.serving.sampling import SamplingParams

CHOICES_MAX = 128  # completions of one request; more would sit in the queue behind each other anyway

Count = Annotated[int, msgspec.Meta(ge=1, le=CHOICES_MAX)]
Body = TypeVar("Body", bound=msgspec.Struct)


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
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            max_tokens=self.max_tokens if max_tokens is None else max_tokens,
            seed=self.seed,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            top_logprobs=top_logprobs,
        )


class ChatBody(Sampling, kw_only=True):
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


class GenerateBody(msgspec.Struct, kw_only=True):
    token_ids: list[int]
    sampling_params: GenerateSampling
    model: str | None = None
    request_id: str | None = None
    stream: bool | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None


class InitTransferBody(msgspec.Struct):
    init_info: dict[str, Any]


class UpdateInfo(msgspec.Struct):
    path: str
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    checksum: str
    bytes: int = 0


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
    if isinstance(exc, UnknownModelError):
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
