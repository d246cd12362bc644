"""A local HTTP server for a cluster, over the connections of a Dask client."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from distributed import Client
from fastapi import FastAPI, Request, WebSocket
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response, StreamingResponse
from websockets.sync.client import connect as connect_websocket

import daskserve as serve
from daskserve.cli import serve as serve_command
from daskserve.session import client_session
from tests.hosts import HostCluster, open_hosts
from tests.links import open_link
from tests.utils import (
    Process,
    ProcessCluster,
    leftover_threads,
    poll,
    run_script,
    scheduler_workers,
)

pytestmark = pytest.mark.slow

MB = 10**6
#: Replicas with ports of their own would be reached on these.
COMM_ONLY = {"DASK_DASKSERVE__TRANSPORT__DIRECT": "false"}
app = FastAPI()
_numbers = itertools.count()


@serve.deployment(route_prefix="/app", max_ongoing_requests=None)
@serve.ingress(app)
class App:
    @app.get("/add/{x}")
    async def add(self, x: int) -> int:
        await asyncio.sleep(0.005)
        return x + 1

    @app.get("/sleep/{seconds}")
    async def sleep(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "slept"

    @app.post("/echo")
    async def echo(self, request: Request) -> Response:
        return Response(await request.body())

    @app.post("/deaf")
    async def deaf(self) -> None:
        await asyncio.sleep(100)

    @app.get("/blocks/{count}")
    async def blocks(self, count: int) -> StreamingResponse:
        async def make() -> AsyncIterator[bytes]:
            for _ in range(count):
                yield bytes(100_000)

        return StreamingResponse(make())

    @app.get("/events")
    async def events(self) -> StreamingResponse:
        async def make() -> AsyncIterator[str]:
            for number in range(20):
                yield f"data: {number}\n\n"
                await asyncio.sleep(0.02)

        return StreamingResponse(make(), media_type="text/event-stream")

    @app.websocket("/talk")
    async def talk(self, websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text.upper())

    @app.websocket("/flood")
    async def flood(self, websocket: WebSocket) -> None:
        await websocket.accept()
        while True:
            await websocket.send_bytes(bytes(100_000))

    async def zeros(self, count: int) -> Any:
        return np.zeros(count, dtype=np.uint8)


@pytest.fixture(
    scope="module",
    params=[
        "tcp",
        pytest.param("tls", marks=pytest.mark.long),
        pytest.param("ws", marks=pytest.mark.by_hand),
    ],
)
def cluster(request: pytest.FixtureRequest) -> Iterator[ProcessCluster]:
    with ProcessCluster(2, nanny=False, protocol=request.param) as cluster:
        yield cluster
    assert leftover_threads() == []


@pytest.fixture
def client(cluster: ProcessCluster) -> Iterator[Client]:
    with cluster.client() as client:
        yield client


@contextmanager
def started(**http: Any) -> Iterator[serve.ServeInstance]:
    with serve.start(http_options={"location": "NoServer", **http}) as instance:
        yield instance


@contextmanager
def deployed(**http: Any) -> Iterator[serve.Tunnel]:
    with started(**http):
        App.deploy()
        with serve.tunnel(port=0) as tunnel:
            yield tunnel


def base(tunnel: serve.Tunnel) -> str:
    return f"{tunnel.url}/app"


def check_requests(tunnel: serve.Tunnel, count: int = 1000) -> None:
    """Send requests, 50 of them at once."""
    limits = httpx.Limits(max_connections=50, max_keepalive_connections=50)
    client = httpx.Client(timeout=30, limits=limits)
    with client as http, ThreadPoolExecutor(50) as pool:
        urls = [f"{base(tunnel)}/add/{x}" for x in range(count)]
        answers = [response.json() for response in pool.map(http.get, urls)]
    assert answers == list(range(1, count + 1))


def check_bodies(tunnel: serve.Tunnel, size: int = 100 * MB) -> None:
    """Send a body there and back."""
    body = os.urandom(size)
    answer = httpx.post(f"{base(tunnel)}/echo", content=body, timeout=60).content
    assert hashlib.sha256(answer).digest() == hashlib.sha256(body).digest()


def check_streams(tunnel: serve.Tunnel, count: int = 20) -> None:
    """Have so many streams of events and as many WebSockets open at once."""
    together = threading.Barrier(2 * count, timeout=20)

    def read_events(_: int) -> list[str]:
        with httpx.stream("GET", f"{base(tunnel)}/events", timeout=20) as response:
            lines = response.iter_lines()
            first = next(lines)
            together.wait()
            return [line for line in [first, *lines] if line]

    def talk(number: int) -> list[str]:
        url = f"{base(tunnel)}/talk".replace("http", "ws", 1)
        with connect_websocket(url, proxy=None) as websocket:
            websocket.send("a")
            answers = [str(websocket.recv(20))]
            together.wait()
            for n in range(20):
                websocket.send(f"b{number} {n}")
                answers.append(str(websocket.recv(20)))
        return answers

    with ThreadPoolExecutor(2 * count) as pool:
        events = [pool.submit(read_events, n) for n in range(count)]
        talks = [pool.submit(talk, n) for n in range(count)]
        for each in events:
            assert each.result() == [f"data: {n}" for n in range(20)]
        for number, talked in enumerate(talks):
            assert talked.result() == ["A", *(f"B{number} {n}" for n in range(20))]


def test_what_goes_through(client: Client) -> None:
    with deployed() as tunnel:
        check_requests(tunnel)
        check_bodies(tunnel)
        check_streams(tunnel)
        # As with any server of the instance.
        assert httpx.get(f"{tunnel.url}/-/healthz").text == "success"
        assert httpx.get(f"{tunnel.url}/-/routes").json() == {"/app": "App"}
        App.delete()
        assert httpx.get(f"{tunnel.url}/-/routes").json() == {}
        assert httpx.get(f"{base(tunnel)}/add/1").status_code == 404
        App.deploy()
        assert httpx.get(f"{base(tunnel)}/add/1").json() == 2


def test_options(client: Client, tmp_path: Path) -> None:
    cors = Middleware(CORSMiddleware, allow_origins=["*"])
    own = {"ssl_certfile": "/nowhere", "ssl_keyfile": "/nowhere", "port": 1}
    limits = {"max_request_body_bytes": 1000, "request_timeout_s": 0.3}
    with deployed(token="t", middlewares=[cors], **own, **limits) as tunnel:
        url = f"{base(tunnel)}/add/1"
        assert httpx.get(url).status_code == 401
        httpx.get(f"{tunnel.url}/-/healthz").raise_for_status()
        headers = {"authorization": "Bearer t", "origin": "http://x"}
        with httpx.Client(headers=headers) as http:
            answer = http.get(url)
            assert answer.json() == 2
            assert answer.headers["access-control-allow-origin"] == "*"
            large = http.post(f"{base(tunnel)}/echo", content=bytes(1001))
            assert large.status_code == 413
            assert http.get(f"{base(tunnel)}/sleep/2").status_code == 504

        path = str(tmp_path / "tunnel")
        with serve.tunnel(uds=path) as second:
            assert second.url == f"http+unix://{path}"
            transport = httpx.HTTPTransport(uds=path)
            with httpx.Client(transport=transport, headers=headers) as http:
                assert http.get("http://x/app/add/2").json() == 3
        assert not os.path.exists(path)
        # The first is still there.
        assert httpx.get(url, headers=headers).json() == 2


def test_what_is_refused(client: Client) -> None:
    with pytest.raises(serve.ServeError, match=r"call serve\.start\(\) first"):
        serve.tunnel(port=0)
    with started():
        for host in ("0.0.0.0", "192.0.2.1", "::", "example.org", "interface:eth0"):
            with pytest.raises(ValueError, match="not a loopback address"):
                serve.tunnel(host=host)
        with pytest.raises(ValueError, match="port"):
            serve.tunnel(port=65536)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(serve.ServeError, match=f"127.0.0.1:{port}.* in use"):
                serve.tunnel(port=port)
        with serve.tunnel(port=port) as tunnel:
            assert tunnel.url == f"http://127.0.0.1:{port}"
            assert tunnel.url in tunnel._repr_html_()


def test_it_ends(cluster: ProcessCluster) -> None:
    def is_there(tunnel: serve.Tunnel) -> bool:
        with suppress(httpx.ConnectError):
            return httpx.get(f"{tunnel.url}/-/healthz").status_code == 200
        return False

    with cluster.client() as client, started():
        tunnel = serve.tunnel(client, port=0)
        assert is_there(tunnel)
        assert not tunnel.closed
        tunnel.close()
        assert tunnel.closed
        assert not is_there(tunnel)
        tunnel.close()
        with serve.tunnel(port=0) as tunnel:
            assert is_there(tunnel)
        assert not is_there(tunnel)
        tunnel = serve.tunnel(port=0)  # and then with the instance
    assert not is_there(tunnel)
    with cluster.client(), started():
        with cluster.client(set_as_default=False) as other:
            tunnel = serve.tunnel(other, port=0)
            assert is_there(tunnel)
        poll(lambda: not is_there(tunnel), 3)
        tunnel.close()


def test_asynchronous(cluster: ProcessCluster) -> None:
    async def main() -> None:
        async with cluster.client(asynchronous=True):
            async with await serve.start(http_options={"location": None}):
                await App.deploy()
                async with await serve.tunnel(port=0) as tunnel:
                    async with httpx.AsyncClient() as http:
                        answer = await http.get(f"{base(tunnel)}/add/1")
                        assert answer.json() == 2
                assert tunnel.closed
                tunnel = await serve.tunnel(port=0)
                await tunnel.close()
                assert tunnel.closed

    asyncio.run(main())


def test_requests_in_progress_when_it_closes(client: Client) -> None:
    with deployed() as tunnel, ThreadPoolExecutor() as pool:
        short = pool.submit(httpx.get, f"{base(tunnel)}/sleep/0.5")
        with httpx.stream("GET", f"{base(tunnel)}/blocks/1000000") as response:
            blocks = response.iter_raw()
            next(blocks)
            long = pool.submit(httpx.get, f"{base(tunnel)}/sleep/30", timeout=40)
            time.sleep(0.2)
            began = time.monotonic()
            tunnel.close()
            assert time.monotonic() - began < 3
            assert short.result().json() == "slept"
            for failed in (lambda: list(blocks), long.result):
                with pytest.raises(httpx.TransportError):
                    failed()


def test_another_instance(cluster: ProcessCluster) -> None:
    """A tunnel forwards nothing to an instance that wants another token."""
    with cluster.client() as client, cluster.client(set_as_default=False) as other:
        statuses = set()
        done = threading.Event()

        def ask() -> None:
            with httpx.Client() as http:
                while not done.is_set():
                    statuses.add(http.get(f"{base(tunnel)}/add/1").status_code)

        def answer(path: str) -> tuple[int, str]:
            response = httpx.get(f"{tunnel.url}{path}")
            return response.status_code, response.text

        with started():
            App.deploy()
            tunnel = serve.tunnel(other, port=0)
            assert answer("/app/add/1") == (200, "2")
        poll(lambda: answer("/-/healthz")[0] == 503)
        assert "no daskserve instance" in answer("/app/add/1")[1]
        with started():
            App.deploy()
            poll(lambda: answer("/app/add/1") == (200, "2"))
        poll(lambda: answer("/app/add/1")[0] == 503)
        thread = threading.Thread(target=ask)
        thread.start()
        with started(token="t"):
            App.deploy()
            poll(lambda: "other http_options" in answer("/app/add/1")[1])
            with serve.tunnel(client, port=0) as right:
                assert httpx.get(f"{base(right)}/add/1").status_code == 401
        done.set()
        thread.join()
        assert statuses == {503}


@pytest.mark.long
def test_a_scheduler_is_lost() -> None:
    with ProcessCluster(1, nanny=False) as cluster:
        with cluster.client(timeout=15), started(), ExitStack() as stack:
            App.deploy()
            tunnel = stack.enter_context(serve.tunnel(port=0))
            pool = stack.enter_context(ThreadPoolExecutor())
            running = pool.submit(httpx.post, f"{base(tunnel)}/deaf", timeout=60)
            poll(lambda: serve.status().deployments["App"])
            time.sleep(0.3)
            cluster.kill_scheduler()
            lost = httpx.get(f"{base(tunnel)}/add/1", timeout=5)
            assert (lost.status_code, lost.headers["retry-after"]) == (503, "1")
            assert lost.text == tunnel.trouble == "The scheduler does not answer."
            assert running.result().status_code == 502
            # The client finds the next one, which knows nothing.
            cluster.start_scheduler()
            poll(lambda: "no daskserve instance" in tunnel.trouble, 20)
            cluster.add_worker()
            cluster.wait_for_workers(1)
            with started():
                App.deploy()
                poll(lambda: not tunnel.trouble)
                assert httpx.get(f"{base(tunnel)}/add/1").json() == 2


@contextmanager
def command(cluster: ProcessCluster, *args: str) -> Iterator[Process]:
    """Run ``dask serve tunnel``; wait until it serves."""
    log = cluster.directory / f"tunnel{next(_numbers)}.log"
    words = [sys.executable, "-m", "dask", "serve", "tunnel", *args]
    words += ["--scheduler", cluster.address]
    process = Process("tunnel", words, log, {}, cluster.directory)
    try:
        yield process
    finally:
        process.end_group()
        print(log.read_text())


def url_of(process: Process) -> str:
    poll(lambda: "Ctrl-C" in process.log.read_text() or process.poll() is not None, 30)
    line = process.log.read_text().splitlines()[0]
    assert line.startswith("Serving tcp://"), line
    return line.split()[-1]


def invoke(cluster: ProcessCluster, *args: str) -> str:
    """Run the command in this process, where it is to fail; return what it prints."""
    words = ["tunnel", "--scheduler", cluster.address, *args]
    result = CliRunner().invoke(serve_command, words, catch_exceptions=False)
    assert result.exit_code == 1
    return result.output


def test_command() -> None:
    with ProcessCluster(1, nanny=False) as cluster:
        with cluster.client():
            assert "call serve.start() first" in invoke(cluster, "--port", "0")
            serve.start(http_options={"location": "NoServer"}, detached=True)
            App.deploy()
        with command(cluster, "--port", "0") as process:
            url = url_of(process)
            assert httpx.get(f"{url}/app/add/1").json() == 2
            printed = invoke(cluster, "--port", url.rpartition(":")[2])
            assert "in use already" in printed
            assert "Here, that is --port." in printed
            process.signal_group(signal.SIGINT)
            assert process.wait(10) == 0
            printed = process.log.read_text()
            assert printed.endswith("Stopped.\n")
            assert "Traceback" not in printed
        with command(cluster, "--port", "0", "--timeout", "1") as process:
            url = url_of(process)
            cluster.kill_scheduler()
            assert httpx.get(f"{url}/app/add/1").status_code == 503
            assert process.wait(20) == 1
            printed = process.log.read_text()
            assert f"Error: {cluster.address} is lost" in printed
            assert "Traceback" not in printed


def test_end_of_the_interpreter(cluster: ProcessCluster) -> None:
    path = cluster.directory / "left"
    script = f"""
import daskserve as serve
from distributed import Client
from tests.utils import _write_certificates
from distributed import Security

security = None
if {cluster.address!r}.startswith("tls"):
    files = {{"tls_ca_file": {str(cluster.directory / "cert.pem")!r}}}
    files["tls_client_cert"] = files["tls_ca_file"]
    files["tls_client_key"] = {str(cluster.directory / "key.pem")!r}
    security = Security(require_encryption=True, **files)
client = Client({cluster.address!r}, security=security)
serve.start(http_options={{"location": None}})
serve.tunnel(uds={str(path)!r})
import os
assert os.path.exists({str(path)!r})
"""
    began = time.monotonic()
    output = run_script(script).stdout
    assert "Traceback" not in output
    assert time.monotonic() - began < 20
    assert not path.exists()


# Where the scheduler is all that can be reached.


@pytest.mark.long
@pytest.mark.parametrize("protocol", ["tcp", "tls"])
def test_only_the_scheduler(protocol: Any) -> None:
    with open_hosts(1) as (host,):
        ports: dict[str, Any] = {
            "scheduler_args": ["--port", "8786"],
            "worker_args": ["--worker-port", "9000"],
        }
        with (
            HostCluster(host, [host], protocol=protocol, **ports) as cluster,
            host.firewall(),
            host.firewall("9000"),
            cluster.client(),
            started(),
        ):
            App.deploy()
            with serve.tunnel(port=0) as tunnel:
                check_requests(tunnel, 500)
                check_bodies(tunnel, 20 * MB)
                check_streams(tunnel)


@contextmanager
def far_cluster() -> Iterator[tuple[ProcessCluster, Any]]:
    """Give a cluster whose scheduler is behind a link, and its workers out of reach."""
    with ProcessCluster(1, nanny=False, env=COMM_ONLY) as cluster:
        port = int(cluster.address.rpartition(":")[2])
        with open_link(port, 1e9) as link, Client(f"tcp://127.0.0.1:{link.port}") as c:
            (worker,) = scheduler_workers(c)
            client_session(c)._relayed[worker] = float("inf")
            yield cluster, link
            link.rate = 1e9


LENGTH = f"content-length: {100 * MB}"
WEBSOCKET = (
    "upgrade: websocket",
    "connection: upgrade",
    "sec-websocket-version: 13",
    "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==",
)


@contextmanager
def silent_client(
    tunnel: serve.Tunnel, line: str, *headers: str
) -> Iterator[socket.socket]:
    """Send a request's head, and never read."""
    port = int(tunnel.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=1) as sock:
        lines = [f"{line} HTTP/1.1", "host: x", *headers, "", ""]
        sock.sendall("\r\n".join(lines).encode())
        yield sock


def growth(process: Process, before: float = 0.0) -> float:
    """Return the memory of a process in MB, less `before`."""
    return psutil.Process(process.pid).memory_info().rss / MB - before


def test_nothing_piles_up_in_the_scheduler() -> None:
    """Neither with clients that do not read nor with a slow way to one."""
    with far_cluster() as (cluster, link), deployed(stall_timeout_s=60) as tunnel:
        handle = App.get_handle()
        handle.zeros.remote(1).result()
        check_requests(tunnel, 100)
        before = growth(cluster.scheduler)
        # Who do not read, or are not read: a window of each is on the way.
        with (
            silent_client(tunnel, "GET /app/blocks/10000"),
            silent_client(tunnel, "GET /app/flood", *WEBSOCKET),
            silent_client(tunnel, "POST /app/deaf", LENGTH) as upload,
        ):
            with suppress(TimeoutError):
                upload.sendall(bytes(100 * MB))

            def is_still() -> bool:
                passed = link.passed
                time.sleep(0.5)
                return bool(link.passed - passed < 100_000)

            poll(is_still)
            assert growth(cluster.scheduler, before) < 16

        # What comes faster than the link takes waits in the worker.
        link.rate = 1e6
        answers = [handle.zeros.remote(100 * MB) for _ in range(2)]
        with ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(silent_client(tunnel, "GET /app/blocks/10000"))
            end = time.monotonic() + 5
            while time.monotonic() < end:
                assert growth(cluster.scheduler, before) < 16
                time.sleep(0.1)
        link.rate = 1e9
        for answer in answers:
            assert len(answer.result(60)) == 100 * MB


@pytest.mark.by_hand
@pytest.mark.timeout(180)
@pytest.mark.parametrize("slow", ["client", "link"])
def test_a_gigabyte_to_a_slow_reader(slow: str) -> None:
    """100 kB/s for a minute, of a client or of the way to it."""
    with far_cluster() as (cluster, link), deployed() as tunnel:
        check_requests(tunnel, 100)
        before = growth(cluster.scheduler)
        with silent_client(tunnel, "GET /app/blocks/10000") as sock:
            sock.settimeout(30)
            link.rate = 1e5 if slow == "link" else 1e9
            began, read = time.monotonic(), 0
            while (passed_s := time.monotonic() - began) < 60:
                read += len(sock.recv(10_000))
                time.sleep(max(0.0, read / 1e5 - passed_s))
                assert growth(cluster.scheduler, before) < 32
        assert read > 4 * MB
