"""Many exchanges on one connection, from a caller to a worker. Any process.

Three carriers: a Dask comm to the worker's own address (no port of ours, the cluster's
TLS holds), a mailbox for replicas in the caller's process, and, in `direct`, the quick
one to a replica's own port. All carry the tuples of `messages`; whoever uses a
`Channel` cannot tell them apart.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import msgpack
from distributed.protocol.serialize import to_serialize

from daskserve.exceptions import RequestError
from daskserve.transport.flushing import flushed
from daskserve.transport.loops import Mailbox
from daskserve.transport.messages import (
    GRANT,
    OP_CHANNEL,
    OPENING,
    REFUSED,
    Message,
)
from daskserve.transport.outbox import Outbox
from daskserve.transport.parts import Joiner

logger = logging.getLogger(__name__)

#: From this size on a batch goes as a frame of its own, not copied into msgpack again.
OWN_FRAME_BYTES = 64 * 1024


class ReplyTo(Protocol):
    """Where a replica sends its messages; hashable, one for each channel."""

    #: The process that asks, which may have several channels.
    caller: str

    def send(self, message: Message) -> None:
        """Queue `message`; any thread."""


class Inbox(Protocol):
    """A replica's end of all channels."""

    @property
    def deserted(self) -> int:
        """Calls that run on in it though nobody waits for them; any thread."""

    def put(self, reply_to: ReplyTo, batch: list[Message]) -> None:
        """Hand messages to the replica, in this order; any thread."""

    def forget(self, reply_to: ReplyTo) -> None:
        """Cancel what came from `reply_to`: its caller is gone; any thread."""


class ConnectionLostError(RequestError):
    """The way to the replica broke; the request may or may not be in it."""


class CommPipe:
    """Batches of messages over one Dask comm; everything on one loop.

    Parameters
    ----------
    comm
        An established Dask comm that is ours alone.
    deliver
        Called with every batch that arrives.
    """

    def __init__(self, comm: Any, deliver: Callable[[list[Message]], None]) -> None:
        self._comm = comm
        self._deliver = deliver
        self._outbox = Outbox()
        self._joiner = Joiner()
        self._wake: asyncio.Future[None] | None = None

    def send(self, message: Message) -> None:
        """Queue `message`; all small ones of one turn of the loop go at once."""
        self._outbox.put(message)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def run(self) -> None:
        """Read and write until either end closes or breaks."""
        writer = asyncio.ensure_future(self._write())
        try:
            while True:
                packed = await self._comm.read()
                batch = msgpack.unpackb(
                    packed,
                    use_list=False,
                    strict_map_key=False,
                    unicode_errors="surrogatepass",
                )
                self._deliver(self._joiner.join(batch))
        except OSError:  # CommClosedError is one
            pass
        finally:
            writer.cancel()
            self._comm.abort()
            await asyncio.wait([writer])

    def close(self) -> None:
        """Close the comm, which ends `run` at both ends."""
        self._comm.abort()

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                if not self._outbox:
                    self._wake = loop.create_future()
                    await self._wake
                    self._wake = None
                batch = self._outbox.take()
                packed = msgpack.packb(batch, unicode_errors="surrogatepass")
                large = len(packed) >= OWN_FRAME_BYTES
                await self._comm.write(to_serialize(packed) if large else packed)
                await flushed(self._comm)  # what is small may pass bulk until then
        except OSError as err:
            logger.debug("channel %s broke: %s", self._comm, err)
            self._comm.abort()
        except Exception:
            # Better that all on this channel fails than that it is never answered.
            logger.exception("channel %s cannot send", self._comm)
            self._comm.abort()


class Exchange:
    """A caller's end of one request or call: messages in, in order, or a failure."""

    __slots__ = ("_failure", "_later", "_waiter", "exchange_id", "first", "on_grant",
                 "on_news", "replica_id")  # fmt: skip

    def __init__(self, exchange_id: int) -> None:
        self.exchange_id = exchange_id
        #: Who has it; 0 before it is sent.
        self.replica_id = 0
        #: What `next` would return at once; None if there is nothing, or a failure.
        self.first: Message | None = None
        # Most exchanges have one message: a queue is made for the second.
        self._later: deque[Message] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None
        #: Told of the bytes of the request's body that the replica will take.
        self.on_grant: Callable[[int], None] | None = None
        #: Called when there is something for `next`, by whoever does not wait in it.
        self.on_news: Callable[[], None] | None = None

    def push(self, message: Message) -> None:
        """Add what the replica sent."""
        if message[0] == GRANT:
            if self.on_grant is not None:
                self.on_grant(message[2])
            return
        if self.first is None:
            self.first = message
        elif self._later is None:
            self._later = deque((message,))
        else:
            self._later.append(message)
        self._notify()

    def fail(self, failure: BaseException) -> None:
        """Make `next` raise `failure`, after what has arrived already."""
        if self._failure is None:
            self._failure = failure
            self._notify()

    def forget_failure(self) -> None:
        """Let go of what `next` raised: it leads back here by its traceback."""
        self._failure = None

    async def next(self) -> Message:
        """Return the next message; raise what `fail` was given if there is none."""
        while self.first is None:
            if self._failure is not None:
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        message = self.first
        self.first = self._later.popleft() if self._later else None
        return message

    def _notify(self) -> None:
        if self.on_news is not None:
            self.on_news()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Channel:
    """A caller's connection to one place: a worker, or its own process."""

    def __init__(self) -> None:
        #: Takes messages of replicas that belong to no exchange.
        self.on_notice: Callable[[Message], None] | None = None
        self._exchanges: dict[int, Exchange] = {}
        self._last_id = 0

    @property
    def idle(self) -> bool:
        """Whether no exchange is open."""
        return not self._exchanges

    def open(self) -> Exchange:
        """Begin an exchange; `close` it in any case."""
        self._last_id += 1
        exchange = self._exchanges[self._last_id] = Exchange(self._last_id)
        return exchange

    def close_exchange(self, exchange: Exchange) -> None:
        """End an exchange; what still comes for it is dropped."""
        self._exchanges.pop(exchange.exchange_id, None)

    def send(self, message: Message) -> None:
        """Send a caller's message."""
        raise NotImplementedError  # pragma: no cover

    def close(self, reason: str) -> None:
        """Close the connection; exchanges that are open fail with `reason`."""
        raise NotImplementedError  # pragma: no cover

    def fail_replica(self, replica_id: int, reason: str) -> None:
        """Fail what is open with one replica; the connection stays."""
        for exchange in list(self._exchanges.values()):
            if exchange.replica_id == replica_id:
                exchange.fail(ConnectionLostError(reason))

    def _receive(self, batch: list[Message]) -> None:
        for message in batch:
            exchange = self._exchanges.get(message[1])
            if exchange is not None:
                exchange.push(message)
            elif message[1] == 0:
                self._take(message)

    def _take(self, message: Message) -> None:
        """Take a message that belongs to no exchange."""
        if self.on_notice is not None:
            self.on_notice(message)

    def _fail_all(self, reason: str) -> None:
        exchanges, self._exchanges = self._exchanges, {}
        for exchange in exchanges.values():
            exchange.fail(ConnectionLostError(reason))


class CommChannel(Channel):
    """A channel over a Dask comm; connects by itself, once.

    Parameters
    ----------
    address
        The worker's Dask address.
    connect
        Opens a comm to an address.
    on_open, on_close
        Called when the connection stands, and once when it has ended or could not be
        made.
    caller
        The id of this process.
    """

    def __init__(
        self,
        address: str,
        connect: Callable[[str], Awaitable[Any]],
        on_open: Callable[[CommChannel], None],
        on_close: Callable[[CommChannel], None],
        caller: str,
    ) -> None:
        super().__init__()
        self.address = address
        self._caller = caller
        self._connect = connect
        self._on_open = on_open
        self._on_close = on_close
        #: The socket of the comm when it is open, if it has one.
        self.sock: Any = None
        self._pipe: CommPipe | None = None
        self._reason = f"the connection to worker {address} was lost"
        self._task = asyncio.ensure_future(self._run())
        self._task.add_done_callback(self._ended)

    @property
    def is_open(self) -> bool:
        """Whether the connection stands."""
        return self._pipe is not None

    def send(self, message: Message) -> None:
        """Send a caller's message; dropped if the connection has ended."""
        # Whose request it belongs to has not run yet since its exchange failed.
        if self._pipe is not None:
            self._pipe.send(message)

    def close(self, reason: str) -> None:
        """Close the connection; exchanges that are open fail with `reason`."""
        self._reason = reason
        self._task.cancel()

    async def wait_closed(self) -> None:
        """Wait for the connection's task to end, after `close`."""
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            comm = await self._connect(self.address)
            hello = {"op": OP_CHANNEL, "caller": self._caller, "reply": False}
            await comm.write(hello)
            self._pipe = CommPipe(comm, self._receive)
            self.sock = getattr(getattr(comm, "stream", None), "socket", None)
            self._on_open(self)
            await self._pipe.run()
        except (TimeoutError, OSError) as err:
            logger.info("cannot connect to worker %s: %s", self.address, err)
        except Exception as err:
            logger.exception("channel to %s failed", self.address)
            self._reason = f"the connection to worker {self.address} failed: {err!r}"

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._pipe = None
        # Before the exchanges fail: what is tried again is not to end up here.
        self._on_close(self)
        self._fail_all(self._reason)


class LocalChannel(Channel):
    """A channel to the replicas in the caller's own process.

    Parameters
    ----------
    loop
        The caller's loop.
    inboxes
        The process's replicas by id; another thread adds and removes them.
    caller
        The id of this process.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        inboxes: Mapping[int, Inbox],
        caller: str,
    ) -> None:
        super().__init__()
        self.inboxes = inboxes
        self._loop = loop
        self._unsent: list[Message] = []
        self._replies: Mailbox[Message] = Mailbox(loop, self._receive)
        self._reply_to = _MailboxReply(self._replies, caller)

    def send(self, message: Message) -> None:
        """Hand a caller's message to its replica, at the end of the loop's next turn.

        A replica's thread that wakes while this one goes on parsing what others sent
        would only wait for the interpreter's lock, which costs more than the hand-over.
        And what has come meanwhile, for which the loop looks once more, goes along.
        """
        if not self._unsent:
            self._loop.call_soon(self._loop.call_soon, self._flush)
        self._unsent.append(message)

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        dispatch(self.inboxes, self._reply_to, unsent)

    def close(self, reason: str) -> None:
        """Fail the exchanges that are open with `reason`."""
        self._fail_all(reason)
        self._unsent.clear()
        for inbox in list(self.inboxes.values()):
            inbox.forget(self._reply_to)


class _MailboxReply:
    __slots__ = ("_mailbox", "caller")

    def __init__(self, mailbox: Mailbox[Message], caller: str) -> None:
        self._mailbox = mailbox
        self.caller = caller

    def send(self, message: Message) -> None:
        self._mailbox.put(message)


async def serve_channel(comm: Any, inboxes: Mapping[int, Inbox], caller: str) -> None:
    """Be a worker's end of a channel until the comm closes; runs on Dask's loop."""

    def deliver(batch: list[Message]) -> None:
        dispatch(inboxes, reply_to, batch)

    def write(batch: list[Message]) -> None:
        for message in batch:
            pipe.send(message)

    pipe = CommPipe(comm, deliver)
    reply_to = _MailboxReply(Mailbox(asyncio.get_running_loop(), write), caller)
    try:
        await pipe.run()
    finally:
        for inbox in list(inboxes.values()):
            inbox.forget(reply_to)


def dispatch(
    inboxes: Mapping[int, Inbox], reply_to: ReplyTo, batch: list[Message]
) -> None:
    """Hand messages to the replicas they name, or refuse what names none here."""
    by_replica: dict[int, list[Message]] = {}
    for message in batch:
        by_replica.setdefault(message[2], []).append(message)
    for replica_id, messages in by_replica.items():
        inbox = inboxes.get(replica_id)
        if inbox is not None:
            inbox.put(reply_to, messages)
            continue
        for message in messages:
            if message[0] in OPENING:
                reason = f"replica {replica_id} is not here"
                reply_to.send((REFUSED, message[1], reason))
