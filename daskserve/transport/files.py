"""How many files this process may open. Any process."""

from __future__ import annotations

import contextlib
import os
import sys


def max_files() -> int:
    """Return how many files this process may have open."""
    if sys.platform == "win32":
        return 2**15
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if soft == resource.RLIM_INFINITY else soft


def share_of_files(share: float) -> int:
    """Return a part of them, 1 at least."""
    return max(1, int(max_files() * share))


def raise_max_files() -> int:
    """Raise the limit as far as Dask's scheduler raises its own; return the limit."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = hard // 2 if hard != resource.RLIM_INFINITY else 2**20
        if soft != resource.RLIM_INFINITY and soft < wanted:
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
