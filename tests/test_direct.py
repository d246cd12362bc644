"""Connections straight to a replica's port; real sockets, a stand-in behind them."""

from __future__ import annotations

import asyncio
import logging
import ssl
import struct
from collections.abc import Callable, Coroutine
from typing import Any

import msgpack
import psutil
import pytest
from distributed import Security
from distributed.comm.core import connect

from daskserve.transport import complaints, connections, direct
from daskserve.transport.call import Call
from daskserve.transport.channel import ConnectionLostError
from daskserve.transport.complaints import Complaints
from daskserve.transport.direct import DirectAddress, DirectChannel, DirectListener
from daskserve.transport.dispatcher import Dispatcher
from daskserve.transport.messages import (
    CALL,
    CHUNK,
    NOBODY,
    PART,
    REFUSED,
    RESULT,
    Message,
)
from daskserve.transport.silence import SilenceWatch
from tests.test_dispatcher import Place, StandIn, keep, snapshot


class Replica(StandIn):
    """A stand-in that listens on a port of its own."""

    async def listen(self, context: ssl.SSLContext | None = None) -> DirectAddress:
        self.batches: list[int] = []
        self.listener = DirectListener(self, self.take, watch())
        self.address = await self.listener.start("127.0.0.1", context)
        return self.address

    def take(self, reply_to: Any, batch: list[Message]) -> None:
        self.batches.append(len(batch))
        self.put(reply_to, batch)


def watch() -> SilenceWatch:
    return SilenceWatch(asyncio.get_running_loop(), 10)


async def open_channel(
    address: DirectAddress, context: ssl.SSLContext | None = None
) -> DirectChannel:
    channel = DirectChannel(
        address, "tcp://w:1", context, watch(), lambda channel: None, "me"
    )
    await until(lambda: channel.is_open)
    return channel


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def run(test: Callable[[Replica], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        replica = Replica()
        async with asyncio.timeout(30):
            await test(replica)
        replica.listener.close()
        await asyncio.sleep(0)

    asyncio.run(bounded())


def test_many_exchanges_at_once() -> None:
    async def test(replica: Replica) -> None:
        channel = await open_channel(await replica.listen())
        exchanges = [channel.open() for _ in range(1000)]
        for exchange in exchanges:
            channel.send((CALL, exchange.exchange_id, 1, "f", b"%d" % id(exchange)))
        for exchange in exchanges:
            answer = await exchange.next()
            assert answer == (RESULT, exchange.exchange_id, "f")
            channel.close_exchange(exchange)
        assert channel.idle
        assert max(replica.batches) > 10  # they went together
        channel.close("done")

    run(test)


def test_bulk_both_ways() -> None:
    def answer(replica: StandIn, reply_to: Any, message: Message) -> None:
        reply_to.send((CHUNK, message[1], message[3], False))

    async def test(replica: Replica) -> None:
        replica.answer = answer
        channel = await open_channel(await replica.listen())
        exchanges = [channel.open() for _ in range(20)]
        for exchange in exchanges:
            data = bytes([exchange.exchange_id]) * 3_000_000
            channel.send((CALL, exchange.exchange_id, 1, data))
        for exchange in exchanges:
            message = await exchange.next()
            assert message[2] == bytes([exchange.exchange_id]) * 3_000_000
        channel.close("done")

    run(test)


def test_other_threads_may_answer() -> None:
    def answer(replica: StandIn, reply_to: Any, message: Message) -> None:
        loop = asyncio.get_running_loop()
        loop.run_in_executor(None, reply_to.send, (RESULT, message[1], "thread"))

    async def test(replica: Replica) -> None:
        replica.answer = answer
        channel = await open_channel(await replica.listen())
        exchange = channel.open()
        channel.send((CALL, exchange.exchange_id, 1))
        assert await exchange.next() == (RESULT, exchange.exchange_id, "thread")
        channel.close("done")

    run(test)


def test_what_is_open_fails_with_the_connection() -> None:
    async def test(replica: Replica) -> None:
        replica.answer = keep
        address = await replica.listen()
        for side in ("replica", "caller"):
            channel = await open_channel(address)
            exchange = channel.open()
            channel.send((CALL, exchange.exchange_id, 1))
            await until(lambda: replica.messages)
            forgotten = replica.forgotten
            if side == "caller":
                channel.close("because")
            else:
                for pipe in list(replica.listener._pipes):
                    pipe.abort()
            with pytest.raises(ConnectionLostError):
                await exchange.next()
            assert not channel.is_open
            await until(lambda before=forgotten: replica.forgotten == before + 1)  # type: ignore[misc]
            replica.messages.clear()

    run(test)


@pytest.mark.parametrize(
    "what", ["wrong secret", "no secret", "part", "nonsense", "flood"]
)
def test_strangers_get_nowhere(what: str) -> None:
    first = {
        "wrong secret": msgpack.packb((b"x" * 16, "me")),
        "no secret": msgpack.packb((CALL, 1, 1, "f", b"")),
        "part": msgpack.packb((PART, 1, 1, 2**40, True, 2**30)),
        "nonsense": b"\xc1\xc1\xc1",
        "flood": b"x" * 100_000,
    }[what]

    async def test(replica: Replica) -> None:
        address = await replica.listen()
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(first + msgpack.packb((CALL, 1, 1, "f", b"")))
        assert await read_all(reader) == b""
        writer.close()
        assert replica.messages == []
        assert not replica.listener._pipes

    run(test)


@pytest.mark.parametrize("nonsense", [5, (), (CALL,), {"op": CALL}])
def test_a_caller_that_talks_nonsense_ends_alone(nonsense: Any) -> None:
    def answer(replica: StandIn, reply_to: Any, message: Message) -> None:
        reply_to.send((RESULT, message[1], message[3]))

    async def test(replica: Replica) -> None:
        replica.answer = answer
        address = await replica.listen()
        good = await open_channel(address)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(msgpack.packb((address.secret, "odd")))
        assert await reader.read(100)
        writer.write(msgpack.packb(nonsense))
        await read_all(reader)  # until it is closed
        writer.close()
        exchange = good.open()
        good.send((CALL, exchange.exchange_id, 1, "still"))
        assert await exchange.next() == (RESULT, exchange.exchange_id, "still")
        good.close("done")

    run(test)


def test_strangers_get_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    """Of some versions of msgpack, 5 bytes that announce a tuple take its room."""

    def memory() -> int:
        return int(psutil.Process().memory_info().rss)

    async def test(replica: Replica) -> None:
        address = await replica.listen()
        before, most = memory(), 0
        for kind in (b"\xdd", b"\xdf", b"\xc6", b"\xdb"):  # array, map, bin, str
            for size in (2**26, 2**31 - 2, 200):
                reader, writer = await asyncio.open_connection(
                    address.host, address.port
                )
                writer.write(kind + struct.pack(">I", size))
                await asyncio.sleep(0.02)
                most = max(most, memory())
                writer.write(b"x" * 300)
                assert await read_all(reader) == b""
                writer.close()
        assert most - before < 64 << 20
        assert not replica.listener._pipes

    with caplog.at_level("WARNING"):
        run(test)
    assert len(caplog.records) <= 1  # however many there are


def test_silent_strangers_are_cut_before_their_handshake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(direct, "SECRET_TIMEOUT_S", 0.5)
    monkeypatch.setattr(direct, "share_of_files", lambda share: 5)
    security = Security.temporary()
    server = security.get_listen_args("worker")["ssl_context"]
    client = security.get_connection_args("worker")["ssl_context"]

    async def test(replica: Replica) -> None:
        address = await replica.listen(server)
        silent = [
            await asyncio.open_connection(address.host, address.port) for _ in range(20)
        ]
        tls: Any = replica.listener._server
        await until(lambda: len(tls.handshakes) == 5)
        channel = await open_channel(address, client)  # there is room for who is quick
        read = [read_all(reader) for reader, _ in silent]
        assert not any(await asyncio.gather(*read))
        assert not tls.handshakes
        for _, writer in silent:
            writer.close()
        channel.close("done")

    run(test)


def test_messages_have_bounds() -> None:
    async def test(replica: Replica) -> None:
        channel = await open_channel(await replica.listen())
        exchange = channel.open()
        assert channel._pipe is not None and channel._pipe._transport is not None
        channel._pipe._transport.write(b"\xdd" + struct.pack(">I", 2**26))
        with pytest.raises(ConnectionLostError):
            await exchange.next()

    run(test)


def test_who_is_turned_away_is_named_once_in_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    strangers = Complaints(logging.getLogger("daskserve"), "was turned away")
    now = 1000.0
    monkeypatch.setattr(complaints.time, "monotonic", lambda: now)
    for _ in range(1000):
        strangers.about(("10.1.2.3", 5), "no secret came")
    assert [r.getMessage() for r in caplog.records] == [
        "10.1.2.3 was turned away: no secret came"
    ]
    now += complaints.EVERY_S
    strangers.about("", "no secret came")
    assert caplog.records[1].getMessage() == (
        "somebody was turned away: no secret came, and 999 times more before"
    )


async def read_all(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


def test_silent_strangers_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "SECRET_TIMEOUT_S", 0.05)

    async def test(replica: Replica) -> None:
        address = await replica.listen()
        reader, writer = await asyncio.open_connection(address.host, address.port)
        assert await read_all(reader) == b""
        writer.close()

    run(test)


def test_tls() -> None:
    security = Security.temporary()
    server = security.get_listen_args("worker")["ssl_context"]
    client = security.get_connection_args("worker")["ssl_context"]

    async def test(replica: Replica) -> None:
        address = await replica.listen(server)
        channel = await open_channel(address, client)
        exchange = channel.open()
        channel.send((CALL, exchange.exchange_id, 1, b"x" * 1_000_000))
        assert (await exchange.next())[0] == RESULT
        channel.close("done")
        closed: list[DirectChannel] = []
        DirectChannel(
            address, "tcp://w:1", None, watch(), closed.append, "me"
        )  # no TLS
        await until(lambda: closed)
        assert not closed[0].greeted

    run(test)


# In a dispatcher.


async def call(made: Dispatcher, retry: bool = False) -> Message:
    request = Call(made, "D")
    try:
        return await request.first(
            lambda exchange_id, replica_id: (CALL, exchange_id, replica_id, b"args"),
            retry_lost=retry,
        )
    finally:
        request.finish()


def dispatching(
    test: Callable[[Dispatcher, Replica, Place], Coroutine[Any, Any, None]],
) -> None:
    """Run a test with a replica that can be reached both ways."""

    async def bounded(replica: Replica) -> None:
        address = await replica.listen()
        place = await Place({1: replica}).start()
        made = Dispatcher(asyncio.get_running_loop(), connect)
        news = snapshot((1, place))
        news["deployments"]["D"]["replicas"][0][3] = address.to_message()
        made.update(1, news)
        made.connect_ahead()
        await made.connected()
        for _ in range(connections.OFTEN):  # as then there is a connection of its own
            assert (await call(made))[0] == RESULT
        await until(lambda: made.connections.direct)
        replica.messages.clear()
        await test(made, replica, place)
        await made.close()
        place.stop()

    run(bounded)


def test_direct_connections_are_preferred() -> None:
    async def test(made: Dispatcher, replica: Replica, place: Place) -> None:
        await until(lambda: made.connections.direct[1].is_open)
        assert (await call(made))[0] == RESULT
        assert sum(replica.batches) == 1  # it came to the replica's own port
        made.update(2, snapshot((1, place)))  # which is gone
        assert not made.connections.direct
        assert (await call(made))[0] == RESULT
        assert sum(replica.batches) == 1

    dispatching(test)


def test_comms_carry_what_direct_connections_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "DIRECT_RETRY_S", 0.05)

    async def test(made: Dispatcher, replica: Replica, place: Place) -> None:
        await until(lambda: made.connections.direct[1].is_open)
        replica.listener.close()
        await until(lambda: not made.connections.direct)
        for _ in range(10):  # it is tried again and again, which disturbs nobody
            assert (await call(made))[0] == RESULT
            await asyncio.sleep(0.02)
        assert sum(replica.batches) == 0

    dispatching(test)


def test_a_broken_connection_is_made_again() -> None:
    async def test(made: Dispatcher, replica: Replica, place: Place) -> None:
        replica.answer = keep
        await until(lambda: made.connections.direct[1].is_open)
        first = made.connections.direct[1]
        lost = asyncio.ensure_future(call(made, retry=True))
        await until(lambda: replica.messages)
        for pipe in list(replica.listener._pipes):
            pipe.abort()
        await until(lambda: len(replica.messages) == 2)  # sent once more
        replica.answer = lambda r, reply_to, m: reply_to.send((RESULT, m[1], b""))
        await until(
            lambda: 1 in made.connections.direct and made.connections.direct[1].is_open
        )
        assert made.connections.direct[1] is not first
        assert (await call(made))[0] == RESULT
        lost.cancel()

    dispatching(test)


def test_a_broken_connection_casts_doubt_on_the_whole_worker() -> None:
    async def test(made: Dispatcher, replica: Replica, place: Place) -> None:
        await until(lambda: made.connections.direct[1].is_open)
        news = snapshot((1, place), (2, place))
        news["deployments"]["D"]["replicas"][0][3] = replica.address.to_message()
        made.update(2, news)
        neighbour = made.groups["D"].router.slots[2]
        assert neighbour.reachable
        for pipe in list(replica.listener._pipes):
            pipe.abort()
        await until(lambda: not made.connections.direct)
        assert not neighbour.reachable  # it may have died with the one that is lost
        assert (await call(made))[0] == RESULT  # as soon as it is known to live

    dispatching(test)


def test_doubt_lasts_until_the_worker_answers() -> None:
    async def test(made: Dispatcher, replica: Replica, place: Place) -> None:
        await until(lambda: made.connections.direct[1].is_open)
        (channel,) = made.connections.channels.values()
        slot = made.groups["D"].router.slots[1]
        silent = place.replicas[NOBODY] = StandIn(keep)
        for pipe in list(replica.listener._pipes):
            pipe.abort()
        await until(lambda: silent.messages)
        await asyncio.sleep(2 * connections.RECONNECT_S)
        # A snapshot says nothing of that.
        news = snapshot((1, place), max_ongoing=7)
        news["deployments"]["D"]["replicas"][0][3] = replica.address.to_message()
        made.update(2, news)
        assert channel.is_open and not slot.reachable  # dead, for all that is known
        del place.replicas[NOBODY]
        for comm in place.comms:
            refusal = (REFUSED, silent.messages[0][1], "not here")
            await comm.write(msgpack.packb([refusal]))
        await until(lambda: slot.reachable)
        assert (await call(made))[0] == RESULT
        assert channel.idle

    dispatching(test)


def test_what_a_lost_worker_had_goes_to_another_worker() -> None:
    async def test(made: Dispatcher, replica: Replica, place: Place) -> None:
        await until(lambda: made.connections.direct[1].is_open)
        neighbour = place.replicas[2] = StandIn(keep)
        news = snapshot((1, place), (2, place), max_ongoing=1)
        news["deployments"]["D"]["replicas"][0][3] = replica.address.to_message()
        made.update(2, news)
        replica.answer = keep
        asked = [asyncio.ensure_future(call(made, retry=True)) for _ in range(2)]
        await until(lambda: replica.messages and neighbour.messages)
        # The controller may know before our connections end.
        made.worker_lost(place.address)
        await asyncio.sleep(0.05)
        assert not any(asking.done() for asking in asked)
        other = await Place({3: StandIn()}).start()
        made.update(3, snapshot((3, other)))
        assert [(await asking)[0] for asking in asked] == [RESULT, RESULT]
        assert len(replica.messages) + len(neighbour.messages) == 2
        other.stop()

    dispatching(test)


def test_a_replica_that_ends_sends_its_callers_away() -> None:
    def refuse(replica: StandIn, reply_to: Any, message: Message) -> None:
        reply_to.send((REFUSED, message[1], "stopping"))

    async def test(replica: Replica) -> None:
        replica.answer = keep
        address = await replica.listen()
        idle, busy = await open_channel(address), await open_channel(address)
        exchange = busy.open()
        busy.send((CALL, exchange.exchange_id, 1))
        await until(lambda: replica.messages)
        replica.answer = refuse
        leaving = asyncio.ensure_future(replica.listener.say_goodbye())
        late = idle.open()
        idle.send((CALL, late.exchange_id, 1))  # it crosses the goodbye
        assert await late.next() == (REFUSED, late.exchange_id, "stopping")
        idle.close_exchange(late)
        await until(lambda: not busy.is_open)
        await until(lambda: len(replica.listener._pipes) == 1)  # the idle one has left
        (pipe,) = replica.listener._pipes
        pipe.send((RESULT, exchange.exchange_id, b"after all"))
        assert await exchange.next() == (RESULT, exchange.exchange_id, b"after all")
        busy.close_exchange(exchange)
        await leaving
        assert not replica.listener._pipes
        assert not (idle.broke or busy.broke)

    run(test)
