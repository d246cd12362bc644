"""Channels and dispatchers against replicas that do what a test says.

The comms are real ones on loopback; only the replica behind them is a stand-in, at the
`Inbox` protocol.
"""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from distributed.comm import listen
from distributed.comm.core import connect

from daskserve.exceptions import (
    DeploymentUnavailableError,
    QueueFullError,
    ReplicaDiedError,
    RequestError,
    RequestTimeoutError,
)
from daskserve.transport.affinity import Session
from daskserve.transport.call import Call
from daskserve.transport.channel import ReplyTo, serve_channel
from daskserve.transport.dispatcher import Dispatcher
from daskserve.transport.messages import (
    CALL,
    CANCEL,
    CHUNK,
    DECLINE,
    ERROR,
    FOLLOW,
    LOAD,
    MODELS,
    OP_CHANNEL,
    REFUSED,
    RESULT,
    ROOM,
    SESSION,
    STOPPED,
    WANT,
    Message,
)

Answer = Callable[["StandIn", ReplyTo, Message], None]


def echo(replica: StandIn, reply_to: ReplyTo, message: Message) -> None:
    if message[0] == CALL:
        reply_to.send((RESULT, message[1], message[3]))


def keep(replica: StandIn, reply_to: ReplyTo, message: Message) -> None:
    """Answer nothing."""


def refuse(replica: StandIn, reply_to: ReplyTo, message: Message) -> None:
    if message[0] == CALL:
        reply_to.send((REFUSED, message[1], "full"))


class StandIn:
    """A replica that hands each message to `answer`."""

    deserted = 0

    def __init__(self, answer: Answer = echo) -> None:
        self.answer = answer
        self.messages: list[Message] = []
        self.forgotten = 0

    def put(self, reply_to: ReplyTo, batch: list[Message]) -> None:
        for message in batch:
            self.messages.append(message)
            self.answer(self, reply_to, message)

    def forget(self, reply_to: ReplyTo) -> None:
        self.forgotten += 1

    @property
    def ops(self) -> list[int]:
        return [message[0] for message in self.messages]


class Place:
    """A worker's address with replicas behind it, as `worker` serves them."""

    def __init__(self, replicas: dict[int, StandIn]) -> None:
        self.replicas = replicas
        self.comms: list[Any] = []

    async def start(self) -> Place:
        self.listener = await listen("tcp://127.0.0.1:0", self._handle)
        self.address: str = self.listener.contact_address
        return self

    async def _handle(self, comm: Any) -> None:
        self.comms.append(comm)
        hello = await comm.read()
        assert hello["op"] == OP_CHANNEL
        await serve_channel(comm, self.replicas, hello["caller"])

    def cut(self) -> None:
        """Break all connections, as a dying process does."""
        for comm in self.comms:
            comm.abort()

    def stop(self) -> None:
        self.listener.stop()
        self.cut()


def snapshot(
    *replicas: tuple[int, Place], name: str = "D", **changes: Any
) -> dict[str, Any]:
    info = {
        "replicas": [[i, f"{name}#{i}", p.address, None, None] for i, p in replicas],
        "max_ongoing": 10,
        "max_queued": None,
        "max_websockets": 10,
        "timeout_s": None,
        "hopeless": False,
        "version": None,
    }
    return {"routes": {}, "deployments": {name: {**info, **changes}}}


async def ask(
    dispatcher: Dispatcher, what: str = "x", *, name: str = "D", retry: bool = False
) -> Message:
    call = Call(dispatcher, name)
    try:
        return await call.first(lambda x, r: (CALL, x, r, what), retry_lost=retry)
    finally:
        call.finish()


def run(test: Callable[[Dispatcher], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        dispatcher = Dispatcher(asyncio.get_running_loop(), connect)
        try:
            async with asyncio.timeout(20):
                await test(dispatcher)
            in_flight = [g.router.in_flight for g in dispatcher.groups.values()]
            assert not any(in_flight), "a place in a replica was not given back"
        finally:
            await dispatcher.close()

    asyncio.run(main())


def test_many_calls_share_one_connection() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        place = await Place({1: StandIn()}).start()
        dispatcher.update(1, snapshot((1, place), max_ongoing=1000))
        answers = await asyncio.gather(*(ask(dispatcher, str(i)) for i in range(500)))
        assert [answer[2] for answer in answers] == [str(i) for i in range(500)]
        assert len(place.comms) == 1
        place.stop()

    run(test)


def test_connections_are_made_when_there_is_something_to_send() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        places = [await Place({i: StandIn()}).start() for i in (1, 2)]
        both = snapshot((1, places[0]), max_queued=0)
        both["deployments"] |= snapshot((2, places[1]), name="E")["deployments"]
        dispatcher.update(1, both)
        await dispatcher.connected()
        assert not dispatcher.connections.channels
        # Nothing is open yet, and still there is room: these are not in a queue.
        answers = [asyncio.ensure_future(ask(dispatcher)) for _ in range(10)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await ask(dispatcher)
        await asyncio.gather(*answers)
        assert list(dispatcher.connections.channels) == [places[0].address]
        await ask(dispatcher, name="E")
        assert len(dispatcher.connections.channels) == 2
        for place in places:
            place.stop()

    run(test)


def test_connections_of_who_has_an_http_server_are_made_ahead() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        places = [await Place({i: StandIn()}).start() for i in (1, 2)]
        dispatcher.update(1, snapshot((1, places[0])))
        dispatcher.connect_ahead()
        await dispatcher.connected()
        assert dispatcher.groups["D"].router.slots[1].reachable
        dispatcher.update(2, snapshot((1, places[0]), (2, places[1])))
        await dispatcher.connected()
        assert dispatcher.groups["D"].router.slots[2].reachable
        for place in places:
            place.stop()

    run(test)


def test_messages_keep_bytes_text_and_order() -> None:
    def stream(replica: StandIn, reply_to: ReplyTo, message: Message) -> None:
        for i in range(100):
            reply_to.send((CHUNK, message[1], bytes([i]) * (i * 5000), i < 99))

    async def test(dispatcher: Dispatcher) -> None:
        place = await Place({1: StandIn(stream)}).start()
        dispatcher.update(1, snapshot((1, place)))
        call = Call(dispatcher, "D")
        message = await call.first(
            lambda x, r: (CALL, x, r, "ü\udcff", b"\x00\xff", None, (1, 2.5)),
            retry_lost=False,
        )
        assert place.replicas[1].messages[0][3:] == (
            "ü\udcff",
            b"\x00\xff",
            None,
            (1, 2.5),
        )
        sizes = [len(message[2])]
        while message[3]:
            message = await call.next()
            sizes.append(len(message[2]))
        call.finish()
        assert sizes == [i * 5000 for i in range(100)]
        place.stop()

    run(test)


def test_a_refused_call_goes_to_another_replica() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        full, roomy = StandIn(refuse), StandIn()
        place = await Place({1: full, 2: roomy}).start()
        dispatcher.update(1, snapshot((1, place), (2, place)))
        for _ in range(20):
            assert (await ask(dispatcher))[0] == RESULT
        assert len(roomy.messages) == 20
        place.stop()

    run(test)


def test_a_call_waits_while_all_refuse() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        replica = StandIn(refuse)
        place = await Place({1: replica}).start()
        dispatcher.update(1, snapshot((1, place)))
        asking = asyncio.ensure_future(ask(dispatcher))
        while len(replica.messages) < 3:
            await asyncio.sleep(0.005)
        assert not asking.done()
        replica.answer = echo
        assert (await asking)[0] == RESULT
        place.stop()

    run(test)


def test_a_replica_that_is_not_there_any_more_refuses() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        place = await Place({2: StandIn()}).start()
        dispatcher.update(1, snapshot((1, place), (2, place)))
        assert (await ask(dispatcher))[0] == RESULT
        place.stop()

    run(test)


def test_limits_hold_and_the_queue_is_served_in_order() -> None:
    waiting: list[tuple[ReplyTo, Message]] = []

    def hold(replica: StandIn, reply_to: ReplyTo, message: Message) -> None:
        if message[0] == CALL:
            waiting.append((reply_to, message))

    async def test(dispatcher: Dispatcher) -> None:
        place = await Place({1: StandIn(hold)}).start()
        dispatcher.update(1, snapshot((1, place), max_ongoing=2, max_queued=3))
        await dispatcher.connected()
        tasks = [asyncio.ensure_future(ask(dispatcher, str(i))) for i in range(5)]
        while len(waiting) < 2:
            await asyncio.sleep(0.005)
        with pytest.raises(QueueFullError, match=r"max_queued_requests=3"):
            await ask(dispatcher)
        order = []
        while order != list("01234"):
            while not waiting:
                await asyncio.sleep(0.005)
            assert len(waiting) <= 2
            reply_to, message = waiting.pop(0)
            order.append(message[3])
            reply_to.send((RESULT, message[1], message[3]))
        assert [(await task)[2] for task in tasks] == order
        place.stop()

    run(test)


def test_a_lost_replica_fails_what_is_in_it() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        replica = StandIn(keep)
        place = await Place({1: replica}).start()
        dispatcher.update(1, snapshot((1, place)))
        asking = asyncio.ensure_future(ask(dispatcher))
        while not replica.messages:
            await asyncio.sleep(0.005)
        place.cut()
        with pytest.raises(ReplicaDiedError, match="was lost"):
            await asking
        place.stop()

    run(test)


def test_an_idempotent_request_is_tried_once_more() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        replicas = {1: StandIn(keep), 2: StandIn(keep)}
        places = [await Place({i: r}).start() for i, r in replicas.items()]
        dispatcher.update(1, snapshot((1, places[0]), (2, places[1])))
        asking = asyncio.ensure_future(ask(dispatcher, retry=True))
        while not any(r.messages for r in replicas.values()):
            await asyncio.sleep(0.005)
        first = 1 if replicas[1].messages else 2
        second = replicas[3 - first]
        places[first - 1].cut()
        while not second.messages:
            await asyncio.sleep(0.005)
        places[2 - first].cut()
        with pytest.raises(ReplicaDiedError):
            await asking
        assert [len(r.messages) for r in replicas.values()] == [1, 1]
        for place in places:
            place.stop()

    run(test)


def stop(replica: StandIn, reply_to: ReplyTo, message: Message) -> None:
    if message[0] == CALL:
        reply_to.send((ERROR, message[1], STOPPED, "", "it stops", "", None))


@pytest.mark.parametrize("retry", [True, False])
def test_what_a_replica_stopped_with_is_tried_once_more(retry: bool) -> None:
    async def test(dispatcher: Dispatcher) -> None:
        first, second = StandIn(stop), StandIn(stop)
        place = await Place({1: first, 2: second}).start()
        dispatcher.update(1, snapshot((1, place), (2, place)))
        message = await ask(dispatcher, retry=retry)
        assert (message[0], message[2]) == (ERROR, STOPPED)
        assert sorted(r.ops.count(CALL) for r in (first, second)) == [int(retry), 1]
        second.answer = first.answer = echo
        assert (await ask(dispatcher))[0] == RESULT
        place.stop()

    run(test)


def test_what_was_not_sent_goes_elsewhere() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        dead = await Place({1: StandIn()}).start()
        dead.stop()
        alive = await Place({2: StandIn()}).start()
        dispatcher.update(1, snapshot((1, dead), (2, alive)))
        for _ in range(10):
            assert (await ask(dispatcher))[0] == RESULT
        alive.stop()

    run(test)


def test_what_is_sent_when_the_connection_broke_is_dropped() -> None:
    """The request's task runs later than that, and may say something until then."""

    async def test(dispatcher: Dispatcher) -> None:
        place = await Place({1: StandIn(keep)}).start()
        dispatcher.update(1, snapshot((1, place)))
        dispatcher.connect_ahead()
        await dispatcher.connected()
        channel = dispatcher.connections.channels[place.address]
        while not place.comms:
            await asyncio.sleep(0.005)
        place.cut()
        await channel.wait_closed()
        channel.send((CANCEL, 1, 1))
        place.stop()

    run(test)


def test_worker_lost_fails_at_once_what_waits_for_it() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        replica = StandIn(keep)
        place = await Place({1: replica}).start()
        dispatcher.update(1, snapshot((1, place)))
        asking = asyncio.ensure_future(ask(dispatcher))
        while not replica.messages:
            await asyncio.sleep(0.005)
        dispatcher.worker_lost(place.address)
        with pytest.raises(ReplicaDiedError, match="left the cluster"):
            await asking
        place.stop()

    run(test)


def test_some_replicas_of_a_worker_lost() -> None:
    """What waits for the others there goes on waiting."""

    async def test(dispatcher: Dispatcher) -> None:
        lost, other = StandIn(keep), StandIn(keep)
        place = await Place({1: lost, 2: other}).start()
        dispatcher.update(1, snapshot((1, place), (2, place)))
        asking = [asyncio.ensure_future(ask(dispatcher)) for _ in range(6)]
        while len(lost.messages) + len(other.messages) < 6:
            await asyncio.sleep(0.005)
        assert len(lost.messages) > 0
        assert len(other.messages) > 0
        expected = len(lost.messages)
        dispatcher.worker_lost(place.address, [1])
        done, waiting = await asyncio.wait(asking, timeout=0.2)
        assert len(done) == expected
        for asked in done:
            with pytest.raises(ReplicaDiedError, match="does not answer"):
                await asked
        # Nothing new goes there either.
        again = [asyncio.ensure_future(ask(dispatcher)) for _ in range(6)]
        while len(other.messages) < 12 - expected:
            await asyncio.sleep(0.005)
        assert len(lost.messages) == expected
        for task in [*again, *waiting]:
            task.cancel()
        await asyncio.wait([*again, *waiting])
        place.stop()

    run(test)


def test_a_call_waits_for_the_first_replica() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        place = await Place({1: StandIn()}).start()
        dispatcher.update(1, snapshot())
        asking = asyncio.ensure_future(ask(dispatcher))
        await asyncio.sleep(0)
        assert not asking.done()
        dispatcher.update(2, snapshot((1, place)))
        assert (await asking)[0] == RESULT
        place.stop()

    run(test)


def test_no_snapshot_yet_is_waited_for() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        place = await Place({1: StandIn()}).start()
        asking = asyncio.ensure_future(ask(dispatcher))
        await asyncio.sleep(0)
        dispatcher.update(1, snapshot((1, place)))
        assert (await asking)[0] == RESULT
        place.stop()

    run(test)


def test_unavailable_deployments() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        dispatcher.update(1, snapshot())
        with pytest.raises(DeploymentUnavailableError, match="no deployment 'E'"):
            await ask(dispatcher, name="E")
        asking = asyncio.ensure_future(ask(dispatcher))
        await asyncio.sleep(0)
        dispatcher.update(2, snapshot(hopeless=True))
        for attempt in (asking, ask(dispatcher)):
            with pytest.raises(DeploymentUnavailableError, match="failed to deploy"):
                await attempt
        dispatcher.update(3, snapshot())
        asking = asyncio.ensure_future(ask(dispatcher))
        await asyncio.sleep(0)
        dispatcher.update(4, {"routes": {}, "deployments": {}})
        with pytest.raises(DeploymentUnavailableError, match="was deleted"):
            await asking

    run(test)


def test_an_older_snapshot_is_ignored() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        seen: list[Any] = []
        dispatcher.listeners.append(seen.append)
        dispatcher.update(5, snapshot())
        dispatcher.update(4, {"routes": {}, "deployments": {}})
        assert list(dispatcher.groups) == ["D"] and len(seen) == 1

    run(test)


def test_abort_wakes_whoever_waits() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        replica = StandIn(keep)
        place = await Place({1: replica}).start()
        dispatcher.update(1, snapshot((1, place), max_ongoing=1))
        calls = [Call(dispatcher, "D") for _ in range(2)]
        tasks = [
            asyncio.ensure_future(
                call.first(lambda x, r: (CALL, x, r, ""), retry_lost=True)
            )
            for call in calls
        ]
        while not replica.messages:
            await asyncio.sleep(0.005)
        for call, task in zip(calls, tasks, strict=True):  # in a replica, in the queue
            call.time_up(0.5)
            with pytest.raises(RequestTimeoutError, match=r"within 0\.5 s"):
                await task
            call.cancel()
        while CANCEL not in replica.ops:
            await asyncio.sleep(0.005)
        place.stop()

    run(test)


def test_cancelled_calls_give_their_places_back() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        place = await Place({1: StandIn(keep)}).start()
        dispatcher.update(1, snapshot((1, place), max_ongoing=3))
        tasks = [asyncio.ensure_future(ask(dispatcher)) for _ in range(50)]
        for round_ in range(5):
            await asyncio.sleep(0.002)
            for task in tasks[round_::5]:
                task.cancel()
        await asyncio.wait(tasks)
        group = dispatcher.groups["D"]
        assert group.router.in_flight == 0 and not group.waiting
        place.stop()

    run(test)


def test_replicas_forget_callers_who_went() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        replica = StandIn()
        place = await Place({1: replica}).start()
        dispatcher.update(1, snapshot((1, place)))
        await ask(dispatcher)
        await dispatcher.close()
        while not replica.forgotten:
            await asyncio.sleep(0.005)
        with pytest.raises(DeploymentUnavailableError, match="stopping"):
            await ask(dispatcher)
        place.stop()

    run(test)


def test_a_local_replica_needs_no_connection() -> None:
    async def test(_: Dispatcher) -> None:
        near, far = StandIn(), StandIn()
        place = await Place({2: far}).start()
        dispatcher = Dispatcher(
            asyncio.get_running_loop(),
            connect,
            local_address="tcp://here:1",
            inboxes={1: near},
        )
        both = snapshot((2, place))
        both["deployments"]["D"]["replicas"].append(
            [1, "D#1", "tcp://here:1", None, None]
        )
        dispatcher.update(1, both)
        for _ in range(10):
            assert (await ask(dispatcher))[0] == RESULT
        assert len(near.messages) == 10 and not far.messages
        await dispatcher.close()
        assert near.forgotten == 1
        place.stop()

    run(test)


@pytest.mark.parametrize("stuck", [False, True])
def test_a_replica_that_lies_about_its_load(stuck: bool) -> None:
    """Others get what there is; alone, it is asked again and again."""
    lies = (10**9, -1, -5, -7, stuck)

    def lie(replica: StandIn, reply_to: ReplyTo, message: Message) -> None:
        if message[0] == CALL:
            reply_to.send((LOAD, 0, message[2], *lies))
            reply_to.send((RESULT, message[1], message[3]))
        elif message[0] == WANT and stuck:
            reply_to.send((ROOM, 0, message[2]))

    async def test(dispatcher: Dispatcher) -> None:
        liar, honest = StandIn(lie), StandIn()
        place = await Place({1: liar, 2: honest}).start()
        dispatcher.update(1, snapshot((1, place), (2, place)))
        await asyncio.gather(*(ask(dispatcher) for _ in range(20)))
        told = len(liar.messages)
        for _ in range(20):
            assert (await ask(dispatcher))[0] == RESULT
        assert len(liar.messages) <= told + 1  # a second may have passed
        dispatcher.update(2, snapshot((1, place)))
        async with asyncio.timeout(10):
            for _ in range(3):
                assert (await ask(dispatcher))[0] == RESULT
        place.stop()

    run(test)


def test_a_replica_that_offers_what_nobody_wants() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        replica = StandIn()
        place = await Place({1: replica}).start()
        dispatcher.update(1, snapshot((1, place)))
        assert (await ask(dispatcher))[0] == RESULT
        for notice in ((ROOM, 0, 1), (ROOM, 0, 99), (LOAD, 0, 99, 0, 1, 1, 1, False)):
            dispatcher._take_notice(notice)
        while DECLINE not in replica.ops:
            await asyncio.sleep(0.005)
        assert (await ask(dispatcher))[0] == RESULT
        place.stop()

    run(test)


def test_slots_are_asked_for_where_others_have_all() -> None:
    """No request travels twice for it, and what is not needed is given back."""

    def full(replica: StandIn, reply_to: ReplyTo, message: Message) -> None:
        if message[0] == CALL:
            reply_to.send((LOAD, 0, message[2], 5, 5, 10_000, 10_000, False))
            reply_to.send((RESULT, message[1], message[3]))
        elif message[0] == WANT:
            wanted.append(message[3])
            asyncio.get_running_loop().call_later(0.02, offer, reply_to, message)

    def offer(reply_to: ReplyTo, message: Message) -> None:
        for _ in range(message[3]):
            reply_to.send((ROOM, 0, message[2]))

    wanted: list[int] = []

    async def test(dispatcher: Dispatcher) -> None:
        replica = StandIn(full)
        place = await Place({1: replica}).start()
        dispatcher.update(1, snapshot((1, place), max_ongoing=5))
        assert (await ask(dispatcher))[0] == RESULT
        answers = [asyncio.ensure_future(ask(dispatcher)) for _ in range(200)]
        async with asyncio.timeout(10):
            await asyncio.gather(*answers)
        assert replica.ops.count(CALL) == 201
        assert sum(wanted) >= 200 and len(wanted) < 20, wanted
        place.stop()

    run(test)


def test_calls_for_nobody_are_load() -> None:
    async def test(_: Dispatcher) -> None:
        replica = StandIn(keep)
        replica.deserted = 2
        dispatcher = Dispatcher(
            asyncio.get_running_loop(),
            connect,
            local_address="tcp://here:1",
            inboxes={1: replica},
        )
        news = snapshot()
        news["deployments"]["D"]["replicas"].append(
            [1, "D#1", "tcp://here:1", None, None]
        )
        dispatcher.update(1, news)
        asking = asyncio.ensure_future(ask(dispatcher))
        while not replica.messages:
            await asyncio.sleep(0.005)
        assert dispatcher._count_load("D") == (0, {1: 3}, 1)
        asking.cancel()
        await asyncio.wait([asking])
        await dispatcher.close()

    run(test)


def test_who_was_refused_keeps_its_turn() -> None:
    """Requests that come back from a full replica do not change their order."""

    async def test(dispatcher: Dispatcher) -> None:
        replica = StandIn(refuse)
        place = await Place({1: replica}).start()
        dispatcher.update(1, snapshot((1, place), max_ongoing=3))
        await dispatcher.connected()
        order: list[int] = []

        async def one(n: int) -> None:
            request = Call(dispatcher, "D")
            await request.first(lambda e, r: (CALL, e, r, n), retry_lost=False)
            order.append(n)
            request.finish()

        tasks = [asyncio.ensure_future(one(n)) for n in range(6)]
        group = dispatcher.groups["D"]
        async with asyncio.timeout(10):
            while len(replica.messages) < 3 or group.waiting < 6:
                await asyncio.sleep(0.001)
        replica.answer = echo
        # For one, and long before the pause is over.
        dispatcher._take_notice((ROOM, 0, 1))
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks)
        assert order == list(range(6))
        place.stop()

    run(test)


def test_who_comes_during_a_pause_waits_for_its_end_only() -> None:
    """The request that was refused has gone, so nothing else will wake anybody."""

    async def test(dispatcher: Dispatcher) -> None:
        replica = StandIn(refuse)
        place = await Place({1: replica}).start()
        dispatcher.update(1, snapshot((1, place), max_queued=1))
        await dispatcher.connected()
        refused = asyncio.ensure_future(ask(dispatcher))
        async with asyncio.timeout(10):
            while not dispatcher.groups["D"].waiting:
                await asyncio.sleep(0)
        refused.cancel()
        await asyncio.wait([refused])
        replica.answer = echo
        async with asyncio.timeout(10):
            assert (await ask(dispatcher))[0] == RESULT
        place.stop()

    run(test)


# Sessions.


@pytest.mark.parametrize("silent", [False, True])
def test_the_first_call_for_a_model_finds_who_has_it(silent: bool) -> None:
    """Another caller's request loaded it there; one that says nothing holds up none."""

    def tell(replica: StandIn, reply_to: ReplyTo, message: Message) -> None:
        if message[0] == FOLLOW and not (silent and message[2] != 4):
            ids = ("a",) if message[2] == 4 else ()
            loop.call_later(
                0.05, reply_to.send, (MODELS, 0, message[2], 2, 1_000_000, ids)
            )
        echo(replica, reply_to, message)

    async def test(dispatcher: Dispatcher) -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        replicas = {number: StandIn(tell) for number in range(1, 6)}
        place = await Place(replicas).start()
        dispatcher.connect_ahead()
        dispatcher.update(1, snapshot(*((number, place) for number in replicas)))
        await dispatcher.connected()
        began = loop.time()
        for _ in range(3):
            call = Call(dispatcher, "D", "a")
            await call.first(lambda x, r: (CALL, x, r, "x"), retry_lost=False)
            assert call.slot is not None and call.slot.replica_id == 4
            call.finish()
        assert (loop.time() - began < 0.45) != silent
        assert loop.time() - began < 2
        assert [replica.ops.count(FOLLOW) for replica in replicas.values()] == [1] * 5
        place.stop()

    loop: asyncio.AbstractEventLoop
    run(test)


async def where(dispatcher: Dispatcher, session: Session) -> int:
    """Return the replica that a call of a session is sent to."""
    call = Call(dispatcher, "D", session=session)

    def make(exchange_id: int, replica_id: int) -> Message:
        return (CALL, exchange_id, replica_id, replica_id)

    try:
        answer = await call.first(make, retry_lost=False)
        return int(answer[2])
    finally:
        call.finish()


def test_sessions_stay_where_they_are_said_to_be() -> None:
    def tell(replica: StandIn, reply_to: ReplyTo, message: Message) -> None:
        if message[0] == FOLLOW and message[2] == 2:
            reply_to.send((SESSION, 0, 2, sessions[0].digest + sessions[1].digest))
        echo(replica, reply_to, message)

    sessions = [Session.of(b"%d" % i) for i in range(12)]

    async def test(dispatcher: Dispatcher) -> None:
        replicas = {1: StandIn(tell), 2: StandIn(tell)}
        place, other = (
            await Place(replicas).start(),
            await Place({3: StandIn()}).start(),
        )
        there = [(1, place), (2, place)]
        affinity = {"header": "sid"}
        dispatcher.update(1, snapshot(*there, session_affinity=affinity))
        await where(dispatcher, sessions[0])  # connects, and asks
        async with asyncio.timeout(5):
            while len(dispatcher.groups["D"].sessions) < 2:
                await asyncio.sleep(0.01)
        assert [await where(dispatcher, s) for s in sessions[:2]] == [2, 2]
        found = [await where(dispatcher, s) for s in sessions]
        assert {1, 2} == set(found[2:])
        assert await where(dispatcher, Session(sessions[2].digest, 1)) == 1
        assert await where(dispatcher, Session(sessions[2].digest, 2)) == 2
        assert [replica.ops.count(FOLLOW) for replica in replicas.values()] == [1, 1]
        # More replicas, and fewer: what is bound does not move before it has to.
        dispatcher.update(2, snapshot(*there, (3, other), session_affinity=affinity))
        await dispatcher.connected()
        again = [await where(dispatcher, s) for s in sessions]
        assert again[:2] == [2, 2] and 3 in again[2:]
        assert all(new in (old, 3) for old, new in zip(found, again, strict=True))
        dispatcher.update(
            3, snapshot((1, place), (3, other), session_affinity=affinity)
        )
        assert 2 not in [await where(dispatcher, s) for s in sessions]
        assert [replica.ops.count(FOLLOW) for replica in replicas.values()] == [1, 1]
        place.stop()
        other.stop()

    run(test)


def test_replicas_are_followed_when_sessions_begin_to_matter() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        replicas = {1: StandIn(), 2: StandIn()}
        place = await Place(replicas).start()
        there = [(1, place), (2, place)]
        dispatcher.connect_ahead()
        dispatcher.update(1, snapshot(*there))
        await dispatcher.connected()
        await ask(dispatcher)
        assert [replica.ops.count(FOLLOW) for replica in replicas.values()] == [0, 0]
        dispatcher.update(2, snapshot(*there, session_affinity={"query": "s"}))
        place.cut()  # and again when there is another connection
        async with asyncio.timeout(5):
            while not all(FOLLOW in replica.ops for replica in replicas.values()):
                await asyncio.sleep(0.01)
        place.stop()

    run(test)


def test_a_session_whose_replica_is_full_goes_elsewhere() -> None:
    async def test(dispatcher: Dispatcher) -> None:
        place = await Place({1: StandIn(refuse), 2: StandIn()}).start()
        dispatcher.update(1, snapshot((1, place), (2, place)))
        session = Session(Session.of(b"a").digest, 1)
        assert await where(dispatcher, session) == 2
        dispatcher.update(2, snapshot((1, place)))
        task = asyncio.ensure_future(where(dispatcher, session))
        await asyncio.sleep(0.1)
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])
        place.stop()

    run(test)


def test_a_call_that_has_ended_is_no_garbage() -> None:
    """Collecting circles of references costs more than a request."""

    class Request:
        def __init__(self, dispatcher: Dispatcher) -> None:
            self.call = Call(dispatcher, "D")
            self.done = asyncio.get_running_loop().create_future()
            assert self.call.begin(self.make, self.news)

        def make(self, exchange_id: int, replica_id: int) -> Message:
            return (CALL, exchange_id, replica_id, "x")

        def news(self) -> None:
            assert self.call.peek() is not None
            self.call.finish()
            self.done.set_result(None)

    async def test(dispatcher: Dispatcher) -> None:
        place = await Place({1: StandIn()}).start()
        dispatcher.update(1, snapshot((1, place)))
        await ask(dispatcher)
        gc.disable()
        try:
            request = Request(dispatcher)
            await request.done
            await asyncio.sleep(0)
            left = weakref.ref(request)
            del request
            assert left() is None
        finally:
            gc.enable()
        place.stop()

    run(test)


def test_a_call_that_failed_is_no_garbage() -> None:
    """What its frames held of a response would stay until it is collected."""

    class Large:
        """Part of an answer."""

    async def test(dispatcher: Dispatcher) -> None:
        place = await Place({1: StandIn()}).start()
        dispatcher.update(1, snapshot((1, place)))
        await ask(dispatcher)
        left: list[weakref.ref[Large]] = []
        call = Call(dispatcher, "D")

        async def stream() -> None:
            part = Large()
            left.append(weakref.ref(part))
            try:
                await call.first(lambda *ids: (CALL, *ids, "x"), retry_lost=False)
                await call.next()
            except BaseException:
                call.cancel()
                raise
            finally:
                call.finish()

        gc.disable()
        try:
            task = asyncio.create_task(stream())
            await asyncio.sleep(0.1)
            call.abort(RequestError("the client has gone"))
            await asyncio.wait([task])
            assert isinstance(task.exception(), RequestError)
            del task
            await asyncio.sleep(0)
            assert left[0]() is None
        finally:
            gc.enable()
        place.stop()

    run(test)
