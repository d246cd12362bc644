"""Children that user code forks keep none of our sockets; real processes."""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

import httpx
import pytest

import daskserve as serve
from daskserve.transport.forks import close_in_children
from tests.utils import ProcessCluster, free_port, poll

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


class Owner:
    def __init__(self, *files: int) -> None:
        self._files = files

    def files(self) -> Iterable[int]:
        return self._files


class Broken:
    def files(self) -> Iterable[int]:
        raise ValueError


def in_child(*files: int) -> list[str]:
    """Fork, and return what the files are there."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        found = [os.readlink(f"/proc/self/fd/{file}") for file in files]
        os.write(writing, "\n".join(found).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text.splitlines()


def test_children_have_nothing_of_an_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours, socket.socket() as other:
        owner, broken = Owner(ours.fileno(), -1), Broken()
        close_in_children(broken)
        close_in_children(owner)
        left = in_child(ours.fileno(), other.fileno())
        assert left[0] == os.devnull and left[1].startswith("socket:")
        with socket.create_connection(ours.getsockname()):
            ours.accept()[0].close()  # here it is as it was
        del owner
        gc.collect()
        assert in_child(ours.fileno())[0].startswith("socket:")


@pytest.mark.slow
def test_a_dead_worker_answers_nobody() -> None:
    @serve.deployment(route_prefix="/f", num_replicas=2)
    class Forks:
        def __init__(self) -> None:
            self.child = os.fork()
            if self.child == 0:
                signal.pause()

        def __call__(self) -> int:
            return self.child

    with ProcessCluster(2, nanny=False) as cluster, cluster.client() as client:
        with client.as_current():
            options = {"port": free_port(), "location": "EveryNode"}
            serve.start(client, http_options=options)
            Forks.deploy()
            url = str(Forks.url)
            address = urlsplit(url)
            assert address.hostname is not None
            kept = [httpx.Client() for _ in range(20)]
            for http in kept:
                http.get(url).raise_for_status()
            pid = serve.status().deployments["Forks"].replicas[0].pid
            [worker] = [w for w in cluster.workers if w.pid == pid]
            cluster.workers.remove(worker)
            os.kill(worker.pid, signal.SIGKILL)  # its child lives on
            worker.wait(10)

            def answered(http: httpx.Client) -> bool:
                """Whether all goes well, but for a connection that is at its end."""
                try:
                    return http.get(url, timeout=2).status_code == 200
                except (httpx.RemoteProtocolError, httpx.ReadError):
                    return False

            # Also on a connection to the dead worker: its end is to be seen at once.
            for http in kept:
                poll(lambda http=http: answered(http))  # type: ignore[misc]
                http.close()
            for _ in range(40):
                assert httpx.get(url, timeout=2).status_code == 200
