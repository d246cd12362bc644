"""Which session a request belongs to, and which replica has it. Pure; any process.

Deployments with the option ``session_affinity`` name a header, a cookie or a parameter
of the query that has a session's id. Proxies look for it in requests; replicas look for
ids that the app makes in its responses, and tell the proxies what they have found.
Nobody passes an id on, or logs it: what travels is its digest.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping
from typing import Literal, NamedTuple, Self
from urllib.parse import quote, unquote_to_bytes

DIGEST_BYTES = 16
#: For how many sessions of a deployment a caller keeps which replica has them.
MAX_BOUND = 100_000
#: What browsers take from servers with TLS only.
_SECURE_COOKIES = (b"__Host-", b"__Secure-")
#: A cookie of ours says itself which replica has the session, as it does in nginx and
#: HAProxy: clients that keep no cookies begin one with each request.
_OUR_COOKIE = re.compile(rb"serve-([0-9a-f]{1,15})-[0-9a-f]{32}")


class Session(NamedTuple):
    """A session as callers know it."""

    digest: bytes
    #: Of the replica that its id names; 0: it names none.
    replica_id: int = 0

    @classmethod
    def of(cls, session_id: bytes) -> Self:
        """Return the session that has an id."""
        digest = hashlib.blake2b(session_id, digest_size=DIGEST_BYTES).digest()
        ours = _OUR_COOKIE.fullmatch(session_id)
        return cls(digest, 0 if ours is None else int(ours[1], 16))


class Affinity(NamedTuple):
    """Where a deployment's requests and responses have the ids of sessions."""

    kind: Literal["header", "cookie", "query"]
    #: Of a header in small letters.
    name: bytes

    @classmethod
    def of(cls, option: Mapping[str, str] | None) -> Self | None:
        """Return what the option ``session_affinity`` says, which was checked."""
        if option is None:
            return None
        ((kind, name),) = option.items()
        return cls(kind, name.encode())  # type: ignore[arg-type]

    def session(
        self, headers: Iterable[tuple[bytes, bytes]], query_string: bytes
    ) -> Session | None:
        """Return the session that a request belongs to, if it says so."""
        session_id = self.find(headers, query_string)
        return Session.of(session_id) if session_id else None

    def find(
        self, headers: Iterable[tuple[bytes, bytes]], query_string: bytes
    ) -> bytes:
        """Return the id in a request; b"" if it has none. The first one counts."""
        kind, name = self
        if kind == "query":
            return _in_query(query_string, name)
        if kind == "header":
            return next((value.strip() for key, value in headers if key == name), b"")
        for key, line in headers:
            if key == b"cookie" and name in line:
                for pair in line.split(b";"):
                    found = _in_pair(pair, name)
                    if found is not None:
                        return found
        return b""

    def find_made(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """Return the id in a response; b"" if it has none.

        Of several cookies the last one counts, as it does for clients. Names of headers
        are in small letters.
        """
        kind, name = self
        if kind == "header":
            return self.find(headers, b"")
        made = b""
        if kind == "cookie":
            for key, line in headers:
                if key == b"set-cookie":
                    found = _in_pair(line.partition(b";")[0], name)
                    made = made if found is None else found
        return made

    def cookie(self, replica_id: int, path: str) -> bytes | None:
        """Return a ``Set-Cookie`` that binds a new session to a replica.

        None if none can be made.
        """
        if self.kind != "cookie" or self.name.startswith(_SECURE_COOKIES):
            return None
        # What a server calls its path, as in the client's requests.
        where = quote(path or "/", safe="/%!$&'()*+,:=@~").encode()
        value = b"serve-%x-%s" % (replica_id, secrets.token_hex(16).encode())
        return b"%s=%s; Path=%s; HttpOnly; SameSite=Lax" % (self.name, value, where)


class Bindings:
    """Which replica has which session, as one caller was told; the newest ones."""

    def __init__(self, limit: int = MAX_BOUND) -> None:
        self._limit = limit
        self._replicas: OrderedDict[bytes, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._replicas)

    def bind(self, replica_id: int, digests: bytes) -> None:
        """Note the sessions, by their digests in a row, that a replica has."""
        for i in range(0, len(digests), DIGEST_BYTES):
            digest = digests[i : i + DIGEST_BYTES]
            self._replicas[digest] = replica_id
            self._replicas.move_to_end(digest)
        while len(self._replicas) > self._limit:
            self._replicas.popitem(last=False)

    def find(self, session: Session, replicas: Container[int]) -> int:
        """Return which of the replicas that there are has a session; 0 for none."""
        replica_id = session.replica_id or self._replicas.get(session.digest, 0)
        if replica_id in replicas:
            if not session.replica_id:
                self._replicas.move_to_end(session.digest)
            return replica_id
        self._replicas.pop(session.digest, None)  # it has gone, with all it knew
        return 0


def _in_pair(pair: bytes, name: bytes) -> bytes | None:
    """Return the value in ``name=value``; None if that is of another name."""
    key, _, value = pair.partition(b"=")
    # Some clients send the quotes back, some do not.
    return value.strip().strip(b'"') if key.strip() == name else None


def _in_query(query: bytes, name: bytes) -> bytes:
    if name not in query and b"%" not in query and b"+" not in query:
        return b""
    for field in query.split(b"&"):
        key, _, value = field.partition(b"=")
        if key == name or _decoded(key) == name:
            return _decoded(value)
    return b""


def _decoded(text: bytes) -> bytes:
    if b"%" not in text and b"+" not in text:
        return text
    return unquote_to_bytes(text.replace(b"+", b" "))
