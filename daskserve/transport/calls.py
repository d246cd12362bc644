"""Calls through handles, on the transport loop: many at once, from any thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from daskserve import packing
from daskserve.exceptions import (
    DeploymentUnavailableError,
    ReplicaDiedError,
    RequestError,
)
from daskserve.packing import Packed
from daskserve.transport.affinity import Session
from daskserve.transport.call import Call
from daskserve.transport.channel import ConnectionLostError
from daskserve.transport.dispatcher import Dispatcher
from daskserve.transport.group import Group
from daskserve.transport.items import Items
from daskserve.transport.loops import Mailbox
from daskserve.transport.messages import CALL, CREDIT, ITEM, REFUSED, Message


class Answer(Future[Message]):
    """Where the ``RESULT`` or ``ERROR`` message of a call goes, or one of our errors.

    A done-callback for each call would do as well, and keep the call alive for as long
    as its answer.
    """

    #: Called, on any thread, when it is cancelled.
    on_cancel: Callable[[], None] | None = None
    #: If a replica calls its own deployment, in what context, and which method.
    self_call: tuple[Any, str] | None = None

    def packed(self) -> Packed:
        """Return the value of its ``RESULT`` message.

        Whoever asks first may unpack it, and then change it; others get a copy.
        """
        packed: Packed = self.result()[2]
        if type(packed) is bytes:
            return packed
        mark = object()
        is_first = self.__dict__.setdefault("_owner", mark) is mark
        return packed if is_first else packing.copy(packed)

    def cancel(self) -> bool:
        """Cancel the call; False if it has been answered."""
        cancelled = super().cancel()
        if cancelled and (on_cancel := self.on_cancel) is not None:
            on_cancel()
        return cancelled


@dataclass(slots=True, eq=False)
class CallRequest:
    """One call on its way, and where its answer goes."""

    deployment: str
    method_name: str
    #: Packed ``(args, kwargs)``.
    arguments: Packed
    #: Keys of the Dask futures among them.
    future_keys: tuple[Hashable, ...]
    request_id: str | None
    #: The model that it is for; "": none in particular.
    model_id: str = ""
    answer: Answer = field(default_factory=Answer)
    #: Where the items go, if they are wanted one by one; the answer is the end then.
    items: Items | None = None
    #: Packed results of other calls that are among the arguments.
    results: tuple[Packed, ...] = ()
    #: How many bytes of the Dask futures are on which workers, and how many there are.
    near: tuple[Mapping[str, int], int] | None = None
    #: The session that it belongs to, if it belongs to one.
    session: Session | None = None


class CallSender:
    """Send calls out through a dispatcher.

    Parameters
    ----------
    dispatcher
        Of the same process.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self._inbox: Mailbox[CallRequest] = Mailbox(dispatcher.loop, self._begin)

    def send(self, request: CallRequest) -> None:
        """Start a call; any thread. Cancel its answer to cancel the call."""
        if not self._inbox.put(request):
            stopped = DeploymentUnavailableError("daskserve is stopping here.")
            request.answer.set_exception(stopped)

    def _begin(self, batch: list[CallRequest]) -> None:
        for request in batch:
            if request.items is None:
                _RunningCall(self.dispatcher, request).begin()
            else:
                _RunningStream(self.dispatcher, request, request.items).begin()


class _RunningCall:
    """A call that has left its caller; on the dispatcher's loop.

    If a replica takes it and answers, that takes two callbacks. All else is left to a
    task, which goes on from there.
    """

    __slots__ = ("_call", "_dispatcher", "_request", "_task", "_timer")

    def __init__(self, dispatcher: Dispatcher, request: CallRequest) -> None:
        self._dispatcher = dispatcher
        self._request = request
        self._call = Call(
            dispatcher,
            request.deployment,
            request.model_id,
            request.session,
            request.near,
        )
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Send the call, or wait for a replica that has room for it."""
        name, answer = self._request.deployment, self._request.answer
        answer.on_cancel = self._answer_cancelled
        if answer.done():  # cancelled before it was told whom to tell
            answer.on_cancel = None
            return
        group = self._dispatcher.groups.get(name)
        if group is not None:
            self._limit(group)
        self._start()

    def _limit(self, group: Group) -> None:
        if group.timeout_s is not None:
            self._timer = self._dispatcher.loop.call_later(
                group.timeout_s, self._call.time_up, group.timeout_s
            )

    def _start(self) -> None:
        try:
            if not self._call.begin(self._make, self._take_news):
                self._go_on()
        except RequestError as err:
            self._fail(err)

    def _make(self, exchange_id: int, replica_id: int) -> Message:
        request = self._request
        return (
            CALL,
            exchange_id,
            replica_id,
            request.method_name,
            request.arguments,
            request.future_keys,
            request.request_id,
            request.model_id,
            None if request.items is None else request.items.window_bytes,
            *request.results,
        )

    def _take_news(self) -> None:
        message, failure = self._call.peek(), self._call.failure
        if message is None and failure is not None:
            self._call.cancel()
            self._fail(failure)
        elif message is None:
            self._call.stop_listening()
            self._go_on()
        elif message[0] == REFUSED:
            try:
                self._call.try_again(message[2])
            except RequestError as err:
                self._fail(err)
        else:
            self._answer(message)

    def _go_on(self) -> None:
        self._task = self._dispatcher.loop.create_task(self._wait())

    async def _first(self) -> Message:
        if self._call.group is None and self._timer is None:  # nothing was known of it
            self._limit(await self._dispatcher.group(self._request.deployment))
        return await self._call.first(self._make, retry_lost=False)

    async def _wait(self) -> None:
        try:
            message = await self._first()
        except asyncio.CancelledError:
            self._cancel()
            raise
        except Exception as err:
            self._call.cancel()
            self._fail(err)
        else:
            self._answer(message)

    def _fail(self, error: BaseException) -> None:
        self._finish()
        with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
            self._request.answer.set_exception(error)

    def _answer(self, message: Message) -> None:
        self._finish()
        with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
            self._request.answer.set_result(message)

    def _finish(self) -> None:
        self._request.answer.on_cancel = None
        if self._timer is not None:
            self._timer.cancel()
        self._call.finish()

    def _answer_cancelled(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has stopped
            self._dispatcher.loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._call.cancel()
        self._finish()
        self._request.answer.cancel()


class _RunningStream(_RunningCall):
    """A call that brings items; the window bounds what nobody has consumed yet."""

    __slots__ = ("_items",)

    def __init__(
        self, dispatcher: Dispatcher, request: CallRequest, items: Items
    ) -> None:
        super().__init__(dispatcher, request)
        self._items = items
        items.on_consumed = self._consumed

    def _start(self) -> None:
        self._go_on()

    async def _wait(self) -> None:
        try:
            message = await self._first()
            if self._timer is not None:  # that was until the first one
                self._timer.cancel()
            self._call.streams()
            while message[0] == ITEM:
                self._items.put(message[2])
                message = await self._call.next()
        except asyncio.CancelledError:
            self._cancel()
            raise
        except Exception as err:
            self._call.cancel()
            if isinstance(err, ConnectionLostError):
                err = ReplicaDiedError(str(err))
            self._fail(err)
        else:
            self._answer(message)

    def _consumed(self, cost: int) -> None:
        """Let the replica send more; any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has stopped
            self._dispatcher.loop.call_soon_threadsafe(self._call.send, CREDIT, cost)
