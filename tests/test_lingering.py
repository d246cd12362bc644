"""Clients get the response to a request whose body nobody reads, and soon the end."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from distributed import Security

from daskserve.proxy.guard import LINGER_S
from tests.test_http import Site, connect, read_all, read_head, spare, start
from tests.utils import poll

__all__ = ["spare", "start"]  # fixtures

MB = 2**20


def ask(site: Site, sock: socket.socket, length: int) -> None:
    host = urlsplit(site.url).netloc
    head = f"PUT /nowhere HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n"
    sock.sendall(head.encode())


def test_who_sends_all_first_gets_the_answer(start: Callable[..., Site]) -> None:
    site = start(max_request_body_bytes=MB)
    site.deploy(read_nothing, route_prefix="/nowhere")
    for _ in range(5):
        with connect(site.url) as sock:
            ask(site, sock, 20 * MB)
            sock.sendall(b"x" * 20 * MB)
            answer = read_all(sock)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert answer.count(b"HTTP/1.1") == 1


def test_what_comes_late_is_no_request(start: Callable[..., Site]) -> None:
    site = start(max_request_body_bytes=MB)
    site.deploy(read_nothing, route_prefix="/nowhere")
    with connect(site.url) as sock:
        ask(site, sock, 2 * MB)
        assert read_head(sock).startswith(b"HTTP/1.1 413 ")
        sock.sendall(b"x" * 2 * MB + b"GET /-/healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"success" not in read_all(sock)


def test_a_first_request_that_is_refused_may_be_sent_to_its_end(
    start: Callable[..., Site],
) -> None:
    """Longer than a connection may be idle, which it is not."""
    site = start(keep_alive_timeout_s=0.2)
    with connect(site.url) as sock:
        sock.sendall(
            b"PUT / HTTP/1.1\r\nhost: x\r\nhost: y\r\ncontent-length: 999\r\n\r\n"
        )
        for _ in range(15):
            sock.sendall(b"x" * 10)
            time.sleep(0.1)
        assert read_all(sock).startswith(b"HTTP/1.1 400 ")


@pytest.mark.slow
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.long
def test_who_sends_for_ever_is_cut(
    start: Callable[..., Site], tmp_path: Path, tls: bool
) -> None:
    options: dict[str, str] = {}
    if tls:
        temporary = Security.temporary()
        (tmp_path / "cert.pem").write_text(temporary.tls_client_cert)
        (tmp_path / "key.pem").write_text(temporary.tls_client_key)
        options["ssl_certfile"] = str(tmp_path / "cert.pem")
        options["ssl_keyfile"] = str(tmp_path / "key.pem")
    site = start(max_request_body_bytes=MB, **options)
    site.deploy(read_nothing, route_prefix="/nowhere")
    with ExitStack() as stack:
        sock = stack.enter_context(connect(site.url))
        if tls:
            context = ssl.create_default_context(cafile=options["ssl_certfile"])
            context.check_hostname = False
            sock = stack.enter_context(context.wrap_socket(sock))
        ask(site, sock, 1000 * MB)
        assert read_head(sock).startswith(b"HTTP/1.1 413 ")
        began = time.monotonic()

        def cut() -> bool:
            try:
                sock.sendall(b"x" * 1000)
            except OSError:
                return True
            return False

        poll(cut, 4 * LINGER_S)
        assert time.monotonic() - began > LINGER_S / 2


def read_nothing() -> str:
    return "read nothing"
