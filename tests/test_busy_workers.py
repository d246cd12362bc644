"""Replicas start on workers whose threads all run long tasks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Future, get_client

import daskserve as serve
from tests.utils import ProcessCluster, poll, scheduler_workers

pytestmark = pytest.mark.slow

#: Longer than any test waits for a replica.
LONG_S = 600


@contextmanager
def busy(client: Client, stop: Path) -> Iterator[list[Future[Any]]]:
    """Let tasks run on all threads, and more wait; until the block ends."""

    def run(number: int, path: str, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        while not os.path.exists(path) and time.monotonic() < deadline:
            time.sleep(0.02)
        return number

    nthreads = sum(client.nthreads().values())
    tasks = client.map(
        run, range(2 * nthreads), path=str(stop), seconds=LONG_S, pure=False
    )
    poll(lambda: executing(client) == nthreads, 10)
    try:
        yield tasks
    finally:
        stop.touch()
        client.gather(tasks)


def executing(client: Client) -> int:
    def count(dask_worker: Any) -> int:
        return len(dask_worker.state.executing)

    return sum(client.run(count).values())


def actors(client: Client) -> dict[str, list[str]]:
    """Return which actors each worker has or is to make, for the scheduler."""

    def read(dask_scheduler: Any) -> dict[str, list[str]]:
        return {
            address: [f"{ts.key} {ts.state}" for ts in ws.actors]
            for address, ws in dask_scheduler.workers.items()
        }

    found: dict[str, list[str]] = client.run_on_scheduler(read)
    return found


def counted(path: Path) -> type:
    """Return a class that notes in a file when it is made."""

    class Model:
        def __init__(self) -> None:
            with open(path, "a") as file:
                file.write("made\n")

        def __call__(self) -> int:
            return os.getpid()

    return Model


@pytest.fixture
def cluster() -> Iterator[ProcessCluster]:
    with ProcessCluster(1, nanny=False, nthreads=1) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: ProcessCluster) -> Iterator[Client]:
    with cluster.client() as client:
        serve.start(client, http_options={"location": "NoServer"})
        yield client
        serve.shutdown()


def test_deploy_and_delete(client: Client, tmp_path: Path) -> None:
    """Neither waits for a thread, and the actor is made once there is one."""
    notes = tmp_path / "notes"
    deployment = serve.deployment(name="model")(counted(notes))
    with busy(client, tmp_path / "stop"):
        deployment.deploy()
        assert deployment.get_handle().remote().result(timeout_s=10) > 0
        [[actor]] = actors(client).values()
        assert actor.endswith(" processing")
    poll(lambda: "memory" in str(actors(client)), 10)
    assert notes.read_text() == "made\n"
    assert deployment.get_handle().remote().result(timeout_s=10) > 0
    deployment.delete()
    poll(lambda: list(actors(client).values()) == [[]], 5)


def test_what_ended_before_its_actor(client: Client, tmp_path: Path) -> None:
    """It does not come back with the actor, and its worker can be retired."""
    notes = tmp_path / "notes"
    with busy(client, tmp_path / "stop"):
        deployment = serve.deployment(name="model")(counted(notes))
        deployment.deploy()
        deployment.delete()
        poll(lambda: list(actors(client).values()) == [[]], 5)
    poll(lambda: executing(client) == 0, 10)
    time.sleep(0.5)
    assert notes.read_text() == "made\n"
    retired = client.retire_workers(scheduler_workers(client))
    assert len(retired) == 1


def test_constructors_that_fail(client: Client, tmp_path: Path) -> None:
    """They are tried as often as ever, and no more than that when threads are free."""
    notes = tmp_path / "notes"

    class Broken(counted(notes)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            raise OSError("no model here")

    with busy(client, tmp_path / "stop"):
        with pytest.raises(serve.ServeError, match="no model here"):
            serve.deployment(name="broken")(Broken).deploy()
        tries = notes.read_text()
    poll(lambda: executing(client) == 0, 10)
    time.sleep(0.5)
    assert notes.read_text() == tries
    assert tries.count("made") == 3


def test_from_inside_a_task(client: Client) -> None:
    """A task deploys and calls, on the one thread that there is."""

    def task() -> int:
        get_client()
        deployment = serve.deployment(name="inner")(counted(Path(os.devnull)))
        deployment.deploy()
        return deployment.get_handle().remote().result(timeout_s=10)

    assert client.submit(task).result(timeout=30) > 0
    assert serve.get_deployment("inner").get_handle().remote().result(timeout_s=10) > 0


def test_tasks_that_were_cancelled(client: Client, tmp_path: Path) -> None:
    """They go on, and have the threads, though the scheduler has forgotten them."""

    def hold(path: str) -> None:
        deadline = time.monotonic() + LONG_S
        while not os.path.exists(path) and time.monotonic() < deadline:
            time.sleep(0.02)

    stop = tmp_path / "stop"
    task = client.submit(hold, str(stop), pure=False)
    poll(lambda: executing(client) == 1, 10)
    task.cancel()
    poll(lambda: not client.processing()[next(iter(scheduler_workers(client)))], 10)
    try:
        deployment = serve.deployment(name="model", deploy_timeout_s=10)
        model = deployment(counted(tmp_path / "notes"))
        model.deploy()
        assert model.get_handle().remote().result(timeout_s=10) > 0
    finally:
        stop.touch()


def test_replacement(tmp_path: Path) -> None:
    """A replica whose worker was killed is back while tasks run everywhere."""
    with ProcessCluster(3, nanny=False) as cluster, cluster.client() as client:
        serve.start(client, http_options={"location": "NoServer"})
        deployment = serve.deployment(name="model")(counted(Path(os.devnull)))
        deployment.deploy()
        handle = deployment.get_handle()
        pid = handle.remote().result(timeout_s=10)
        with busy(client, tmp_path / "stop"):
            os.kill(pid, signal.SIGKILL)
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(other, handle, pid)
                assert found.result(timeout=20) != pid
            assert executing(client) == 2


def other(handle: serve.DeploymentHandle, pid: int) -> int:
    """Ask until another process answers."""
    while True:
        with suppress(serve.ServeError):
            answer: int = handle.remote().result(timeout_s=10)
            if answer != pid:
                return answer
        time.sleep(0.02)
