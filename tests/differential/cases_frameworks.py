"""Cases of the Starlette and FastAPI apps."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import re

from tests.differential.cases import Scripts, ask
from tests.differential.observe import Response, Talk

script = Scripts()

JSON = ("Content-Type", "application/json")
FORM = ("Content-Type", "application/x-www-form-urlencoded")
MULTIPART = ("Content-Type", "multipart/form-data; boundary=BOUND")


def part(name: str, content: bytes, more: str = "") -> bytes:
    """Return a part of a multipart body."""
    disposition = f'Content-Disposition: form-data; name="{name}"{more}'
    return b"--BOUND\r\n" + disposition.encode() + b"\r\n\r\n" + content + b"\r\n"


def file(name: str, filename: str, content: bytes) -> bytes:
    """Return the part of a file."""
    return part(name, content, f'; filename="{filename}"\r\nContent-Type: a/b')


PARTS = (
    part("words", "ä".encode())
    + file("files", "a b.bin", bytes(200_000))
    + file("files", "ü.txt", b"")
    + b"--BOUND--\r\n"
)

# Starlette.

ROUTING = [
    ask("routing", path)
    for path in (
        "",
        "/",
        "/urls?a=1&a=2&b=%C3%BC",
        "/users/me",
        "/users/a%20b%2Fc",
        "/users/a/b",
        "/float/1.5",
        "/float/x",
        "/rest/a/b//c%2Fd",
        "/slash",
        "/slash/",
        "/slash?q=1",
        "/no-slash",
        "/no-slash/",
        "/post",
        "/redirect",
        "/redirect-to",
        "/verbs",
        "/outer",
        "/outer/",
        "/outer/inner/urls",
        "/outer/inner/leaf/5",
        "/outer/inner/leaf/5/",
        "/outer/inner/nothing",
        "/files/a.txt",
        "/files",
        "/host",
        "/nothing",
        "//",
    )
] + [
    ask("routing", "/urls", name="urls at another host", host="elsewhere.test:81"),
    ask("routing", "/urls", name="urls by https", headers=[
        ("X-Forwarded-Proto", "https")]),
    ask("routing", "/urls", name="urls behind a proxy", headers=[
        ("X-Forwarded-Prefix", "/proxy"), ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-For", "203.0.113.7")]),
    ask("routing", "/host", name="by host", host="api.example.test"),
    ask("routing", "/post", "POST"),
    ask("routing", "/post", "OPTIONS"),
    ask("routing", "/verbs", "POST"),
    ask("routing", "/verbs", "DELETE"),
    ask("routing", "/users/me", "HEAD"),
    ask("routing", "/slash", "POST", name="redirect with body", body=b"x" * 1000),
]  # fmt: skip

RANGES = ("bytes=0-3", "bytes=-4", "bytes=40-", "bytes=4-2", "bytes=99-", "x=1-2")
FILES = [
    *(
        ask("files", path, method)
        for path in (
            "/one",
            "/static/a.txt",
            "/static",
            "/static/",
            "/static/sub",
            "/static/sub/",
            "/static/nothing",
            "/static/../asgi.py",
            "/static/%2e%2e/asgi.py",
            "/static/..%2fasgi.py",
            "/missing",
        )
        for method in ("GET", "HEAD")
    ),
    *(ask("files", "/one", name=f"range {r}", headers=[("Range", r)]) for r in RANGES),
    ask("files", "/static/a.txt", "POST"),
    ask("files", "/static/a.txt", name="unless changed", headers=[
        ("If-Modified-Since", "Wed, 21 Oct 2065 07:28:00 GMT")]),
    ask("files", "/one", name="if the same", headers=[
        ("Range", "bytes=0-3"), ("If-Range", '"another"')]),
]  # fmt: skip


@script("files")
async def etags(talk: Talk) -> None:
    etag = (await talk.ask("/static/a.txt")).header("etag")
    for given in (etag, f'W/{etag}, "x"', '"x"'):
        await talk.ask("/static/a.txt", headers=[("If-None-Match", given)])
    headers = [("Range", "bytes=0-3"), ("If-Range", etag)]
    await talk.ask("/static/a.txt", headers=headers)


@script("files")
async def several_ranges(talk: Talk) -> None:
    """Compare all but the boundary, which is random."""
    found = await talk.quietly("/one", headers=[("Range", "bytes=0-3,10-12")])
    kind = found.header("content-type")
    boundary = kind.partition("boundary=")[2]
    assert boundary, found
    talk.note("status and type", [found.status, kind.replace(boundary, "B")])
    talk.note("body", found.body.replace(boundary.encode(), b"B"))


STREAMING = [ask("streaming", f"/{name}") for name in ("sync", "async", "fails")]
STREAMING += [ask("streaming", "/async", "HEAD"), ask("streaming", "/failing-after")]


async def after(talk: Talk, path: str, count: int) -> None:
    """Get a response whose tasks have not run; let them, and look at them."""
    await talk.ask(f"{path}/{talk.key}", end=False)
    talk.note("notes before", (await talk.quietly(f"/notes/{talk.key}")).json())
    await talk.open()
    await talk.notes(count)


@script("streaming")
async def background_tasks(talk: Talk) -> None:
    await after(talk, "/after", 2)


@script("streaming")
async def background_task_of_a_stream(talk: Talk) -> None:
    await after(talk, "/after-stream", 1)


@script("streaming")
async def is_disconnected(talk: Talk) -> None:
    connection = await talk.connect()
    connection.request(f"/gone/{talk.key}")
    while not (await talk.quietly(f"/notes/{talk.key}")).json():
        await asyncio.sleep(0.01)
    connection.abort()
    await talk.notes(2)


@script("streaming")
async def client_leaves_a_stream(talk: Talk) -> None:
    connection = await talk.connect()
    connection.request(f"/closes/{talk.key}")
    await connection.head()
    await connection.chunk()
    connection.abort()
    await talk.notes(2)


ERRORS = [
    ask(app, f"/{kind}")
    for app in ("errors", "last-errors")
    for kind in ("teapot", "http", "empty", "unavailable", "unknown", "a/b")
]

ORIGIN = ("Origin", "https://friend.test")
MIDDLEWARE = [
    ask("middleware", "/stamped"),
    ask("middleware", "/stamped", "POST", body=b"x" * 1000),
    ask("middleware", "/stamped?refuse"),
    ask("middleware", "/stream"),
    ask("middleware", "/long"),
    ask("middleware", "/nothing"),
    ask("middleware", "/raise/http", headers=[ORIGIN]),
    ask("middleware", "/raise/other", headers=[ORIGIN]),
    ask("middleware", "/stamped", name="of a friend", headers=[ORIGIN]),
    ask("middleware", "/stamped", name="of a stranger", headers=[
        ("Origin", "https://x.test")]),
    *(
        ask("middleware", "/stamped", "OPTIONS", name=f"may I {method}", headers=[
            ORIGIN, ("Access-Control-Request-Method", method)])
        for method in ("PUT", "DELETE")
    ),
    ask("trusted-hosts", "/"),
    ask("trusted-hosts", "/", name="stranger", host="evil.test"),
    ask("trusted-hosts", "/", name="below", host="a.good.test:80"),
    ask("trusted-hosts", "/x?y", name="www", host="www.example.test"),
    ask("trusted-hosts", "/", name="odd host", host="a/../b@c"),
]  # fmt: skip


async def unzipped(talk: Talk, path: str) -> None:
    """Compare what was compressed; the compressed form may have a time in it."""
    found = await talk.quietly(path, headers=[("Accept-Encoding", "gzip")])
    headers = [h for h in found.headers if h[0] != "x-request-id"]
    talk.note("headers", headers)
    talk.note("in chunks", found.chunks is not None)
    talk.note("body", gzip.decompress(found.body))


@script("middleware")
async def compressed(talk: Talk) -> None:
    await unzipped(talk, "/long")


@script("middleware")
async def compressed_stream(talk: Talk) -> None:
    await unzipped(talk, "/stream")


def without_value(cookie: str) -> str:
    """Leave the signature out, in which there is the time."""
    return re.sub("session=[^;]{40,}", "session=...", cookie)


@script("sessions")
async def session(talk: Talk) -> None:
    cookie = ""
    for path in ("/count", "/count", "/forget", "/count"):
        headers = [("Cookie", cookie)] if cookie else []
        found = await talk.quietly(path, headers=headers)
        talk.note("answer", [found.status, found.body])
        talk.note("cookie", without_value(found.header("set-cookie")))
        cookie = found.header("set-cookie").partition(";")[0]


@script("sessions")
async def forged_session(talk: Talk) -> None:
    found = await talk.quietly("/count", headers=[("Cookie", "session=forged")])
    talk.note("answer", [found.status, found.body])


FORMS = [
    ask("forms", "/form", "POST", headers=[FORM], body=b"a=1&a=%C3%BC&b=+&c"),
    ask("forms", "/form", "PUT", headers=[MULTIPART], body=PARTS),
    ask("forms", "/form", "POST", name="no boundary", headers=[
        ("Content-Type", "multipart/form-data")], body=PARTS),
    ask("forms", "/form", "POST", name="cut form", headers=[MULTIPART],
        body=PARTS[:1000]),
    ask("forms", "/stream", "POST", body=bytes(500_000)),
    ask("forms", "/json", "POST", headers=[JSON], body=b'{"a": [1, null, "\xc3\xbc"]}'),
    ask("forms", "/json", "POST", name="bad JSON", headers=[JSON], body=b"{"),
]  # fmt: skip


@script("lifespan")
async def state(talk: Talk) -> None:
    for _ in range(2):
        await talk.ask("/state")


# FastAPI.

ITEM = json.dumps({"name": "thing", "price": "1.5", "when": "2024-01-02T03:04:05Z"})
ITEMS = [
    *(
        ask("items", path)
        for path in (
            "/items/5",
            "/items/5?q=abc",
            "/items/5?q=too-long",
            "/items/x",
            "/parameters",
            "/parameters?tags=a&tags=b",
            "/cookies",
            "/html",
            "/nothing",
            "/elsewhere",
            "/slash",
            "/broken",
            "/missing",
            "/docs",
            "/redoc",
            "/openapi.json",
            "/any",
        )
    ),
    *(
        ask("items", "/any", method)
        for method in ("PATCH", "DELETE", "OPTIONS", "HEAD", "POST")
    ),
    ask("items", "/parameters", name="headers and cookies", headers=[
        ("X-Many", "1"), ("X-Many", "2"), ("Cookie", "session=s"),
        ("User-Agent", "t")]),
    ask("items", "/items", "POST", headers=[JSON], body=ITEM.encode()),
    ask("items", "/items", "POST", name="POST of nothing"),
    ask("items", "/items", "POST", name="POST not valid", headers=[JSON],
        body=b'{"name": "x", "tags": [1]}'),
    ask("items", "/items", "POST", name="POST no JSON", headers=[JSON], body=b"{"),
    ask("items", "/items/7", "PUT", headers=[JSON],
        body=b'{"item": %b, "note": "n"}' % ITEM.encode()),
]  # fmt: skip


async def cleanup(talk: Talk, path: str, count: int) -> None:
    """Compare a response and what the dependencies did."""
    await talk.ask(f"{path}/{talk.key}", end=False)
    await talk.notes(count)


@script("dependencies")
async def used(talk: Talk) -> None:
    await cleanup(talk, "/use", 5)


@script("dependencies")
async def failed(talk: Talk) -> None:
    await cleanup(talk, "/fail", 4)


@script("dependencies")
async def refused(talk: Talk) -> None:
    await cleanup(talk, "/refuse", 3)


@script("dependencies")
async def streamed(talk: Talk) -> None:
    await cleanup(talk, "/stream", 5)


ROUTERS = [
    *(
        ask("routers", path)
        for path in (
            "/router/x",
            "/router/nested/y",
            "/router/nested/y/",
            "/inner/z",
            "/inner",
            "/inner/docs",
            "/inner/openapi.json",
            "/the-docs",
            "/the-docs/oauth2-redirect",
            "/docs",
            "/openapi.json",
        )
    ),
    *(ask("docs", path) for path in ("", "/", "/docs", "/redoc", "/openapi.json")),
    ask("docs", "/docs/"),
    *(ask("rooted", path) for path in ("/", "/inner/x", "/docs", "/openapi.json")),
]


@script("routers")
async def socket_of_the_inner_app(talk: Talk) -> None:
    async with talk.websocket("/inner/socket") as socket:
        await socket.closed()


SECURITY = [
    ask("security", "/bearer"),
    ask("security", "/bearer", name="bearer", headers=[("Authorization", "Bearer t")]),
    ask("security", "/bearer", name="no bearer", headers=[("Authorization", "x t")]),
    ask("security", "/basic"),
    ask("security", "/basic", name="basic", headers=[
        ("Authorization", "Basic " + base64.b64encode(b"me:secret").decode())]),
    ask("security", "/token", "POST", headers=[FORM], body=b"username=u&password=p"),
    ask("security", "/openapi.json"),
]  # fmt: skip

TASKS = [ask("tasks", "/sync")]


@script("tasks")
async def background(talk: Talk) -> None:
    await talk.ask(f"/after/{talk.key}", end=False)
    # The dependency's task does not wait for anything, the next one does.
    await talk.notes(1)
    await talk.open()
    await talk.notes(3)


@script("tasks")
async def server_sent_events(talk: Talk) -> None:
    connection = await talk.connect()
    connection.request(f"/events/{talk.key}")
    await connection.head()
    talk.note("event", await connection.chunk())
    for name in ("second", "last"):
        await talk.open(name)
        talk.note("event", await connection.chunk())
    await connection.rest(end=True)


HANDLERS = [
    ask("handlers", "/unicorn/bob"),
    ask("handlers", "/missing"),
    ask("handlers", "/models"),
    ask("handlers", "/fail"),
    ask("handlers", "/models", "POST"),
]

UPLOADS = [
    ask("uploads", "/files", "POST", headers=[MULTIPART], body=PARTS),
    ask("uploads", "/files", "POST", name="no files"),
    ask("uploads", "/bytes", "POST", headers=[MULTIPART],
        body=file("file", "f", bytes(3_000_000)) + b"--BOUND--\r\n"),
    ask("uploads", "/bytes", "POST", name="not multipart", headers=[JSON], body=b"{}"),
]  # fmt: skip

BY_CLASS = [
    *(
        ask("by-class", path)
        for path in (
            "/numbers/1?factor=5",
            "/numbers/x",
            "/numbers/9",
            "/all",
            "/items",
            "/openapi.json",
            "/docs",
        )
    ),
    ask("by-class", "/items", "POST", headers=[JSON], body=ITEM.encode()),
    ask("by-class", "/items", "POST", name="not valid", headers=[JSON], body=b"{}"),
]


@script("by-class")
async def socket_of_the_class(talk: Talk) -> None:
    async with talk.websocket("/socket") as socket:
        await socket.closed()


@script("handlers")
async def errors_do_not_last(talk: Talk) -> None:
    """After an error, others are served as before."""
    for path in ("/fail", "/models", "/fail", "/unicorn/x"):
        found = await talk.quietly(path)
        talk.note(path, summary(found))


def summary(response: Response) -> list[object]:
    """Return what counts of a response that is not compared whole."""
    return [response.status, response.body, response.complete]


CASES = [
    *ROUTING,
    *FILES,
    *STREAMING,
    *ERRORS,
    *MIDDLEWARE,
    *FORMS,
    *ITEMS,
    *ROUTERS,
    *SECURITY,
    *TASKS,
    *HANDLERS,
    *UPLOADS,
    *BY_CLASS,
    *script.cases,
]
