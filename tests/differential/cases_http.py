"""Cases of the raw HTTP apps."""

from __future__ import annotations

import asyncio

from tests.differential.apps_misbehaving import APPS
from tests.differential.cases import Case, Scripts, ask, raw
from tests.differential.observe import Talk

script = Scripts()

CRLF = b"\r\n"
HOST = b"Host: example.test\r\n"


def get(line: bytes, headers: bytes = b"") -> bytes:
    """Return a request with this line."""
    return line + CRLF + HOST + headers + CRLF


# What an app sees.

PATHS = (
    "",
    "/",
    "//",
    "/a//b/",
    "/a%20b+c",
    "/%2f%2F",
    "/a%2Fb",
    "/..",
    "/a/../b/./c",
    "/%2e%2e/x",
    "/%C3%BC",
    "/%ff%fe",
    "/%00",
    "/%",
    "/%zz",
    "/a;b=c,d@e:f",
    "/?",
    "/?a=1&a=2&b",
    "/?q=%C3%BC%ff&+=%20",
    "/x?a?b/c#d",
    "/?q=" + "x" * 20_000,
    "/" + "long/" * 1_000,
    '/"<>`{}|',
)
METHODS = ("HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND")

ECHO = [
    *(ask("echo", path, name=f"path {path[:30]}") for path in PATHS),
    *(ask("echo", "/m", method) for method in METHODS),
    ask("echo", "/m", "NONSENSE"),
    ask("echo", "/m", "get"),
    ask("echo", "/x", headers=[("X-A", "1"), ("x-a", "2"), ("Cookie", "a=b; c=d")]),
    ask("echo", "/x", name="odd headers", headers=[("x-ü", "1"), ("x-b", "\xfc\xff")]),
    ask("echo", "/x", name="long header", headers=[("x-long", "v" * 30_000)]),
    ask("echo", "/x", name="forwarded", headers=[
        ("X-Forwarded-Proto", "https"), ("X-Forwarded-For", "203.0.113.7")]),
    ask("echo", "/x", name="request id", headers=[("x-request-id", "given")]),
    ask("echo", "/-/routes"),
    *(ask("echo", path) for path in ("/-/static/x", "/-/routes/", "/-/", "/-/routesx")),
    ask("echo", "/-/mine", "POST", body=b"body"),
    ask("echo", "/-", name="path /-"),
    ask("echo", "/-x/y", name="path /-x/y"),
    ask("echo", "/x", name="another host", host="other.test:8080"),
    ask("echo", "/x", "POST", name="POST with body", body=b"body"),
    ask("echo", "/x", name="GET with body", body=b"body"),
    raw("echo", "HTTP/1.0", get(b"GET {prefix}/x HTTP/1.0")),
    raw("echo", "HTTP/1.0 keep-alive",
        get(b"GET {prefix}/x HTTP/1.0", b"Connection: keep-alive\r\n")),
    raw("echo", "HTTP/1.0 without host", b"GET {prefix}/x HTTP/1.0\r\n\r\n"),
    raw("echo", "HTTP/1.1 without host", b"GET {prefix}/x HTTP/1.1\r\n\r\n"),
    raw("echo", "HTTP/2.0", get(b"GET {prefix}/x HTTP/2.0")),
    raw("echo", "HTTP/0.9", b"GET {prefix}/x\r\n\r\n"),
    raw("echo", "no HTTP", b"nonsense\r\n\r\n"),
    raw("echo", "TLS", bytes.fromhex("16030100050100000100")),
    raw("echo", "connection close",
        get(b"GET {prefix}/x HTTP/1.1", b"Connection: close\r\n")),
    raw("echo", "absolute form",
        get(b"GET http://example.test{prefix}/x?q=1 HTTP/1.1")),
    raw("echo", "absolute form of another",
        get(b"GET https://u@other.test:8443{prefix}/x HTTP/1.1")),
    raw("echo", "OPTIONS *", get(b"OPTIONS * HTTP/1.1")),
    raw("echo", "CONNECT", get(b"CONNECT example.test:443 HTTP/1.1")),
    raw("echo", "raw bytes in path", get(b"GET {prefix}/\xc3\xbc\xff HTTP/1.1")),
    raw("echo", "raw bytes in query", get(b"GET {prefix}/x?q=\xc3\xbc HTTP/1.1")),
    raw("echo", "null in path", get(b"GET {prefix}/a\x00b HTTP/1.1")),
    raw("echo", "null in header", get(b"GET {prefix}/x HTTP/1.1", b"x-a: a\x00b\r\n")),
    raw("echo", "space in path", get(b"GET {prefix}/a b HTTP/1.1")),
    raw("echo", "bare newlines", b"GET {prefix}/x HTTP/1.1\nHost: example.test\n\n"),
    raw("echo", "folded header",
        get(b"GET {prefix}/x HTTP/1.1", b"x-a: one\r\n two\r\n")),
    raw("echo", "space before colon", get(b"GET {prefix}/x HTTP/1.1", b"x-a : 1\r\n")),
    raw("echo", "two lengths",
        get(b"POST {prefix}/x HTTP/1.1",
            b"Content-Length: 1\r\nContent-Length: 2\r\n") + b"ab"),
    raw("echo", "length and chunked",
        get(b"POST {prefix}/x HTTP/1.1",
            b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n") + b"0\r\n\r\n"),
    raw("echo", "negative length",
        get(b"POST {prefix}/x HTTP/1.1", b"Content-Length: -1\r\n")),
    raw("echo", "unknown encoding",
        get(b"POST {prefix}/x HTTP/1.1", b"Transfer-Encoding: gzip\r\n")),
    raw("echo", "bad chunk",
        get(b"POST {prefix}/x HTTP/1.1", b"Transfer-Encoding: chunked\r\n") + b"z\r\n"),
    raw("echo", "upgrade to something",
        get(b"GET {prefix}/x HTTP/1.1", b"Connection: Upgrade\r\nUpgrade: h2c\r\n")),
]  # fmt: skip


@script("echo")
async def prefix_in_other_words(talk: Talk) -> None:
    """Write the prefix, if there is one, with escapes."""
    prefix = talk.target.prefix.replace("r", "%72")
    connection = await talk.connect()
    connection.send(get(f"GET {prefix}/x%72 HTTP/1.1".encode()))
    await connection.response(end=True)


# Responses, and connections that are used again.

RESPONSES = [
    *(
        ask("responses", f"/{name}", method)
        for name in (
            "empty",
            "bare",
            "chunks",
            "chunks-with-length",
            "said-chunked",
            "many-headers",
            "page",
            "large-with-length",
            "closing",
            "strange-event-keys",
        )
        for method in ("GET", "HEAD")
    ),
    *(
        ask("responses", f"/status/{status}")
        for status in (200, 201, 204, 205, 301, 304, 400, 404, 418, 451, 500, 503, 511)
    ),
    *(
        ask("responses", f"/odd-status/{status}")
        for status in (103, 199, 299, 420, 599)
    ),
    *(ask("responses", f"/large/{size}") for size in (1000, 262_144, 900_000)),
    raw("responses", "chunks for HTTP/1.0", get(b"GET {prefix}/chunks HTTP/1.0")),
]


@script("responses")
async def several_on_one_connection(talk: Talk) -> None:
    connection = await talk.connect()
    for path in ("/page", "/chunks", "/status/204", "/empty", "/status/500"):
        for method in ("GET", "HEAD", "POST"):
            connection.request(path, method)
            await connection.response(method)
    connection.request("/page")
    await connection.response(end=True)


@script("responses")
async def pipelined(talk: Talk) -> None:
    connection = await talk.connect()
    for path in ("/chunks", "/page", "/large/1000", "/status/204", "/page"):
        connection.request(path)
    for _ in range(5):
        await connection.response()
    connection.request("/closing")
    await connection.response(end=True)


@script("responses")
async def pipelined_with_bodies(talk: Talk) -> None:
    connection = await talk.connect()
    for n in range(4):
        connection.request("/page", "POST", body=b"x" * n * 1000)
    for _ in range(4):
        await connection.response()


@script("responses")
async def slowly_sent(talk: Talk) -> None:
    """Send a request in small pieces."""
    connection = await talk.connect()
    data = get(f"GET {talk.target.prefix}/page HTTP/1.1".encode())
    for i in range(0, len(data), 7):
        connection.send(data[i : i + 7])
        await asyncio.sleep(0.001)
    await connection.response(end=True)


# Requests' bodies.

CHUNKED = [("Transfer-Encoding", "chunked")]
KINDS = ("all", "nothing", "part", "late", "again")

BODIES = [
    *(ask("bodies", f"/{kind}", "POST", body=b"x" * 100) for kind in KINDS),
    *(ask("bodies", f"/{kind}", "PUT", body=b"") for kind in KINDS),
    *(ask("bodies", f"/{kind}") for kind in KINDS),
    ask("bodies", "/all", "POST", name="3 MB", body=bytes(range(256)) * 12_000),
    ask("bodies", "/late", "POST", name="3 MB, late", body=bytes(3_000_000)),
    raw("bodies", "chunked upload",
        get(b"POST {prefix}/all HTTP/1.1", b"Transfer-Encoding: chunked\r\n")
        + b"".join(b"%x\r\n%s\r\n" % (n, b"y" * n) for n in range(1, 300))
        + b"0\r\n\r\n"),
    raw("bodies", "trailers",
        get(b"POST {prefix}/all HTTP/1.1", b"Transfer-Encoding: chunked\r\n")
        + b"3;ext=1\r\nabc\r\n0\r\nX-Trailer: 1\r\n\r\n"),
]  # fmt: skip


@script("bodies")
async def half_a_body_then_the_rest(talk: Talk) -> None:
    connection = await talk.connect()
    connection.request("/all", "POST", headers=[("Content-Length", "200000")])
    connection.send(b"a" * 100_000)
    await asyncio.sleep(0.02)
    connection.send(b"b" * 100_000)
    await connection.response(end=True)


@script("bodies")
async def lockstep(talk: Talk) -> None:
    """Send each part only when the one before it was answered."""
    connection = await talk.connect()
    connection.request("/lockstep", "POST", headers=CHUNKED)
    # More than a proxy reads before it asks a replica.
    connection.send(b"14000\r\n" + b"x" * 0x14000 + b"\r\n")
    await connection.head()
    received = b""
    while received.count(b"x") < 0x14000:
        received += await connection.chunk() or b""
    for part in (b"one", b"two", b"three"):
        connection.send(b"%x\r\n%s\r\n" % (len(part), part))
        talk.note("part", await connection.chunk())
    connection.send(b"0\r\n\r\n")
    talk.note("end", [await connection.chunk(), await connection.chunk()])


@script("bodies")
async def expect_continue(talk: Talk) -> None:
    connection = await talk.connect()
    headers = [("Expect", "100-continue"), ("Content-Length", "4")]
    connection.request("/all", "POST", headers=headers)
    await asyncio.sleep(0.02)
    connection.send(b"body")
    await connection.response(end=True)


@script("bodies")
async def expect_continue_but_refused(talk: Talk) -> None:
    connection = await talk.connect()
    headers = [("Expect", "100-continue"), ("Content-Length", "4")]
    connection.request("/nothing", "POST", headers=headers)
    await asyncio.sleep(0.02)
    connection.send(b"body")
    await connection.response(end=True)


@script("bodies")
async def large_and_not_read(talk: Talk) -> None:
    await talk.ask("/nothing", "POST", body=bytes(5_000_000))


@script("bodies")
async def chunked_and_not_read(talk: Talk) -> None:
    connection = await talk.connect()
    connection.request("/nothing", "POST", headers=CHUNKED)
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    connection.send(chunk * 80 + b"0\r\n\r\n")
    await connection.response(end=True)


# Time.


@script("streams")
async def gated(talk: Talk) -> None:
    connection = await talk.connect()
    connection.request(f"/gated/{talk.key}")
    await talk.open("head")
    talk.note("head", (await connection.head()).status)
    for name in ("first", "second"):
        await talk.open(name)
        talk.note("chunk", await connection.chunk())
    await talk.open("last")
    await connection.rest(end=True)


@script("streams")
async def work_after(talk: Talk) -> None:
    await talk.ask(f"/work-after/{talk.key}", end=False)
    await talk.open()
    await talk.notes(1)


@script("streams")
async def client_goes_in_a_stream(talk: Talk) -> None:
    connection = await talk.connect()
    connection.request(f"/until-gone/{talk.key}")
    await connection.head()
    talk.note("chunk", await connection.chunk())
    connection.abort()
    await talk.notes(1)


@script("streams")
async def client_goes_before(talk: Talk) -> None:
    connection = await talk.connect()
    connection.request(f"/gone-before/{talk.key}")
    while not (await talk.quietly(f"/notes/{talk.key}")).json():
        await asyncio.sleep(0.01)
    connection.abort()
    await talk.notes(2)


# State.


@script("stateful")
async def state_is_copied(talk: Talk) -> None:
    for path in ("/one", "/two"):
        await talk.ask(path)


@script("contexts")
async def context_variables(talk: Talk) -> None:
    await asyncio.gather(*(talk.ask("/same") for _ in range(5)))
    await talk.ask("/later")


# Misbehaviour.


def misbehaviour() -> list[Case]:
    """Return a case for every app that misbehaves."""
    names = [app.__name__.replace("_", "-") for app in APPS]
    names = [name for name in names if name not in ("bad-status", "bad-header")]
    statuses = ("low", "high", "text", "none")
    headers = "text-name text-value newline newline-name null space none".split()
    return [
        *(ask("misbehaving", f"/{name}") for name in names),
        *(ask("misbehaving", f"/bad-status/{kind}") for kind in statuses),
        *(ask("misbehaving", f"/bad-header/{kind}") for kind in headers),
        ask("misbehaving", "/raises", "HEAD"),
        ask("misbehaving", "/raises", "POST", body=b"x" * 100),
        ask("misbehaving", "/raises", "PUT", body=bytes(3_000_000)),
        ask("misbehaving", "/too-long", "HEAD"),
        ask("misbehaving", "/too-short", "HEAD"),
    ]


@script("misbehaving")
async def what_send_raises(talk: Talk) -> None:
    await talk.ask(f"/catches/{talk.key}", end=False)
    await talk.notes(7)


CASES = [
    *ECHO,
    *RESPONSES,
    *BODIES,
    ask("no-lifespan", "/"),
    *misbehaviour(),
    *script.cases,
]
