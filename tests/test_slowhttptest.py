"""A thousand clients that stand in the way, by slowhttptest; others are served."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from tests.test_http import Site, spare, start
from tests.utils import need_program, poll

__all__ = ["spare", "start"]  # fixtures

CONNECTIONS = 1000
SECONDS = 5
#: What each attack is, as options of slowhttptest.
ATTACKS = {
    "headers": ["-H", "-i", "2"],
    "body": ["-B", "-i", "2", "-s", "500000"],
    "read": ["-X", "-w", "512", "-y", "1024", "-n", "2", "-z", "32", "-k", "3"],
}


def page(request: Request) -> bytes:
    return b"x" * 500_000


async def upload(request: Request) -> str:
    return str(len(await request.body()))


def quick() -> str:
    return "quick"


@dataclass
class Visitor:
    """Somebody who only wants an answer, on a new connection each time."""

    url: str
    seconds: list[float] = field(default_factory=list)

    def visit(self) -> None:
        began = time.monotonic()
        assert httpx.get(self.url, timeout=10).text == "quick"
        self.seconds.append(time.monotonic() - began)


def resident_bytes() -> int:
    """Return the memory of the process, without what could be given back at once."""
    import ctypes
    import gc

    import psutil

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


@pytest.mark.long
@pytest.mark.timeout(180)
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_thousand_slow_clients(
    start: Callable[..., Site], tmp_path: Path, attack: str
) -> None:
    program = need_program("slowhttptest")
    site = start(header_timeout_s=2, stall_timeout_s=2, request_timeout_s=3)
    target = site.deploy(upload if attack == "body" else page)
    visitor = Visitor(site.at(site.deploy(quick)))

    def memory() -> int:
        return sum(site.client.run(resident_bytes).values())

    def run() -> None:
        command = [program, *ATTACKS[attack], "-c", f"{CONNECTIONS}"]
        command += ["-r", "500", "-l", f"{SECONDS}", "-p", "3", "-u", site.at(target)]
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
            try:
                while process.poll() is None:
                    visitor.visit()
                    time.sleep(0.02)
            finally:
                process.kill()
                process.wait()
        assert process.returncode == 0, (tmp_path / "log").read_text()
        # The program had what it wanted: as many connections, and an open service.
        text = (tmp_path / "log").read_text(errors="replace")
        assert "service available" in text.replace("\x1b[0m", "") or "YES" in text, text
        poll(lambda: connections(site) <= 2, timeout=20)

    def settled() -> int:
        """Return the memory when it falls no more: answers are freed in their turn."""
        last, now = 2 * memory(), memory()
        while now < last * 0.99:
            time.sleep(1)
            last, now = now, memory()
        return now

    run()
    before = settled()
    run()
    after = settled()
    slowest = max(visitor.seconds)
    print(
        f"{attack}: {len(visitor.seconds)} visits, median "
        f"{sorted(visitor.seconds)[len(visitor.seconds) // 2] * 1e3:.0f} ms, slowest "
        f"{slowest * 1e3:.0f} ms; {before / 2**20:.0f} MiB, then "
        f"{after / 2**20:.0f} MiB"
    )
    assert slowest < 5
    assert after < before * 1.05
    assert httpx.get(site.at(target), timeout=10).status_code == 200


def connections(site: Site) -> int:
    """Return how many connections the proxies hold."""

    def count(dask_worker: Any) -> int:
        server = dask_worker.plugins["daskserve"]._server
        return 0 if server is None else len(server._guard.connections)

    return sum(site.client.run(count).values())
