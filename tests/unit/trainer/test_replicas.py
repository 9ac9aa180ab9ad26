"""What replicas say of themselves, over real HTTP, and what is made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.gateway_fixtures import serving
from trainer.replicas import Comparison, Replica, ask_replicas, compare_replicas

pytestmark = pytest.mark.anyio
NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens


class Stub:
    """A replica that says what it is told to say. `labels` and `logprobs` are given in turn, the last one for ever.

    logprobs  of the one token with which it continues a prompt; without any it has no such route
    adapter   that of its adapter, if it has one
    """

    def __init__(
        self,
        *labels: str,
        healthy: bool = True,
        logprobs: Sequence[float] = (),
        adapter: float | None = None,
        **checksums: str,
    ) -> None:
        self.labels, self.healthy, self.checksums = list(labels), healthy, checksums
        self.logprobs, self.adapter = list(logprobs), adapter

    def app(self) -> Starlette:
        async def info(request: Request) -> Response:
            return JSONResponse({"weight_version": self.labels.pop(0) if len(self.labels) > 1 else self.labels[0]})

        async def health(request: Request) -> Response:
            return Response(status_code=200 if self.healthy else 503)

        async def checker(request: Request) -> Response:
            assert (await request.json())["action"] == "checksum"
            return JSONResponse({"checksums": self.checksums})

        async def generate(request: Request) -> Response:
            if not self.logprobs:
                return Response(status_code=404)
            if (await request.json()).get("model") == "adapter":
                logprob = self.adapter
            else:
                logprob = self.logprobs.pop(0) if len(self.logprobs) > 1 else self.logprobs[0]
            return JSONResponse({"choices": [{"logprobs": {"content": [{"token_id": 7, "logprob": logprob}]}}]})

        async def models(request: Request) -> Response:
            parents = {"base": None} if self.adapter is None else {"base": None, "adapter": "base"}
            return JSONResponse({"data": [{"id": name, "parent": parent} for name, parent in parents.items()]})

        return Starlette(
            routes=[
                Route("/v1/models", models),
                Route("/weight_info", info),
                Route("/health", health),
                Route("/weight_checker", checker, methods=["POST"]),
                Route("/inference/v1/generate", generate, methods=["POST"]),
            ]
        )


@contextmanager
def replicas(*stubs: Stub) -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [stack.enter_context(serving(stub.app())) for stub in stubs]


async def compared(*stubs: Stub) -> Comparison:
    with replicas(*stubs) as urls:
        return await compare_replicas(urls)


async def test_each_replica_is_told_in_the_order_asked_and_silence_is_told_too() -> None:
    with replicas(Stub("12"), Stub("unfit", healthy=False)) as (well, ill):
        told = await ask_replicas([well, NOWHERE, ill])
    assert [told[0], told[2]] == [Replica(well, "12", True), Replica(ill, "unfit", False)]
    assert (told[1].url, told[1].version, told[1].healthy) == (NOWHERE, "", False)
    assert "gave no answer" in told[1].error


async def test_replicas_that_hold_the_same_tensors_agree() -> None:
    held = await compared(Stub("3", a="1", b="2"), Stub("3", b="2", a="1"))
    assert held.agree
    assert held.verdict() == "all 2 hold the same 2 tensors"


async def test_a_tensor_that_differs_or_is_missing_is_named() -> None:
    held = await compared(Stub("3", a="1", b="2"), Stub("3", a="9", b="2"), Stub("3", a="1"))
    assert not held.agree
    assert held.differing == ["a", "b"]
    assert held.verdict() == "replicas of one version differ in 2 things (a, b): restart them"


async def test_weights_that_no_checksum_covers_are_told_by_what_they_say() -> None:
    packed = await compared(Stub("3", a="1", logprobs=[-1.0]), Stub("3", a="1", logprobs=[-1.3]))
    assert packed.differing == ["the continuation of a fixed prompt"]
    same = await compared(Stub("3", a="1", logprobs=[-1.0]), Stub("3", a="1", logprobs=[-1.01]))
    assert same.verdict() == "all 2 hold the same 1 tensors and continue a prompt alike"
    # Greedy decoding may fall either way at a tie: a difference that goes away is none.
    assert (await compared(Stub("3", a="1", logprobs=[-1.0]), Stub("3", a="1", logprobs=[-1.3, -1.0]))).agree


async def test_replicas_with_two_adapters_on_one_base_do_not_agree() -> None:
    base = {"a": "1", "logprobs": [-1.0]}
    assert (await compared(Stub("3", **base, adapter=-2.0), Stub("3", **base, adapter=-2.01))).agree
    for other in (-2.3, None):
        held = await compared(Stub("3", **base, adapter=-2.0), Stub("3", **base, adapter=other))
        assert held.differing == ["the continuation of a fixed prompt"]


async def test_replicas_of_two_versions_do_not_agree_and_are_not_called_broken() -> None:
    held = await compared(Stub("3", a="1"), Stub("4", a="2"))
    assert (held.agree, held.differing) == (False, [])
    assert "replicas serve versions 3, 4: an update is under way, or one is behind" in held.verdict()


async def test_a_replica_that_takes_new_weights_meanwhile_is_asked_again() -> None:
    held = await compared(Stub("3", "4", "4", a="1"), Stub("4", a="1"))
    assert (held.agree, set(held.versions.values())) == (True, {"4"})
    restless = await compared(Stub("3", "4", "5", "6", "7", "8", a="1"))
    assert [error for error in restless.errors.values() if "took new weights each time" in error]


async def test_one_that_does_not_answer_leaves_nothing_to_agree_on() -> None:
    with replicas(Stub("3", a="1")) as (well,):
        held = await compare_replicas([well, NOWHERE])
    assert not held.agree
    assert held.verdict() == "not compared: 1 of 2 replicas did not answer"
