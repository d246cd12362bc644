"""One request or handle call at its caller, from the queue to the last message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from daskserve.exceptions import (
    DeploymentUnavailableError,
    ReplicaDiedError,
    RequestError,
    RequestTimeoutError,
)
from daskserve.transport.affinity import Session
from daskserve.transport.channel import Channel, ConnectionLostError, Exchange
from daskserve.transport.group import Group
from daskserve.transport.messages import CANCEL, ERROR, REFUSED, STOPPED, Message
from daskserve.transport.router import Slot

if TYPE_CHECKING:
    from daskserve.transport.dispatcher import Dispatcher

#: Makes the message of a request of exchange id and replica id.
Make: TypeAlias = Callable[[int, int], Message]


class Call:
    """One request or handle call.

    Use it on the dispatcher's loop, by callbacks (`begin`) or from one task (`first`);
    `abort` may come from any other task of that loop. `finish` is due in any case and
    may be called twice.

    Parameters
    ----------
    dispatcher, deployment
        Of this process, and a name.
    model_id
        The model that it is for; "": none in particular.
    session
        The session that it belongs to, if a replica is chosen by it.
    near
        How many bytes of its values are on which workers, and how many there are.
    websocket
        Whether it lasts for long, and has no part in the limit of requests.
    """

    __slots__ = ("_channel", "_dispatcher", "_exchange", "_left", "_make", "_on_news",
                 "_waiter", "avoid", "deployment", "failure", "group", "model_id",
                 "near", "on_grant", "particular", "queued", "returned", "session",
                 "slot", "websocket")  # fmt: skip

    def __init__(
        self,
        dispatcher: Dispatcher,
        deployment: str,
        model_id: str = "",
        session: Session | None = None,
        near: tuple[Mapping[str, int], int] | None = None,
        websocket: bool = False,
    ) -> None:
        self._dispatcher = dispatcher
        self.deployment = deployment
        self.model_id = model_id
        self.session = session
        self.near = near
        self.websocket = websocket
        #: A replica to be taken only if there is no other.
        self.avoid: Slot | None = None
        #: Whether it matters which replica it goes to.
        self.particular = (
            model_id != "" or session is not None or near is not None or websocket
        )
        self.group: Group | None = None
        self.slot: Slot | None = None
        #: It waits for a slot.
        self.queued = False
        #: A replica had no slot for it, so that it has had its turn.
        self.returned = False
        #: Told how many bytes of the request's body the replica takes.
        self.on_grant: Callable[[int], None] | None = None
        self._exchange: Exchange | None = None
        self._channel: Channel | None = None
        #: Why nothing comes any more: it was aborted, or failed while it waited.
        self.failure: BaseException | None = None
        #: Its slot was given back before it ended.
        self._left = False
        self._make: Make | None = None
        self._on_news: Callable[[], None] | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def begun(self) -> bool:
        """Whether a replica has been sent the request, and not been given up since."""
        return self._exchange is not None

    # By callbacks.

    def begin(self, make: Make, on_news: Callable[[], None]) -> bool:
        """Send a request as soon as a replica has a slot for it.

        Then `on_news` is called when there is something to `peek` at, or a `failure`,
        until `stop_listening`; `first` goes on from there. False: nothing is known of
        the deployment yet, and nothing was done.

        Raises
        ------
        RequestError
            It can't wait, as there is no room for that, or no sense in it.
        """
        group = self._dispatcher.groups.get(self.deployment)
        if group is None:
            return False
        self.group = group
        self._make, self._on_news = make, on_news
        self._dispatcher.submit(self, group)
        return True

    def peek(self) -> Message | None:
        """Return what has come from the replica and was not taken, or None."""
        return None if self._exchange is None else self._exchange.first

    def stop_listening(self) -> None:
        """Leave what comes to `first` and `next`."""
        self._on_news = None
        if self._exchange is not None:
            self._exchange.on_news = None

    def try_again(self, reason: str) -> None:
        """Wait for another slot, since a replica has refused the request.

        Raises
        ------
        RequestError
            As `begin`.
        """
        group, slot = self.group, self.slot
        assert group is not None and slot is not None
        self._dispatcher.refused(self, group, slot, reason)
        self.returned = True
        self._leave()
        self._dispatcher.submit(self, group)

    # From a task.

    async def first(self, make: Make, *, retry_lost: bool) -> Message:
        """Send a request until a replica has taken it; return its first message.

        Parameters
        ----------
        make
            Makes the request's message from exchange id and replica id; called again
            for another replica.
        retry_lost
            Whether to try another replica, once, if the one that had the request is
            lost, or stopped before it was done: the request is idempotent and can be
            sent again.

        Raises
        ------
        ReplicaDiedError
            The replica was lost with the request in it.
        RequestError
            Any other of its subclasses, as they say.
        """
        self._make = make
        while True:
            if self._exchange is None:
                await self._send()
            try:
                message = await self.next()
                if message[0] == REFUSED:
                    self.try_again(message[2])
                    continue
                stopped = message[0] == ERROR and message[2] == STOPPED
                deleted = self.deployment not in self._dispatcher.groups
                if not stopped or deleted or not retry_lost:
                    return message
            except ConnectionLostError as lost:
                if not retry_lost:
                    self._leave()
                    raise ReplicaDiedError(str(lost)) from lost
            self.avoid, self.particular = self.slot, True
            self._leave()
            retry_lost = False

    async def next(self) -> Message:
        """Return the next message of the replica."""
        if self.failure is not None:
            raise self.failure
        assert self._exchange is not None
        return await self._exchange.next()

    async def _send(self) -> None:
        """Send the request as soon as a replica has a slot for it."""
        dispatcher = self._dispatcher
        if self.failure is None and not self.queued:
            self.group = dispatcher.groups.get(
                self.deployment
            ) or await dispatcher.group(self.deployment)
            if self.failure is None:
                dispatcher.submit(self, self.group)
        if self.queued:
            self._waiter = dispatcher.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self.failure is not None:
            self.send(CANCEL)  # it may have been sent, in the same turn of the loop
            self._leave()
            raise self.failure

    # Both.

    def send(self, op: int, *fields: Any) -> None:
        """Send a further message to the replica that has the request."""
        if self._exchange is not None:
            assert self._channel is not None and self.slot is not None
            exchange_id = self._exchange.exchange_id
            self._channel.send((op, exchange_id, self.slot.replica_id, *fields))

    def streams(self) -> None:
        """Note that the answer comes in parts: its sync code is done by then."""
        slot = self.slot
        if slot is None or slot.first_limit is None or self._left or self.websocket:
            return
        assert self.group is not None
        self._left = True
        slot.streams += 1
        self._dispatcher.release(self.group, slot)

    def abort(self, failure: BaseException) -> None:
        """Make `first` or `next` raise `failure`, wherever they wait."""
        if self.failure is None:
            self.failure = failure
            if self.queued:
                self.fail(failure)
            if self._exchange is not None:
                self._exchange.fail(failure)

    def time_up(self, timeout_s: float) -> None:
        """Abort it, for there was no answer within so many seconds."""
        self.abort(self.timeout_error(timeout_s))

    def timeout_error(self, timeout_s: float) -> RequestError:
        """Say what was missing for so many seconds: the answer, or even a replica."""
        group = self.group
        if group is None or not self.queued or group.router.slots:
            return RequestTimeoutError(
                f"Deployment {self.deployment!r} did not begin to answer within "
                f"{timeout_s:g} s."
            )
        return DeploymentUnavailableError(
            f"Deployment {self.deployment!r} had no replica within {timeout_s:g} s: "
            f"{group.reason}."
        )

    def cancel(self) -> None:
        """Tell the replica that nobody waits for it any more, and finish."""
        self.send(CANCEL)
        self.finish()

    def finish(self) -> None:
        """Give the slot in the replica back, or the place in the queue."""
        # Who made it is known to them, and would else be garbage in a circle; so would
        # the frames that a failure went through, with what they held of a response.
        self._make = self._on_news = None
        self._leave()
        self.failure = None

    def _leave(self) -> None:
        if self.queued:
            assert self.group is not None
            self.group.leave(self)
        if self._exchange is not None:
            assert self._channel is not None
            self._channel.close_exchange(self._exchange)
            self._exchange.forget_failure()
            self._exchange = None
        if self.slot is not None:
            slot, self.slot = self.slot, None
            assert self.group is not None
            if self._left:
                self._left = False
                slot.streams -= 1
            else:
                self._dispatcher.release(self.group, slot, self.websocket)

    # What the dispatcher calls.

    def assign(self, slot: Slot) -> None:
        """Send the request to a replica that has a slot for it."""
        assert self._make is not None
        self.slot = slot
        self._channel = channel = self._dispatcher.connections.channel(slot)
        self._exchange = exchange = channel.open()
        exchange.replica_id = slot.replica_id
        exchange.on_grant = self.on_grant
        exchange.on_news = self._on_news
        channel.send(self._make(exchange.exchange_id, slot.replica_id))
        if self._waiter is not None:
            self._wake()

    def fail(self, failure: BaseException) -> None:
        """Let it fail while it waits."""
        assert self.group is not None
        self.group.leave(self)
        self.failure = failure
        if self._on_news is not None:
            self._on_news()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
