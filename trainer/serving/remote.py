"""One engine's control routes, as vLLM and the embedded engine have them, and what each failure means.

What always holds: every call ends within the limit; an answer that is an error, or that no engine would give, raises
EngineAnsweredError with its own words, no answer at all raises EngineSilentError.
"""

from __future__ import annotations

from typing import Any, Literal

import httpx

from trainer.serving.errors import EngineAnsweredError, EngineSilentError, WeightUpdateError

UNFIT = "unfit"  # label of an engine that a push broke: nobody calls it, its keeper restarts it
BEHIND = "behind"  # of one whose keeper could not read the newest weights: nobody calls it until the trainer has pushed
CALL_LIMIT_S = 60.0  # of each call; generous for gigabytes, short enough to notice a dead engine
PAUSE_MODES = {"keep": "keep", "drain": "wait", "abort": "abort"}  # ours → vLLM's

PushMode = Literal["keep", "drain", "abort"]


class RemoteEngine:
    """One engine behind a base URL. All methods raise EngineAnsweredError and EngineSilentError."""

    def __init__(self, client: httpx.AsyncClient, url: str, *, limit_s: float = CALL_LIMIT_S) -> None:
        self.url = url.rstrip("/")
        self.limit_s = limit_s
        self._client = client

    # --- what it serves ---

    async def health(self) -> bool:
        """Whether the engine answers and calls itself healthy."""
        try:
            await self._call("GET", "/health")
        except WeightUpdateError:
            return False
        return True

    async def label(self) -> str:
        """What the engine calls its weights: a version's number, "default", "behind", "unfit"."""
        return str(await self._read("GET", "/weight_info", "weight_version"))

    async def ready(self) -> bool:
        """Whether the engine is healthy and serves a published version, so that it may be called."""
        return await self.health() and (await self.label()).isdecimal()

    async def why_not_ours(self) -> str:
        """ "" when the engine is the trainer's to push to, else why it is still its keeper's."""
        try:
            await self._call("GET", "/health")
            label = await self.label()
        except WeightUpdateError as exc:
            return str(exc)
        ours = label.isdecimal() or label == BEHIND
        return "" if ours else f"its weights are called {label!r}, so it is not current yet"

    async def set_label(self, label: str) -> None:
        await self._call("POST", "/update_weight_version", {"new_version": label})

    async def checksums(self) -> dict[str, str]:
        """SHA-256 of each tensor that the engine holds, by the engine's own names."""
        return await self._read("POST", "/weight_checker", "checksums", body={"action": "checksum"})

    async def adapters(self) -> list[str]:
        """The names of the LoRA adapters that answer beside the base; empty where none do."""
        models = await self._read("GET", "/v1/models", "data")
        return sorted(model["id"] for model in models if model.get("parent"))

    async def world_size(self) -> int:
        """How many processes hold a part or a copy of the model: tensor × pipeline × data parallel."""
        return int(await self._read("GET", "/get_world_size?include_dp=true", "world_size"))

    # --- standing still ---

    async def pause(self, mode: PushMode = "keep") -> None:
        """Return once the engine stands still. Keys and values are kept: the prefix cache is salted by version."""
        await self._call("POST", f"/pause?mode={PAUSE_MODES[mode]}&clear_cache=false")

    async def resume(self) -> None:
        await self._call("POST", "/resume")

    async def is_paused(self) -> bool:
        return bool(await self._read("GET", "/is_paused", "is_paused"))

    # --- new weights ---

    async def init_transfer(self, init_info: dict[str, Any]) -> None:
        await self._call("POST", "/init_weight_transfer_engine", {"init_info": init_info})

    async def start(self) -> None:
        await self._call("POST", "/start_weight_update")

    async def update(self, update_info: dict[str, Any]) -> None:
        await self._call("POST", "/update_weights", {"update_info": update_info})

    async def finish(self, version: str) -> None:
        await self._call("POST", "/finish_weight_update", {"weight_version": version})

    async def reload(self, directory: str) -> None:
        """Have vLLM read this directory's safetensors itself: for a replica that nobody calls yet."""
        await self._call("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": directory}})

    async def load_adapter(self, name: str, directory: str) -> None:
        """Serve the LoRA adapter in this directory as model `name`, in place of the one that had the name."""
        body = {"lora_name": name, "lora_path": directory, "load_inplace": True}
        await self._call("POST", "/v1/load_lora_adapter", body)

    # --- generation, to prove that weights arrived as they were sent ---

    async def sample(self, token_ids: list[int], tokens: int, salt: str, model: str = "") -> list[tuple[int, float]]:
        """Ids and log-probs of the greedy continuation of a prompt, by the base or by the adapter of this name."""
        body = {
            **({"model": model} if model else {}),
            "token_ids": token_ids,
            "cache_salt": salt,  # what other weights left in the prefix cache must not answer
            "sampling_params": {"temperature": 0.0, "max_tokens": tokens, "logprobs": 0, "ignore_eos": True},
        }
        path = ("choices", 0, "logprobs", "content")
        entries = await self._read("POST", "/inference/v1/generate", *path, body=body)
        return [(entry["token_id"], entry["logprob"]) for entry in entries]

    # --- text ---

    async def tokenize(self, model: str, text: str) -> list[int]:
        """The ids of a text by itself, without a template and without special tokens before or after it."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        return [int(token_id) for token_id in await self._read("POST", "/tokenize", "tokens", body=body)]

    async def _read(self, method: str, route: str, *path: str | int, body: dict[str, Any] | None = None) -> Any:
        """What the answer holds at this path."""
        response = await self._call(method, route, body)
        try:
            found = response.json()
            for key in path:
                found = found[key]
        except (ValueError, LookupError, TypeError) as exc:
            raise EngineAnsweredError(
                f"{self.url}{route} answered what no engine does: {response.text[:400]!r}", status=response.status_code
            ) from exc
        return found

    async def _call(self, method: str, route: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            response = await self._client.request(
                method,
                self.url + route,
                json=body,
                timeout=self.limit_s,
                # vLLM's server closes the connection after an internal error without saying so, and the next call
                # on it would fail for no reason of its own.
                headers={"Connection": "close"},
            )
        except httpx.HTTPError as exc:
            raise EngineSilentError(
                f"{self.url}{route} gave no answer: {type(exc).__name__} {exc}".rstrip()
                + f" (limit {self.limit_s:g} s)"
            ) from exc
        if response.status_code != 200:
            raise EngineAnsweredError(
                f"{self.url}{route} answered {response.status_code}: {response.text[:400]}", status=response.status_code
            )
        return response
