"""All that may differ between plain uvicorn and daskserve, each with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from daskserve.transport.messages import MAX_CHUNK_BYTES
from tests.differential.cases import Case
from tests.differential.observe import Handshake, Note, Response, Seen


@dataclass(frozen=True)
class Difference:
    """One difference that is meant.

    Parameters
    ----------
    name
        What differs.
    reason
        Why it may.
    forgive
        Takes what uvicorn and what daskserve did; returns the latter without the
        difference, if it is exactly this one.
    cases
        Ids of the cases in which it shows; each must show it, and no others may.
    """

    name: str
    reason: str
    forgive: Callable[[Seen, Seen], Seen]
    cases: Sequence[str]


def with_its_error(theirs: Seen, ours: Seen) -> Seen:
    """Forgive that the connection is kept after an error; all else has to be equal."""
    if isinstance(theirs, Response) and isinstance(ours, Response):
        headers = ours.headers
        if ("connection", "close") in theirs.headers:
            headers = (*headers, ("connection", "close"))
        if theirs.complete and (theirs.after, ours.after) == ("closed", "kept"):
            return replace(ours, headers=headers, after="closed")
    return ours


def error_for_nothing(theirs: Seen, ours: Seen) -> Seen:
    """Forgive a whole 500 where uvicorn sends a head at most, and closes."""
    if isinstance(theirs, Response) and isinstance(ours, Response):
        cut = not theirs.complete and not theirs.body
        if cut and replace(ours, after="kept") == INTERNAL_SERVER_ERROR:
            return theirs
    return ours


def error_for_1xx(theirs: Seen, ours: Seen) -> Seen:
    """Forgive a 500 where uvicorn sends what is no response."""
    if isinstance(theirs, Response) and isinstance(ours, Response):
        if 100 <= theirs.status < 200 and ours == INTERNAL_SERVER_ERROR:
            return theirs
    return ours


def more_continues(theirs: Seen, ours: Seen) -> Seen:
    """Forgive one ``100 Continue``."""
    if isinstance(theirs, Response) and isinstance(ours, Response):
        if (theirs.continued, ours.continued) == (0, 1):
            return replace(ours, continued=0)
    return ours


def closed_instead_of_read(theirs: Seen, ours: Seen) -> Seen:
    """Forgive that the connection is closed, if that was announced."""
    if isinstance(theirs, Response) and isinstance(ours, Response):
        closing = ("connection", "close")
        if closing in ours.headers and (theirs.after, ours.after) == ("kept", "closed"):
            headers = tuple(h for h in ours.headers if h != closing)
            return replace(ours, headers=headers, after="kept")
    return ours


def cancelled(theirs: Seen, ours: Seen) -> Seen:
    """Forgive that the app's task is cancelled where it is to notice by itself."""
    if isinstance(theirs, Note) and isinstance(ours, Note):
        for told in ("http.disconnect", "disconnected"):
            if [*ours.value] == _replaced(theirs.value, told, "cancelled"):
                return theirs
    return ours


def _replaced(values: Iterable[object], old: object, new: object) -> list[object]:
    return [new if value == old else value for value in values]


def split_chunks(theirs: Seen, ours: Seen) -> Seen:
    """Forgive that chunks come in pieces of `MAX_CHUNK_BYTES`."""
    if isinstance(theirs, Response) and isinstance(ours, Response):
        if theirs.chunks and tuple(_split(theirs.chunks)) == ours.chunks:
            return replace(ours, chunks=theirs.chunks)
    return ours


def _split(chunks: Iterable[int]) -> Iterator[int]:
    for size in chunks:
        yield from [MAX_CHUNK_BYTES] * (size // MAX_CHUNK_BYTES)
        if size % MAX_CHUNK_BYTES:
            yield size % MAX_CHUNK_BYTES


def no_route(theirs: Seen, ours: Seen) -> Seen:
    """Forgive the answer to a path that has no route."""
    if isinstance(ours, Response) and ours.status == 404:
        if ours.body.startswith(b"Path '*' not found. Please ping "):
            return theirs
    return ours


def forwarded_prefix(theirs: Seen, ours: Seen) -> Seen:
    """Forgive a prefix that was forwarded, in the app's own URLs."""
    if isinstance(theirs, Response) and isinstance(ours, Response):
        if ours.body.replace(b"/proxy", b"") == theirs.body:
            return replace(ours, body=theirs.body, headers=theirs.headers)
    return ours


def own_path(theirs: Seen, ours: Seen) -> Seen:
    """Forgive the table of routes, with the app at its root."""
    if isinstance(ours, Response) and ours.status == 200:
        if json.loads(ours.body).get("/", "").endswith("-echo"):
            return theirs
    return ours


def other_words(theirs: Seen, ours: Seen) -> Seen:
    """Forgive another text, with what the headers say of it, for the same status."""
    if isinstance(theirs, Response) and isinstance(ours, Response):
        about_text = {"content-length", "content-type"}
        left = [
            sorted((n.lower(), v) for n, v in r.headers if n.lower() not in about_text)
            for r in (theirs, ours)
        ]
        if left[0] == left[1]:
            return replace(ours, headers=theirs.headers, body=theirs.body)
    return ours


INTERNAL_SERVER_ERROR = Response(
    500,
    "Internal Server Error",
    (("content-type", "text/plain; charset=utf-8"), ("content-length", "21")),
    b"Internal Server Error",
    complete=True,
    after="kept",
)

DIFFERENCES = [
    Difference(
        "the connection is kept after an error",
        "uvicorn closes the connection when an app raises, or does not answer, even if "
        "the response is complete. Here the error was in another place than the "
        "connection: the client has its answer, and need not connect again. A response "
        "that is not complete is cut, as on uvicorn.",
        with_its_error,
        [
            *(
                f"misbehaving: GET /{name}"
                for name in (
                    "returns",
                    "raises",
                    "raises-exit",
                    "raises-after-the-end",
                    "body-first",
                    "ends-twice",
                    "unknown-event",
                    "no-type",
                    "body-of-204",
                    "body-of-304",
                )
            ),
            "misbehaving: HEAD /raises",
            "misbehaving: POST /raises",
            "files: GET /missing",
            "files: HEAD /missing",
            "streaming: GET /failing-after",
            "errors: GET /unknown",
            "last-errors: GET /teapot",
            "last-errors: GET /unknown",
            "middleware: GET /raise/other",
            "forms: bad JSON",
            "items: GET /broken",
            "handlers: GET /fail",
            "by-class: GET /numbers/9",
        ],
    ),
    Difference(
        "a head that nothing follows becomes a 500",
        "uvicorn sends a head at once; if the app then fails, or if the head is "
        "malformed, the client gets half a response or none. Here the head waits for "
        "the body for one turn of the app's loop, and it is checked in the replica: an "
        "error until then can still be told (the contract's row 'user code raises').",
        error_for_nothing,
        [
            *(
                f"misbehaving: GET /{name}"
                for name in (
                    "returns-after-start",
                    "raises-after-start",
                    "too-long",
                    "bad-length",
                    "starts-twice-at-once",
                )
            ),
            *(
                f"misbehaving: GET /bad-status/{kind}"
                for kind in ("low", "high", "text", "none")
            ),
            *(
                f"misbehaving: GET /bad-header/{kind}"
                for kind in (
                    "text-name",
                    "text-value",
                    "newline",
                    "newline-name",
                    "null",
                    "space",
                    "none",
                )
            ),
        ],
    ),
    Difference(
        "statuses of 1xx are an error",
        "They come before a response and are none: what follows would be taken for the "
        "next one's, by a proxy in front for another client's.",
        error_for_1xx,
        ["responses: GET /odd-status/103", "responses: GET /odd-status/199"],
    ),
    Difference(
        "a handshake that is no GET is refused in our words",
        "On uvicorn it depends on the version of websockets what it is told, and "
        "whether it is refused at all.",
        other_words,
        ["sockets: POST"],
    ),
    Difference(
        "100 Continue is sent before the app reads",
        "A small body is read before a replica is asked, so that a slow sender holds "
        "no place in it. On uvicorn a client is told to go on when the app reads.",
        more_continues,
        ["bodies: expect continue but refused"],
    ),
    Difference(
        "a response before the end of a body of unknown length closes the connection",
        "uvicorn reads the rest, for as long as it comes, and throws it away. A proxy "
        "does so if the length was announced, and so is within the limit of bodies.",
        closed_instead_of_read,
        ["bodies: chunked and not read"],
    ),
    Difference(
        "the app's task is cancelled when its client goes",
        "The contract's row 'client gone': a response that nobody waits for ends, also "
        "where the app does not look. On uvicorn it has to receive `http.disconnect`.",
        cancelled,
        [
            "streams: client goes before",
            "streaming: is disconnected",
        ],
    ),
    Difference(
        "chunks of more than 256 KiB come in several",
        "One body must not keep the connection to a replica busy for long, which many "
        "requests share. How a body is divided has no meaning in HTTP.",
        split_chunks,
        ["responses: GET /large/900000"],
    ),
    Difference(
        "X-Forwarded-Prefix counts, if the peer is trusted",
        "The contract's row 'scope': jupyter-server-proxy sends it, and links have to "
        "lead through it. uvicorn leaves it to the command line (`--root-path`).",
        forwarded_prefix,
        ["routing: urls behind a proxy"],
    ),
    Difference(
        "two paths below /-/ are the proxy's own",
        "The contract's rows of `/-/routes` and `/-/healthz`; an app at `/` does not "
        "get them. Under any other prefix it does.",
        own_path,
        ["echo: GET /-/routes"],
    ),
    Difference(
        "OPTIONS * does not reach an app under a prefix",
        "It asks about the server as a whole; its path `*` is in no app's prefix.",
        no_route,
        ["echo: OPTIONS *"],
    ),
]


def reconcile(
    case: Case, expected: list[Seen], found: list[Seen]
) -> tuple[list[Seen], set[tuple[str, str]]]:
    """Return what was found without allowed differences, and which ones these were."""
    found = [without_request_id(theirs) for theirs in found]
    used = set()
    for difference in DIFFERENCES:
        if case.id in difference.cases and len(expected) == len(found):
            pairs = zip(expected, found, strict=True)
            forgiven = [difference.forgive(theirs, ours) for theirs, ours in pairs]
            if forgiven != found:
                used.add((difference.name, case.id))
                found = forgiven
    return found, used


def without_request_id(seen: Seen) -> Seen:
    """Leave out the header that daskserve adds to every response (the contract's)."""
    if not isinstance(seen, Response | Handshake):
        return seen
    headers = list(seen.headers)
    for i in reversed(range(len(headers))):
        if headers[i][0] == "x-request-id":
            del headers[i]
            break
    return replace(seen, headers=tuple(headers))
