"""Threads that run an event loop, and hand-over between loops. Any process.

A worker process has Dask's own loop, one transport loop (proxy and handles), and one
loop for each replica. What crosses between them goes through a `Mailbox`.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future
from contextvars import Context
from typing import Any, Generic, TypeVar

make_loop: Callable[[], asyncio.AbstractEventLoop]
try:
    from uvloop import new_event_loop as make_loop
except ImportError:  # uvloop has no Windows build
    make_loop = asyncio.SelectorEventLoop  # Windows' own cannot wait for a listener

#: How long a thread may take to end with the interpreter.
AT_EXIT_S = 1.0

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Mailbox(Generic[T]):
    """Hand items to another thread's loop, one wake-up for each batch.

    A wake-up costs a write to a pipe and a trip through the selector, so items that
    come while one is on its way ride along.

    Parameters
    ----------
    loop
        The loop that `deliver` runs on.
    deliver
        Called on `loop` with a non-empty batch, in the order of `put`.
    """

    __slots__ = ("_awake", "_deliver", "_items", "_loop")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, deliver: Callable[[list[T]], None]
    ) -> None:
        self._loop = loop
        self._deliver = deliver
        self._items: deque[T] = deque()
        self._awake = False

    def put(self, item: T) -> bool:
        """Queue `item`; any thread. False if the loop is closed: nobody is there."""
        self._items.append(item)
        # Append before looking: `_drain` clears the flag before it takes the items, so
        # either it sees this item or this thread sees the cleared flag.
        if not self._awake:
            self._awake = True
            try:
                # In a context of its own: what is begun on behalf of one item is not
                # to see the variables of whoever put another.
                self._loop.call_soon_threadsafe(self._drain, context=Context())
            except RuntimeError:
                self._awake = False
                self._items.clear()
                return False
        return True

    def take_all(self) -> list[T]:
        """Take what is queued away from `deliver`; any thread."""
        taken = []
        try:
            while True:
                taken.append(self._items.popleft())
        except IndexError:
            return taken

    def _drain(self) -> None:
        self._awake = False
        batch = self.take_all()
        if batch:
            self._deliver(batch)


class LoopThread:
    """A daemon thread that runs one event loop until `stop`.

    Parameters
    ----------
    name
        The thread's name; ours all begin with ``daskserve``.
    user_code
        Whether tasks of users run there: one that raises `SystemExit` is then an
        ordinary failure, which otherwise would end the loop.
    """

    def __init__(self, name: str, *, user_code: bool = False) -> None:
        self.loop: asyncio.AbstractEventLoop = make_loop()
        self._user_code = user_code
        if user_code:
            self.loop.set_task_factory(_make_guarded_task)
        self._stopping: asyncio.Event | None = None
        self._submitted: set[Future[Any]] = set()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def ident(self) -> int | None:
        """The thread's number, as in `sys._current_frames`."""
        return self._thread.ident

    @property
    def is_current(self) -> bool:
        """Whether the caller is this thread."""
        return threading.current_thread() is self._thread

    def start(self) -> None:
        """Start the thread and wait for its loop to run."""
        if not self._user_code:
            _to_stop.add(self)
        self._thread.start()
        self._started.wait()

    def call_soon(self, function: Callable[..., object], *args: Any) -> None:
        """Run `function` on the loop; any thread; silently dropped once stopped."""
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            logger.debug("%s has stopped, dropped %r", self._thread.name, function)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `coroutine` on the loop; any thread."""
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        except RuntimeError:
            coroutine.close()
            raise
        # The loop holds tasks weakly: one that waits for what only it knows would be
        # collected with it.
        self._submitted.add(future)
        future.add_done_callback(self._submitted.discard)
        return future

    def stop(self, timeout_s: float = 5) -> bool:
        """Cancel what runs on the loop and end the thread; True when it has ended.

        User code that blocks the loop can keep the thread alive beyond `timeout_s`;
        it is a daemon and does not hold the process.
        """

        def set_stopping() -> None:
            assert self._stopping is not None
            self._stopping.set()

        self.call_soon(set_stopping)
        if not self.is_current:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            # `run_until_complete`, not `run_forever`: anyio ties its worker threads to
            # the task that it finds running so.
            self.loop.run_until_complete(self._main())
            self.loop.run_until_complete(_cancel_all())
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        except Exception:
            logger.exception("%s ended with an error", self._thread.name)
        finally:
            asyncio.set_event_loop(None)
            self.loop.close()

    async def _main(self) -> None:
        self._stopping = asyncio.Event()
        self._started.set()
        await self._stopping.wait()


#: Threads that are to end before the interpreter does: uvloop, which goes on while
#: Python is taken down, has crashed processes that had done all they were to do.
_to_stop: weakref.WeakSet[LoopThread] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for thread in list(_to_stop):
        if thread.alive:
            thread.stop(AT_EXIT_S)


def _make_guarded_task(
    loop: asyncio.AbstractEventLoop, coroutine: Any, **kwargs: Any
) -> asyncio.Task[Any]:
    return asyncio.Task(_WithoutExits(coroutine), loop=loop, **kwargs)


class _WithoutExits(Coroutine[Any, Any, Any]):
    """A coroutine that fails with `RuntimeError` where it would end the loop."""

    __slots__ = ("_coroutine",)

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._coroutine = coroutine

    def send(self, value: Any) -> Any:
        try:
            return self._coroutine.send(value)
        except (SystemExit, KeyboardInterrupt) as err:
            raise RuntimeError(f"user code raised {err!r}") from err

    def throw(self, *error: Any) -> Any:
        try:
            return self._coroutine.throw(*error)
        except (SystemExit, KeyboardInterrupt) as err:
            raise RuntimeError(f"user code raised {err!r}") from err

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()

    def __getattr__(self, name: str) -> Any:
        # cr_running and the like, by which anyio sees whether a task has begun.
        return getattr(self._coroutine, name)


async def _cancel_all(patience_s: float = 2) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=patience_s)
