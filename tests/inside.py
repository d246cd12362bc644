"""What is open inside a cluster's processes: for tests that nothing is left behind."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import psutil
from distributed import Worker

from daskserve.session import current_session
from daskserve.transport.dispatcher import Dispatcher
from tests.test_http import Site
from tests.utils import poll

#: What is open somewhere, and how many of each.
Open = dict[str, int]


def _tasks(what: str) -> Open:
    """Count the tasks of the running loop, but for the one that asks."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    names = (task.get_coro().__qualname__ for task in tasks)  # type: ignore[union-attr]
    return {f"{what} task {name}": n for name, n in Counter(names).items()}


async def _in_dispatcher(dispatcher: Dispatcher) -> Open:
    found = _tasks("transport")
    for name, group in dispatcher.groups.items():
        found[f"in flight to {name}"] = group.router.in_flight
        found[f"waiting for {name}"] = group.waiting
    for address, channel in dispatcher.connections.channels.items():
        found[f"exchanges with {address}"] = len(channel._exchanges)
    for replica_id, direct in dispatcher.connections.direct.items():
        found[f"exchanges with replica {replica_id}"] = len(direct._exchanges)
    if dispatcher.connections.local is not None:
        found["exchanges inside"] = len(dispatcher.connections.local._exchanges)
    return found


async def _in_runner(runner: Any) -> Open:
    tag = runner.spec.tag
    found = {f"ongoing in {tag}": runner.ongoing}
    return {**found, **_tasks(f"replica {tag}")}


def _run_on(thread: Any, coroutine: Coroutine[Any, Any, Open]) -> Open:
    found: Open = thread.submit(coroutine).result(10)
    return found


def _in_worker(dask_worker: Worker) -> Open:
    plugin: Any = dask_worker.plugins["daskserve"]
    found = _run_on(plugin._thread, _in_dispatcher(plugin.session.dispatcher))
    for runner in plugin.runners.values():
        found |= _run_on(runner._thread, _in_runner(runner))
    if plugin._server is not None:
        state = plugin._server._server.server_state
        found["connections"] = len(state.connections)
        found["requests"] = len(state.tasks)
        express = plugin._server._guard.express
        found["requests on the quick way"] = len(express.running) if express else 0
        found["bytes of windows"] = plugin._server._forwarder._windows.taken_bytes
    return found


def _in_client() -> Open:
    session: Any = current_session()
    dispatcher = session.dispatcher
    return _run_on(session._thread, _in_dispatcher(dispatcher))


def open_inside(site: Site) -> Open:
    """Return all that is open in the workers and in this process, zeros left out."""
    found = {f"{key} of the client": n for key, n in _in_client().items()}
    for worker, inside in site.client.run(_in_worker).items():
        found |= {f"{key} of {worker}": n for key, n in inside.items()}
    return {key: n for key, n in found.items() if n}


def idle_inside(site: Site) -> Open:
    """Return what is open while there are no requests: tasks that wait for some."""
    found: Open = {}

    def settled() -> bool:
        nonlocal found
        last, found = found, open_inside(site)
        return found == last and all(" task " in key for key in found)

    poll(settled, 20, 0.3)
    return found


def wait_for_idle(site: Site, idle: Open, timeout: float = 20) -> None:
    """Wait until nothing is open but what was when the cluster was idle."""
    last: Open = {}

    def is_idle() -> bool:
        nonlocal last
        last = open_inside(site)
        return last == idle

    try:
        poll(is_idle, timeout, 0.1)
    except AssertionError:
        surplus = {k: n - idle.get(k, 0) for k, n in last.items() if idle.get(k) != n}
        gone = {k: n for k, n in idle.items() if k not in last}
        raise AssertionError(f"still open: {surplus}; gone: {gone}") from None


def _trimmed_rss() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process(os.getpid()).memory_info().rss)


def resident_bytes(site: Site) -> dict[str, int]:
    """Return each worker's resident memory, with what can be given back given back."""
    function: Callable[[], int] = _trimmed_rss
    found: dict[str, int] = site.client.run(function)
    return found
