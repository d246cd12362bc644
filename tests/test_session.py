"""Sessions of several clients on one cluster."""

from __future__ import annotations

import asyncio
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import Scheduler, Worker

import daskserve as serve
from daskserve.controller import publisher
from daskserve.controller.publisher import Publisher
from daskserve.exceptions import DeploymentFailedError, ServeNotRunningError
from daskserve.session import WorkerSession, client_session
from daskserve.transport.snapshots import follow
from tests.utils import ProcessCluster, free_port, leftover_threads, poll

NO_SERVER = {"location": "NoServer"}


def test_handles_outlive_an_instance(process_cluster: ProcessCluster) -> None:
    @serve.deployment
    class Version:
        def __init__(self, number: int) -> None:
            self.number = number

        def __call__(self) -> int:
            return self.number

    with process_cluster.client() as other, process_cluster.client() as client:
        with client.as_current():
            serve.start(client, http_options=NO_SERVER)
            Version.deploy(1)
        with other.as_current():
            handle = Version.get_handle()
            assert handle.remote().result(timeout_s=10) == 1
            kept = client_session(other).dispatcher
        with client.as_current():
            serve.shutdown()
            serve.start(client, http_options=NO_SERVER)
            Version.deploy(2)
        with other.as_current():
            # deploy() has returned, so this handle knows of it.
            assert handle.remote().result(timeout_s=10) == 2
            assert client_session(other).dispatcher is kept


def test_errors_show_the_users_own_line(process_cluster: ProcessCluster) -> None:
    """Not what lies between: Dask's and our own ways through loops and threads."""

    @serve.deployment
    class Broken:
        def __init__(self) -> None:
            raise OSError("no model here")

    with process_cluster.client():
        with pytest.raises(ServeNotRunningError) as forgotten:
            Broken.deploy()
        with serve.start(http_options=NO_SERVER):
            with pytest.raises(DeploymentFailedError) as failed:
                Broken.deploy()
    for caught in (forgotten, failed):
        names = [entry.name for entry in caught.traceback]
        assert names == ["test_errors_show_the_users_own_line", "deploy", "run"]
    assert str(failed.value).endswith("with OSError: no model here")
    text = "".join(traceback.format_exception(failed.value))
    assert text.count("Traceback (most recent call last)") == 2  # there, and here
    assert "daskserve/replica" not in text
    assert text.count('raise OSError("no model here")') == 1


def test_the_clock_may_step_back(process_cluster: ProcessCluster) -> None:
    def step_back() -> None:
        # Only for the numbers: under one that does, Dask's own timers would wait.
        clock = SimpleNamespace(**vars(time))
        clock.time = lambda: time.time() - 3600
        publisher.time = clock  # type: ignore[assignment]

    @serve.deployment
    def number(value: int = 1) -> int:
        return value

    with process_cluster.client() as other, process_cluster.client() as client:
        with client.as_current():
            serve.start(client, http_options=NO_SERVER)
            number.deploy()
        with other.as_current():
            handle = number.get_handle()
            assert handle.remote().result(timeout_s=10) == 1
        with client.as_current():
            serve.shutdown()
            client.run_on_scheduler(step_back)
            serve.start(client, http_options=NO_SERVER)
            number.deploy()
        with other.as_current():
            assert handle.remote(2).result(timeout_s=10) == 2


def test_a_scheduler_that_counts_from_below(process_cluster: ProcessCluster) -> None:
    """Its clients have newer numbers from the one before it."""

    def set_number(dask_scheduler: Scheduler, version: int) -> None:
        plugin = dask_scheduler.plugins["daskserve"]
        plugin._instance.publisher.version = version  # type: ignore[attr-defined]

    @serve.deployment
    def number(value: int = 1) -> int:
        return value

    with process_cluster.client() as client, client.as_current():
        serve.start(client, http_options=NO_SERVER)
        session = client_session(client)
        session.dispatcher.version = 2**50  # what it had
        client.run_on_scheduler(set_number, version=7)
        client.loop.add_callback(session._subscribe)
        poll(lambda: session.dispatcher.version > 2**50)
        began = time.monotonic()
        number.deploy()
        assert time.monotonic() - began < 4  # all followed: nobody is waited for
        assert number.get_handle().remote(2).result(timeout_s=10) == 2


def test_numbers_of_snapshots_only_rise() -> None:
    sent: list[dict[str, Any]] = []

    class Streams:
        stream_comms = {"w": None}

        def worker_send(self, worker: str, message: dict[str, Any]) -> None:
            sent.append(message)

    made = Publisher(Streams(), 1)  # type: ignore[arg-type]
    made.subscribe("w")
    first = made.version
    made.rise_above(first)  # given out here
    assert made.version == first
    made.rise_above(first + 5)
    assert made.version == first + 6
    assert [(m["version"], m["base"]) for m in sent] == [
        (first, None),
        (first + 6, first),
    ]
    assert follow(made.snapshot, sent[1]["snapshot"]) == made.snapshot


def test_a_client_that_is_done_holds_up_nobody(process_cluster: ProcessCluster) -> None:
    @serve.deployment(version="1")
    def hello() -> str:
        return "hello"

    with process_cluster.client() as other, process_cluster.client() as client:
        with client.as_current():
            serve.start(client, http_options=NO_SERVER)
            hello.deploy()
        with other.as_current():
            assert hello.get_handle().remote().result(timeout_s=10) == "hello"
        client_session(other).close()
        with client.as_current():
            began = time.monotonic()
            hello.options(num_replicas=2).deploy()
            # Not asked any more; the answer of a silent one is waited for for 5 s.
            assert time.monotonic() - began < 4
        with other.as_current():
            assert hello.get_handle().remote().result(timeout_s=10) == "hello"


def test_threads_end_with_their_client(process_cluster: ProcessCluster) -> None:
    with process_cluster.client() as client:
        serve.start(client, http_options=NO_SERVER)
        assert client_session(client).dispatcher.loop.is_running()
    assert leftover_threads("daskserve-client") == []


def test_replicas_listen_where_their_worker_does(tmp_path: Path) -> None:
    """Its contact address can be a name, or a router's."""

    async def test() -> None:
        port = free_port()
        here = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
        contact = f"tcp://127.0.0.2:{port}"
        async with Scheduler(port=0, **here) as scheduler:
            for address, known in ((None, "127.0.0.1"), (contact, "127.0.0.2")):
                async with Worker(
                    scheduler.address,
                    port=port,
                    contact_address=address,
                    local_directory=str(tmp_path),
                    **here,
                ) as worker:
                    session = WorkerSession(worker, lambda connect: None)  # type: ignore[arg-type, return-value]
                    assert session.direct_listener() == ("127.0.0.1", None, known)

    asyncio.run(test())
