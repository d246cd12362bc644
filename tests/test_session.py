"""Sessions of several clients on one cluster."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from distributed import Scheduler, Worker

import daskserve as serve
from daskserve.session import WorkerSession, client_session
from tests.utils import ProcessCluster, free_port, leftover_threads

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
