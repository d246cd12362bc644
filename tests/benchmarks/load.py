"""Load on one URL: by wrk, or by a client of our own in a process of its own."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from tests.utils import ROOT

_UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6}


@dataclass(frozen=True)
class Figures:
    """Requests a second, and the median latency in microseconds."""

    rate: float
    p50_us: float


def client_name() -> str:
    return "wrk" if shutil.which("wrk") else "asyncio"


def load(url: str, connections: int, seconds: float) -> Figures:
    """Load a server and fail if any answer is not a 200."""
    if client_name() == "wrk":
        duration = f"-d{max(1, round(seconds))}s"  # wrk takes whole seconds
        return parse_wrk(
            _run("wrk", "-t1", f"-c{connections}", duration, "--latency", url)
        )
    module = (sys.executable, "-m", "tests.benchmarks.load")
    return Figures(**json.loads(_run(*module, url, str(connections), str(seconds))))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def parse_wrk(text: str) -> Figures:
    assert "Non-2xx" not in text and "Socket errors" not in text, text
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    p50 = re.search(r"50%\s+([\d.]+)(us|ms|s)\b", text)
    assert rate and p50, text
    assert float(rate[1]) > 0, text
    return Figures(float(rate[1]), float(p50[1]) * _UNITS[p50[2]])


async def _storm(url: str, connections: int, seconds: float) -> Figures:
    deadline = time.perf_counter() + seconds
    latencies: list[float] = []
    clients = (_client(url, deadline, latencies) for _ in range(connections))
    await asyncio.gather(*clients)
    return Figures(len(latencies) / seconds, statistics.median(latencies) * 1e6)


async def _client(url: str, deadline: float, latencies: list[float]) -> None:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    request = (
        f"GET {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
    )
    while (began := time.perf_counter()) < deadline:
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = re.search(rb"\r\ncontent-length: *(\d+)", head)
        assert head.startswith(b"http/1.1 200 ") and length, head
        await reader.readexactly(int(length[1]))
        latencies.append(time.perf_counter() - began)
    writer.close()
    await writer.wait_closed()


if __name__ == "__main__":
    figures = asyncio.run(_storm(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
    print(json.dumps(vars(figures)))
