"""The threads of a replica's sync user code; in a worker.

Jobs begin in the order in which they came, and with one thread they run one after the
other, as an actor's methods do. Results go back to the replica's loop in batches: a
wake-up of the loop for each would cost more than a short job.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from queue import SimpleQueue
from time import perf_counter
from typing import Any

from daskserve.replica.times import Times
from daskserve.transport.loops import Mailbox


class Job:
    """What was handed to the threads; its methods are the loop's."""

    __slots__ = ("_function", "_ticket", "by_caller", "context", "deserted_at",
                 "ended", "error", "future", "result", "thread",
                 "took_s")  # fmt: skip

    #: Which thread has it; there once it runs.
    thread: int
    #: Seconds that it ran.
    took_s: float

    def __init__(
        self,
        function: Callable[[], Any],
        future: asyncio.Future[Any],
        by_caller: bool,
    ) -> None:
        #: Done when the job is, unless it was cancelled.
        self.future = future
        #: Whether it is a caller's, and not a constructor or a health check.
        self.by_caller = by_caller
        self.result: Any = None
        self.error: BaseException | None = None
        #: Its end has come to the loop.
        self.ended = False
        #: Since when nobody waits for it, though it runs on; by the loop's clock.
        self.deserted_at: float | None = None
        #: The variables that it sees and sets: a copy of those of whoever asks.
        self.context = contextvars.copy_context()
        self._function = function
        # Who takes it decides: a thread, to run the job, or who waits, to leave it.
        self._ticket = [None]

    def claim(self) -> bool:
        """Take the right to run the job, or to say that it never runs; any thread."""
        try:
            self._ticket.pop()
        except IndexError:
            return False
        return True

    def run(self) -> None:
        """Run it; on a thread."""
        began = perf_counter()
        try:
            self.result = self.context.run(self._function)
        except StopIteration as err:  # a future cannot hold one
            self.error = RuntimeError("user code raised StopIteration")
            self.error.__cause__ = err
        except BaseException as err:
            self.error = err
        self.took_s = perf_counter() - began


class SyncThreads:
    """Run jobs on a few daemon threads, each of which begins when it is needed.

    What can be read is the loop's, and so are the methods, but for `close`.

    Parameters
    ----------
    loop
        The replica's loop.
    name
        What the threads are called.
    number
        How many jobs run at once.
    deserted
        Called on the loop when a call is deserted that runs on.
    deserted_ended
        Called on the loop when such a call ends.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: str,
        number: int,
        deserted: Callable[[], None],
        deserted_ended: Callable[[], None],
    ) -> None:
        #: Jobs that were submitted and have not ended; deserted ones are among them.
        self.jobs = 0
        #: Calls of callers that have gone; they run on, a thread cannot be stopped.
        self.deserted = 0
        #: Of these, the one that was deserted first; for any thread to read.
        self.oldest_deserted: Job | None = None
        #: How long calls take on their threads; deserted ones and what is no caller's
        #: are left out.
        self.times = Times()
        self._loop = loop
        self._name = name
        self._number = number
        self._note_deserted = deserted
        self._note_deserted_ended = deserted_ended
        self._deserted: dict[Job, None] = {}  # in that order
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._done: Mailbox[Job] = Mailbox(loop, self._deliver)
        self._threads: list[threading.Thread] = []

    @property
    def idle(self) -> bool:
        """Whether a job that is submitted now begins at once."""
        return self.jobs < self._number

    @property
    def is_current(self) -> bool:
        """Whether the caller is on one of them; any thread."""
        return threading.current_thread() in self._threads

    def submit(self, function: Callable[[], Any], *, by_caller: bool = True) -> Job:
        """Hand over a job, in the context of whoever asks."""
        if len(self._threads) <= self.jobs and len(self._threads) < self._number:
            self._start_thread()
        job = Job(function, self._loop.create_future(), by_caller)
        self.jobs += 1
        self._queue.put(job)
        return job

    def desert(self, job: Job) -> bool:
        """Stop waiting for a job whose future was cancelled.

        Returns
        -------
        bool
            Whether it runs on.
        """
        if job.ended:
            return False
        if job.claim():
            self.jobs -= 1
            return False
        if job.by_caller:
            job.deserted_at = self._loop.time()
            self._deserted[job] = None
            self._count_deserted()
            self._note_deserted()
        return True

    def close(self) -> None:
        """End the threads, once they are free; any thread."""
        self._queue.put(None)

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _run(self) -> None:
        ident = threading.get_ident()
        while (job := self._queue.get()) is not None:
            job.thread = ident  # before it is claimed, and so before it is deserted
            if job.claim():
                job.run()
                self._done.put(job)
            del job  # while the thread waits, it is not to keep a result
        self._queue.put(None)  # for the next one

    def _deliver(self, jobs: list[Job]) -> None:
        self.jobs -= len(jobs)
        for job in jobs:
            job.ended = True
            if job.deserted_at is not None:
                del self._deserted[job]
                self._count_deserted()
                self._note_deserted_ended()
                continue
            if job.by_caller:
                self.times.add(job.took_s)
            if job.future.done():  # cancelled, and who waits has not noticed yet
                continue
            if job.error is not None:
                job.future.set_exception(job.error)
            else:
                job.future.set_result(job.result)

    def _count_deserted(self) -> None:
        self.deserted = len(self._deserted)
        self.oldest_deserted = next(iter(self._deserted), None)
