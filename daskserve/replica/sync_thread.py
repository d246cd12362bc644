"""The thread of a replica's sync user code; in a worker.

One job after the other, as an actor's methods run. Results go back to the replica's
loop in batches: a wake-up of the loop for each would cost more than a short job.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from daskserve.transport.loops import Mailbox


class Job:
    """A call that was handed to the thread; its methods are the loop's."""

    __slots__ = ("_context", "_function", "_ticket", "deserted", "ended", "error",
                 "future", "result")  # fmt: skip

    def __init__(
        self, function: Callable[[], Any], future: asyncio.Future[Any]
    ) -> None:
        #: Done when the call is, unless it was cancelled.
        self.future = future
        self.result: Any = None
        self.error: BaseException | None = None
        #: Its end has come to the loop.
        self.ended = False
        #: Nobody waits for it any more, and it runs on.
        self.deserted = False
        self._function = function
        self._context = contextvars.copy_context()
        # Who takes it decides: the thread, to run the call, or who waits, to leave it.
        self._ticket = [None]

    def claim(self) -> bool:
        """Take the right to run the call, or to say that it never runs; any thread."""
        with contextlib.suppress(IndexError):
            self._ticket.pop()
            return True
        return False

    def run(self) -> None:
        """Run the call; on the thread."""
        try:
            self.result = self._context.run(self._function)
        except StopIteration as err:  # a future cannot hold one
            self.error = RuntimeError("user code raised StopIteration")
            self.error.__cause__ = err
        except BaseException as err:
            self.error = err


class SyncThread:
    """Run calls one at a time, on a daemon thread that begins with the first.

    Parameters
    ----------
    loop
        The replica's loop.
    name
        The thread's name.
    deserted_ended
        Called on the loop when a deserted call ends.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: str,
        deserted_ended: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._name = name
        self._deserted_ended = deserted_ended
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._done: Mailbox[Job] = Mailbox(loop, self._deliver)
        self._thread: threading.Thread | None = None

    def submit(self, function: Callable[[], Any]) -> Job:
        """Hand over a call, in the context of whoever asks; on the loop."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name=self._name, daemon=True
            )
            self._thread.start()
        job = Job(function, self._loop.create_future())
        self._jobs.put(job)
        return job

    def desert(self, job: Job) -> bool:
        """Stop waiting for a call whose future was cancelled; on the loop.

        Returns
        -------
        bool
            Whether it runs on, for a thread cannot be stopped.
        """
        job.deserted = not job.ended and not job.claim()
        return job.deserted

    def close(self) -> None:
        """End the thread, once it is free; any thread."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.claim():
                job.run()
                self._done.put(job)
            del job  # while it waits, it is not to keep a result

    def _deliver(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.ended = True
            if job.deserted:
                self._deserted_ended()
            elif job.future.done():  # cancelled, and who waits has not noticed yet
                continue
            elif job.error is not None:
                job.future.set_exception(job.error)
            else:
                job.future.set_result(job.result)
