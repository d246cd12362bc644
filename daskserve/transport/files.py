"""How many files this process may open, and has open. Any process."""

from __future__ import annotations

import contextlib
import logging
import os

logger = logging.getLogger(__name__)

#: What share of the files may be open before it is worth a warning; and when that is
#: over.
WARN_SHARE, WELL_SHARE = 0.8, 0.7
#: Seconds between two looks.
LOOK_S = 5.0


def max_files() -> int:
    """Return how many files this process may have open."""
    try:
        import resource
    except ImportError:  # Windows
        return 2**15
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if soft == resource.RLIM_INFINITY else soft


def share_of_files(share: float) -> int:
    """Return a part of them, 1 at least."""
    return max(1, int(max_files() * share))


def raise_max_files() -> int:
    """Raise the limit as far as Dask's scheduler raises its own; return the limit."""
    with contextlib.suppress(ImportError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = hard // 2 if hard != resource.RLIM_INFINITY else 2**20
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(OSError, ValueError):  # a system has limits, too
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max_files()


def reserve_files(count: int) -> list[int]:
    """Open that many files, or fewer, only to have them."""
    opened: list[int] = []
    with contextlib.suppress(OSError):
        while len(opened) < count:
            opened.append(os.open(os.devnull, os.O_RDONLY))
    return opened


def missing_files(count: int) -> int:
    """Return how many of `count` files this process could not open now."""
    opened = reserve_files(count)
    for file in opened:
        os.close(file)
    return count - len(opened)


def open_files() -> int | None:
    """Return how many files this process has open; None where that is not told."""
    try:
        # Since Linux 6.2 the kernel has counted them.
        size = os.stat("/proc/self/fd").st_size
        return size or len(os.listdir("/proc/self/fd"))
    except OSError:
        return None


class FileWatch:
    """Say when hardly any files are left in this process; one thread's use.

    Parameters
    ----------
    process
        How people know it, such as ``"worker tcp://..."``.
    """

    def __init__(self, process: str) -> None:
        #: What is wrong; "" if nothing is.
        self.reason = ""
        self._process = process
        self._look_at = 0.0

    def look(self, now: float) -> str:
        """Return what is wrong, as of a few seconds ago at most.

        Parameters
        ----------
        now
            Time in seconds.
        """
        if now < self._look_at:
            return self.reason
        self._look_at = now + LOOK_S
        number, limit = open_files() or 0, max_files()
        if number <= limit * (WELL_SHARE if self.reason else WARN_SHARE):
            self.reason = ""
            return ""
        known = self.reason
        self.reason = (
            f"{self._process} has {number} of the {limit} files open that it may "
            f"(ulimit -n): raise the limit, or give it fewer replicas and connections"
        )
        if not known:
            logger.warning("%s", self.reason)
        return self.reason
