"""One push to one or several engines: the order of calls, and what each failure leaves behind."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import torch

from tests.unit.trainer.engine_stub import FILE_FIELDS, EngineStub, client_of, engine_of
from tests.unit.trainer.serving_fixtures import build_model, build_tokenizer, reference_logprobs
from tests.unit.trainer.test_serving_weights import DAMAGES, Damage
from trainer.serving.adapters import AdapterTransfer, push_adapter, push_adapters
from trainer.serving.app import build_app
from trainer.serving.engine import Engine
from trainer.serving.errors import EngineAnsweredError, EngineSilentError, WeightsRefusedError, WeightUpdateError
from trainer.serving.push import FileOffer, FileTransfer, PushTimes, Target, push
from trainer.serving.remote import RemoteEngine
from trainer.serving.sampling import SamplingParams
from trainer.serving.slots import WeightDirectory, WeightSlots
from trainer.serving.weights import checksums, served_tensors

pytestmark = pytest.mark.anyio
PUSHED = ["start_weight_update", "update_weights", "pause", "finish_weight_update", "resume"]
TENSORS = {"layers.0.w": torch.ones(3), "norm": torch.ones(2)}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def served() -> AsyncIterator[tuple[Engine, RemoteEngine]]:
    with Engine(build_model(0), build_tokenizer(), torch_threads=1) as engine:
        transport = httpx.ASGITransport(build_app(engine, model_name="policy"))
        async with httpx.AsyncClient(transport=transport) as client:
            yield engine, RemoteEngine(client, "http://engine/", limit_s=5.0)


def offer_of(directory: Path, tensors: dict[str, torch.Tensor], version: str = "1") -> FileOffer:
    return FileTransfer(WeightSlots(directory, "run")).offer(tensors, version)


async def push_to(offer: FileOffer, stub: EngineStub, **options: Any) -> PushTimes | WeightUpdateError:
    async with client_of(stub) as client:
        return (await push(offer, [Target(engine_of(client, stub))], **options))[stub.url]


# --- to the embedded engine ---


@pytest.mark.parametrize("store", [WeightSlots, WeightDirectory])
async def test_a_push_changes_weights_version_and_answers(
    served: tuple[Engine, RemoteEngine], tmp_path: Path, store: type[WeightSlots]
) -> None:
    engine, remote = served
    new = build_model(1)
    assert (await remote.ready(), await remote.label(), await remote.world_size()) == (True, "0", 1)
    offer = FileTransfer(store(tmp_path, "run")).offer(served_tensors(new), "1")
    times = (await push(offer, [Target(remote, verify=True)]))[remote.url]
    assert isinstance(times, PushTimes) and 0 < times.standstill_ms <= times.seconds * 1e3
    assert (await remote.label(), await remote.is_paused()) == ("1", False)
    completion = await engine.generate([1, 2], SamplingParams(max_tokens=8, ignore_eos=True))
    assert completion.logprobs == pytest.approx(reference_logprobs(new, [1, 2], completion.token_ids), abs=1e-5)
    assert await remote.checksums() == checksums(served_tensors(new))


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
async def test_a_bad_update_is_refused_and_the_old_weights_keep_serving(
    served: tuple[Engine, RemoteEngine], tmp_path: Path, damage: Damage, reason: str
) -> None:
    engine, remote = served
    before = await engine.weight_checksums()
    tensors = served_tensors(build_model(1))
    store = WeightDirectory(tmp_path, "run")
    good = store.write(tensors, "1").with_checksum()
    result = (await push(FileOffer(store, damage(good, tensors)), [Target(remote)]))[remote.url]
    assert isinstance(result, WeightsRefusedError) and result.served
    assert re.search(reason, str(result))
    assert (await engine.weight_checksums(), engine.version, engine.is_paused) == (before, "0", False)
    again = FileTransfer(store).offer(tensors, "2")
    assert isinstance((await push(again, [Target(remote)]))[remote.url], PushTimes)
    assert engine.version == "2"


async def test_only_the_layers_that_changed_are_read_by_an_engine_that_has_the_rest(
    served: tuple[Engine, RemoteEngine], tmp_path: Path
) -> None:
    engine, remote = served
    transfer = FileTransfer(WeightSlots(tmp_path, "run"))
    tensors = served_tensors(build_model(1))
    frozen = {name for name in tensors if not name.startswith("model.layers.1.")}
    await push(transfer.offer(tensors, "1", frozen=frozen), [Target(remote)])
    tensors |= {name: tensor + 0.01 for name, tensor in tensors.items() if name not in frozen}
    offer = transfer.offer(tensors, "2", frozen=frozen)
    assert set(offer.update_info(Target(remote, base="1"))["names"]) == tensors.keys() - frozen
    assert isinstance((await push(offer, [Target(remote, base="1")]))[remote.url], PushTimes)
    assert await engine.weight_checksums() == checksums(tensors)
    refused = (await push(offer, [Target(remote, base="1")]))[remote.url]
    assert isinstance(refused, WeightsRefusedError) and "Push all tensors" in str(refused)


async def test_steps_out_of_order_answer_500_and_change_nothing(
    served: tuple[Engine, RemoteEngine], tmp_path: Path
) -> None:
    engine, remote = served
    offer = offer_of(tmp_path, served_tensors(build_model(1)))
    for call in (remote.update(offer.update_info(Target(remote))), remote.finish("x")):
        with pytest.raises(WeightUpdateError, match="answered 500: .*no weight update is open"):
            await call
    await remote.start()
    with pytest.raises(WeightUpdateError, match="answered 500: .*already open"):
        await remote.start()
    with pytest.raises(WeightUpdateError, match="answered 500: .*brought no weights"):
        await remote.finish("x")
    assert engine.version == "0"


async def test_a_push_whose_trainer_died_midway_does_not_lock_the_next_one_out(
    served: tuple[Engine, RemoteEngine], tmp_path: Path
) -> None:
    engine, remote = served
    await remote.pause()
    await remote.start()  # …and then it was killed
    assert isinstance(
        (await push(offer_of(tmp_path, served_tensors(build_model(5)), "8"), [Target(remote)]))[remote.url], PushTimes
    )
    assert engine.version == "8" and not engine.is_paused


# --- to an engine that checks what vLLM would check ---


@pytest.mark.parametrize(("mode", "theirs"), [("keep", "keep"), ("drain", "wait"), ("abort", "abort")])
async def test_generation_stands_still_for_the_finish_alone(tmp_path: Path, mode: Any, theirs: str) -> None:
    stub = EngineStub()
    offer = offer_of(tmp_path, TENSORS, "7")
    modes: list[str] = []
    async with client_of(stub) as client:

        async def spy(request: httpx.Request) -> None:
            modes.extend(request.url.params.get_list("mode"))

        client.event_hooks["request"].append(spy)
        times = (await push(offer, [Target(engine_of(client, stub), verify=True)], mode=mode))[stub.url]
    assert isinstance(times, PushTimes)
    assert (stub.calls, stub.label, stub.paused, modes) == (PUSHED, "7", False, [theirs])
    (info,) = stub.updates
    assert info.keys() == FILE_FIELDS
    assert (info["names"], info["dtype_names"], info["shapes"]) == (list(TENSORS), ["float32"] * 2, [[3], [2]])
    assert (info["version"], info["bytes"], info["base"]) == ("7", 20, "")
    assert info["checksum"].startswith("crc32:") and info["stamp"]


async def test_an_update_that_a_dead_trainer_left_open_is_closed_first(tmp_path: Path) -> None:
    stub = EngineStub()
    stub.update_open = stub.paused = True
    assert isinstance(await push_to(offer_of(tmp_path, TENSORS), stub), PushTimes)
    assert stub.calls == ["start_weight_update", "update_weights", *PUSHED]
    assert len(stub.updates) == 1


@pytest.mark.parametrize("failing", ["start_weight_update", "update_weights", "pause"])
@pytest.mark.parametrize("status", [500, 503, None])
async def test_what_fails_before_the_finish_leaves_the_old_weights_serving(
    tmp_path: Path, failing: str, status: int | None
) -> None:
    stub = EngineStub(label="3")

    def fail(route: str) -> int | None:
        if route == failing and status is None:
            raise httpx.ReadError("reset by peer")
        return status if route == failing else None

    stub.on_call = fail
    result = await push_to(offer_of(tmp_path, TENSORS), stub)
    assert isinstance(result, WeightUpdateError) and result.served
    assert isinstance(result, WeightsRefusedError) == (failing == "update_weights" and status is not None)
    assert (stub.label, stub.paused) == ("3", False)
    assert ("resume" in stub.calls) == (failing == "pause")


@pytest.mark.parametrize("status", [500, None])
async def test_an_engine_that_broke_in_the_finish_is_marked_unfit_and_left_standing(
    tmp_path: Path, status: int | None
) -> None:
    stub = EngineStub(label="3")

    def fail(route: str) -> int | None:
        if route == "finish_weight_update" and status is None:
            raise httpx.ReadTimeout("no answer")
        return status if route == "finish_weight_update" else None

    stub.on_call = fail
    result = await push_to(offer_of(tmp_path, TENSORS), stub)
    assert isinstance(result, WeightUpdateError) and not result.served
    assert "marked unfit: its keeper restarts it" in str(result)
    assert (stub.label, stub.paused) == ("unfit", True)
    assert stub.calls[-1] == "update_weight_version"


async def test_a_refusal_by_one_of_several_workers_makes_the_replica_unfit(tmp_path: Path) -> None:
    stub = EngineStub(world_size=2)
    stub.on_call = lambda route: 500 if route == "update_weights" else None
    result = await push_to(offer_of(tmp_path, TENSORS), stub)
    assert isinstance(result, WeightUpdateError) and not result.served
    assert stub.label == "unfit"


async def test_one_engines_failure_is_not_anothers(tmp_path: Path) -> None:
    good, broken, gone = EngineStub("http://good"), EngineStub("http://broken"), EngineStub("http://gone")
    broken.on_call = lambda route: 500 if route == "finish_weight_update" else None
    async with client_of(good, broken) as client:
        targets = [Target(engine_of(client, stub)) for stub in (good, broken, gone)]
        results = await push(offer_of(tmp_path, TENSORS, "4"), targets)
    assert isinstance(results[good.url], PushTimes)
    assert (good.label, broken.label) == ("4", "unfit")
    for stub, served in ((broken, False), (gone, True)):
        failure = results[stub.url]
        assert isinstance(failure, WeightUpdateError) and failure.served is served


async def test_a_push_that_is_cancelled_while_an_engine_stands_still_ends_as_it_began(tmp_path: Path) -> None:
    stub = EngineStub()
    async with client_of(stub) as client:
        with anyio.CancelScope() as scope:
            stub.on_call = lambda route: scope.cancel() if route == "pause" else None
            await push(offer_of(tmp_path, TENSORS, "9"), [Target(engine_of(client, stub))])
    assert (stub.label, stub.paused) == ("9", False)


async def test_an_adapter_is_loaded_while_generation_stands_still(tmp_path: Path) -> None:
    stub = EngineStub()
    async with client_of(stub) as client:
        assert (await push_adapter(engine_of(client, stub), "policy", tmp_path, "5")).standstill_ms > 0
        assert stub.calls == ["pause", "v1/load_lora_adapter", "update_weight_version", "resume"]
        assert stub.updates == [{"lora_name": "policy", "lora_path": str(tmp_path), "load_inplace": True}]
        stub.on_call = lambda route: 404 if route == "v1/load_lora_adapter" else None
        with pytest.raises(WeightUpdateError, match="load_lora_adapter answered 404"):
            await push_adapter(engine_of(client, stub), "policy", tmp_path, "6")
    assert (stub.label, stub.paused) == ("5", False)


@pytest.mark.parametrize("body", ["", "[]", "{}", '"no"', "<html>"])
async def test_an_answer_that_no_engine_gives_is_an_engines_failure(body: str) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=body))
    async with httpx.AsyncClient(transport=transport) as client:
        engine = RemoteEngine(client, "http://engine")
        for ask in (engine.label, engine.checksums, engine.world_size, engine.is_paused, engine.adapters):
            with pytest.raises(EngineAnsweredError, match="answered what no engine does"):
                await ask()
        for say in (engine.sample([1], 1, salt=""), engine.tokenize("policy", "one")):
            with pytest.raises(EngineAnsweredError, match="answered what no engine does"):
                await say
        assert "answered what no engine does" in await engine.why_not_ours()


async def test_an_engine_that_is_away_is_named_with_the_limit() -> None:
    stub = EngineStub()
    async with client_of() as client:
        engine = engine_of(client, stub)
        with pytest.raises(EngineSilentError, match=r"http://engine/pause\S* gave no answer: ConnectError .*limit 5 s"):
            await engine.pause()
        assert "gave no answer" in await engine.why_not_ours()
        assert not await engine.health() and not await engine.ready()
    stub.label = "default"
    async with client_of(stub) as client:
        assert "'default', so it is not current yet" in await engine_of(client, stub).why_not_ours()


async def test_an_adapter_reaches_every_engine_by_a_path_of_its_own_version(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2}
    transfer = AdapterTransfer(tmp_path / "adapters", "policy", config)
    tensors = {"base_model.model.q.lora_A.weight": torch.ones(1, 3)}
    stubs = [EngineStub(), EngineStub()]
    for version in ("1", "2", "3", "4", "5"):
        offer = transfer.offer(tensors, version)
        for stub in stubs:
            async with client_of(stub) as client:
                (result,) = (await push_adapters(offer, [Target(engine_of(client, stub))])).values()
                assert isinstance(result, PushTimes)
    for stub in stubs:
        assert [Path(update["lora_path"]).name for update in stub.updates] == ["1", "2", "3", "4", "5"]
        assert (stub.label, stub.paused) == ("5", False)
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == ["2", "3", "4", "5"]
    assert json.loads((offer.directory / "adapter_config.json").read_text()) == config
    with pytest.raises(WeightsRefusedError, match="1 tensors of adapter 6 are not finite"):
        transfer.offer({"lora_A": torch.tensor([float("nan")])}, "6")


async def test_an_engine_that_may_have_an_adapter_and_not_its_label_does_not_go_on(tmp_path: Path) -> None:
    stub = EngineStub()
    offer = AdapterTransfer(tmp_path, "policy", {}).offer({}, "7")
    async with client_of(stub) as client:
        stub.on_call = lambda route: 500 if route == "update_weight_version" and stub.label != "unfit" else None
        (result,) = (await push_adapters(offer, [Target(engine_of(client, stub))])).values()
    assert isinstance(result, WeightUpdateError) and not result.served
    assert stub.paused
