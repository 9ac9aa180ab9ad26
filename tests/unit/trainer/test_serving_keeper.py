"""A replica is kept alive, is not ready before it is current, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import anyio
import httpx
import pytest

from lightning_bus import BrokenError, monotonic_s
from tests import fake_vllm
from tests.journeys.ring import free_ports
from trainer.config import ServeSection
from trainer.serving import keeper as keeping
from trainer.serving.errors import WeightUpdateError
from trainer.serving.keeper import STILLBORN_MAX, Keeper, Limits, ReplicaGivenUp
from trainer.serving.vllm import find_vllm, vllm_launch

pytestmark = pytest.mark.anyio

LIMITS = Limits(start_s=60.0, silent_s=60.0, paused_s=60.0, probe_s=0.01, pause_s=0.01, pause_max_s=0.05)


class Replica:
    """A keeper over a fake vLLM, and what the test may do to it."""

    def __init__(self, directory: Path, http: httpx.AsyncClient) -> None:
        (self.port,) = free_ports(1)
        self.directory = directory
        self.log = directory / "logs" / "vllm.log"
        self.http = http
        self.ready: list[str] = []
        section = ServeSection(engine="vllm", bind=f"127.0.0.1:{self.port}", python=str(fake_vllm.install(directory)))
        self.launch = vllm_launch(section, directory, name="policy", installed=find_vllm(section))

    def keeper(
        self, bring_current: Callable[[], Awaitable[str]] | None = None, *, limits: Limits = LIMITS, **options: object
    ) -> Keeper:
        return Keeper(
            1, self.launch, self.http, bring_current=bring_current or self.label, log_path=self.log,
            on_ready=self.ready.append, limits=limits, **options,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip

    async def label(self, version: str = "7") -> str:
        await self.post("/update_weight_version", {"new_version": version})
        return version

    async def post(self, route: str, body: dict[str, object]) -> None:
        (await self.http.post(self.launch.url + route, json=body)).raise_for_status()

    async def mood(self, **mood: object) -> None:
        """Have it behave like this from now on. It may be ended for that before it has answered, or be starting."""
        before = self.asked("/mood")
        while self.asked("/mood") == before:
            with suppress(httpx.HTTPError):
                await self.post("/mood", mood)

    async def weight_info(self) -> str:
        return (await self.http.get(f"{self.launch.url}/weight_info")).json()["weight_version"]

    def asked(self, route: str) -> int:
        return sum(line.get("route") == route for line in fake_vllm.asked(self.directory, self.port))

    def starts(self) -> int:
        return sum("pids" in line for line in fake_vllm.asked(self.directory, self.port))

    def pids(self) -> list[int]:
        return fake_vllm.processes(self.directory, self.port)


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncGenerator[Replica]:
    async with httpx.AsyncClient(trust_env=False, timeout=60.0) as http:
        yield Replica(tmp_path, http)


@asynccontextmanager
async def kept(keeper: Keeper) -> AsyncGenerator[Keeper]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keeper.run)
        yield keeper
        tasks.cancel_scope.cancel()


async def until(condition: Callable[[], object]) -> None:
    """Wait for what another process does; the test's own limit bounds it."""
    while not condition():  # noqa: ASYNC110
        await anyio.sleep(0.005)


async def test_a_replica_is_not_ready_before_it_is_current(replica: Replica) -> None:
    published = anyio.Event()
    asked = 0

    async def bring() -> str:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise BrokenError("the broker is restarting")
        await published.wait()
        return await replica.label("12")

    async with kept(replica.keeper(bring)) as keeper:
        await until(lambda: asked == 2)
        assert not keeper.ready
        assert await replica.weight_info() == "default"
        published.set()
        await until(lambda: keeper.ready)
        assert await replica.weight_info() == "12"
        assert replica.ready == [keeper.url]


async def test_a_replica_has_generated_before_anybody_may_take_its_compiling_for_silence(replica: Replica) -> None:
    async with kept(replica.keeper()) as keeper:
        await until(lambda: keeper.ready)
    routes = [line["route"] for line in fake_vllm.asked(replica.directory, replica.port) if "route" in line]
    assert routes[:2] == ["/inference/v1/generate", "/update_weight_version"]


@pytest.mark.parametrize(
    ("mood", "said"),
    [
        ({"exit": 3}, "ended with exit code 3"),
        ({"health": 503}, "answers 503 at /health"),
        ({"label": "unfit"}, "was marked unfit"),
    ],
)
async def test_a_replica_that_dies_sickens_or_is_marked_unfit_comes_back_and_is_brought_current_again(
    replica: Replica, mood: dict[str, object], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with kept(replica.keeper()) as keeper:
        await until(lambda: len(replica.ready) == 1)
        before = replica.pids()
        await replica.mood(**mood)
        await until(lambda: len(replica.ready) == 2)
        assert keeper.ready and keeper.restarts == 1
        assert replica.asked("/update_weight_version") == 2
        assert not [pid for pid in before if fake_vllm.alive(pid)]
    assert said in caplog.text


async def test_a_replica_whose_process_is_killed_comes_back_without_what_it_left(replica: Replica) -> None:
    async with kept(replica.keeper()):
        await until(lambda: len(replica.ready) == 1)
        before = replica.pids()
        os.kill(before[0], signal.SIGKILL)
        await until(lambda: len(replica.ready) == 2)
        assert not [pid for pid in before if fake_vllm.alive(pid)]


async def test_a_replica_that_says_nothing_any_more_is_started_again(replica: Replica) -> None:
    async with kept(replica.keeper(limits=replace(LIMITS, silent_s=0.5))):
        await until(lambda: replica.ready)
        starts, ready = replica.starts(), len(replica.ready)
        await replica.mood(silent=True)
        await until(lambda: replica.starts() > starts and len(replica.ready) > ready)


async def test_a_keeper_that_stood_still_itself_does_not_call_its_replica_silent(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    stood_s, asked, first = 0.0, 0, 1_000_000
    monkeypatch.setattr(keeping, "monotonic_s", lambda: monotonic_s() + stood_s)

    class Http(httpx.AsyncClient):
        async def request(self, *args: object, **options: object) -> httpx.Response:
            nonlocal stood_s, asked
            asked += 1
            if asked == first + 5:  # an answer that came while nobody could read it is late by the clock
                stood_s += 1000.0
                raise httpx.ReadTimeout("stopped for a quarter of an hour")
            return await super().request(*args, **options)  # pyright: ignore[reportArgumentType]

    async with Http(trust_env=False, timeout=60.0) as replica.http, kept(replica.keeper()) as keeper:
        await until(lambda: keeper.ready)
        first = asked
        await until(lambda: asked > first + 20)
        assert (stood_s, replica.starts(), keeper.ready) == (1000.0, 1, True)


@pytest.mark.parametrize("body", ["", "[]", "{}"])
async def test_a_replica_whose_answers_make_no_sense_is_silent(replica: Replica, body: str) -> None:
    async with kept(replica.keeper(limits=replace(LIMITS, silent_s=0.5))):
        await until(lambda: replica.ready)
        starts, ready = replica.starts(), len(replica.ready)
        await replica.mood(says=body)
        await until(lambda: replica.starts() > starts and len(replica.ready) > ready)


async def test_a_pause_that_a_dead_trainer_left_ends_and_the_replica_lives_on(replica: Replica) -> None:
    async with kept(replica.keeper(limits=replace(LIMITS, paused_s=0.1))) as keeper:
        await until(lambda: keeper.ready)
        await replica.post("/pause", {})
        await until(lambda: replica.asked("/resume"))
        assert replica.starts() == 1


async def test_a_pause_in_which_weights_may_be_half_new_ends_in_a_start(replica: Replica) -> None:
    async with kept(replica.keeper(limits=replace(LIMITS, paused_s=0.1), resumable=False)):
        await until(lambda: len(replica.ready) == 1)
        await replica.post("/pause", {})
        await until(lambda: len(replica.ready) == 2)
        assert not replica.asked("/resume")


async def test_a_replica_that_took_harm_while_it_was_brought_current_is_started_again(replica: Replica) -> None:
    harmed = False

    async def bring() -> str:
        nonlocal harmed
        if not harmed:
            harmed = True
            raise WeightUpdateError("half of the weights are new", served=False)
        return await replica.label()

    async with kept(replica.keeper(bring)) as keeper:
        await until(lambda: keeper.ready)
        assert replica.starts() == 2


async def test_a_replica_that_cannot_start_is_given_up_with_the_end_of_its_log(replica: Replica) -> None:
    (replica.directory / "start.json").write_text('{"exit": 1, "say": "out of memory: 139 GiB"}')
    with pytest.raises(ReplicaGivenUp, match=r"ended with exit code 1, 3 starts in a row(?s:.*)139 GiB"):
        await replica.keeper().run()
    assert replica.log.read_text().count("out of memory") == STILLBORN_MAX


async def test_arguments_that_vllm_does_not_know_are_not_tried_again(replica: Replica) -> None:
    (replica.directory / "start.json").write_text('{"exit": 2, "say": "unrecognized arguments: --turbo"}')
    with pytest.raises(ReplicaGivenUp, match=r"(?s)ended with exit code 2\. .*unrecognized arguments: --turbo"):
        await replica.keeper().run()
    assert replica.log.read_text().count("unrecognized") == 1


async def test_a_replica_that_is_slow_to_start_is_given_up_with_its_limit(replica: Replica) -> None:
    (replica.directory / "start.json").write_text('{"wait_s": 60}')
    with pytest.raises(ReplicaGivenUp, match=r"did not answer /health within 0\.1 s \(\[serve\] start_limit_s\)"):
        await replica.keeper(limits=replace(LIMITS, start_s=0.1)).run()


async def test_while_another_replica_serves_one_that_cannot_start_is_tried_on(replica: Replica) -> None:
    (replica.directory / "start.json").write_text('{"exit": 1}')
    async with kept(replica.keeper(others_ready=lambda: True)) as keeper:
        await until(lambda: keeper.restarts > STILLBORN_MAX)
        (replica.directory / "start.json").unlink()
        await until(lambda: keeper.ready)


async def test_a_port_that_someone_else_has_is_never_taken_for_the_replica(replica: Replica) -> None:
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=replica.port)
    async with listener:
        with pytest.raises(ReplicaGivenUp, match=f"127.0.0.1:{replica.port} is in use by another process"):
            await replica.keeper().run()
    assert replica.starts() == 0


async def test_no_process_is_left_when_the_keeper_is_cancelled(replica: Replica) -> None:
    async with kept(replica.keeper()) as keeper:
        await until(lambda: keeper.ready)
        pids = replica.pids()
        assert all(map(fake_vllm.alive, pids))
    assert not [pid for pid in pids if fake_vllm.alive(pid)]


@pytest.mark.crash
@pytest.mark.timeout(600)
async def test_no_process_outlives_a_serve_that_is_killed(replica: Replica) -> None:
    command = [
        sys.executable,
        "-m",
        "lightning_bus.cli",
        "serve",
        str(replica.directory),
        "--run",
        str(run_toml(replica)),
    ]
    with anyio.fail_after(500):
        serve = await anyio.open_process(command, stdout=None, stderr=None)
        await until(lambda: replica.asked("/update_weight_version"))
        pids = replica.pids()
        serve.kill()
        await serve.wait()
        await until(lambda: not [pid for pid in pids if fake_vllm.alive(pid)])
        await serve.aclose()


def run_toml(replica: Replica) -> Path:
    """A run whose vLLM is the fake; nothing but `serve` is started of it."""
    path = replica.directory / "run.toml"
    path.write_text(
        f"""
        [run]
        name = "fake"
        directory = "{replica.directory}"
        [policy]
        model = "{replica.directory}"
        [gateway]
        upstreams = ["{replica.launch.url}"]
        [serve]
        engine = "vllm"
        bind = "127.0.0.1:{replica.port}"
        python = "{replica.directory / "fake-python"}"
        [worker]
        agent = "examples.calc.agent:agent"
        [train]
        tasks = "examples.calc.tasks:train"
        held_out = "examples.calc.tasks:held_out"
        """
    )
    return path
