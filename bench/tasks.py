"""How many rollouts a second go through their whole life durably, and how long does a free worker wait for one?

`tasks_per_s`: two worker processes lease and report done; a third process keeps the queue filled. A cycle is submit,
lease, done, each on disk before it is answered; tasks carry 1 KB. At credit 64 and 1: attempts a worker holds at most.
`dispatch_ms`: two idle workers, one submission at a time: from before submit until the agent could start.
`tasks_1000_workers` and `dispatch_1000_workers_ms`: the same with a thousand workers, each with a connection and a
credit of its own, in a few processes.

    python -m bench.tasks --json          three minutes; the last line is one JSON object
"""

from __future__ import annotations

import argparse
import shutil
import time
from contextlib import AsyncExitStack
from typing import Any

import anyio

from bench import common
from lightning_bus import Client, Status, Submission, Task

WORKERS = 2
CREDITS = (64, 1)
TASK_BYTES = 1024
QUEUED_MIN = 4096  # the submitter keeps at least this many waiting, so that no worker ever runs dry
SUBMIT_AT_ONCE = 512
DELAYS_MAX = 2000  # reported by a worker
WARMUP_S = 0.5
CROWD = 1000  # workers
CROWD_PROCESSES = 4
TASKS_PER_S_FLOOR = 20_000


def main() -> None:
    made = common.parser(__doc__, seconds=2.0, runs=3)
    made.add_argument("--submit", help=argparse.SUPPRESS)
    made.add_argument("--work", nargs=2, metavar=("ADDRESS", "CREDIT"), help=argparse.SUPPRESS)
    made.add_argument("--crowd", nargs=2, metavar=("ADDRESS", "WORKERS"), help=argparse.SUPPRESS)
    made.add_argument("--ping", help=argparse.SUPPRESS)
    options = common.parse(made)
    if options.submit:
        submit(options.submit, options.seconds)
    elif options.work:
        work(options.work[0], int(options.work[1]), options.seconds)
    elif options.crowd:
        work(options.crowd[0], 1, options.seconds, int(options.crowd[1]))
    elif options.ping:
        ping(options.ping, options.seconds)
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    rates: dict[int, list[float]] = {credit: [] for credit in CREDITS}
    submitted: list[float] = []
    cores: list[float] = []
    dispatch: list[list[float]] = []
    crowd: list[float] = []
    crowd_dispatch: list[float] = []
    seconds = ("--seconds", options.seconds)
    with common.workspace(options.dir) as directory:
        for _ in range(options.runs):
            for credit in CREDITS:
                with common.broker(directory / "log") as broker:
                    before_s, began = broker.cpu_s(), time.perf_counter()
                    worker = common.member("tasks", *seconds, "--work", broker.address, credit)
                    crew = [common.member("tasks", *seconds, "--submit", broker.address), *[worker] * WORKERS]
                    submitter, *workers = common.run_crew(crew)
                    if credit == CREDITS[0]:
                        submitted.append(submitter["per_s"])
                        cores.append((broker.cpu_s() - before_s) / (time.perf_counter() - began))
                rates[credit].append(sum(found["per_s"] for found in workers))
                shutil.rmtree(directory / "log")
            with common.broker(directory / "log") as broker:
                worker = common.member("tasks", *seconds, "--work", broker.address, 1)
                crew = [common.member("tasks", *seconds, "--ping", broker.address), *[worker] * WORKERS]
                dispatch.append([delay for found in common.run_crew(crew)[1:] for delay in found["delays_ms"]])
            shutil.rmtree(directory / "log")
            for chief in ("--submit", "--ping"):
                with common.broker(directory / "log") as broker:
                    workers = common.member("tasks", *seconds, "--crowd", broker.address, CROWD // CROWD_PROCESSES)
                    crew = [common.member("tasks", *seconds, chief, broker.address), *[workers] * CROWD_PROCESSES]
                    found = common.run_crew(crew)[1:]
                shutil.rmtree(directory / "log")
                if chief == "--submit":
                    crowd.append(sum(one["per_s"] for one in found))
                else:
                    crowd_dispatch += [delay for one in found for delay in one["delays_ms"]]
        summary: dict[str, Any] = {"bench": "tasks", "machine": common.machine(directory)}
    every = [delay for run in dispatch for delay in run]
    rate = common.median(rates[CREDITS[0]])
    summary |= {
        "n": options.runs,
        "seconds": options.seconds,
        "workers": WORKERS,
        "tasks_per_s": rate,
        "tasks_per_s_spread": common.spread(rates[CREDITS[0]]),
        "tasks_per_s_credit_1": common.median(rates[1]),
        "tasks_per_s_credit_1_spread": common.spread(rates[1]),
        "submitted_per_s": common.median(submitted),
        "broker_cores": common.median(cores, 2),
        "dispatch_n": len(every),
        "dispatch_ms_p50": common.percentile(every, 50),
        "dispatch_ms_p50_spread": common.spread([common.percentile(run, 50) for run in dispatch], 2),
        "dispatch_ms_p99": common.percentile(every, 99),
        "dispatch_ms_p99_spread": common.spread([common.percentile(run, 99) for run in dispatch], 2),
        "tasks_1000_workers": common.median(crowd),
        "tasks_1000_workers_spread": common.spread(crowd),
        "dispatch_1000_workers_n": len(crowd_dispatch),
        "dispatch_1000_workers_ms_p50": common.percentile(crowd_dispatch, 50),
        "dispatch_1000_workers_ms_p99": common.percentile(crowd_dispatch, 99),
        "tasks_per_s_floor": TASKS_PER_S_FLOOR,
        "ok": rate >= TASKS_PER_S_FLOOR,
    }
    common.finish(summary, options.json)


# -- the crew -----------------------------------------------------------------------------------------------------------


def submit(address: str, seconds: float) -> None:
    """Keep the queue filled for as long as the workers measure."""
    meter = common.Meter(WARMUP_S, seconds)

    async def run() -> None:
        async with Client(address, role="submitter") as client:
            number = 0

            async def more() -> bool:
                nonlocal number
                batch = [Submission(f"r-{number + at}", _task()) for at in range(SUBMIT_AT_ONCE)]
                number += len(batch)
                await client.submit(batch)
                return meter.add(len(batch))

            while number < 2 * QUEUED_MIN:
                await more()
            await common.say_ready_async()
            meter.start()
            going = True
            while going:
                if (await client.status()).rollouts[Status.QUEUED] < QUEUED_MIN:
                    going = await more()
                else:
                    await anyio.sleep(0.002)
                    going = meter.add(0)

    common.run_async(run)
    common.report({"per_s": meter.per_s})


def work(address: str, credit: int, seconds: float, workers: int = 1) -> None:
    """Report each task done as soon as it arrives; note how long ago it was submitted."""
    meter = common.Meter(WARMUP_S, seconds)
    delays_ms: list[float] = []

    async def run() -> None:
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(Client(address, role="worker")) for _ in range(workers)]
            await common.say_ready_async()
            meter.start()
            with anyio.move_on_after(WARMUP_S + seconds):
                async with anyio.create_task_group() as tasks:
                    for client in clients:
                        tasks.start_soon(work_as, client)

    async def work_as(client: Client) -> None:
        async with client.lease(credit) as leases, anyio.create_task_group() as tasks:

            async def done(task: Task) -> None:
                await leases.done(task, 1.0)
                meter.add(1)

            async for task in leases:
                if len(delays_ms) < DELAYS_MAX:
                    delay_ns = time.monotonic_ns() - int.from_bytes(task.task[:8], "big")
                    delays_ms.append(round(delay_ns / 1e6, 3))
                tasks.start_soon(done, task)

    common.run_async(run)
    common.report({"per_s": meter.per_s, "delays_ms": delays_ms[20:]})


def ping(address: str, seconds: float) -> None:
    """Submit one rollout at a time to workers that have nothing to do."""
    meter = common.Meter(0.0, WARMUP_S + seconds)

    async def run() -> None:
        async with Client(address, role="submitter") as client:
            await common.say_ready_async()
            meter.start()
            await anyio.sleep(WARMUP_S / 2)  # until the workers have asked
            number = 0
            while meter.add(0):
                await client.submit([Submission(f"r-{number}", _task())])
                number += 1
                await anyio.sleep(0.005)  # the worker has reported by then

    common.run_async(run)
    common.report({"submitted": meter.counted})


def _task() -> bytes:
    """1 KB that begins with the time, on the clock that processes of a machine share."""
    return time.monotonic_ns().to_bytes(8, "big") + bytes(TASK_BYTES - 8)


if __name__ == "__main__":
    main()
