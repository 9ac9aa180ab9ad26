"""A stand-in for vLLM's control routes that checks every field and the order of calls, and fails where it is told to."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from trainer.serving.remote import RemoteEngine

FILE_FIELDS = {"path", "version", "names", "dtype_names", "shapes", "bytes", "base", "stamp", "checksum"}


class EngineStub:
    """One engine. `on_call` may look at the world, wait, raise httpx.ConnectError, or answer another status.

    overwrites_at_start  as vLLM's own backends do; our plugin overwrites at the finish
    """

    def __init__(
        self, url: str = "http://engine", *, label: str = "0", world_size: int = 1, overwrites_at_start: bool = False
    ) -> None:
        self.url = url
        self.label = label
        self.world_size = world_size
        self.paused = False
        self.update_open = False
        self.checksums = {"w": "same"}
        self.adapters: set[str] = set()
        self.calls: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.updates: list[dict[str, Any]] = []
        self.inits: list[dict[str, Any]] = []
        self.on_call: Callable[[str], Any] = lambda route: None
        self._overwrites_at_start = overwrites_at_start

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        route = request.url.path
        assert request.headers["connection"] == "close"
        body = json.loads(request.content) if request.content else None
        if request.method == "POST":
            self.calls.append(route.strip("/"))
        status: int | Awaitable[int | None] | None = self.on_call(route.strip("/"))
        if isinstance(status, Awaitable):
            status = await status
        if status is not None:
            self.update_open &= route != "/update_weights"  # an update that fails is over
            return httpx.Response(status, json={"error": {"message": f"told to fail at {route}"}})
        answer = getattr(self, "_" + route.strip("/").replace("/", "_"), None)
        assert answer is not None, f"vLLM has no route {route}"
        try:
            return httpx.Response(200, json=answer(body, dict(request.url.params)))
        except RuntimeError as exc:
            return httpx.Response(500, json={"error": {"message": str(exc)}})

    def _health(self, body: Any, query: dict[str, str]) -> dict[str, Any]:
        return {}

    def _weight_info(self, body: Any, query: dict[str, str]) -> dict[str, Any]:
        return {"weight_version": self.label}

    def _get_world_size(self, body: Any, query: dict[str, str]) -> dict[str, Any]:
        assert query == {"include_dp": "true"}
        return {"world_size": self.world_size}

    def _weight_checker(self, body: Any, query: dict[str, str]) -> dict[str, Any]:
        assert body == {"action": "checksum"}
        return {"checksums": self.checksums}

    def _inference_v1_generate(self, body: Any, query: dict[str, str]) -> dict[str, Any]:
        assert not self.paused
        entries = [{"token_id": at, "logprob": -1.0} for at in range(body["sampling_params"]["max_tokens"])]
        return {"choices": [{"logprobs": {"content": entries}}]}

    def _v1_models(self, body: Any, query: dict[str, str]) -> dict[str, Any]:
        return {"data": [{"id": "base", "parent": None}, *({"id": name, "parent": "base"} for name in self.adapters)]}

    def _pause(self, body: Any, query: dict[str, str]) -> dict[str, Any]:
        assert query["clear_cache"] == "false" and query["mode"] in ("keep", "wait", "abort")
        self.paused = True
        return {"status": "paused"}

    def _resume(self, body: Any, query: dict[str, str]) -> dict[str, Any]:
        self.paused = False
        return {"status": "resumed"}

    def _is_paused(self, body: Any, query: dict[str, str]) -> dict[str, Any]:
        return {"is_paused": self.paused}

    def _init_weight_transfer_engine(self, body: Any, query: dict[str, str]) -> dict[str, Any]:
        assert not self.update_open
        self.inits.append(body["init_info"])
        return {"message": "Weight transfer initialized"}

    def _start_weight_update(self, body: Any, query: dict[str, str]) -> dict[str, Any]:
        assert body is None
        if self.update_open:
            raise RuntimeError("start_weight_update called while a weight update is already active.")
        assert self.paused or not self._overwrites_at_start, "generation would read half a model"
        self.update_open = True
        return {"message": "Weight update started"}

    def _update_weights(self, body: Any, query: dict[str, str]) -> dict[str, Any]:
        if not self.update_open:
            raise RuntimeError("start_weight_update must be called before update_weights.")
        info = body["update_info"]
        if info.get("abandon"):
            self.update_open = False
            raise RuntimeError("the open update was abandoned, as asked.")
        assert len(info["names"]) == len(info["dtype_names"]) == len(info["shapes"])
        self.updates.append(info)
        return {"message": "Weights updated"}

    def _finish_weight_update(self, body: Any, query: dict[str, str]) -> dict[str, Any]:
        assert self.paused, "generation would read half a model"
        if not self.update_open:
            raise RuntimeError("finish_weight_update called without a matching start_weight_update.")
        self.update_open = False
        self.label = body["weight_version"]
        return {"message": "Weight update finished"}

    def _update_weight_version(self, body: Any, query: dict[str, str]) -> dict[str, Any]:
        self.label = body["new_version"]
        return {"success": True, "new_version": self.label}

    def _v1_load_lora_adapter(self, body: Any, query: dict[str, str]) -> dict[str, Any]:
        assert body.keys() == {"lora_name", "lora_path", "load_inplace"} and body["load_inplace"] is True
        self.updates.append(body)
        self.adapters.add(body["lora_name"])
        return {}


def client_of(*stubs: EngineStub) -> httpx.AsyncClient:
    """An HTTP client to whom these engines, and no others, exist."""
    by_url = {httpx.URL(stub.url).netloc: stub for stub in stubs}

    async def answer(request: httpx.Request) -> httpx.Response:
        stub = by_url.get(request.url.netloc)
        if stub is None:
            raise httpx.ConnectError("connection refused", request=request)
        return await stub(request)

    return httpx.AsyncClient(transport=httpx.MockTransport(answer))


def engine_of(client: httpx.AsyncClient, stub: EngineStub, *, limit_s: float = 5.0) -> RemoteEngine:
    return RemoteEngine(client, stub.url, limit_s=limit_s)
