"""Emitters: what an agent tells about its own work, from wherever it runs.

    emit_reward(1.0)                                for the rollout
    emit_reward(0.2, name="style", span=search)     for one span of it
    emit_message("the table is empty")

    @operation
    async def search(query): ...

They find their attempt by themselves: in sync and async code, in threads, and in subprocesses that were given
`environment()`. Outside any attempt they raise CallError, for what nobody can file is lost.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar, cast, overload

from lightning_bus.errors import CallError
from lightning_bus.otel import names as n
from lightning_bus.otel.attributes import as_json, exception_attributes, type_name
from lightning_bus.otel.live import LiveSpan, begin, record_at_once, stacktrace

F = TypeVar("F", bound=Callable[..., Any])


def emit_reward(
    value: float | Mapping[str, float] | None = None, name: str = "", *, span: object = None,
    reward: float | Mapping[str, float] | None = None, primary_key: str = "",
    attributes: Mapping[str, Any] | None = None,
) -> LiveSpan:  # fmt: skip
    """Record a reward: a finite number, or several by name with one of them primary.

    name         what it measures
    span         the span it is for (a live span, ours or OpenTelemetry's, its id, or the id in hex); None: the rollout
    reward       the same as `value`
    primary_key  of several: the one that counts, the others being its dimensions
    """
    given = value if value is not None else reward
    more: dict[str, Any] = {}
    if isinstance(given, Mapping):
        several = dict(given)
        if primary_key not in several:
            raise ValueError(f"primary_key is {primary_key!r}; it must be one of {', '.join(map(repr, several))}")
        given = several.pop(primary_key)
        name = name or primary_key
        more = {n.REWARD_DIMENSION + each: _finite(number) for each, number in several.items()}
    more[n.REWARD] = _finite(given)
    if name:
        more[n.REWARD_NAME] = name
    if span is not None:
        more[n.REWARD_SPAN] = _span_id(span).hex()
    return record_at_once(n.REWARD_SPAN_NAME, {**(attributes or {}), **more})


def emit_annotation(annotation: Mapping[str, Any]) -> LiveSpan:
    """Record facts by name; nested mappings become dotted names."""
    return record_at_once(n.ANNOTATION_SPAN_NAME, annotation)


def emit_message(message: str, attributes: Mapping[str, Any] | None = None) -> LiveSpan:
    """Record a line of text."""
    return record_at_once(n.MESSAGE_SPAN_NAME, {**(attributes or {}), n.MESSAGE_BODY: message})


def emit_object(value: Any, attributes: Mapping[str, Any] | None = None) -> LiveSpan:
    """Record a value as JSON. Raises ValueError when it has no JSON form."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise ValueError(
            f"a {type(value).__name__} has no JSON form ({exc}). Record its fields, or a path to it."
        ) from exc
    more = {n.OBJECT_TYPE: type_name(value.__class__), n.OBJECT_JSON: text}
    return record_at_once(n.OBJECT_SPAN_NAME, {**(attributes or {}), **more})


def emit_exception(exc: BaseException, attributes: Mapping[str, Any] | None = None) -> LiveSpan:
    """Record an exception that was dealt with. The span itself did not fail."""
    return record_at_once(n.EXCEPTION_SPAN_NAME, {**(attributes or {}), **exception_attributes(exc, stacktrace(exc))})


@overload
def operation(function: F, /) -> F: ...
@overload
def operation(name: str = "", /, **attributes: Any) -> Operation: ...
def operation(function: Callable[..., Any] | str = "", /, **attributes: Any) -> Any:
    """Trace a function or a block as one span.

    @operation                            named after the function; arguments and result are recorded
    @operation("search", source="web")    named and with attributes

    with operation("search") as op:       `async with` too
        op.set_input(query=query)
        op.set_output(hits)
    """
    if callable(function):
        return Operation(function.__name__, {})(function)
    return Operation(function, attributes)


class Operation:
    """What `operation` returns: one block as a context manager, or any number of calls as a decorator."""

    def __init__(self, name: str, attributes: Mapping[str, Any]) -> None:
        self._name = name
        self._attributes = attributes
        self._span: LiveSpan | None = None

    @property
    def span(self) -> LiveSpan:
        """The block's span, for `emit_reward(…, span=op.span)`. Raises CallError before it has begun."""
        if self._span is None:
            raise CallError("the operation has not begun: enter it with `with`")
        return self._span

    def set_input(self, *args: Any, **kwargs: Any) -> None:
        """Record what the block works on."""
        self.span.set_attributes(_inputs({**{str(i): arg for i, arg in enumerate(args)}, **kwargs}))

    def set_output(self, value: Any) -> None:
        """Record what came of it."""
        self.span.set_attributes(_output(value))

    def set_attribute(self, name: str, value: Any) -> None:
        self.span.set_attribute(name, value)

    def __enter__(self) -> Operation:
        self._span = begin(self._name or "operation", self._attributes)
        self._span.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.span.__exit__(kind, exc, trace)

    async def __aenter__(self) -> Operation:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, exc, trace)

    def __call__(self, function: F) -> F:
        name = self._name or function.__name__
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # of some functions in C
            signature = None

        def begun(args: tuple[Any, ...], kwargs: dict[str, Any]) -> LiveSpan:
            return begin(name, {**self._attributes, **_inputs(_named(signature, args, kwargs))})

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def traced_async(*args: Any, **kwargs: Any) -> Any:
                with begun(args, kwargs) as span:
                    result = await function(*args, **kwargs)
                    span.set_attributes(_output(result))
                    return result

            return cast("F", traced_async)

        @functools.wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            with begun(args, kwargs) as span:
                result = function(*args, **kwargs)
                span.set_attributes(_output(result))
                return result

        return cast("F", traced)


def _named(signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by their parameters' names, without `self`."""
    if signature is not None:
        try:
            bound = signature.bind(*args, **kwargs).arguments
        except TypeError:
            pass  # the call itself will say so
        else:
            return {name: value for name, value in bound.items() if name not in ("self", "cls")}
    return {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}


def _inputs(named: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{n.OPERATION_INPUT}.{name}": _shown(value) for name, value in named.items()}


def _output(value: Any) -> dict[str, Any]:
    return {} if value is None else {n.OPERATION_OUTPUT: _shown(value)}


def _shown(value: Any) -> Any:
    return value if isinstance(value, str | bool | int | float) else as_json(value)


def _finite(value: object) -> float:
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise ValueError(f"a reward is a finite number, not {value!r:.80}")
    number = float(cast("float", value))
    if not math.isfinite(number):
        raise ValueError(f"a reward is a finite number, not {number}")
    return number


def _span_id(span: object) -> bytes:
    context = getattr(span, "get_span_context", None)
    if callable(context):  # OpenTelemetry's own, as its SDK and instrumented frameworks hand them out: ids are numbers
        span = cast("Any", context()).span_id.to_bytes(8, "big")
    span = getattr(span, "span_id", span)
    if isinstance(span, str):
        try:
            span = bytes.fromhex(span)
        except ValueError as exc:
            raise ValueError(f"span is {span!r:.60}: a span id in hex has 16 digits") from exc
    if not isinstance(span, bytes) or len(span) != 8:
        raise ValueError(f"span is {span!r:.60}: a live span is wanted, its id of 8 bytes, or that in hex")
    return span
