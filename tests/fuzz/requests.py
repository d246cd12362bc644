"""Requests of HTTP/1.1, valid ones first; whatever follows, all answers are whole."""

from __future__ import annotations

import http.client
import io
import random
import zlib
from dataclasses import dataclass
from typing import Any

from tests.fuzz.mutations import ODD, harm
from tests.fuzz.target import Target, talk

METHODS = ["GET", "GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD"]
HEADERS = [
    b"Accept: */*", b"Cookie: a=b; c=d", b"X-Empty:", b"Connection: keep-alive",
    b"User-Agent: \xe9\xff", b"Content-Type: application/json", b"Range: bytes=0-1",
    b"Expect: 100-continue", b"TE: trailers", b"X-Long: " + b"x" * 2000,
]  # fmt: skip
#: Fields that decide where a request ends; what two of them say may differ.
FRAMING = [
    b"Content-Length: 5", b"Content-Length: 0", b"Content-Length: -1",
    b"Content-Length: 5, 5", b"Content-Length: 99999999999", b"Content-Length: 1048577",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: identity", b"Transfer-Encoding : chunked",
    b"Connection: close", b"Connection: Upgrade\r\nUpgrade: h2c",
    b"Connection: Upgrade\r\nUpgrade: websocket", b"Upgrade: websocket", b"Host: other",
    b"Expect: 200-maybe", b" folded: x", b"Trailer: x",
]  # fmt: skip


@dataclass
class Request:
    """A valid request, and what the echo says to it."""

    method: str
    head: list[bytes]
    body: bytes
    echo: str

    def pack(self) -> bytes:
        return b"\r\n".join([*self.head, b"", b""]) + self.body


def make(rng: random.Random, ident: str) -> Request:
    """Return a valid request."""
    method = rng.choice(METHODS)
    path = "/echo" + rng.choice(
        ["", "/", "/a%20b", "/%C3%A9/.", "//x", "/" + "y" * 3000]
    )
    path += rng.choice(["", "?", "?a=b&c", "?%ff=%00"])
    head = [f"{method} {path} HTTP/1.1".encode(), b"Host: x", f"X-Id: {ident}".encode()]
    head += rng.sample(HEADERS, rng.randrange(4))
    data = packed = b""
    if method in ("POST", "PUT", "PATCH"):
        data = rng.randbytes(rng.choice([0, 1, 5, 1000, 70_000]))
        if rng.random() < 0.5:
            head.append(b"Transfer-Encoding: chunked")
            packed = _chunks(rng, data)
        else:
            head.append(b"Content-Length: %d" % len(data))
            packed = data
    else:
        head = [h for h in head if not h.startswith(b"Expect")]
    echo = f"{ident}/{len(data)}/{zlib.crc32(data)}"
    return Request(method, head, packed, echo)


def _chunks(rng: random.Random, data: bytes) -> bytes:
    packed, at = b"", 0
    while at < len(data):
        size = rng.choice([1, 7, 1000, 50_000]) if len(data) < 5000 else 30_000
        part = data[at : at + size]
        extension = rng.choice([b"", b"", b";a=b", b';a="b;c"'])
        packed += b"%x%s\r\n%s\r\n" % (len(part), extension, part)
        at += size
    trailers = rng.choice([b"", b"", b"X-Id: other\r\n", b"Host: y\r\nX: z\r\n"])
    return packed + b"0\r\n" + trailers + b"\r\n"


def _spoil(rng: random.Random, request: Request) -> bytes:
    """Return a request of which something is wrong, or perhaps only unusual."""
    match rng.randrange(6):
        case 0:
            return harm(rng, request.pack(), rng.choice([1, 1, 3, 10]))
        case 1:
            for _ in range(rng.choice([1, 1, 2])):
                request.head.insert(rng.randrange(1, 3), rng.choice(FRAMING))
        case 2:
            request.head += [
                b"X-%d: y" % i for i in range(rng.choice([100, 300, 3000]))
            ]
        case 3:
            end = rng.choice([b"\n", b"\r", b"\r\n\r\n"])
            return request.pack().replace(b"\r\n", end, rng.choice([1, 2, -1]))
        case 4:
            size = rng.choice(
                [b"5", b"g", b"-1", b"fffffffffffffffff", b"0;" + b"x" * 9999]
            )
            request.head.append(b"Transfer-Encoding: chunked")
            request.body = size + rng.choice([b"\r\n", b"\n", b""]) + rng.choice(ODD)
            request.body += rng.choice([b"", b"\r\nA: " + b"t" * 20_000 + b"\r\n"])
        case 5:
            request.head[0] = harm(rng, request.head[0])
    return request.pack()


async def try_one(rng: random.Random, target: Target) -> str | None:
    """Send some requests on one connection; return what is wrong with the answers."""
    requests = [make(rng, f"i{i}") for i in range(rng.choice([1, 1, 2, 3, 20]))]
    spoiled = rng.choice([None, *range(len(requests)), len(requests) - 1])
    if spoiled is None:  # else it is closed for what is wrong
        kept = [h for h in requests[-1].head if not h.startswith(b"Connection")]
        requests[-1].head = [*kept, b"Connection: close"]
    good = requests[:spoiled]
    data = [r.pack() for r in good]
    if spoiled is not None:
        for request in requests[spoiled:]:
            if request.method == "HEAD":  # whether it still is one, nobody knows
                request.method, request.head[0] = "GET", b"GET" + request.head[0][4:]
        data.append(_spoil(rng, requests[spoiled]))
        data += [r.pack() for r in requests[spoiled + 1 :]]
    if rng.random() < 0.5:
        data = [b"".join(data)]
    answer, closed = await talk(rng, ("127.0.0.1", target.port), data)
    if not closed:
        return f"the connection is still open; it has said {answer[-300:]!r}"
    try:
        echoes = _parse(answer, [r.method for r in requests])
    except (http.client.HTTPException, ValueError) as err:
        return f"no response: {err!r} in {answer[-500:]!r}"
    expected = [r.echo for r in good]
    if echoes[: len(good)] != expected:
        return f"valid requests got {echoes}, not {expected}"
    if spoiled is None:
        return None if len(echoes) == len(good) else f"one too many: {echoes}"
    # Each is answered at most once, and in the order in which they came.
    places = [int(e[1 : e.index("/")]) for e in echoes if _names_one(e, len(requests))]
    if places != sorted(set(places)):
        return f"answers are out of order: {echoes}"
    return None


def _names_one(echo: str, count: int) -> bool:
    name = echo.partition("/")[0]
    return name[:1] == "i" and name[1:] in map(str, range(count))


class _Answers(io.BytesIO):
    """A file that several responses are read from in turn."""

    def makefile(self, *args: Any) -> _Answers:
        return self

    def close(self) -> None:
        pass


def _parse(answer: bytes, methods: list[str]) -> list[str]:
    """Return what the echo said in each response, the status of others."""
    file, echoes = _Answers(answer), list[str]()
    while file.tell() < len(answer):
        method = methods[len(echoes)] if len(echoes) < len(methods) else "GET"
        response = http.client.HTTPResponse(file, method=method)  # type: ignore[arg-type]
        response.begin()
        if response.status == 101:
            break
        size = response.getheader("content-length")
        if size is None and response.getheader("transfer-encoding") != "chunked":
            raise ValueError(f"a response without an end: {response.msg}")
        response.read()
        if not 200 <= response.status < 600:
            raise ValueError(f"status {response.status}")
        echoes.append(response.getheader("x-echo") or str(response.status))
    return echoes
