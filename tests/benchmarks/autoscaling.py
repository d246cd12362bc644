"""Load steps against a deployment that scales itself: what the number of replicas does.

``python -m tests.benchmarks.autoscaling`` prints it for clients in steps of 1, 50, 1, 0
and 1; exits with 1 if a request failed or the number flapped. A short form of it is
among the tests.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx
from distributed import Client

import daskserve as serve
from tests.utils import ProcessCluster

#: How many clients, one after the other.
STEPS = (1, 50, 1, 0, 1)
#: Seconds between two looks at the status.
LOOK_S = 0.1


class Sleeper:
    """Take a while for each request, and next to no processor time."""

    async def __call__(self, request: Any) -> str:
        await asyncio.sleep(0.2)
        return serve.get_replica_context().replica_tag


def config(seconds: float, most: int) -> dict[str, Any]:
    """Return an autoscaling configuration that is done within a step of `seconds`."""
    return {
        "min_replicas": 0,
        "max_replicas": most,
        "target_ongoing_requests": 10,
        "upscale_delay_s": seconds / 8,
        "downscale_delay_s": seconds / 3,
        "metrics_interval_s": min(1.0, seconds / 16),
        "look_back_period_s": seconds / 8,
    }


@dataclass
class Step:
    """What happened while there were so many clients."""

    clients: int
    #: Seconds since the step began, and how many replicas were wanted and ran; when
    #: that changed.
    numbers: list[tuple[float, int, int]] = field(default_factory=list)
    states: Counter[str] = field(default_factory=Counter)
    served: int = 0
    slowest_s: float = 0.0
    replicas: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)

    @property
    def turns(self) -> int:
        """How often the number wanted changed its direction."""
        wanted = [number for _, number, _ in self.numbers]
        steps = [b - a for a, b in pairwise(wanted) if a != b]
        return sum((a > 0) != (b > 0) for a, b in pairwise(steps))

    @property
    def last(self) -> int:
        """How many replicas were wanted in the end."""
        return self.numbers[-1][1]

    def __str__(self) -> str:
        numbers = "  ".join(f"{at:.1f} s {w}/{r}" for at, w, r in self.numbers)
        return (
            f"{self.clients:3} clients: {self.served:6} served by "
            f"{len(self.replicas)} replicas, {len(self.failures)} failed, slowest "
            f"{self.slowest_s:.2f} s, {self.turns} turns; wanted/running: {numbers}"
        )


async def run_step(
    clients: int, seconds: float, ask: Callable[[int], Any], look: Callable[[], Any]
) -> Step:
    """Let clients make requests, one after the other each, and look at the status.

    Parameters
    ----------
    clients
        How many.
    seconds
        How long; requests that have begun by then are waited for.
    ask
        Makes one request of a client by its number; returns an awaitable.
    look
        Returns the status of the deployment; called in a thread.
    """
    step = Step(clients)
    began = time.monotonic()

    async def client(number: int) -> None:
        while (asked := time.monotonic()) < began + seconds:
            try:
                step.replicas.add(await ask(number))
            except Exception as err:
                step.failures.append(repr(err))
            else:
                step.served += 1
            step.slowest_s = max(step.slowest_s, time.monotonic() - asked)

    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(client(number))
        while time.monotonic() < began + seconds:
            status = await asyncio.to_thread(look)
            step.states[status.state] += 1
            now = status.target_replicas, status.running_replicas
            if not step.numbers or step.numbers[-1][1:] != now:
                step.numbers.append((time.monotonic() - began, *now))
            await asyncio.sleep(LOOK_S)
    return step


async def run_steps(
    deployment: serve.Deployment,
    url: str,
    seconds: float,
    steps: Sequence[int] = STEPS,
) -> list[Step]:
    """Run several; every other client uses a handle and not HTTP."""
    handle = deployment.get_handle()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=60, limits=limits) as http:

        async def ask(number: int) -> str:
            if number % 2:
                return str(await handle.remote(None))
            response = await http.get(url)
            response.raise_for_status()
            return response.text

        def look() -> Any:
            return serve.status().deployments[deployment.name]

        return [await run_step(n, seconds, ask, look) for n in steps]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.autoscaling")
    parser.add_argument("--seconds", type=float, default=24, help="of one step")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--most", type=int, default=8, help="replicas")
    args = parser.parse_args()
    with (
        ProcessCluster(args.workers, nanny=False) as cluster,
        Client(cluster.address) as client,
        serve.start(client, http_options={"port": 0}) as instance,
    ):
        deployment = serve.deployment(
            name="Sleeper", autoscaling_config=config(args.seconds, args.most)
        )(Sleeper)
        deployment.deploy()
        url = f"{instance.http_urls[0]}/Sleeper"
        steps = asyncio.run(run_steps(deployment, url, args.seconds))
    for step in steps:
        print(step)
    return int(any(step.failures or step.turns > 1 for step in steps))


if __name__ == "__main__":
    sys.exit(main())
