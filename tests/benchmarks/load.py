"""Load on one URL: by wrk, or by a client of our own in a process of its own."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from tests.benchmarks.queueing import quantile
from tests.benchmarks.rows import Figures
from tests.utils import ROOT

_UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 60e6}


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
        Requests a second; the median latency and the 99th percentile in microseconds.
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
    assert rate and float(rate[1]) > 0, text
    figures = {"req/s": float(rate[1])}
    for percent in (50, 99):
        found = re.search(rf"\b{percent}%\s+([\d.]+)(us|ms|s|m)\b", text)
        assert found, text
        figures[f"p{percent} us"] = float(found[1]) * _UNITS[found[2]]
    return figures


async def _storm(
    url: str,
    connections: int,
    seconds: float,
    headers: Sequence[str],
    body: str | None,
) -> Figures:
    deadline = time.perf_counter() + seconds
    latencies: list[float] = []
    request = request_bytes(url, headers, body)
    clients = (_client(url, request, deadline, latencies) for _ in range(connections))
    await asyncio.gather(*clients)
    figures = {"req/s": len(latencies) / seconds}
    for percent in (50, 99):
        figures[f"p{percent} us"] = quantile(latencies, percent / 100) * 1e6
    return figures


def request_bytes(
    url: str, headers: Sequence[str] = (), body: str | None = None
) -> bytes:
    """Return a whole request: GET, or with a body POST of JSON."""
    parts = urlsplit(url)
    method = "GET" if body is None else "POST"
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [f"{method} {target} HTTP/1.1", f"Host: {parts.netloc}"]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", body or ""]).encode()


async def _client(
    url: str, request: bytes, deadline: float, latencies: list[float]
) -> None:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    while (began := time.perf_counter()) < deadline:
        status, body = await exchange(reader, writer, request)
        assert status == 200, body
        latencies.append(time.perf_counter() - began)
    writer.close()
    await writer.wait_closed()


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> tuple[int, bytes]:
    """Send a request on a connection that is kept; return the status and the body."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    assert head.startswith(b"http/1.1 "), head
    length = re.search(rb"\r\ncontent-length: *(\d+)", head)
    if length:
        return int(head[9:12]), await reader.readexactly(int(length[1]))
    assert b"\r\ntransfer-encoding: chunked" in head, head
    return int(head[9:12]), await _read_chunks(reader)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    assert await reader.readuntil(b"\r\n") == b"\r\n", "trailers"
    return body


if __name__ == "__main__":
    _url, _connections, _seconds, _body, *_headers = sys.argv[1:]
    storm = _storm(
        _url, int(_connections), float(_seconds), _headers, json.loads(_body)
    )
    print(json.dumps(asyncio.run(storm)))
