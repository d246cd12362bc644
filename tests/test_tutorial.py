"""What is written by FastAPI's tutorial serves as it does on plain uvicorn.

Each app of `tests.tutorial` runs as the ``__main__`` of scripts, which workers cannot
import: on uvicorn, deployed as it is, and with the methods of a class for routes.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import re
import runpy
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn  # noqa: F401 - scripts are forked with it
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import daskserve as serve
from tests.utils import ROOT, ProcessCluster, free_port, poll

pytestmark = [pytest.mark.slow, pytest.mark.long]

FOLDER = ROOT / "tests/tutorial"
APPS = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
#: Asked of each app as well.
DOCS = [("GET", path) for path in ("/openapi.json", "/docs", "/redoc")]
#: The port is in no URL that an app makes.
HOST = "www.example.org"
#: These are the server's, not the app's.
OF_SERVER = {"connection", "date", "sec-websocket-accept", "server", "x-request-id"}
ROUTES = {"get", "post", "put", "patch", "delete", "head", "api_route", "websocket"}
SETTINGS = {"TUTORIAL_name": "Ada's", "TUTORIAL_admin": "root"}

ON_UVICORN = """
import os
import uvicorn
os.environ |= {settings!r}
uvicorn.run(app, port={port}, root_path="/{name}")
"""
DEPLOYMENT = """
import daskserve as serve
@serve.deployment(route_prefix="/{name}")
@serve.ingress(app)
class Tutorial:
    pass
"""
DEPLOY = """
from distributed import Client
with Client({address!r}):
    serve.start(detached=True)
    Tutorial.deploy()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[ProcessCluster]:
    with ProcessCluster(2, nanny=False, env=SETTINGS) as cluster, cluster.client():
        serve.start(detached=True, http_options={"port": 0})
        yield cluster
        serve.shutdown()


@pytest.mark.parametrize("name", APPS)
def test_tutorial(name: str, cluster: ProcessCluster, tmp_path: Path) -> None:
    source = (FOLDER / f"{name}.py").read_text()
    requests = requests_of(source)
    for folder in ("static", "templates"):
        shutil.copytree(FOLDER / folder, tmp_path / folder)

    port = free_port()
    end = ON_UVICORN.format(settings=SETTINGS, port=port, name=name)
    with running(tmp_path / "plain.py", source + end) as process:
        poll(lambda: not process.is_alive() or _listens(port))
        expected = ask(f"http://127.0.0.1:{port}", requests)
    assert not [seen for seen in expected if isinstance(seen, httpx.HTTPError)]

    deployment = DEPLOYMENT.format(name=name)
    end = "\n" + DEPLOY.format(address=cluster.address)
    [url] = serve.connect().http_urls
    for script, text in [
        ("as_it_is", source + deployment),
        ("methods", with_methods(source, deployment)),
    ]:
        with running(tmp_path / f"{script}.py", text + end) as process:
            process.join(30)
            assert process.exitcode == 0
        found = ask(f"{url}/{name}", requests)
        together = zip(requests, expected, found, strict=True)
        wrong = [each for each in together if each[1] != each[2]]
        assert not wrong, "\n".join("\n  ".join(map(str, each)) for each in wrong)


def requests_of(source: str) -> list[Any]:
    """Return what an app is asked; it is not run."""
    names: dict[str, Any] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REQUESTS":
            exec(ast.unparse(node), names)
    return [*names["REQUESTS"], *DOCS]


def with_methods(source: str, deployment: str) -> str:
    """Make all routes methods of the deployed class, where the last of them was."""
    tree, made = ast.parse(source), ast.parse(deployment)
    routes = [node for node in tree.body if _is_route(node)]
    for route in routes:
        _StateIsSelf().visit(route)
        route.args.args.insert(0, ast.arg("self"))
    [tutorial] = [node for node in made.body if isinstance(node, ast.ClassDef)]
    tutorial.body = [*routes]
    if any(isinstance(n, ast.ClassDef) and n.name == "State" for n in tree.body):
        tutorial.bases = [ast.Name("State")]
    last = tree.body.index(routes[-1])
    tree.body[last:last] = made.body
    tree.body = [node for node in tree.body if node not in routes]
    return ast.unparse(ast.fix_missing_locations(tree))


def _is_route(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and any(
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ROUTES
        for call in node.decorator_list
    )


class _StateIsSelf(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name("self", node.ctx) if node.id == "state" else node


# Each script is a process of its own, without the seconds that imports take.
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload([__name__])


@contextmanager
def running(script: Path, text: str) -> Iterator[BaseProcess]:
    """Run a script; end it if it does not by itself."""
    script.write_text(text)
    process = forks.Process(target=_run_as_main, args=(script,))
    process.start()
    try:
        yield process
    finally:
        process.terminate()
        process.join(10)
        process.kill()
        print(script.with_suffix(".log").read_text())


def _run_as_main(script: Path) -> None:
    log = os.open(script.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    runpy.run_path(str(script), run_name="__main__")


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def ask(url: str, requests: list[Any]) -> list[Any]:
    """Ask one thing after the other; return what a client sees, or why it does not."""
    seen: list[Any] = []
    # uvicorn closes connections after errors, sometimes too late for a client to know.
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(headers={"Host": HOST}, limits=limits) as client:
        for method, path, *options in requests:
            if method == "WS":
                seen.append(_talk(url, path, **options[0]))
                continue
            try:
                answer = client.request(method, url + path, **dict(*options))
            except httpx.HTTPError as err:
                seen.append(err)
                continue
            headers = _of_app(answer.headers.multi_items())
            seen.append((answer.status_code, headers, answer.content))
    return seen


def _talk(
    url: str, path: str, *, send: list[Any], receive: int = 99, **options: Any
) -> list[Any]:
    """Open a WebSocket; return all that comes."""
    where = urlsplit(url)
    sock = socket.create_connection((where.hostname, where.port))
    try:
        with connect(f"ws://{HOST}{where.path}{path}", sock=sock, **options) as client:
            assert client.response is not None
            seen = [_of_app(client.response.headers.raw_items()), client.subprotocol]
            for message in send:
                client.send(message)
            try:
                for _ in range(receive):
                    seen.append(client.recv(10))
            except ConnectionClosed as closed:
                seen.append(closed.rcvd)
            return seen
    except InvalidStatus as refused:
        answer = refused.response
        return [answer.status_code, _of_app(answer.headers.raw_items()), answer.body]


def _of_app(headers: Any) -> list[tuple[str, str]]:
    return [
        (name.lower(), re.sub("expires=[^;]+", "expires", value))
        for name, value in headers
        if name.lower() not in OF_SERVER
    ]
