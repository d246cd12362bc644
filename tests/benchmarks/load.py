"""Load on one URL: by wrk, or by a client of our own in a process of its own."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from tests.benchmarks.rows import Figures
from tests.utils import ROOT

_UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6}


def client_name() -> str:
    return "wrk" if shutil.which("wrk") else "asyncio"


def load(
    url: str,
    connections: int,
    seconds: float,
    headers: Sequence[str] = (),
    body: str | None = None,
) -> Figures:
    """Load a server and fail if any answer is not a 200; with a body, by POST of JSON.

    Returns
    -------
    Figures
        Requests a second, and the median latency in microseconds.
    """
    seconds = max(1, round(seconds)) if client_name() == "wrk" else seconds
    limit = seconds + 30
    if client_name() == "wrk":
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency"]
        for header in headers:
            command += ["-H", header]
        if body is None:
            return parse_wrk(_run(limit, *command, url))
        with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
            script.write(
                f'wrk.method = "POST"\nwrk.body = [[{body}]]\n'
                'wrk.headers["Content-Type"] = "application/json"\n'
            )
            script.flush()  # it runs before the load, not for every request
            return parse_wrk(_run(limit, *command, "-s", script.name, url))
    command = [sys.executable, "-m", "tests.benchmarks.load"]
    arguments = [url, str(connections), str(seconds), json.dumps(body), *headers]
    figures: Figures = json.loads(_run(limit, *command, *arguments))
    return figures


def _run(limit: float, *command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=limit
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def parse_wrk(text: str) -> Figures:
    assert "Non-2xx" not in text and "Socket errors" not in text, text
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    p50 = re.search(r"50%\s+([\d.]+)(us|ms|s)\b", text)
    assert rate and p50, text
    assert float(rate[1]) > 0, text
    return {"req/s": float(rate[1]), "p50 us": float(p50[1]) * _UNITS[p50[2]]}


async def _storm(
    url: str,
    connections: int,
    seconds: float,
    headers: Sequence[str],
    body: str | None,
) -> Figures:
    deadline = time.perf_counter() + seconds
    latencies: list[float] = []
    request = _request(url, headers, body)
    clients = (_client(url, request, deadline, latencies) for _ in range(connections))
    await asyncio.gather(*clients)
    p50 = statistics.median(latencies) * 1e6
    return {"req/s": len(latencies) / seconds, "p50 us": p50}


def _request(url: str, headers: Sequence[str], body: str | None) -> bytes:
    parts = urlsplit(url)
    method = "GET" if body is None else "POST"
    lines = [f"{method} {parts.path or '/'} HTTP/1.1", f"Host: {parts.netloc}"]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", body or ""]).encode()


async def _client(
    url: str, request: bytes, deadline: float, latencies: list[float]
) -> None:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
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
    _url, _connections, _seconds, _body, *_headers = sys.argv[1:]
    storm = _storm(
        _url, int(_connections), float(_seconds), _headers, json.loads(_body)
    )
    print(json.dumps(asyncio.run(storm)))
