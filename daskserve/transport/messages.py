"""Everything that crosses a channel, and the names of the ops on Dask's comms.

A message is a tuple ``(op, exchange_id, ...)`` of what msgpack can carry; a channel
packs many of them at once. An exchange is one request or one call; its id is the
caller's, unique on one channel.

From a caller to a replica (the third field is always the replica's id):

===========  ===============================================================
``REQUEST``  replica, the fields of `Head`, body, more_body
``CALL``     replica, method name, packed ``(args, kwargs)``, keys of the Dask
             futures in them, request id, id of the model that it is for or "",
             window in bytes or None, packed results that are among the arguments;
             with a window it is a stream
``BODY``     replica, data, more_body
``CREDIT``   replica, bytes of the response that the caller has passed on, or cost
             of the items that it has consumed
``CONNECT``  replica, head with subprotocols: a WebSocket
``EVENT``    replica, an ASGI event of a WebSocket, as a dict
``CANCEL``   replica: the caller has gone, or does not want an answer any more
===========  ===============================================================

From a replica to a caller:

============  ==============================================================
``RESPONSE``  status, headers, body: the whole response
``START``     status, headers
``CHUNK``     data, more_body
``PUSH``      an ASGI event of a WebSocket, as a dict
``END``       the app of a WebSocket has returned; there are no more items
``ITEM``      packed item of a stream
``RESULT``    packed result of a call
``ERROR``     kind, type name, text, traceback, pickled exception or None
``REFUSED``   reason: it was not handed to user code, try another replica
``GRANT``     bytes of the request's body that user code has taken
============  ==============================================================

These belong to no exchange, and have a 0 for its id:

============  ==============================================================
``WANT``      replica, number of slots that a caller has use for; it gets as many
              ``ROOM`` in time
``ROOM``      replica: it keeps a slot for a caller that wants one or was refused
``DECLINE``   replica: from a caller that has no use for slots any more
``LOAD``      replica, requests of others in it, how many it takes at a time,
              microseconds that each adds to the wait of the next, and that are
              typical for it, whether calls that nobody waits for keep it from all
              others: when that has changed
``MODELS``    replica, how many models it keeps or 0, microseconds that one takes to
              load, ids of those it has: when they have changed
``FOLLOW``    replica: from a caller that wants to be told of its sessions and models
``SESSION``   replica, digests in a row: it has these sessions; see `affinity`
``WELCOME``   the secret was right (on direct connections)
``GOODBYE``   the replica is about to end (on direct connections)
============  ==============================================================

A connection carries large fields in parts; see `parts`:

============  ==============================================================
``PART``      number of a field, its size, whether it is a ``memoryview``, data
``WHOLE``     the message that they are parts of
============  ==============================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeAlias

from daskserve.exceptions import RequestError

Message: TypeAlias = tuple[Any, ...]
Headers: TypeAlias = list[tuple[bytes, bytes]]

REQUEST: Final = 1
CALL: Final = 2
BODY: Final = 3
CREDIT: Final = 4
CANCEL: Final = 5
CONNECT: Final = 6
EVENT: Final = 7

RESPONSE: Final = 16
START: Final = 17
CHUNK: Final = 18
RESULT: Final = 19
ERROR: Final = 20
REFUSED: Final = 21
GRANT: Final = 22
PUSH: Final = 23
END: Final = 24
ITEM: Final = 25

ROOM: Final = 32
WELCOME: Final = 33
GOODBYE: Final = 34
DECLINE: Final = 35
WANT: Final = 36
LOAD: Final = 37
MODELS: Final = 38
FOLLOW: Final = 39
SESSION: Final = 40

PART: Final = 48
WHOLE: Final = 49

#: Messages that begin an exchange.
OPENING: Final = frozenset({REQUEST, CALL, CONNECT})
#: Why a request is ``REFUSED`` by a replica that offers a slot later.
FULL: Final = "full"
#: Why a WebSocket is.
FULL_OF_WEBSOCKETS: Final = "max_websockets"
#: Of requests at once, where there is no limit.
NO_LIMIT: Final = 2**31 - 1
#: The id of no replica: a worker refuses what is for it, and so says that it lives.
NOBODY: Final = 0
#: Messages with packed values, in which there may be views of memory.
PACKED: Final = frozenset({CALL, RESULT, ITEM})


#: Headers of a request that name the model that it is for. (nginx drops the first.)
MODEL_HEADERS: Final = (b"serve_multiplexed_model_id", b"serve-multiplexed-model-id")
_MODEL_HEADERS = frozenset(MODEL_HEADERS)


def model_id_of(headers: Mapping[bytes, bytes]) -> str:
    """Return the model that a request is for; "" if its headers name none."""
    if _MODEL_HEADERS.isdisjoint(headers):  # as in most, and quicker than to look
        return ""
    return next(headers[n] for n in MODEL_HEADERS if n in headers).decode("latin-1")


class Head(NamedTuple):
    """What a `REQUEST`'s head holds; a `CONNECT`'s has the subprotocols besides."""

    method: str
    path: str
    raw_path: bytes
    query_string: bytes
    headers: Headers
    http_version: str
    scheme: str
    client: tuple[str, int] | None
    server: tuple[str, int | None] | None
    root_path: str
    request_id: str
    debug: bool
    #: How much of the response the caller will hold.
    window_bytes: int

    def scope(
        self, kind: str, versions: Mapping[str, str], state: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Return what ASGI scopes of both kinds have; with a copy of `state`."""
        # At once: field by field takes three times as long.
        (_, path, raw_path, query_string, headers, http_version, scheme, client,
         server, root_path, _, _, _) = self  # fmt: skip
        return {
            "type": kind,
            "asgi": versions,
            "http_version": http_version,
            "scheme": scheme,
            "path": path,
            "raw_path": raw_path,
            "query_string": query_string,
            "root_path": root_path,
            "headers": list(headers),
            "client": client,
            "server": server,
            "state": {} if state is None else dict(state),
        }


RETRY_AFTER: Final = (b"retry-after", b"1")


def error_response(error: RequestError) -> tuple[int, Headers, bytes]:
    """Return status, headers and body of the answer to a request that failed."""
    body = (str(error) or type(error).__name__).encode("utf-8", "replace")
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", b"%d" % len(body)),
    ]
    if error.status_code == 503:
        headers.append(RETRY_AFTER)
    return error.status_code, headers, body


# Kinds of `ERROR`.
USER_ERROR: Final = "user"  # user code raised
NOT_ENCODABLE: Final = "not-encodable"  # its result cannot be expressed
UNKNOWN_METHOD: Final = "unknown-method"
STOPPED: Final = "stopped"  # the replica ended with the request in it
CUT: Final = "cut"  # the response began and cannot be completed

#: What an item of a stream counts beside its bytes, so that small ones are not many.
ITEM_OVERHEAD_BYTES: Final = 1024


def item_cost(item: bytes | tuple[Any, ...]) -> int:
    """Return what a packed item takes of the window."""
    size = len(item) if type(item) is bytes else sum(map(len, item))
    return size + ITEM_OVERHEAD_BYTES


#: Chunks of bodies are split to at most this many bytes, so that one body cannot keep
#: a channel busy for long.
MAX_CHUNK_BYTES: Final = 256 * 1024

# Ops on Dask's comms. RPC ops have underscores, stream ops hyphens.
OP_CHANNEL: Final = "serve_channel"  # caller -> worker: this comm is a channel now
OP_RELAY: Final = "serve_relay"  # client -> scheduler: this comm goes on to a worker
OP_BIND: Final = "serve_bind"  # scheduler -> worker: start an HTTP server
OP_UNBIND: Final = "serve_unbind"  # scheduler -> worker: stop it
OP_SHARE: Final = "serve_share"  # scheduler -> worker: share the port, or no more
OP_UNLISTEN: Final = "serve_unlisten"  # scheduler -> worker: others take connections
OP_LEAVE: Final = "serve_leave"  # worker -> scheduler: I leave; answered when I can
STREAM_ROUTES: Final = "serve-routes"  # scheduler -> worker or client: what changed
STREAM_LOST: Final = "serve-lost"  # scheduler -> worker or client: workers or replicas
STREAM_COMMAND: Final = "serve-command"  # scheduler -> worker: to one replica
STREAM_ACK: Final = "serve-ack"  # worker or client -> scheduler: snapshot applied
STREAM_BYE: Final = "serve-bye"  # client -> scheduler: no more snapshots, please
STREAM_HELLO: Final = "serve-hello"  # worker -> scheduler: its plugin is set up
STREAM_END: Final = "serve-end"  # worker -> scheduler: when its job ends, if it does
STREAM_LOAD: Final = "serve-load"  # worker or client -> scheduler: requests in all
STREAM_QUEUED: Final = "serve-queued"  # both ways: how many requests wait
STREAM_REPLICA: Final = "serve-replica"  # worker -> scheduler: a replica's news
STREAM_HEALTH: Final = "serve-health"  # worker -> scheduler: it lives, what is ill

#: How often a worker without replicas says that it lives.
IDLE_PERIOD_S: Final = 10.0
#: And for how long it may say nothing before it counts as silent.
IDLE_PATIENCE_S: Final = 40.0
#: However short the periods of health checks are, a worker may say nothing for so long.
LEAST_PATIENCE_S: Final = 2.0
