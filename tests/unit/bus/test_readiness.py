"""What `up` waits for: its own engines, and those only once their weights have a number."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lightning_bus.http import bind_tcp, http_server
from lightning_bus.readiness import answers, is_ready, own_engines

UPSTREAMS = [f"http://127.0.0.1:{port}" for port in range(9000, 9005)]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("health", "info", "ready"),
    [
        (200, {"weight_version": "12"}, True),
        (200, {"weight_version": "0"}, True),
        (200, {"weight_version": "default"}, False),  # started, not yet current
        (200, {"weight_version": "unfit"}, False),
        (503, {"weight_version": "12"}, False),
        (200, None, True),  # a server that knows nothing of weights that change
        (200, {"strange": 1}, False),
        (200, ["12"], False),
        (200, "12", False),
    ],
)
async def test_an_engine_is_ready_once_its_weights_have_a_number(health: int, info: object, ready: bool) -> None:
    async def say_health(_: Request) -> Response:
        return Response(status_code=health)

    async def say_info(_: Request) -> Response:
        return Response(status_code=404) if info is None else JSONResponse(info)

    app = Starlette(routes=[Route("/health", say_health), Route("/weight_info", say_info)])
    with bind_tcp("127.0.0.1:0", "test") as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with http_server(app, listener):
            assert await is_ready(url) is ready
            assert await answers(f"{url}/health") is (health == 200)
    assert not await is_ready(url)


def test_up_waits_for_its_own_engines_and_not_for_those_of_others() -> None:
    assert own_engines({"bind": "127.0.0.1:9000"}, UPSTREAMS) == UPSTREAMS[:1]
    assert own_engines({"bind": "0.0.0.0:9001", "replicas": 2}, UPSTREAMS) == UPSTREAMS[1:3]
    vllm = {"engine": "vllm", "bind": "127.0.0.1:9000", "replicas": 2, "scripted": {"teacher": "m:f"}}
    assert own_engines(vllm, UPSTREAMS) == UPSTREAMS[:3]
    assert own_engines({**vllm, "scripted_bind": "127.0.0.1:9004"}, UPSTREAMS) == [*UPSTREAMS[:2], UPSTREAMS[4]]
    assert own_engines({}, UPSTREAMS) == UPSTREAMS  # a bus without a trainer: [serve] is nobody's section
