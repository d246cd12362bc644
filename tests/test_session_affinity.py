"""Sessions that stay on their replicas, in real clusters."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import socket
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import websockets.sync.client
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

import daskserve as serve
from daskserve.handle import DeploymentHandle
from tests.test_http import Site, open_site, site
from tests.utils import poll, scheduler_workers

__all__ = ["site"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def _site() -> Iterator[Site]:
    with open_site(4) as made:
        yield made


def make_app() -> Starlette:
    """Return an app that keeps its sessions in memory."""
    import daskserve as serve  # in the replica

    known: set[str] = set()
    mine = {"pid": os.getpid()}

    def of(given: str | None) -> dict[str, Any]:
        return {
            **mine,
            "known": given in known,
            "tag": serve.get_replica_context().replica_tag,
        }

    async def use(request: Request) -> JSONResponse:
        await asyncio.sleep(float(request.query_params.get("sleep", 0)))
        given = request.headers.get("x-sid") or request.cookies.get("sid")
        return JSONResponse(of(given))

    async def begin(request: Request) -> JSONResponse:
        new = uuid.uuid4().hex
        known.add(new)
        response = JSONResponse(of(new), headers={"X-Sid": new})
        response.set_cookie("sid", new)
        return response

    async def talk(websocket: WebSocket) -> None:
        new = uuid.uuid4().hex
        given = websocket.headers.get("x-sid") or websocket.cookies.get("sid")
        headers = []
        if given is None and "x-begin" in websocket.headers:
            known.add(new)
            headers = [(b"X-Sid", new.encode())]
        await websocket.accept(headers=headers)
        await websocket.send_json(of(given))
        await websocket.close()

    routes = [Route("/use", use), Route("/begin", begin), WebSocketRoute("/ws", talk)]
    return Starlette(routes=[*routes, Route("/use", use, methods=["POST"])])


def deploy(
    site: Site, num_replicas: int = 2, workers: list[str] | None = None, **option: str
) -> serve.Deployment:
    """Deploy the app on other workers than the server's, a replica on each."""
    if workers is None:
        everywhere = sorted(scheduler_workers(site.client))
        workers = [w for w in everywhere if w != site.near]

    @serve.ingress(make_app)
    class App:
        async def pid(self) -> int:
            return os.getpid()

        async def call(self, name: str, keys: list[str]) -> list[int]:
            handle = serve.get_deployment(name).get_handle()
            return [await handle.options(session_id=k).pid.remote() for k in keys]

    made = site.deploy(
        App,
        num_replicas=num_replicas,
        workers=workers,
        version="1",
        session_affinity=option or None,
    )
    replicas = serve.status().deployments[made.name].replicas
    assert len({replica.worker for replica in replicas}) == num_replicas
    return made


def get(url: str, **kwargs: Any) -> httpx.Response:
    """Send a request as a client of its own, that keeps nothing, does."""
    return httpx.get(url, timeout=20, verify=False, **kwargs)


def use(url: str, **kwargs: Any) -> dict[str, Any]:
    response = get(url + "/use", **kwargs)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ask(url: str, path: str = "/ws", **headers: str) -> tuple[dict[str, Any], Any]:
    """Return what a WebSocket says first, and the headers that it was accepted with."""
    with websockets.sync.client.connect(
        url.replace("http", "ws", 1) + path,
        additional_headers={n.replace("_", "-"): v for n, v in headers.items()},
    ) as websocket:
        response = websocket.response
        assert response is not None
        return json.loads(websocket.recv()), response.headers


def sessions_that_hold(url: str, count: int = 50) -> int:
    """Begin sessions, at once; return how many found their replica in each request."""

    def run(_: int) -> bool:
        with httpx.Client(timeout=20, verify=False) as client:
            new = client.get(url + "/begin").headers["x-sid"]
            headers = {"x-sid": new}
            return all(use(url, headers=headers)["known"] for _ in range(6))

    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(run, range(count)))


def test_sessions_made_by_the_server(site: Site) -> None:
    # A machine in use may keep one replica slow, so that most go to the other.
    assert sessions_that_hold(site.at(deploy(site))) < 50
    assert sessions_that_hold(site.at(deploy(site, header="X-Sid"))) == 50


def test_ids_of_the_clients_own(site: Site) -> None:
    by_query = site.at(deploy(site, query="session_hash"))
    by_header = site.at(deploy(site, header="x-session"))
    ids = [uuid.uuid4().hex for _ in range(20)]
    with ThreadPoolExecutor(4) as pool:

        def pids(key: str) -> set[tuple[int, int]]:
            odd = f"session%5Fhash={key}&session_hash=other"
            found = [
                (
                    use(f"{by_query}", params={"session_hash": key})["pid"],
                    use(f"{by_header}", headers={"X-Session": key})["pid"],
                )
                for _ in range(4)
            ]
            by_odd = get(f"{by_query}/use?{odd}").json()["pid"]
            said, _ = ask(by_query, f"/ws?session_hash={key}")
            also, _ = ask(by_header, X_Session=key)
            return {*found, (by_odd, also["pid"]), (said["pid"], found[0][1])}

        found = list(pool.map(pids, ids))
    assert all(len(each) == 1 for each in found), found
    assert len({pid for each in found for pid, _ in each}) == 2


def test_handles_go_where_http_goes(site: Site) -> None:
    deployment = deploy(site, header="x-sid")
    name, url = deployment.name, site.at(deployment)
    ids = [uuid.uuid4().hex for _ in range(10)]
    ids += [get(url + "/begin").headers["x-sid"] for _ in range(10)]
    expected = [use(url, headers={"x-sid": key})["pid"] for key in ids]
    assert len(set(expected)) == 2
    handle = deployment.get_handle()
    with ThreadPoolExecutor(4) as pool:  # whatever connections stand yet
        called = pool.map(
            lambda key: handle.options(session_id=key).pid.remote().result(20), ids[:10]
        )
        assert list(called) == expected[:10]
    # By now the replicas have told of the sessions that they began.
    poll(
        lambda: (
            [handle.options(session_id=key).pid.remote().result(20) for key in ids]
            == expected
        )
    )
    assert handle.call.remote(name, ids[:10]).result(20) == expected[:10]
    other = deploy(site)  # without the option: by the id alone
    handle = other.get_handle()
    for key in ids[:5]:
        chosen = handle.options(session_id=key)
        assert len({chosen.pid.remote().result(20) for _ in range(10)}) == 1


def test_session_ids_of_handles() -> None:
    handle = DeploymentHandle("D")
    chosen = handle.options(session_id="ä" * 512)
    assert chosen.call == chosen.options(method_name="call")
    assert chosen != handle and chosen.options(session_id="") == handle
    assert pickle.loads(pickle.dumps(chosen)) == chosen
    assert "ä" not in repr(chosen)
    assert handle.options(session_id="\ud800\0") != handle
    with pytest.raises(ValueError, match="session_id has 1025 bytes; 1024 are allowed"):
        handle.options(session_id="a" * 1025)
    with pytest.raises(TypeError, match="session_id=7 is not a string"):
        handle.options(session_id=7)  # type: ignore[arg-type]


def test_a_cookie_for_clients_that_keep_them(site: Site) -> None:
    deployment = deploy(site, cookie="sticky")
    url = site.at(deployment)
    for _ in range(20):
        with httpx.Client(timeout=20, verify=False) as client:
            found = {client.get(f"{url}/use").json()["pid"] for _ in range(5)}
            posted = client.post(f"{url}/use", content=b"x" * 100_000).json()["pid"]
            assert found == {posted}
            (cookie,) = client.cookies.jar
            assert (cookie.name, cookie.path) == ("sticky", f"/{deployment.name}")
            said, headers = ask(url, cookie=f"sticky={cookie.value}")
            assert said["pid"] == posted and "set-cookie" not in headers
    said, headers = ask(url)
    pair = headers["set-cookie"].partition(";")[0]
    assert {use(url, headers={"cookie": pair})["pid"] for _ in range(9)} == {
        said["pid"]
    }


def test_a_session_that_a_websocket_begins(site: Site) -> None:
    url = site.at(deploy(site, header="x-sid"))
    for _ in range(10):
        _, headers = ask(url, x_begin="1")
        assert use(url, headers={"x-sid": headers["x-sid"]})["known"]
        said, _ = ask(url, x_sid=headers["x-sid"])
        assert said["known"]


@pytest.mark.long
def test_replicas_come_and_die(site: Site) -> None:
    deployment = deploy(site, header="x-sid")
    url = site.at(deployment)
    begun = [get(url + "/begin").headers["x-sid"] for _ in range(30)]
    own = [uuid.uuid4().hex for _ in range(60)]

    def where(ids: list[str]) -> list[str]:
        return [use(url, headers={"x-sid": key})["tag"] for key in ids]

    former, hashed = where(begun), where(own)
    deployment.options(num_replicas=3).deploy()
    assert where(begun) == former
    moved = [(a, b) for a, b in zip(hashed, where(own), strict=True) if a != b]
    assert 8 <= len(moved) <= 30, "a third of them"
    (third,) = {new for _, new in moved}
    assert third not in hashed
    # The replica of one session dies with a request in it.
    victim = use(url, headers={"x-sid": begun[0]})
    with ThreadPoolExecutor(8) as pool:
        headers = {"x-sid": begun[0]}
        params = {"sleep": "5"}
        slow = [
            pool.submit(
                httpx.request,
                method,
                url + "/use",
                headers=headers,
                params=params,
                timeout=20,
            )
            for method in ["GET", "POST"] * 4
        ]
        poll(lambda: _running(url) or True)
        os.kill(victim["pid"], signal.SIGKILL)
        statuses = Counter(future.result().status_code for future in slow)
    assert set(statuses) <= {200, 502}, statuses
    after = [use(url, headers=headers) for _ in range(5)]
    assert victim["pid"] not in {answer["pid"] for answer in after}
    assert len({answer["pid"] for answer in after}) == 1


def _running(url: str) -> int:
    return get(url + "/use").status_code


HANDSHAKE = (
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
BAD = [
    ("header", b"x-sid: " + b"a" * 8192),
    ("header", b"x-sid: \xff\xfe\x80;,=\t\x7e"),
    ("header", b"x-sid:"),
    ("header", b"x-sid: a\r\nx-sid: b\r\nX-SID: c"),
    ("cookie", b"cookie: sid=" + b"a" * 8192),
    ("cookie", b"cookie: ;;;==; sid; =sid;\xff=\xfe; sid=\x80\xff; sid=b"),
    ("cookie", b"cookie: sid=\r\ncookie: sid=b\r\ncookie:"),
    ("cookie", b"cookie: sid=serve-fffffffffffffff-" + b"0" * 32),
    ("query", b"sid=" + b"a" * 8192),
    ("query", b"sid=%ff%zz%&sid&=&&%=%;"),
    ("query", b"&" * 8000),
    ("query", b"sid=&sid=b"),
]


@pytest.fixture(scope="module")
def kinds(_site: Site) -> dict[str, serve.Deployment]:
    names = {"header": "X-Sid", "cookie": "sid", "query": "sid"}
    return {
        kind: deploy(_site, 2, None, **{kind: name}) for kind, name in names.items()
    }


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_ids_are_answered(
    site: Site, kinds: dict[str, serve.Deployment], number: int
) -> None:
    kind, bad = BAD[number]
    path = urlsplit(site.at(kinds[kind])).path.encode() + b"/use"
    line = b"X-None: 1"
    if kind == "query":
        path += b"?" + bad
    else:
        line = bad
    for more in (b"", HANDSHAKE):
        address = urlsplit(site.url)
        with socket.create_connection((address.hostname, address.port), 10) as sock:
            sock.settimeout(10)
            close = b"Connection: close\r\n" if not more else more
            sock.sendall(
                b"GET %s HTTP/1.1\r\nHost: x\r\n%s\r\n%s\r\n" % (path, line, close)
            )
            status = sock.recv(100).split(b"\r\n")[0]
        assert status.split(b" ")[1][:1] in (b"2", b"4"), status
        if not more:
            assert status == b"HTTP/1.1 200 OK"
    assert "Traceback" not in site.cluster.logs()


def test_it_can_be_changed(site: Site) -> None:
    deployment = deploy(site, header="x-sid")
    url = site.at(deployment)
    before = use(url)["pid"], use(url)["pid"]
    assert before
    changed = deployment.options(session_affinity={"cookie": "sid"})
    changed.deploy()
    assert "set-cookie" in get(url + "/use").headers
    assert serve.get_deployment(deployment.name).session_affinity == {"cookie": "sid"}
    changed.options(session_affinity=None).deploy()
    assert "set-cookie" not in get(url + "/use").headers


@pytest.mark.timeout(120)
@pytest.mark.long
def test_another_proxy_finds_a_session() -> None:
    # On one port no client knows which of them it has; each gets its own with port 0.
    with open_site(3, location="EveryNode") as site:
        workers = list(scheduler_workers(site.client))
        deployment = deploy(site, workers=workers, header="x-sid")
        urls = [url + f"/{deployment.name}" for url in site.instance.http_urls]
        assert len(urls) == 3
        for i in range(50):
            new = get(urls[i % 3] + "/begin").headers["x-sid"]
            for j in (1, 2, 0):
                url = urls[(i + j) % 3]
                # It is told at once, and may be told a moment after the client.
                poll(lambda u=url, n=new: use(u, headers={"x-sid": n})["known"], 2)
        by_cookie = deploy(site, workers=workers, cookie="sticky")
        for _ in range(10):
            with httpx.Client(timeout=20, verify=False) as client:
                pids = {
                    client.get(f"{url}/{by_cookie.name}/use").json()["pid"]
                    for url in site.instance.http_urls * 2
                }
            assert len(pids) == 1
