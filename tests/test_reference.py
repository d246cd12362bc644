"""The examples that deployments over HTTP are known by, each as a script of its own.

The scripts exit once they have deployed; what they left is asked with curl. All of it
on a cluster without and on one with TLS.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from distributed import Client

import daskserve as serve
from tests.utils import ProcessCluster, free_port, leftover_threads, run_script

pytestmark = pytest.mark.slow

HELLO = """
from dask.distributed import Client

from fastapi import FastAPI
import daskserve as serve

app = FastAPI()
Client(ADDRESS)
serve.start(detached=True)

@serve.deployment(route_prefix="/hello")
@serve.ingress(app)
class MyFastAPIDeployment:
    @app.get("/")
    def root(self):
        return "Hello, world!"

MyFastAPIDeployment.deploy()
"""

HELLO_AND_POST = """
from dask.distributed import Client

from fastapi import FastAPI
import daskserve as serve

app = FastAPI()
Client(ADDRESS)
serve.start(detached=True)

@serve.deployment(route_prefix="/hello")
@serve.ingress(app)
class MyFastAPIDeployment:
    @app.get("/")
    def root(self):
        return "Hello, world!"

    @app.post("/{subpath}")
    def root(self, subpath: str):
        return f"Hello from {subpath}!"

MyFastAPIDeployment.deploy()
"""

WRAPPER = """
from dask.distributed import Client

from fastapi import FastAPI
import daskserve as serve

app = FastAPI()
Client(ADDRESS)
serve.start(detached=True)

@app.get("/")
def f():
    return "Hello from the root!"

# ... add more routes, routers, etc. to `app` ...

@serve.deployment(route_prefix="/")
@serve.ingress(app)
class FastAPIWrapper:
    pass

FastAPIWrapper.deploy()
"""

TWO_WRAPPERS = """
from dask.distributed import Client

from fastapi import FastAPI
import daskserve as serve

app = FastAPI()
Client(ADDRESS)
serve.start(detached=True)

@app.get("/")
def f():
    return "Hello from the root!"

@serve.deployment(route_prefix="/api1")
@serve.ingress(app)
class FastAPIWrapper1:
    @app.get("/subpath")
    def method(self):
        return "Hello 1!"

@serve.deployment(route_prefix="/api2")
@serve.ingress(app)
class FastAPIWrapper2:
    @app.get("/subpath")
    def method(self):
        return "Hello 2!"

FastAPIWrapper1.deploy()
FastAPIWrapper2.deploy()
"""

COUNTER = """
from dask.distributed import Client

import daskserve as serve

Client(ADDRESS)
serve.start(detached=True, http_options=HTTP_OPTIONS)

@serve.deployment(route_prefix="/counter")
class Counter:
    def __call__(self, request):
        pass

Counter.deploy()
"""

MIDDLEWARES = """
from dask.distributed import Client

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

import daskserve as serve

Client(ADDRESS)

client = serve.start(
    detached=True,
    http_options={"middlewares": [
        Middleware(
            CORSMiddleware, allow_origins=["*"], allow_methods=["*"])
    ]})

@serve.deployment(route_prefix="/counter")
class Counter:
    def __call__(self, request):
        pass

Counter.deploy()
"""


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: str


def curl(url: str, *args: str) -> Reply:
    """Ask as a user would; of several replies (redirects) return the last."""
    command = ["curl", "-sS", "-i", "--max-time", "20", *args, url]
    result = subprocess.run(command, capture_output=True, timeout=30)
    assert result.returncode == 0, result.stderr.decode()
    head, text = "", result.stdout.decode()
    while text.startswith("HTTP/"):
        head, _, text = text.partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return Reply(
        int(status.split()[1]), {k.lower(): v for k, v in headers.items()}, text
    )


@pytest.fixture(scope="module", params=["tcp", "tls"])
def cluster(request: pytest.FixtureRequest) -> Iterator[ProcessCluster]:
    nannies = [True, False, True]
    with ProcessCluster(3, nanny=nannies, protocol=request.param) as cluster:
        yield cluster
    assert leftover_threads() == []


@pytest.fixture(scope="module")
def watcher(cluster: ProcessCluster) -> Iterator[Client]:
    """Give a client that is there all the time and starts nothing."""
    with cluster.client() as client:
        yield client


@pytest.fixture(autouse=True)
def shut_down(watcher: Client) -> Iterator[None]:
    yield
    serve.shutdown()


def run(cluster: ProcessCluster, script: str, **names: Any) -> None:
    """Run a script that ends when it has deployed."""
    names = {"ADDRESS": cluster.address, **names}
    given = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    # Only what any user has who is not the first one on a machine: another port,
    # and where the cluster's certificates are.
    env = {"DASK_DASKSERVE__HTTP__PORT": "0"}
    if cluster.protocol == "tls":
        tls = "DASK_DISTRIBUTED__COMM__TLS"
        env[f"{tls}__CA_FILE"] = str(cluster.directory / "cert.pem")
        env[f"{tls}__CLIENT__CERT"] = str(cluster.directory / "cert.pem")
        env[f"{tls}__CLIENT__KEY"] = str(cluster.directory / "key.pem")
    run_script(given + script, env=env)


def the_url() -> str:
    [url] = serve.connect().http_urls
    return url


def listening(client: Client, port: int) -> list[int]:
    """Return the ids of those of the cluster's processes that listen on a port."""

    def listens() -> bool:
        return any(
            c.status == psutil.CONN_LISTEN and c.laddr.port == port
            for c in psutil.Process().net_connections("tcp")
        )

    def pid() -> int:
        return psutil.Process().pid

    answers = client.run(listens)
    pids = client.run(pid)
    found = [pids[worker] for worker, answer in answers.items() if answer]
    if client.run_on_scheduler(listens):
        found.append(client.run_on_scheduler(pid))
    return found


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def test_hello(cluster: ProcessCluster) -> None:
    run(cluster, HELLO)
    url = the_url()
    reply = curl(f"{url}/hello/")
    assert (reply.status, reply.body) == (200, '"Hello, world!"')
    assert reply.headers["content-type"] == "application/json"
    followed = curl(f"{url}/hello", "-L")
    assert (followed.status, followed.body) == (200, '"Hello, world!"')
    redirect = curl(f"{url}/hello")
    assert redirect.status == 307
    assert redirect.headers["location"] == f"{url}/hello/"
    assert curl(f"{url}/hello/x", "-X", "POST").status == 404

    # The second example takes the place of the first: the same name, the same URL.
    run(cluster, HELLO_AND_POST)
    assert the_url() == url
    assert curl(f"{url}/hello/").body == '"Hello, world!"'
    assert curl(f"{url}/hello", "-L").body == '"Hello, world!"'
    reply = curl(f"{url}/hello/x", "-X", "POST")
    assert (reply.status, reply.body) == (200, '"Hello from x!"')
    assert curl(f"{url}/hello/x").status == 405
    routes = json.loads(curl(f"{url}/-/routes").body)
    assert routes == {"/hello": "MyFastAPIDeployment"}
    openapi = json.loads(curl(f"{url}/hello/openapi.json").body)
    assert set(openapi["paths"]) == {"/", "/{subpath}"}


def test_wrappers(cluster: ProcessCluster) -> None:
    run(cluster, WRAPPER)
    url = the_url()
    reply = curl(f"{url}/")
    assert (reply.status, reply.body) == (200, '"Hello from the root!"')
    assert curl(url).body == '"Hello from the root!"'

    run(cluster, TWO_WRAPPERS)
    assert the_url() == url
    for path in ["/api1", "/api1/", "/api2", "/api2/"]:
        reply = curl(f"{url}{path}", "-L")
        assert (reply.status, reply.body) == (200, '"Hello from the root!"')
    assert curl(f"{url}/api1/subpath").body == '"Hello 1!"'
    assert curl(f"{url}/api2/subpath").body == '"Hello 2!"'
    # The first wrapper is what it was: it has no /subpath.
    assert curl(f"{url}/").body == '"Hello from the root!"'
    assert curl(f"{url}/subpath").status == 404
    assert json.loads(curl(f"{url}/-/routes").body) == {
        "/": "FastAPIWrapper",
        "/api1": "FastAPIWrapper1",
        "/api2": "FastAPIWrapper2",
    }


@pytest.mark.parametrize("options", [None, {"location": "HeadOnly"}])
def test_head_only(
    cluster: ProcessCluster, watcher: Client, options: dict[str, str] | None
) -> None:
    run(cluster, COUNTER, HTTP_OPTIONS=options)
    url = the_url()
    reply = curl(f"{url}/counter")
    assert (reply.status, reply.body) == (200, "")
    assert len(listening(watcher, port_of(url))) == 1
    [proxy] = serve.status().proxies
    assert (proxy.url, proxy.state) == (url, "HEALTHY")


def test_every_node_shares_a_port(cluster: ProcessCluster, watcher: Client) -> None:
    port = free_port()
    options = {"location": "EveryNode", "port": port}
    run(cluster, COUNTER, HTTP_OPTIONS=options)
    url = the_url()
    assert url == f"http://127.0.0.1:{port}"
    pids = set(listening(watcher, port))
    assert pids == set(watcher.run(lambda: psutil.Process().pid).values())
    proxies = serve.status().proxies
    assert {proxy.worker for proxy in proxies} == set(watcher.run(lambda: None))
    assert [proxy.url for proxy in proxies] == [url] * 3
    for _ in range(20):
        assert curl(f"{url}/counter").status == 200


def test_every_node_with_ports_of_their_own(
    cluster: ProcessCluster, watcher: Client
) -> None:
    run(cluster, COUNTER, HTTP_OPTIONS={"location": "EveryNode", "port": 0})
    urls = serve.connect().http_urls
    assert len(set(urls)) == 3
    assert {proxy.url for proxy in serve.status().proxies} == set(urls)
    pids = [pid for url in urls for pid in listening(watcher, port_of(url))]
    assert len(set(pids)) == len(pids) == 3
    for url in urls:
        assert curl(f"{url}/counter").status == 200
        assert json.loads(curl(f"{url}/-/routes").body) == {"/counter": "Counter"}


@pytest.mark.parametrize(
    "options", [{"location": "NoServer"}, {"location": None}, {"host": None}]
)
def test_no_server(
    cluster: ProcessCluster, watcher: Client, options: dict[str, str | None]
) -> None:
    port = free_port()
    run(cluster, COUNTER, HTTP_OPTIONS={**options, "port": port})
    assert serve.connect().http_urls == []
    assert serve.status().proxies == []
    assert listening(watcher, port) == []
    counter = serve.get_deployment("Counter")
    assert counter.get_handle().remote(None).result(timeout_s=10) is None
    assert counter.url is None


def test_middlewares(cluster: ProcessCluster) -> None:
    run(cluster, MIDDLEWARES)
    url = the_url()
    origin = ("-H", "Origin: http://example.org")
    reply = curl(f"{url}/counter", *origin)
    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == "*"
    preflight = curl(
        f"{url}/counter",
        *("-X", "OPTIONS"),
        *origin,
        *("-H", "Access-Control-Request-Method: PUT"),
    )
    assert preflight.status == 200
    assert preflight.headers["access-control-allow-origin"] == "*"
    assert "PUT" in preflight.headers["access-control-allow-methods"]
    for path, status in [("/nope", 404), ("/-/routes", 200), ("/-/healthz", 200)]:
        reply = curl(f"{url}{path}", *origin)
        assert reply.status == status
        assert reply.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-origin" not in curl(f"{url}/counter").headers
