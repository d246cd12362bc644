"""Keep the state file up to date, off the scheduler's loop. Scheduler.

Changes that come while one is being written are written together next. What cannot be
written stops nothing: it is logged, shown in the status and tried again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from daskserve.controller.journal import (
    Journal,
    UnreadableStateError,
    decode,
    encode,
)
from daskserve.controller.state_file import StateFile

logger = logging.getLogger(__name__)

RETRY_S = 5.0
#: How long a `deploy()` waits for a file system that does not answer.
WAIT_S = 10.0


class StateKeeper:
    """Reads the state once and writes it when it changes; on the scheduler's loop.

    Parameters
    ----------
    file
        Where it is.

    Attributes
    ----------
    reason
        What is wrong, for people; "" if nothing is.
    """

    def __init__(self, file: StateFile) -> None:
        self.name = file.name
        self._file = file
        self._found = ""
        self._failed = ""
        self._may_write = True
        self._journal: Journal | None = None
        #: Counts what was wanted; what was written, or could not be, follows.
        self._wanted = 0
        self._tried = 0
        self._written = 0
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def reason(self) -> str:
        """What is wrong, for people; "" if nothing is."""
        return "\n".join(filter(None, (self._found, self._failed)))

    async def load(self) -> Journal | None:
        """Read what an earlier scheduler has left.

        Returns
        -------
        Journal or None
            None if there is nothing, or nothing that can be used: `reason` then tells
            what was found and where it is now.
        """
        try:
            await asyncio.to_thread(self._file.lock)
        except BlockingIOError as err:
            self._give_up(_why(err))
            return None
        except Exception as err:  # what follows says what is wrong
            logger.debug("the state file %s cannot be locked: %s", self.name, err)
        try:
            data = await asyncio.to_thread(self._file.read)
        except Exception as err:  # fsspec's file systems raise what they like
            self._give_up(f"cannot be read: {_why(err)}")
            return None
        if data is None:
            await self._probe()
            return None
        try:
            journal = await asyncio.to_thread(decode, data, _epoch())
        except UnreadableStateError as err:
            await self.refuse(err)
            return None
        self._journal = journal
        await self._probe()
        return journal

    async def refuse(self, err: Exception) -> None:
        """Put aside what was read, since nothing can be made of it."""
        self._journal = None
        try:
            other = await asyncio.to_thread(self._file.set_aside)
        except Exception as error:  # fsspec's file systems raise what they like
            self._give_up(f"cannot be used, nor renamed ({_why(error)}): {err}")
            return
        self._found = (
            f"the state file {self.name} could not be used: {err}. It was renamed to "
            f"{other}, and nothing was restored"
        )
        logger.error("%s", self._found)

    def save(self, journal: Journal | None) -> None:
        """Have another state written, if it is another one."""
        if not self._may_write or (self._wanted and journal == self._journal):
            return
        self._journal = journal
        self._wanted += 1
        self._news.set()
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._write_all())

    async def saved(self) -> None:
        """Wait until what was given to `save` is on disk, or cannot be."""
        wanted = self._wanted
        await self._wait(lambda: self._tried >= wanted, WAIT_S)
        if self._tried < wanted:
            self._note_failure(f"is not written within {WAIT_S:g} s")

    async def close(self) -> None:
        """Wait for what is being written; give up what cannot be."""
        await self.saved()
        if self._task is not None:
            self._task.cancel()
        await asyncio.to_thread(self._file.unlock)

    async def _write_all(self) -> None:
        while self._written < self._wanted:
            number, journal = self._wanted, self._journal
            try:
                await asyncio.to_thread(self._write, journal)
            except Exception as err:  # fsspec's file systems raise what they like
                self._note_failure(f"cannot be written: {_why(err)}")
            else:
                self._written = number
                self._note_success()
            self._tried = number
            self._news.set()
            if self._written < number:
                await self._wait_for_news(number)

    async def _wait_for_news(self, number: int) -> None:
        await self._wait(lambda: self._wanted > number, RETRY_S)

    def _write(self, journal: Journal | None) -> None:
        self._file.write(encode(journal, _epoch()))

    async def _wait(self, condition: Callable[[], bool], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            pass

    async def _probe(self) -> None:
        try:
            await asyncio.to_thread(self._file.probe)
        except Exception as err:  # fsspec's file systems raise what they like
            self._note_failure(f"cannot be written: {_why(err)}")

    def _give_up(self, what: str) -> None:
        """Leave alone what is there, for it may be all that a user has."""
        self._may_write = False
        self._found = (
            f"the state file {self.name} {what}. Nothing was restored, and nothing "
            f"will be written"
        )
        logger.error("%s", self._found)

    def _note_failure(self, what: str) -> None:
        text = f"the state file {self.name} {what}; a new scheduler would not know all"
        if text != self._failed:
            self._failed = text
            logger.error("%s", text)

    def _note_success(self) -> None:
        if self._failed:
            self._failed = ""
            logger.warning("the state file %s is written again", self.name)


def _why(err: Exception) -> str:
    # The text of an `OSError` has the name of a temporary file, another one each time.
    return (isinstance(err, OSError) and err.strerror) or repr(err)


def _epoch() -> float:
    """Return what a monotonic time lacks to seconds since 1970."""
    return time.time() - time.monotonic()
