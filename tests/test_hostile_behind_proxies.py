"""Attacks that came through a real nginx or haproxy, which share connections."""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request

from tests.fronts import run_haproxy, run_nginx
from tests.test_http import (
    Site,
    check_no_bodies,
    connect,
    keep_alive,
    read_all,
    say,
    spare,
    start,
)

__all__ = ["spare", "start"]  # fixtures

pytestmark = pytest.mark.long


@pytest.fixture(params=[False, True], ids=["plain", "middlewares"])
def site(request: pytest.FixtureRequest, start: Callable[..., Site]) -> Site:
    """Give a site that believes the server in front, with middlewares or without."""
    cors = Middleware(CORSMiddleware, allow_origins=["*"])
    options: dict[str, Any] = {"middlewares": [cors]} if request.param else {}
    return start(trusted_proxies=["127.0.0.1"], **options)


@pytest.fixture(params=["nginx", "haproxy"])
def front(
    request: pytest.FixtureRequest, site: Site, tmp_path: Path, certificate: Path | None
) -> Iterator[str]:
    """Give the URL of a server in front."""
    upstream = urlsplit(site.url).netloc
    if request.param == "haproxy":
        with run_haproxy(tmp_path, upstream, certificate) as url:
            yield url
    else:
        location = """
            location / {
                proxy_pass http://daskserve;
                proxy_set_header Connection "";
                proxy_set_header X-User "";
                proxy_set_header X-Forwarded-For $remote_addr;
            }
        """
        with run_nginx(tmp_path, upstream, location, certificate) as url:
            yield url


def context_for(certificate: Path | None) -> ssl.SSLContext | None:
    if certificate is None:
        return None
    context = ssl.create_default_context(cafile=str(certificate))
    context.check_hostname = False
    return context


def test_bodies_do_not_become_answers(
    site: Site, front: str, certificate: Path | None
) -> None:
    path = urlsplit(site.at(site.deploy(say))).path
    context = context_for(certificate)
    check_no_bodies(front + path, context)
    # What one client has caused is not another one's answer.
    for status in ("204", "304"):
        for method in ("GET", "HEAD"):
            for _ in range(5):
                with keep_alive(front, context) as one:
                    one.request(method, f"{path}?status={status}")
                    one.getresponse().read()
                with keep_alive(front, context) as other:
                    other.request("GET", "/-/healthz")
                    answer = other.getresponse()
                    assert (answer.status, answer.read()) == (200, b"success")


def test_trailers_do_not_become_headers(
    site: Site, front: str, certificate: Path | None
) -> None:
    async def echo(request: Request) -> Any:
        await request.body()
        assert request.client is not None
        return {"headers": request.headers.items(), "client": request.client.host}

    path = urlsplit(site.at(site.deploy(echo))).path
    context = context_for(certificate)
    with ExitStack() as stack:
        sock = stack.enter_context(connect(front))
        if context is not None:
            sock = stack.enter_context(context.wrap_socket(sock))
        sock.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            f"Connection: close\r\nX-User: mallory\r\n\r\n3\r\nabc\r\n0\r\n"
            f"X-User: admin\r\nX-Forwarded-For: 6.6.6.6\r\nHost: evil\r\n\r\n".encode()
        )
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 200 ")
    match = re.search(rb"\{.*\}", answer)
    assert match is not None
    told = json.loads(match[0])
    assert told["client"] == "127.0.0.1"
    names = [name for name, _ in told["headers"]]
    assert "x-user" not in names and names.count("host") == 1
    assert "6.6.6.6" not in match[0].decode() and "evil" not in match[0].decode()
