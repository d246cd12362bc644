"""Clusters of dask-gateway: its clients reach a proxy, and through it the scheduler."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.hosts import Host, open_hosts
from tests.utils import Process, poll, run_script

pytest.importorskip("dask_gateway")
pytest.importorskip("dask_gateway_server.backends.local")

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(180)]

HTTP, TCP, API = 8100, 8101, 8103
COMMAND = [sys.executable, "-m", "dask"]


def config(host: str, directory: Path) -> str:
    return f"""
c.DaskGateway.backend_class = "dask_gateway_server.backends.local.UnsafeLocalBackend"
c.DaskGateway.authenticator_class = "dask_gateway_server.auth.SimpleAuthenticator"
c.DaskGateway.address = "127.0.0.1:{API}"
c.Proxy.address = "{host}:{HTTP}"
c.Proxy.tcp_address = "{host}:{TCP}"
c.UnsafeLocalBackend.clusters_directory = "{directory}"
c.UnsafeLocalBackend.inherited_environment = ["PATH", "PYTHONPATH"]
c.ClusterConfig.scheduler_cmd = {[*COMMAND, "scheduler"]}
c.ClusterConfig.worker_cmd = {[*COMMAND, "worker"]}
"""


#: In a process of its own: the gateway's client leaves things to the interpreter's end.
CLIENT = """
import os, sys, time
import httpx
from dask_gateway import Gateway
from dask_gateway.auth import BasicAuth
import daskserve as serve

@serve.deployment(route_prefix="/echo", num_replicas=2)
class Echo:
    async def __call__(self, request):
        return await request.body()

    def add(self, x, y):
        return x + y

host = HOST
gateway = Gateway(f"http://{host}:HTTP", f"tls://{host}:TCP", auth=BasicAuth("me"))
cluster = gateway.new_cluster(shutdown_on_close=True)
cluster.scale(2)
client = cluster.get_client()
client.wait_for_workers(2, timeout=60)
assert client.scheduler.address.startswith("gateway://")
with serve.start(client, http_options={"location": "NoServer", "token": "t"}):
    Echo.deploy()
    handle = Echo.get_handle()
    began = time.monotonic()
    assert handle.add.remote(1, 2).result(20) == 3
    took = time.monotonic() - began
    assert took < 1, took  # mostly 0.25
    calls = [handle.add.remote(n, 1) for n in range(200)]
    assert [call.result(20) for call in calls] == list(range(1, 201))
    with serve.tunnel(client, port=0) as tunnel:
        url, headers = f"{tunnel.url}/echo", {"authorization": "Bearer t"}
        assert httpx.post(url).status_code == 401
        body = os.urandom(10_000_000)
        answer = httpx.post(url, content=body, headers=headers, timeout=30)
        assert answer.content == body
# With a server as well, on the scheduler's host.
with serve.start(client, http_options={"port": 0}) as instance:
    assert instance.http_urls
cluster.shutdown()
print("all is well")
"""


@contextmanager
def run_gateway(host: Host, directory: Path) -> Iterator[None]:
    """Run a gateway, and all clusters of it, on a host."""
    (directory / "config.py").write_text(config(host.address, directory / "clusters"))
    command = [sys.executable, "-m", "dask_gateway_server", "-f", "config.py"]
    log = directory / "gateway.log"
    gateway = Process("gateway", host.command(*command), log, {}, directory)
    url = f"http://{host.address}:{HTTP}/api/health"

    def is_up() -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(url).status_code == 200
        return False

    try:
        poll(is_up, 30)
        yield
    finally:
        gateway.end_group()
        for pid in host.processes():
            os.kill(pid, signal.SIGKILL)
        print(log.read_text())


def test_only_the_gateway_can_be_reached(tmp_path: Path) -> None:
    with open_hosts(1) as (host,), run_gateway(host, tmp_path), host.firewall():
        script = CLIENT.replace("HOST", repr(host.address))
        script = script.replace("HTTP", str(HTTP)).replace("TCP", str(TCP))
        assert "all is well" in run_script(script, timeout=120).stdout
