"""What ends with whom: clients that vanish, and the scheduler's idle timeout."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

import daskserve as serve
from daskserve.exceptions import ServeNotRunningError
from tests.utils import Process, ProcessCluster, poll, run_script

IDLE_S = 1

CLIENT = """
import sys, time
from pathlib import Path
from distributed import Client
import daskserve as serve

class Slow:
    def __init__(self, started, may_go):
        Path(started).touch()
        while not Path(may_go).exists():
            time.sleep(0.02)

    def __call__(self):
        return "slow"

client = Client(sys.argv[1])
serve.start(detached=sys.argv[2] == "detached", http_options={"port": 0})
serve.deployment(Slow).deploy(*sys.argv[3:])
"""


def kill_in_deploy(cluster: ProcessCluster, directory: Path, kind: str) -> Path:
    """Kill a client that waits in ``deploy()``; return what the replica waits for."""
    script, started, may_go = (directory / f"{kind}.{n}" for n in ("py", "on", "go"))
    script.write_text(CLIENT)
    command = [sys.executable, str(script), cluster.address, kind]
    command += [str(started), str(may_go)]
    client = Process(kind, command, directory / f"{kind}.log", {}, directory)
    try:
        poll(started.exists, 20)
    finally:
        client.send_signal(signal.SIGKILL)
        client.end_group()
    return may_go


def _set_idle_timeout(dask_scheduler: Any) -> None:
    dask_scheduler.idle_timeout = IDLE_S


OWN_CLUSTER = """
import os, sys
from pathlib import Path
from distributed import Client
import daskserve as serve

if __name__ == "__main__":
    folder = sys.argv[1]
    client = Client(n_workers=2, dashboard_address="127.0.0.1:0")
    serve.start(http_options={"port": 0})

    @serve.deployment(num_replicas=2)
    class Model:
        def __call__(self):
            return "answer"

        def __del__(self):
            Path(folder, str(os.getpid())).touch()

    Model.deploy()
    print(Model.get_handle().remote().result())
"""


@pytest.mark.long
def test_a_script_that_leaves_its_own_cluster_to_itself(tmp_path: Path) -> None:
    """Nothing is started anew when it ends, and what runs ends in good order."""
    ended = tmp_path / "ended"
    ended.mkdir()
    text = OWN_CLUSTER.replace("sys.argv[1]", repr(str(ended)))
    lines = run_script(text).stdout.splitlines()
    # A worker on a busy machine may not end in the time that Dask gives it.
    lines = [line for line in lines if "still alive after" not in line]
    assert lines == ["answer"]
    assert len(list(ended.iterdir())) == 2


def runs() -> bool:
    try:
        serve.connect()
    except ServeNotRunningError:
        return False
    return True


@pytest.mark.long
def test_clients_that_vanish_and_the_idle_timeout(tmp_path: Path) -> None:
    with ProcessCluster(1, nanny=False, nthreads=2) as cluster:
        with cluster.client() as client:
            # Not detached: it ends with its client, in the midst of a deploy() too.
            kill_in_deploy(cluster, tmp_path, "attached").touch()
            poll(lambda: not runs(), 15)
            # Detached: it goes on with what the client wished.
            may_go = kill_in_deploy(cluster, tmp_path, "detached")
            assert serve.status().deployments["Slow"].state == "UPDATING"
            may_go.touch()
            poll(lambda: serve.status().deployments["Slow"].state == "HEALTHY", 10)
            url = serve.get_deployment("Slow").url
            assert url is not None
            client.run_on_scheduler(_set_idle_timeout)
        time.sleep(2.5 * IDLE_S)
        assert httpx.get(url).text == "slow"
        assert cluster.scheduler.poll() is None
        with cluster.client():
            serve.get_deployment("Slow").delete()
            # Nothing is deployed: it goes, as Dask's do.
            cluster.scheduler.wait(10 * IDLE_S)
