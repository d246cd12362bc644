"""Clients on bare sockets, which cost little beside the servers they load.

In the process of the command. All are for connections that the server closes after
one answer, but for `websockets`.
"""

from __future__ import annotations

import os
import selectors
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

TIMEOUT_S = 30
#: For WebSockets that are opened at once.
OPEN_S = 10
#: How long a replica may take to notice that they are closed.
FORGOTTEN_S = 1.0
BUFFER = 1 << 20
UPGRADE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)


@contextmanager
def connected(
    url: str, method: str = "GET", headers: str = ""
) -> Iterator[socket.socket]:
    """Connect and send the head of a request."""
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    target = parts._replace(scheme="", netloc="").geturl()
    head = f"{method} {target} HTTP/1.1\r\nHost: {parts.netloc}\r\n{headers}\r\n"
    with socket.create_connection((parts.hostname, parts.port), TIMEOUT_S) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(head.encode())
        yield sock


def read_head(sock: socket.socket) -> bytes:
    """Read until the head of the answer is there; return what came after it."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(1 << 16)
        assert more, data
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    assert head.split()[1] in (b"200", b"101"), head
    return rest


def download(url: str, size: int) -> int:
    """Read a body, chunked or not, without looking at it; return its size."""
    with connected(url, headers="Connection: close\r\n") as sock:
        read = len(read_head(sock))
        buffer = bytearray(BUFFER)
        # The kernel drops what it would have to copy.
        while got := sock.recv_into(buffer, flags=socket.MSG_TRUNC):
            read += got
    assert size <= read < size * 1.01 + 1000, f"{read} bytes for {size}"
    return size


@contextmanager
def uploads(size: int) -> Iterator[Callable[[str], int]]:
    """Give a function that sends a body of zeros and expects its size as the answer."""
    with tempfile.TemporaryFile() as file:
        os.truncate(file.fileno(), size)

        def upload(url: str) -> int:
            headers = f"Connection: close\r\nContent-Length: {size}\r\n"
            with connected(url, "PUT", headers) as sock:
                file.seek(0)
                sock.sendfile(file)
                answer = read_head(sock)
                while more := sock.recv(1 << 16):
                    answer += more
            assert answer == str(size).encode(), answer
            return size

        yield upload


def read_many(url: str, clients: int, byte: bytes) -> int:
    """Read bodies at the same time; return how often they have the byte in all."""
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for _ in range(clients):
            sock = stack.enter_context(connected(url, headers="Connection: close\r\n"))
            selector.register(sock, selectors.EVENT_READ, True)
        count = 0
        while selector.get_map():
            ready = selector.select(TIMEOUT_S)
            assert ready, f"nothing came for {TIMEOUT_S} s"
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)
                data = key.fileobj.recv(1 << 16)
                if key.data:  # the first of it
                    assert data.startswith(b"HTTP/1.1 200 "), data
                    selector.modify(key.fileobj, selectors.EVENT_READ, False)
                count += data.count(byte)
                if not data:
                    selector.unregister(key.fileobj)
    return count


@contextmanager
def idle_websockets(url: str, count: int) -> Iterator[None]:
    """Open them all at once, and hold them; they are forgotten when it ends."""
    with ExitStack() as stack:
        stack.callback(time.sleep, FORGOTTEN_S)
        opening = [
            stack.enter_context(connected(url, headers=UPGRADE)) for _ in range(count)
        ]
        for number, sock in enumerate(opening):
            sock.settimeout(OPEN_S)
            try:
                read_head(sock)
            except TimeoutError as err:
                text = f"{number} of {count} WebSockets are open after {OPEN_S} s"
                raise AssertionError(text) from err
        yield


def refused_websocket(url: str) -> float:
    """Return the seconds until a WebSocket is refused; fail if it is not."""
    began = time.perf_counter()
    with connected(url, headers=UPGRADE) as sock:
        sock.settimeout(OPEN_S)
        head = sock.recv(1 << 16)
    assert head.startswith(b"HTTP/1.1 503 "), head
    return time.perf_counter() - began


@contextmanager
def websockets(url: str, clients: int) -> Iterator[Callable[[float], float]]:
    """Open them; give a function that has all echo, and returns echoes a second."""
    text = b"0123456789abcdef"
    ping = bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text
    pong = bytes([0x81, len(text)]) + text
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for _ in range(clients):
            sock = stack.enter_context(connected(url, headers=UPGRADE))
            assert read_head(sock) == b""
            selector.register(sock, selectors.EVENT_READ)

        def echo(seconds: float) -> float:
            began = time.perf_counter()
            for key in selector.get_map().values():
                _sock(key).sendall(ping)
            echoes, waiting = 0, clients
            while waiting:
                ready = selector.select(TIMEOUT_S)
                assert ready, f"no echo for {TIMEOUT_S} s"
                over = time.perf_counter() - began > seconds
                for key, _ in ready:
                    data = _sock(key).recv(len(pong), socket.MSG_PEEK)
                    if data[0] == 0x89:  # the server asks every 20 s if we are there
                        size = 2 + data[1]
                        data = _sock(key).recv(size, socket.MSG_WAITALL)
                        mask = bytes([0x8A, 0x80 | data[1], 0, 0, 0, 0])
                        _sock(key).sendall(mask + data[2:])
                        continue
                    data = _sock(key).recv(len(pong), socket.MSG_WAITALL)
                    assert data == pong, data
                    echoes += 1
                    if over:
                        waiting -= 1
                    else:
                        _sock(key).sendall(ping)
            return echoes / (time.perf_counter() - began)

        yield echo


def _sock(key: selectors.SelectorKey) -> socket.socket:
    assert isinstance(key.fileobj, socket.socket)
    return key.fileobj
