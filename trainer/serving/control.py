"""The engine's control routes: pause and resume, weight updates, health and metrics, in vLLM's shapes.

    pause → start_weight_update → update_weights → finish_weight_update → resume

Always holds: steps out of order answer 500 and change nothing, as vLLM's do; a refused update leaves the old
weights serving.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast, get_args

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from trainer.serving.engine import Engine
from trainer.serving.errors import BadRequestError
from trainer.serving.loop import PauseMode
from trainer.serving.protocol import (
    CheckerBody,
    FinishBody,
    InitTransferBody,
    UpdateBody,
    VersionBody,
    error_body,
    json_response,
    read_body,
)
from trainer.serving.weights import WeightFile


def control_routes(engine: Engine, model_name: str) -> list[Route]:
    """The routes; metrics are labelled with model_name."""
    registry = CollectorRegistry()
    registry.register(_EngineCollector(engine, model_name))

    async def health(_: HttpRequest) -> Response:
        if engine.healthy:
            return Response(status_code=200)
        return json_response(error_body("several forward passes in a row have failed. See the log, restart.", 503), 503)

    async def show_version(_: HttpRequest) -> Response:
        return json_response({"version": _distribution_version()})

    async def metrics(_: HttpRequest) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def pause(request: HttpRequest) -> Response:
        mode = request.query_params.get("mode", "abort")
        if mode not in get_args(PauseMode):
            raise BadRequestError(f"mode is {mode!r}; it must be one of {', '.join(get_args(PauseMode))}", param="mode")
        # clear_cache is accepted and has nothing to do: keys and values computed by other weights are never lent
        # to another request, and a frozen request keeps its own, as in vLLM.
        await engine.pause(cast(PauseMode, mode))
        return json_response({"status": "paused"})

    async def resume(_: HttpRequest) -> Response:
        await engine.resume()
        return json_response({"status": "resumed"})

    async def is_paused(_: HttpRequest) -> Response:
        return json_response({"is_paused": engine.is_paused})

    async def init_transfer(request: HttpRequest) -> Response:
        await read_body(request, InitTransferBody)  # files need no meeting point, so there is nothing to set up
        return json_response({"message": "Weight transfer initialized"})

    async def start_update(_: HttpRequest) -> Response:
        engine.start_weight_update()
        return json_response({"message": "Weight update started"})

    async def update(request: HttpRequest) -> Response:
        info = (await read_body(request, UpdateBody)).update_info
        if info.abandon:
            engine.abandon_weight_update()
            return json_response({"message": "Weight update abandoned"})
        await engine.update_weights(
            WeightFile(
                path=Path(info.path),
                version=info.version,
                names=info.names,
                dtype_names=info.dtype_names,
                shapes=info.shapes,
                bytes=info.bytes,
                base=info.base,
                stamp=info.stamp,
                checksum=info.checksum,
            )
        )
        return json_response({"message": "Weights updated"})

    async def finish_update(request: HttpRequest) -> Response:
        await engine.finish_weight_update((await read_body(request, FinishBody)).weight_version)
        return json_response({"message": "Weight update finished"})

    async def update_version(request: HttpRequest) -> Response:
        body = await read_body(request, VersionBody)
        await engine.set_version(body.new_version)
        return json_response({"success": True, "new_version": body.new_version})

    async def weight_info(_: HttpRequest) -> Response:
        return json_response({"weight_version": engine.version})

    async def weight_checker(request: HttpRequest) -> Response:
        body = await read_body(request, CheckerBody)
        if body.action == "compare" and body.baseline is None:
            raise BadRequestError("action='compare' requires a 'baseline' object", param="baseline")
        checksums = await engine.weight_checksums()
        if body.baseline is None:
            return json_response({"checksums": checksums})
        names = checksums.keys() | body.baseline.keys()
        mismatches = sorted(name for name in names if checksums.get(name) != body.baseline.get(name))
        return json_response({"match": not mismatches, "mismatches": mismatches})

    async def world_size(_: HttpRequest) -> Response:
        return json_response({"world_size": 1})

    return [
        Route("/health", health),
        Route("/version", show_version),
        Route("/metrics", metrics),
        Route("/pause", pause, methods=["POST"]),
        Route("/resume", resume, methods=["POST"]),
        Route("/is_paused", is_paused),
        Route("/init_weight_transfer_engine", init_transfer, methods=["POST"]),
        Route("/start_weight_update", start_update, methods=["POST"]),
        Route("/update_weights", update, methods=["POST"]),
        Route("/finish_weight_update", finish_update, methods=["POST"]),
        Route("/update_weight_version", update_version, methods=["POST"]),
        Route("/weight_info", weight_info),
        Route("/weight_checker", weight_checker, methods=["POST"]),
        Route("/get_world_size", world_size),
    ]


class _EngineCollector(Collector):
    """The engine's counts under vLLM's metric names, read when they are asked for."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        now = self._engine.statistics()
        gauges = [
            ("vllm:num_requests_running", "Requests in the running batch.", now.running),
            ("vllm:num_requests_waiting", "Requests waiting to join it.", now.waiting),
        ]
        counters = [
            ("vllm:prompt_tokens", "Prompt tokens of finished requests.", now.prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated for finished requests.", now.generation_tokens),
            ("vllm:prefix_cache_hits", "Prompt tokens not computed again.", now.prefix_tokens_reused),
        ]
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, text, value in counters:
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter


def _distribution_version() -> str:
    try:
        return version("lightning-bus")
    except PackageNotFoundError:
        return "0+source"
