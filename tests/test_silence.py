"""Peers that do not answer, and such as only look so; real connections."""

from __future__ import annotations

import asyncio
import socket
import sys
import time

import pytest

from daskserve.transport.silence import SilenceWatch
from tests.hosts import Host, open_hosts

LIMIT_S = 1.0


class Watched:
    """A connection to a process that accepts it and does nothing more."""

    def __init__(self, sock: socket.socket, limit_s: float = LIMIT_S) -> None:
        self.sock = sock
        self.silent_at: float | None = None
        self.watch = SilenceWatch(asyncio.get_running_loop(), limit_s)
        self.watch.add(self, sock, self._silent)

    def _silent(self) -> None:
        self.silent_at = time.monotonic()

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *args: object) -> None:
        self.watch.discard(self)
        assert self.watch._timer is None
        self.sock.close()


def test_who_does_not_read_or_write_is_not_silent() -> None:
    """As user code that blocks its loop, with more sent to it than it has room for."""

    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = server.getsockname()
            idle = socket.create_connection(address)
            full = socket.create_connection(address)
            full.setblocking(False)
            with Watched(idle, 0.5) as quiet, Watched(full, 0.5) as stuffed:
                sent = 0
                with pytest.raises(BlockingIOError):
                    while True:
                        sent += full.send(b"x" * 100_000)
                await asyncio.sleep(1.3)
                assert sent > 100_000
                assert quiet.silent_at is None
                assert stuffed.silent_at is None

    asyncio.run(test())


LISTEN = """
import socket, sys, time
with socket.create_server((sys.argv[1], 8000)) as server:
    print("ready", flush=True)
    time.sleep(60)
"""


async def listen(host: Host) -> asyncio.subprocess.Process:
    command = host.command(sys.executable, "-c", LISTEN, host.address)
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return process


def test_hosts_that_are_cut_off_are_silent() -> None:
    async def test(host: Host) -> None:
        process = await listen(host)
        try:
            connections = [
                socket.create_connection((host.address, 8000)) for _ in range(3)
            ]
            waiting, sending, full = map(Watched, connections)
            with waiting, sending, full:
                full.sock.setblocking(False)
                with pytest.raises(BlockingIOError):
                    while True:
                        full.sock.send(b"x" * 100_000)
                host.cut()
                cut_at = time.monotonic()
                sending.sock.send(b"x")
                async with asyncio.timeout(10):
                    while not all(w.silent_at for w in (waiting, sending, full)):
                        await asyncio.sleep(0.01)
                assert sending.silent_at is not None
                assert LIMIT_S / 4 <= sending.silent_at - cut_at < 2 * LIMIT_S
                # The kernel begins to ask after a second at the earliest.
                assert time.monotonic() - cut_at < 4 * LIMIT_S
        finally:
            process.kill()
            await process.wait()

    with open_hosts(1) as (host,):
        asyncio.run(test(host))
