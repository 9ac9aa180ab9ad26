"""Runs a command and leaves nothing of it behind: `python guard.py COMMAND…`, in a session of its own.

An engine is a family of processes, and one that outlives its keeper holds a GPU's memory and a port that the next one
needs. So between the keeper and the engine stands this process. What always holds: when the command ends, when the
guard is asked to (SIGTERM), or when its stdin ends, because the keeper is gone however it died, the whole family is
ended, and only then does the guard leave, with the command's exit code.

It is run as a file, by any Python, and imports nothing but the standard library: a guard must not be what fails.
"""

import os
import select
import signal
import subprocess
import sys
import time

GRACE_S = 5.0  # for an orderly end, before all are killed
LINGER_S = 0.3  # for those that tidy up after the command, shared memory above all
LOOK_S = 0.02  # between two looks at who is left
LOOKS_MAX = 250  # a process that a kill does not end within seconds hangs in the kernel, and waiting does not help


def main(argv: list[str]) -> int:
    """Run the command to its end, or to ours; return its exit code."""
    awake, wake = os.pipe()
    for end in (awake, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: asked.append(number))
    signal.signal(signal.SIGCHLD, lambda *_: None)  # it only has to wake us
    # A group of its own: what asks the command to end must not reach the guard.
    command = subprocess.Popen(argv, stdin=subprocess.DEVNULL, process_group=0)
    while command.poll() is None and not asked:
        readable, _, _ = select.select([0, awake], [], [])
        if awake in readable:
            os.read(awake, 4096)
        if 0 in readable and not os.read(0, 4096):
            asked.append(0)
    if command.poll() is None:
        _signal_group(command.pid, signal.SIGTERM)
        try:
            command.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
    until_s = time.monotonic() + LINGER_S
    while time.monotonic() < until_s and len(session_members(os.getsid(0))) > 1:
        time.sleep(LOOK_S)
    _signal_group(command.pid, signal.SIGKILL)
    kill_session(os.getsid(0), spared=os.getpid())
    code = command.wait()
    return code if code >= 0 else 128 - code


def kill_session(leader: int, *, spared: int = 0) -> None:
    """Kill every process of a session, and return once all are gone; `spared` lives."""
    for _ in range(LOOKS_MAX):
        found = [pid for pid in session_members(leader) if pid != spared]
        if not found:
            return
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(LOOK_S)


def session_members(leader: int) -> list[int]:
    """Return the processes of a session that are alive; empty where the system has no /proc to tell."""
    found: list[int] = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                state, _, _, session, *_ = file.read().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue  # it ended while we looked
        if int(session) == leader and state not in "ZX":
            found.append(int(name))
    return found


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass  # all of it is gone, or a zombie that nobody waited for yet


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
