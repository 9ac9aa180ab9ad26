"""Whether the servers of a run are up: what `up` waits for before it starts what needs them.

Always holds: an engine counts as ready only under weights that have a number, so one that has started but is still
being brought to the current weights does not. One that says it is behind waits for the trainer, so it must not hold
the trainer up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

PROBE_LIMIT_S = 2.0
BEHIND = "behind"


async def is_ready(engine: str) -> bool:
    """Whether an engine answers, and under weights that have a number: until then it is not current."""
    if not await answers(f"{engine}/health"):
        return False
    try:
        async with httpx.AsyncClient(timeout=PROBE_LIMIT_S, trust_env=False) as http:
            info = await http.get(f"{engine}/weight_info")
            if info.status_code == 404:  # other servers of the OpenAI API know nothing of weights that change
                return True
            info.raise_for_status()
            label = str(info.json()["weight_version"])
            return label.isdecimal() or label == BEHIND
    except (httpx.HTTPError, ValueError, LookupError, TypeError):  # it is gone, or it is no engine
        return False


async def answers(url: str) -> bool:
    """Whether something answers there, and calls itself well."""
    try:
        async with httpx.AsyncClient(timeout=PROBE_LIMIT_S, trust_env=False) as http:
            return (await http.get(url)).status_code == 200
    except httpx.HTTPError:
        return False


def own_engines(serve: Mapping[str, Any], upstreams: Sequence[str]) -> list[str]:
    """Return those of the gateway's engines that the run's own `serve` starts; others are for others to keep alive.

    serve  the section [serve], whose `bind` is the first replica's; all upstreams are its own where it is not there
    """
    if "bind" not in serve:
        return list(upstreams)
    first = _port(str(serve["bind"]))
    ports = set(range(first, first + int(serve.get("replicas", 1))))
    if serve.get("engine") == "vllm" and serve.get("scripted"):
        ports.add(_port(str(serve.get("scripted_bind") or f":{first + len(ports)}")))
    return [upstream for upstream in upstreams if urlsplit(upstream).port in ports]


def _port(bind: str) -> int:
    port = bind.rpartition(":")[2]
    return int(port) if port.isdecimal() else 0
