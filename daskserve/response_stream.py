"""What a call with ``stream=True`` returns: its items, for threads and for loops."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any, Self

from daskserve import packing
from daskserve.exceptions import ReplicaDiedError
from daskserve.replica.context import current_replica
from daskserve.session import ForkedSession, Session, WorkerSession
from daskserve.transport import values
from daskserve.transport.calls import Answer
from daskserve.transport.items import Items
from daskserve.transport.messages import END, STOPPED, UNKNOWN_METHOD, Message


class DeploymentResponseGenerator:
    """The items to come of a generator that was called through a handle.

    Iterate over it once, by ``for`` or ``async for``. The replica runs ahead of the
    consumer by a bounded amount only. What the generator raises comes after the items
    before it. When it is left before its end, the generator is closed.

    Examples
    --------
    >>> for token in handle.options(stream=True).generate.remote("Once"):
    ...     print(token)  # doctest: +SKIP
    """

    __slots__ = ("__weakref__", "_answer", "_items", "_keep_alive", "_session")

    def __init__(
        self, answer: Answer, items: Items, session: Session, keep_alive: object
    ) -> None:
        self._answer = answer
        self._items = items
        self._session = session
        # Dask futures among the arguments live at least until the end.
        self._keep_alive = keep_alive
        answer.add_done_callback(items.close)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        while (data := self._items.take()) is None:
            if self._ended():
                raise StopIteration
            check_blocking(self._session, self._answer, "for", "async for")
            self._items.news().result()
        return packing.unpack(data)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        while (data := self._items.take()) is None:
            if self._ended():
                raise StopAsyncIteration
            try:
                await settled(self._items.news())
            except asyncio.CancelledError:
                self.cancel()  # whoever consumed is gone
                raise
        return packing.unpack(data)

    def cancel(self) -> bool:
        """Close the generator in the replica; items that have come can still be had.

        Returns
        -------
        bool
            False if it has ended already.
        """
        return self._answer.cancel()

    def close(self) -> None:
        """As `cancel`; generators have this."""
        self.cancel()

    async def aclose(self) -> None:
        """As `cancel`; async generators have this."""
        self.cancel()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was not made completely
            self._answer.cancel()

    def __repr__(self) -> str:
        state = "ended" if self._answer.done() else "running"
        return f"<DeploymentResponseGenerator: {state}>"

    def __reduce__(self) -> Any:
        raise TypeError(
            "items that stream cannot be pickled: consume them here, or pass the "
            "handle on"
        )

    def _ended(self) -> bool:
        """Whether nothing more comes; raises what the generator raised."""
        if not self._answer.done():
            return False
        if self._items.waiting:  # they came before the end
            return False
        if not self._answer.cancelled():
            message = self._answer.result()
            if message[0] != END:
                raise error_of(message)
        return True


def error_of(message: Message) -> Exception:
    """Return what an ``ERROR`` message says, as an exception."""
    _, _, kind, type_name, text, formatted, pickled = message
    if kind == STOPPED:
        return ReplicaDiedError(text)
    if kind == UNKNOWN_METHOD:
        return AttributeError(text)
    return values.restore(type_name, text, formatted, pickled)


def check_blocking(session: Session, answer: Answer, what: str, instead: str) -> None:
    """Refuse to block where nothing could come: the loop of a Dask worker, say."""
    if isinstance(session, ForkedSession):
        raise session.error()
    context = current_replica.get()
    if context is not None and answer.self_call is not None:
        caller, method_name = answer.self_call
        if caller is context:
            if context._replica.waits_for_itself(method_name):
                raise RuntimeError(
                    f"{what} would wait for ever: {context.deployment!r} has one "
                    f"replica with one thread, which runs this very code and would "
                    f"have to run {method_name}() meanwhile. Call the method directly, "
                    f"make it async, or give the deployment more threads"
                )
    if isinstance(session, WorkerSession):
        if threading.get_ident() == session.worker.thread_id:
            raise RuntimeError(
                f"{what} would block the event loop of the Dask worker: use "
                f"'{instead}' here"
            )


async def settled(answer: Any) -> None:
    """Wait on the running loop for a future, without passing a cancellation on."""
    if answer.done():
        return
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def set_done() -> None:
        if not done.done():
            done.set_result(None)

    def notify(_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(set_done)

    answer.add_done_callback(notify)
    await done
