"""The sessions that began in one replica, and who is told of them; on its loop."""

from __future__ import annotations

from daskserve.transport.affinity import Affinity, Session
from daskserve.transport.channel import ReplyTo
from daskserve.transport.messages import SESSION, Head, Headers

#: How many of the newest ones are told to callers that connect later.
MAX_TOLD = 10_000
#: In one message: what is larger is overtaken by answers.
AT_ONCE = 500


class Sessions:
    """Find the sessions that an app's responses begin, and tell all callers.

    Parameters
    ----------
    affinity
        Where ids are.
    replica_id
        The replica's.
    """

    def __init__(self, affinity: Affinity, replica_id: int) -> None:
        self._affinity = affinity
        self._replica_id = replica_id
        #: Digests, the newest ones last.
        self._begun: dict[bytes, None] = {}
        self._followers: set[ReplyTo] = set()

    def follow(self, caller: ReplyTo) -> None:
        """Tell `caller` of the newest sessions, and of all to come."""
        self._followers.add(caller)
        begun = list(self._begun)
        for i in range(0, len(begun), AT_ONCE):
            digests = b"".join(begun[i : i + AT_ONCE])
            caller.send((SESSION, 0, self._replica_id, digests))

    def forget(self, caller: ReplyTo) -> None:
        """Forget a caller that has gone."""
        self._followers.discard(caller)

    def answered(self, caller: ReplyTo, head: Head, headers: Headers) -> None:
        """Note the session that a response begins, before `caller` is sent that.

        A request that belongs to none, and is not given one by the app, is given one by
        a cookie in the `headers` of the response, if that is what the ids are in.
        """
        affinity = self._affinity
        if affinity.kind == "query":
            return
        made = affinity.find_made(headers)
        given = affinity.find(head.headers, head.query_string)
        if made and made != given:
            self._begin(caller, Session.of(made).digest)
        elif not made and not given:
            cookie = affinity.cookie(self._replica_id, head.root_path)
            if cookie is not None:
                headers.append((b"set-cookie", cookie))

    def _begin(self, caller: ReplyTo, digest: bytes) -> None:
        if digest in self._begun:
            return
        self._begun[digest] = None
        if len(self._begun) > MAX_TOLD:
            del self._begun[next(iter(self._begun))]
        message = (SESSION, 0, self._replica_id, digest)
        caller.send(message)
        for follower in self._followers:
            if follower is not caller:
                follower.send(message)
