"""Clients with sessions, as their makers ship them, through two replicas.

gradio is in no extra, it is large: ``pip install gradio`` has its test run, too.
"""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest

import daskserve as serve
from tests.test_http import Site, open_site
from tests.utils import scheduler_workers

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]

SESSIONS = 50
#: Requests of each, but for those that begin and end it.
STEPS = 5

_numbers = itertools.count(1)


@pytest.fixture(
    scope="module",
    params=["HeadOnly", pytest.param("EveryNode", marks=pytest.mark.by_hand)],
)
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with open_site(3, location=request.param) as made:
        yield made


def deploy(site: Site, make_app: Callable[..., Any], **option: str) -> serve.Deployment:
    """Deploy an app in two replicas, each on a worker, and not on the server's."""
    workers = sorted(scheduler_workers(site.client))
    workers.remove(site.near)

    @serve.ingress(make_app)
    class App: ...

    deployment = site.deploy(
        App,
        name=f"{make_app.__name__}{next(_numbers)}",
        num_replicas=2,
        workers=workers,
        session_affinity=option or None,
    )
    replicas = serve.status().deployments[deployment.name].replicas
    assert {replica.worker for replica in replicas} == set(workers)
    return deployment


def at(site: Site, deployment: serve.Deployment, number: int) -> str:
    """Return the deployment's URL at one of the servers."""
    urls = site.instance.http_urls
    return f"{urls[number % len(urls)]}/{deployment.name}"


def working(session: Callable[[int], bool], count: int = SESSIONS) -> int:
    """Run sessions, some at a time; return how many worked."""

    def run(number: int) -> bool:
        try:
            return session(number)
        except Exception as error:
            print(f"session {number}: {type(error).__name__}: {error}")
            return False

    # Many: engineio's client mostly waits, for 30 s when its last poll crosses the end.
    with ThreadPoolExecutor(20) as pool:
        return sum(pool.map(run, range(count)))


# MCP: the server makes an id and sends it in a header; clients send it in each request.


def mcp_server() -> Any:
    import os

    from mcp.server.mcpserver import Context, MCPServer
    from mcp.server.transport_security import TransportSecuritySettings

    server = MCPServer("counters")
    counts: dict[int, int] = {}

    @server.tool()
    async def step(ctx: Context) -> str:
        key = id(ctx.session)
        counts[key] = counts.get(key, 0) + 1
        return f"{os.getpid()} {counts[key]}"

    return server.streamable_http_app(
        streamable_http_path="/",
        transport_security=TransportSecuritySettings(
            enable_dns_rebinding_protection=False
        ),
    )


def mcp_session(url: str) -> bool:
    mcp = pytest.importorskip("mcp")

    async def main() -> bool:
        pids = set()
        # Later versions of the protocol have no sessions.
        async with mcp.Client(f"{url}/", mode="legacy") as client:
            for _ in range(STEPS):
                result = await client.call_tool("step", {})
                assert not result.is_error, result
                pids.add(result.content[0].text.split()[0])
        return len(pids) == 1

    return asyncio.run(asyncio.wait_for(main(), 60))


def test_mcp(site: Site) -> None:
    deployment = deploy(site, mcp_server, header="mcp-session-id")
    count = working(lambda number: mcp_session(at(site, deployment, number)))
    assert count == SESSIONS


# socket.io's long polling: the server makes an id and sends it in the body of its first
# response, so that only a cookie of ours can tell. The clients keep cookies.


def socketio_server() -> Any:
    import os

    import socketio

    server = socketio.AsyncServer(async_mode="asgi", cors_allowed_origins="*")
    counts: dict[str, int] = {}

    @server.event
    async def step(sid: str) -> list[int]:
        counts[sid] = counts.get(sid, 0) + 1
        return [os.getpid(), counts[sid]]

    return socketio.ASGIApp(server, socketio_path=None)


def socketio_session(url: str, transports: list[str]) -> bool:
    socketio = pytest.importorskip("socketio")
    base, _, name = url.rpartition("/")
    found = []
    with socketio.SimpleClient(reconnection=False) as client:
        client.connect(base, socketio_path=f"/{name}/socket.io", transports=transports)
        for _ in range(STEPS):
            found.append(client.call("step", timeout=10))
    return found == [[found[0][0], i + 1] for i in range(STEPS)]


@pytest.mark.parametrize(
    "transports", [["polling"], ["polling", "websocket"]], ids="-".join
)
def test_socketio(site: Site, transports: list[str]) -> None:
    deployment = deploy(site, socketio_server, cookie="replica")
    count = working(
        lambda number: socketio_session(at(site, deployment, number), transports)
    )
    assert count == SESSIONS


# gradio: clients make an id. It is in the query of some requests and in the body of
# others, so again there has to be a cookie: browsers keep it, and gradio_client sends
# what the response to its first request sets.


def gradio_app() -> Any:
    import gradio as gr
    from fastapi import FastAPI

    def step(count: int) -> tuple[int, int]:
        return count + 1, count + 1

    with gr.Blocks(analytics_enabled=False) as blocks:
        state, shown = gr.State(0), gr.Number()
        gr.Button().click(step, [state], [state, shown], api_name="step")
    return gr.mount_gradio_app(FastAPI(), blocks, path="/")


def gradio_session(url: str) -> bool:
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(f"{url}/", verbose=False, analytics_enabled=False)
    try:
        jobs = []
        for _ in range(STEPS):
            jobs.append(client.submit(api_name="/step").result(timeout=20))
    finally:
        with suppress(Exception):
            client.close()
    return jobs == list(range(1, STEPS + 1))


def test_gradio(site: Site) -> None:
    pytest.importorskip("gradio")
    deployment = deploy(site, gradio_app, cookie="replica")
    count = working(lambda number: gradio_session(at(site, deployment, number)))
    assert count == SESSIONS


def gradio_page(url: str) -> bool:
    """Do what gradio's page does in a browser, which keeps cookies."""
    with httpx.Client(timeout=20, verify=False) as browser:
        page = browser.get(f"{url}/")
        assert page.status_code == 200
        config = browser.get(f"{url}/config").json()
        api = f"{url}{config['api_prefix']}"
        fn_index = config["dependencies"][0]["id"]
        for i in range(STEPS):
            body = {
                "data": [None],
                "fn_index": fn_index,
                "session_hash": page.headers["x-request-id"],
                "trigger_id": 1,
            }
            joined = browser.post(f"{api}/queue/join", json=body)
            assert joined.status_code == 200, joined.text
            params = {"session_hash": body["session_hash"]}
            with browser.stream("GET", f"{api}/queue/data", params=params) as events:
                assert events.status_code == 200
                lines = [line for line in events.iter_lines() if line]
            done = [line for line in lines if "process_completed" in line]
            if len(done) != 1 or f'"data":[null,{i + 1}]' not in done[0]:
                print(lines)
                return False
    return True


def test_gradio_in_a_browser(site: Site) -> None:
    pytest.importorskip("gradio")
    deployment = deploy(site, gradio_app, cookie="replica")
    count = working(lambda number: gradio_page(at(site, deployment, number)))
    assert count == SESSIONS
