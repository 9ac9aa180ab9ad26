"""Several engines behind one gateway: who answers whom, and what a dead one costs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel
import pytest
from anyio.abc import SocketAttribute, SocketStream

from lightning_bus.errors import BrokenError, BusyError, ConfigError
from lightning_bus.gateway.engines import Answer
from lightning_bus.gateway.http_client import BUFFERED_BYTES_MAX
from lightning_bus.gateway.upstream import Upstreams, _salted  # pyright: ignore[reportPrivateUsage]

pytestmark = pytest.mark.anyio


@dataclass
class Asked:
    """An engine's side of it: what it says of itself, and what it was asked."""

    health: int = 200
    label: str | None = None  # of its weights; None: it has no such route
    models: Sequence[str] = ()
    paths: list[str] = field(default_factory=list[str])


@asynccontextmanager
async def engine(
    answer: bytes = b"", *, port: int = 0, answers_per_connection: int = 1000, says: Asked | None = None
) -> AsyncGenerator[str]:
    """A server that gives `answer` (by default its own port) to calls; yields its URL."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port)
    port = listener.extra(SocketAttribute.local_port)
    asked = says or Asked()
    body = answer or _http(200, str(port))

    def told(path: str) -> bytes:
        if path == "/health":
            return _http(asked.health, "")
        if path == "/weight_info":
            return _http(404, "") if asked.label is None else _http(200, json.dumps({"weight_version": asked.label}))
        if path == "/v1/models":
            return _http(200, json.dumps({"data": [{"id": model} for model in asked.models]}))
        asked.paths.append(path)
        return body

    async def serve(stream: SocketStream) -> None:
        async with stream:
            try:
                for _ in range(answers_per_connection):
                    await stream.send(told((await stream.receive()).split(b" ")[1].decode()))
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                pass

    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        yield f"http://127.0.0.1:{port}"
        tasks.cancel_scope.cancel()


def _http(status: int, body: str) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body.encode())


@asynccontextmanager
async def upstreams(
    *urls: str, admission_wait_s: float = 60.0, request_limit_s: float = 60.0
) -> AsyncGenerator[Upstreams]:
    opened = Upstreams(urls, admission_wait_s=admission_wait_s, request_limit_s=request_limit_s)
    try:
        yield opened
    finally:
        await opened.aclose()


async def test_a_rollout_stays_with_its_engine_and_rollouts_spread() -> None:
    async with engine() as one, engine() as two, upstreams(one, two) as both:
        chosen = {key: (await both.call(key, "GET", "/")).body for key in map(str, range(40))}
        again = {key: (await both.call(key, "GET", "/")).body for key in map(str, range(40))}
    assert chosen == again
    assert min(Counter(chosen.values()).values()) >= 8


async def test_a_dead_engines_rollouts_go_to_the_other_and_come_back() -> None:
    async with engine() as one:
        async with engine() as two, upstreams(one, two) as both:
            keys = [key for key in map(str, range(40)) if (await both.engine_for(key, "")).url == two]
            port = int(two.rpartition(":")[2])
        # `two` is gone now, its connections included.
        async with upstreams(one, two) as both:
            assert {(await both.call(key, "GET", "/")).engine.url for key in keys} == {one}
            async with engine(port=port):
                await both.probe()
                assert {(await both.call(key, "GET", "/")).engine.url for key in keys} == {two}


async def test_a_kept_connection_that_the_engine_closed_is_not_an_engine_that_is_down() -> None:
    async with engine(answers_per_connection=1) as url, upstreams(url) as one:
        for _ in range(3):
            answer = await one.call("r", "GET", "/")
            assert (answer.status, answer.asked) == (200, 1)


async def test_connections_are_used_again() -> None:
    async with engine() as url, upstreams(url) as one:
        await one.probe()
        connections = one.engines[0].connections
        for _ in range(3):
            await one.call("r", "GET", "/")
        assert (len(one.engines[0].idle), one.engines[0].connections) == (connections, connections)


async def test_an_engine_that_breaks_off_its_answer_is_asked_again() -> None:
    async with engine(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", answers_per_connection=1) as url:
        async with upstreams(url, admission_wait_s=0.1) as one:
            with pytest.raises(BusyError, match="took no call within 0.1 s"):
                await one.call("r", "GET", "/")


async def test_a_stream_ends_or_breaks() -> None:
    whole = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
    async with engine(whole) as url, upstreams(url) as one:
        answer = await one.call("r", "POST", "/", stream=True)
        assert (await answer.chunk(), await answer.chunk()) == (b"ab", b"")
        answer.close()
        assert answer.engine.idle[-1].reusable
    async with engine(whole[:-5], answers_per_connection=1) as url, upstreams(url) as one:
        answer = await one.call("r", "POST", "/", stream=True)
        assert await answer.chunk() == b"ab"
        with pytest.raises(BrokenError, match="broke off in the middle"):
            await answer.chunk()
        answer.close()
        assert one.engines[0].idle == []


async def test_a_stream_that_stalls_is_given_up() -> None:
    half = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n"
    async with engine(half) as url, upstreams(url, request_limit_s=0.2) as one:
        answer = await one.call("r", "POST", "/", stream=True)
        assert await answer.chunk() == b"ab"
        with pytest.raises(BrokenError, match=r"did not finish the call within 0\.2 s"):
            await answer.chunk()
        answer.close()


@pytest.mark.parametrize("url", ["127.0.0.1:4752", "ftp://127.0.0.1", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not an address"):
        Upstreams([url], admission_wait_s=1, request_limit_s=1)
    with pytest.raises(ConfigError, match="is empty"):
        Upstreams([], admission_wait_s=1, request_limit_s=1)


FAILING = b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 4\r\n\r\noops"


async def test_a_failure_of_one_engine_is_answered_by_another() -> None:
    async with engine(FAILING) as bad, engine() as good, upstreams(bad, good) as both:
        answers: list[Answer] = []
        for key in map(str, range(20)):
            await both.probe()
            answers.append(await both.call(key, "GET", "/"))
    assert {answer.engine.url for answer in answers} == {good}
    assert {answer.asked for answer in answers} == {1, 2}


async def test_a_failure_of_every_engine_is_passed_on() -> None:
    async with engine(FAILING) as one, engine(FAILING) as two, upstreams(one, two) as both:
        await both.probe()
        answer = await both.call("r", "GET", "/")
    assert (answer.status, answer.body, answer.asked) == (500, b"oops", 2)


async def test_a_call_of_no_rollout_goes_to_the_engine_with_the_fewest() -> None:
    async with engine() as one, engine() as two, upstreams(one, two) as both:
        await both.probe()
        both.engines[0].in_flight = 3
        assert (await both.engine_for("", "")).url == two
        both.engines[1].in_flight = 4
        assert (await both.engine_for("", "")).url == one
        both.engines[0].in_flight = both.engines[1].in_flight = 0
        await both.call("", "GET", "/")
    assert [known.in_flight for known in both.engines] == [0, 0]


async def test_an_engine_that_is_found_unwell_is_asked_again_once_it_is_well(caplog: pytest.LogCaptureFixture) -> None:
    async with engine() as one:
        async with engine() as two:
            port = int(two.rpartition(":")[2])
        async with upstreams(one, two) as both:
            health = await both.probe()
            assert (health["engine 1"], health["engine 2"] != "ok") == ("ok", True)
            keys = [str(number) for number in range(40)]
            assert {(await both.engine_for(key, "")).url for key in keys} == {one}
            async with engine(port=port):
                assert await both.probe() == {"engine 1": "ok", "engine 2": "ok"}
                assert {(await both.engine_for(key, "")).url for key in keys} == {one, two}


async def test_the_prefix_cache_is_salted_with_the_weights_of_the_engine_that_is_asked() -> None:
    async with engine() as url, upstreams(url) as one:
        one.engines[0].version = "7"
        answer = await one.call("r", "POST", "/", b'{"a":1}', salted=True)
    assert answer.status == 200
    assert _salted(b'{"a":1}', "7") == b'{"a":1,"cache_salt":"7"}'
    assert _salted(b'{"cache_salt":null,"a":1}', "7") == b'{"cache_salt":"7","a":1}'
    assert _salted(b'{"a":["\\"cache_salt\\""]}', "7") == b'{"a":["\\"cache_salt\\""],"cache_salt":"7"}'


async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    async with engine(b"HTTP/1.1 200 OK\r\n\r\nall of it", answers_per_connection=1) as url, upstreams(url) as one:
        assert (await one.call("r", "GET", "/")).body == b"all of it"
        assert not any(connection.reusable for connection in one.engines[0].idle)


@pytest.mark.parametrize("answer", [b"what?\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n"])
async def test_what_does_not_speak_http_is_no_engine(answer: bytes) -> None:
    async with engine(answer) as url, upstreams(url, admission_wait_s=0.0) as one:
        with pytest.raises(BusyError, match="does not speak HTTP"):
            await one.call("r", "GET", "/")


async def test_an_engine_that_streams_faster_than_anybody_reads_has_to_wait() -> None:
    piece = b"x" * (1 << 20)
    async with (
        engine(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (8 << 20, piece * 8)) as url,
        upstreams(url) as one,
    ):
        answer = await one.call("r", "GET", "/", stream=True)
        received = 0
        while part := await answer.chunk():
            assert len(part) <= BUFFERED_BYTES_MAX + (1 << 20)
            received += len(part)
        answer.close()
    assert received == 8 << 20


# -- readiness


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (Asked(health=503), "answered 503 to /health"),
        (Asked(label="default"), "have no version yet"),
        (Asked(label="unfit"), "are unfit"),
    ],
)
async def test_an_engine_that_is_not_ready_is_asked_nothing(says: Asked, why: str) -> None:
    async with engine(says=says) as url, upstreams(url, admission_wait_s=0.0) as one:
        with pytest.raises(BusyError, match=why):
            await one.call("r", "POST", "/call")
        assert says.paths == []
        says.health, says.label = 200, "4"
        assert (await one.call("r", "POST", "/call")).status == 200
        assert (says.paths, one.engines[0].version) == (["/call"], "4")


async def test_a_call_waits_until_its_engine_is_ready() -> None:
    says = Asked(label="default")
    async with engine(says=says) as url, upstreams(url) as one, anyio.create_task_group() as tasks:
        await one.probe()

        async def get_ready() -> None:
            says.label = "1"

        tasks.start_soon(get_ready)
        assert (await one.call("r", "POST", "/call")).status == 200


async def test_an_engine_that_started_again_unseen_is_asked_how_it_is_before_it_gets_a_call() -> None:
    async with engine(says=Asked(label="7")) as url, upstreams(url, admission_wait_s=0.0) as one:
        await one.call("r", "POST", "/call")
        port = int(url.rpartition(":")[2])
        known = one.engines[0]
    # Its connections went with it, and long enough ago.
    while known.connections:
        await anyio.lowlevel.checkpoint()
    known._proven_s -= 1  # pyright: ignore[reportPrivateUsage]
    again = Asked(label="default")
    async with engine(says=again, port=port), upstreams(url) as one:
        one.engines[:] = [known]
        one._admission_wait_s = 0.0  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(BusyError, match="have no version yet"):
            await one.call("r", "POST", "/call")
        assert again.paths == []


async def test_an_engine_without_a_version_learns_it_from_its_answers_and_keeps_it() -> None:
    async with engine() as url, upstreams(url) as one:
        one.engines[0].version = "5"
        assert await one.probe() == {"engine 1": "ok"}
        assert one.engines[0].version == "5"


# -- models


async def test_a_call_goes_to_the_engines_that_serve_its_model() -> None:
    policy, teacher = Asked(models=["policy"]), Asked(models=["teacher", "policy@3"])
    async with engine(says=policy) as one, engine(says=teacher) as two, upstreams(one, two) as both:
        await both.probe()
        for key in map(str, range(10)):
            assert (await both.call(key, "POST", "/", model="policy")).engine.url == one
            assert (await both.call(key, "POST", "/", model="policy@3")).engine.url == two
        anywhere = {(await both.call(key, "POST", "/", model="gpt")).engine.url for key in map(str, range(40))}
        listed = await both.models()
    assert anywhere == {one, two}
    assert [model["id"] for model in listed["data"]] == ["policy", "teacher", "policy@3"]


async def test_a_model_whose_engine_is_down_is_waited_for_and_not_asked_of_another() -> None:
    teacher = Asked(models=["teacher"])
    async with engine(says=Asked(models=["policy"])) as one, engine(says=teacher) as two:
        async with upstreams(one, two, admission_wait_s=0.0) as both:
            await both.probe()
            teacher.health = 503
            await both.probe()
            with pytest.raises(BusyError, match="engine 2 took no call"):
                await both.call("r", "POST", "/", model="teacher")
