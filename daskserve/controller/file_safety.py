"""Whether a file is ours alone to write, and the lock beside it. Any thread.

Who can write the state file runs code on the cluster: user code is in it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def check_path(path: Path) -> None:
    """Raise `OSError` if another user can say what is there, or may have done so.

    Parameters
    ----------
    path
        An absolute path. The file need not exist, nor need its folder.
    """
    for link in _links(path):
        _check_owner(link, os.lstat(link), "the link")
    file = path.resolve()
    with contextlib.suppress(FileNotFoundError):
        check_file(file, os.lstat(file))
    with contextlib.suppress(FileNotFoundError):
        folder = os.stat(file.parent)
        _check_owner(file.parent, folder, "the folder")
        if not folder.st_mode & stat.S_ISVTX:  # where it is set, as in /tmp, only
            _check_mode(file.parent, folder, "the folder")  # owners rename and delete


def check_file(path: Path, found: os.stat_result) -> None:
    """Raise `OSError` if what was found is no file, or is not for us alone to write."""
    if not stat.S_ISREG(found.st_mode):
        # A device would be replaced as if it were one.
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    _check_owner(path, found, "the file")
    _check_mode(path, found, "the file")


def _check_owner(path: Path, found: os.stat_result, what: str) -> None:
    if sys.platform != "win32" and found.st_uid not in (os.geteuid(), 0):
        raise PermissionError(
            errno.EPERM,
            f"{what} {path} belongs to another user (uid {found.st_uid}), and who "
            f"writes it runs code here: choose a folder of your own",
        )


def _check_mode(path: Path, found: os.stat_result, what: str) -> None:
    if sys.platform != "win32" and found.st_mode & _OTHERS_WRITE:
        raise PermissionError(
            errno.EPERM,
            f"other users may write {what} {path} (mode "
            f"{stat.S_IMODE(found.st_mode):04o}), and who does runs code here: "
            f"chmod go-w {path}",
        )


def _links(path: Path) -> Iterator[Path]:
    """Yield all symbolic links on the way to a file."""
    done = Path(path.anchor)
    for part in path.parts[1:]:
        done = done / part
        if done.is_symlink():
            yield done
            yield from _links(Path(os.path.abspath(done.parent / os.readlink(done))))
            done = done.resolve()


#: Files that are locked by this process: locks of the kernel are between processes.
_locked: set[Path] = set()
_locked_lock = threading.Lock()


class FileLock:
    """A lock on a file beside another one, which is replaced when it is written.

    It ends with the process, and a forked child does not have it.

    Parameters
    ----------
    path
        The other one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(f"{path.name}.lock")
        self._file: int | None = None

    def acquire(self) -> None:
        """Take it, if it is not ours already.

        Raises
        ------
        BlockingIOError
            Somebody else has it; the text says who.
        OSError
            The file cannot be made, or belongs to another user.
        """
        if self._file is not None:
            return
        with _locked_lock:
            if self._path in _locked:
                raise _in_use("this process")
            try:
                self._file = self._lock()
            except ImportError:  # Windows
                return
            _locked.add(self._path)

    def release(self) -> None:
        """Let others have it."""
        if self._file is not None:
            with _locked_lock:
                os.close(self._file)
                self._file = None
                _locked.discard(self._path)

    def _lock(self) -> int:
        import fcntl

        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        file = os.open(self._path, flags, 0o600)
        try:
            check_file(self._path, os.fstat(file))
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            if err.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.read(file, 200).decode(errors="replace")
                os.close(file)
                raise _in_use(holder) from err
            if not isinstance(err, PermissionError) and err.errno != errno.EINVAL:
                # Network file systems need not have locks.
                logger.warning("%s cannot be locked: %s", self._path, err)
                return file
            os.close(file)
            raise
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        return file


def _in_use(holder: str) -> BlockingIOError:
    text = f"is in use by another scheduler ({holder}): each needs a file of its own"
    return BlockingIOError(errno.EAGAIN, text)
