"""The quick carrier of a channel: a connection straight to a replica's own loop.

A Dask comm takes a request through two more threads of the worker and through Dask's
framing, which is most of what forwarding costs. So each replica listens itself, on the
address of its worker and with the cluster's TLS, and callers connect to it beside the
comm. Where that port cannot be reached, the comm goes on carrying everything.

Frames are messages of `messages`, packed one after the other; the data of a ``PART``
comes after it, as it is. The first is a secret which replica and callers have from the
controller: the port is open to all users of a host, and calls have pickled arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import msgpack

from daskserve.transport.channel import Channel, Exchange, Inbox
from daskserve.transport.complaints import Complaints
from daskserve.transport.files import share_of_files
from daskserve.transport.forks import close_in_children
from daskserve.transport.handshakes import TlsListener
from daskserve.transport.messages import GOODBYE, PART, WELCOME, WHOLE, Message
from daskserve.transport.outbox import BULK_BYTES, Outbox, data_bytes
from daskserve.transport.parts import Joiner
from daskserve.transport.silence import SilenceWatch

logger = logging.getLogger(__name__)

#: The kernel and uvloop hold about so much; the rest waits where small messages pass.
WRITE_BUFFER_BYTES = 256 * 1024
#: So much is read at once, at most.
READ_BYTES = 256 * 1024
#: What a stranger may send before the secret is due.
MAX_HELLO_BYTES = 256
#: What a message may have, and a tuple in it; some versions of msgpack make room for
#: all that is announced at once, in 5 bytes.
MAX_MESSAGE_BYTES, MAX_ITEMS = 2**31 - 1, 2**22
#: How many may wait to be accepted.
BACKLOG = 100
#: The part of the files that the process may open which callers may take.
ACCEPTED_SHARE = 1 / 16
#: How long callers may take to leave a replica that says goodbye.
GOODBYE_S = 1.0
#: Seconds in which the secret has to come.
SECRET_TIMEOUT_S = 10.0
#: Seconds for opening a connection: where a firewall drops what comes for a port, the
#: kernel would try for minutes.
CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class DirectAddress:
    """Where a replica listens, and what it wants to hear first."""

    host: str
    port: int
    secret: bytes

    def to_message(self) -> list[Any]:
        """Return it as plain data, for the controller and its snapshots."""
        return [self.host, self.port, self.secret]


class _Scratch(threading.local):
    """Where connections of one thread read into: each has taken it out when it ends."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(READ_BYTES))


_scratch = _Scratch()


class _Pipe(asyncio.BufferedProtocol):
    """One end of a connection: messages in, in batches, and out, coalesced."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread_id = threading.get_ident()
        self._transport: asyncio.Transport | None = None
        self._unpacker = _unpacker(MAX_MESSAGE_BYTES)
        self._packer = msgpack.Packer(unicode_errors="surrogatepass")
        self._scratch = _scratch.view
        #: Where to read into; something else if data of a part comes next.
        self._target = self._scratch
        #: None for strangers: they get no memory.
        self._joiner: Joiner | None = None
        self._outbox = Outbox()
        self._flushing = False
        self._paused = False
        self._watch: SilenceWatch | None = None

    def deliver(self, batch: list[Message]) -> None:
        """Take what has arrived."""
        raise NotImplementedError  # pragma: no cover

    def lost(self) -> None:
        """Note that the connection has ended."""
        raise NotImplementedError  # pragma: no cover

    def cannot_read(self) -> None:
        """End the connection: what has come is nothing that we understand."""
        logger.exception("what came on a channel cannot be read")
        self.abort()

    def send(self, message: Message) -> None:
        """Queue `message`; any thread."""
        if threading.get_ident() == self._thread_id:
            self._put(message)
        else:
            try:
                self._loop.call_soon_threadsafe(self._put, message)
            except RuntimeError:
                logger.debug("the loop has stopped, dropped a message")

    def close(self) -> None:
        """End the connection when all is sent; on its loop."""
        if self._transport is not None:
            self._flush()
            self._transport.close()

    def abort(self) -> None:
        """End the connection at once; on its loop."""
        if self._transport is not None:
            self._transport.abort()

    def watch(self, watch: SilenceWatch, on_silent: Callable[[], None]) -> None:
        """Have `on_silent` called when the other end is silent for too long."""
        if self._transport is not None:
            self._watch = watch
            watch.add(self, self._transport.get_extra_info("socket"), on_silent)

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._transport = None
        if self._watch is not None:
            self._watch.discard(self)
        self.lost()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where to read into."""
        return self._target

    def buffer_updated(self, nbytes: int) -> None:
        """Unpack what is complete."""
        if self._target is not self._scratch:
            self._target = self._target[nbytes:] or self._scratch
            return
        try:
            batch = self._unpack(self._scratch[:nbytes])
            if batch:
                self.deliver(batch)
        except Exception:
            self.cannot_read()

    def pause_writing(self) -> None:
        """Keep what is queued: small messages can pass bulk there."""
        self._paused = True

    def resume_writing(self) -> None:
        """Write what is queued."""
        self._paused = False
        self._flush()

    # Steps.

    def _unpack(self, data: memoryview) -> list[Message]:
        unpacker, joiner = self._unpacker, self._joiner
        unpacker.feed(data)
        if joiner is None:
            return list(unpacker)
        batch = []
        for message in unpacker:
            if message[0] == PART:
                room = joiner.room(message, message[5])
                came = unpacker.read_bytes(len(room))
                room[: len(came)] = came
                if len(came) < len(room):
                    self._target = room[len(came) :]
                    break
            else:
                batch.append(joiner.whole(message) if message[0] == WHOLE else message)
        return batch

    def _put(self, message: Message) -> None:
        self._outbox.put(message)
        if not self._flushing:
            # What else is sent in this turn of the loop goes along.
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        transport = self._transport
        if transport is None:
            return
        try:
            while self._outbox and not self._paused:
                parts: list[bytes | memoryview] = []
                for message in self._outbox.take():
                    if message[0] == PART:
                        *head, data = message
                        parts += self._packer.pack((*head, len(data))), data
                    elif data_bytes(message) >= BULK_BYTES:
                        parts.extend(self._pack_bulk(message))
                    else:
                        parts.append(self._packer.pack(message))
                transport.writelines(parts)
        except Exception:
            # Better that all on this channel fails than that it is never answered.
            logger.exception("a channel cannot send")
            self.abort()

    def _pack_bulk(self, message: Message) -> Iterator[bytes]:
        """Pack a message, but leave its large fields where they are, uncopied."""
        pack = self._packer.pack
        yield self._packer.pack_array_header(len(message))
        for field in message:
            if type(field) is bytes and len(field) >= BULK_BYTES:
                yield b"\xc6" + len(field).to_bytes(4, "big")  # "bin 32" of msgpack
                yield field
            else:
                yield pack(field)


def _unpacker(max_bytes: int) -> msgpack.Unpacker:
    most = min(max_bytes, MAX_ITEMS)
    return msgpack.Unpacker(
        use_list=False,
        strict_map_key=False,
        unicode_errors="surrogatepass",
        max_buffer_size=max_bytes,
        max_array_len=most,
        max_map_len=most,
    )


class DirectListener:
    """A replica's port; everything on the replica's loop.

    Parameters
    ----------
    inbox
        The replica.
    deliver
        Takes a batch of messages and the pipe that answers go to.
    watch
        Finds callers whose hosts are gone.
    """

    def __init__(
        self,
        inbox: Inbox,
        deliver: Callable[[Any, list[Message]], None],
        watch: SilenceWatch,
    ) -> None:
        self._inbox = inbox
        self._deliver = deliver
        self._watch = watch
        self._secret = secrets.token_bytes(16)
        self._server: asyncio.Server | TlsListener | None = None
        self._pipes: set[_Accepted] = set()
        self._left = asyncio.Event()
        close_in_children(self)

    def files(self) -> Iterable[int]:
        """Return the listening files, for forked children to close."""
        return [s.fileno() for s in self._server.sockets] if self._server else []

    async def start(
        self, host: str, context: ssl.SSLContext | None, name: str | None = None
    ) -> DirectAddress:
        """Listen on any free port of `host`, which callers know as `name`.

        Raises
        ------
        OSError
            That is not possible.
        """
        loop = asyncio.get_running_loop()

        def accept() -> _Accepted:
            return _Accepted(loop, self)

        if context is None:
            self._server = await loop.create_server(accept, host, 0)
        else:
            sock = await _listen(host)
            self._server = TlsListener(
                sock, context, accept, SECRET_TIMEOUT_S, self._admit_handshake
            )
        port = self._server.sockets[0].getsockname()[1]
        return DirectAddress(name or host, port, self._secret)

    def _admit_handshake(self) -> bool:
        assert isinstance(self._server, TlsListener)
        there = _accepted + len(self._server.handshakes)
        return there < share_of_files(ACCEPTED_SHARE) or self._server.drop_oldest()

    def _shaken(self, pipe: _Accepted) -> None:
        if isinstance(self._server, TlsListener):
            self._server.handshakes.pop(pipe, None)

    async def say_goodbye(self) -> None:
        """Send callers away; what they have sent meanwhile is still answered."""
        if self._server is not None:
            self._server.close()
        for pipe in self._pipes:
            pipe.send((GOODBYE, 0))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                while self._pipes:
                    self._left.clear()
                    await self._left.wait()

    def close(self) -> None:
        """Stop listening and end all connections."""
        if self._server is not None:
            self._server.close()
        for pipe in list(self._pipes):
            pipe.close()


async def _listen(host: str) -> socket.socket:
    loop = asyncio.get_running_loop()
    family, kind, number, _, address = (
        await loop.getaddrinfo(
            host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    )[0]
    sock = socket.socket(family, kind, number)
    try:
        sock.setblocking(False)
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


#: Connections of callers to all replicas of this process, each on its replica's loop.
_accepted, _accepted_lock = 0, threading.Lock()
_strangers = Complaints(logger, "was turned away at the port of a replica")


class _Accepted(_Pipe):
    """The replica's end."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, listener: DirectListener
    ) -> None:
        super().__init__(loop)
        self.caller = ""
        self._unpacker = _unpacker(MAX_HELLO_BYTES)
        self._listener = listener
        self._known = False
        self._received = 0
        self._timer = loop.call_later(SECRET_TIMEOUT_S, self._secret_due)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._listener._shaken(self)
        self._listener._pipes.add(self)
        self.watch(self._listener._watch, self.abort)
        with _accepted_lock:
            global _accepted
            _accepted += 1
            full = _accepted > share_of_files(ACCEPTED_SHARE)
        if full:  # whoever it is goes by way of the worker's port
            self.abort()

    def buffer_updated(self, nbytes: int) -> None:
        if not self._known:
            self._received += nbytes
            if self._received > MAX_HELLO_BYTES:
                # The caller sends nothing else before it is told that it is known.
                self._turn_away("no secret came")
                return
        super().buffer_updated(nbytes)

    def deliver(self, batch: list[Message]) -> None:
        if self._known:
            self._listener._deliver(self, batch)
            return
        first = batch[0]
        is_hello = type(first) is tuple and [*map(type, first)] == [bytes, str]
        secret, caller = first if is_hello else (b"", "")
        if hmac.compare_digest(secret, self._listener._secret):
            self._known = True
            self._unpacker = _unpacker(MAX_MESSAGE_BYTES)
            self.caller = caller
            self._joiner = Joiner()
            self._timer.cancel()
            self.send((WELCOME, 0))
        else:
            self._turn_away("the secret was wrong")

    def cannot_read(self) -> None:
        if self._known:
            super().cannot_read()
        else:
            self._turn_away("what came is no message")

    def lost(self) -> None:
        global _accepted
        with _accepted_lock:
            _accepted -= 1
        self._timer.cancel()
        self._listener._pipes.discard(self)
        self._listener._left.set()
        self._listener._inbox.forget(self)

    def _secret_due(self) -> None:
        if not self._known:
            self._turn_away(f"no secret came within {SECRET_TIMEOUT_S:g} s")

    def _turn_away(self, why: str) -> None:
        if self._transport is not None:
            _strangers.about(self._transport.get_extra_info("peername"), why)
        self.abort()


class DirectChannel(Channel):
    """A caller's connection to one replica; connects by itself, once.

    Parameters
    ----------
    address
        The replica's.
    worker
        The Dask address of its worker.
    context
        The cluster's TLS, if it has any.
    watch
        Finds replicas whose hosts are gone.
    on_close
        Called once when the connection has ended or could not be made.
    caller
        The id of this process.
    on_open
        Called when it can be used.
    """

    def __init__(
        self,
        address: DirectAddress,
        worker: str,
        context: ssl.SSLContext | None,
        watch: SilenceWatch,
        on_close: Callable[[DirectChannel], None],
        caller: str,
        on_open: Callable[[DirectChannel], None] | None = None,
    ) -> None:
        super().__init__()
        self._caller = caller
        self.worker = worker
        self.is_open = False
        #: It was open, and the replica has not said goodbye.
        self.broke = False
        self._address = address
        self._context = context
        self._watch = watch
        self._on_close = on_close
        self._on_open = on_open or _nothing
        #: It has been open, at some time.
        self.greeted = False
        self._retired = False
        self._pipe: _Connected | None = None
        self._reason = f"the connection to a replica on worker {worker} was lost"
        self._task = asyncio.ensure_future(self._connect())
        self._task.add_done_callback(self._connected)

    def send(self, message: Message) -> None:
        """Send a caller's message."""
        assert self._pipe is not None, "a channel is used when it is open"
        self._pipe.send(message)

    def close(self, reason: str) -> None:
        """Close the connection; exchanges that are open fail with `reason`."""
        self._reason = reason
        self.is_open = False
        self._task.cancel()
        if self._pipe is not None:
            self._pipe.abort()
        self.ended()

    def close_exchange(self, exchange: Exchange) -> None:
        """End an exchange, and with the last one a connection that is retired."""
        super().close_exchange(exchange)
        if self._retired and self.idle:
            self.close("the replica has ended")

    def ended(self) -> None:
        """Fail what is open, once."""
        self.broke = self.is_open
        self.is_open = False
        on_close, self._on_close = self._on_close, _nothing
        on_close(self)
        self._fail_all(self._reason)

    def _take(self, message: Message) -> None:
        if message[0] == WELCOME:
            self.greeted = self.is_open = True
            self._on_open(self)
        elif message[0] == GOODBYE:  # take nothing new
            self._retired, self.is_open = True, False
            if self.idle:
                self.close("the replica has ended")
        else:
            super()._take(message)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        address = self._address
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, pipe = await loop.create_connection(
                    lambda: _Connected(loop, self),
                    address.host,
                    address.port,
                    ssl=self._context,
                    server_hostname="" if self._context is not None else None,
                )
        except TimeoutError as err:
            text = f"no connection within {CONNECT_TIMEOUT_S:g} s"
            raise TimeoutError(text) from err
        self._pipe = pipe
        pipe.watch(self._watch, self._silent)
        pipe.send((address.secret, self._caller))

    def _silent(self) -> None:
        self._reason = f"a replica on worker {self.worker} {self._watch.reason}"
        assert self._pipe is not None
        self._pipe.abort()

    def _connected(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            logger.info(
                "No direct connection to a replica on %s (%s): requests go by way of "
                "the worker's own port, which is slower",
                self.worker,
                error,
            )
            self.ended()


class _Connected(_Pipe):
    """The caller's end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, channel: DirectChannel) -> None:
        super().__init__(loop)
        self._channel = channel
        self._joiner = Joiner()

    def deliver(self, batch: list[Message]) -> None:
        self._channel._receive(batch)

    def lost(self) -> None:
        self._channel.ended()


def _nothing(channel: DirectChannel) -> None:
    pass
