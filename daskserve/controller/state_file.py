"""The state file's I/O: whole or not at all, for nobody else to read. Any thread.

A path is written to a temporary file beside it, synced and renamed; it is refused if
other users could write it, and locked. A URL goes the way that its fsspec file system
has for writing all or nothing, if it has one; who may read and write it is for the
store to say, and nothing keeps two schedulers from using the same.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from daskserve.controller.file_safety import FileLock, check_file, check_path


class StateFile(Protocol):
    """Where the state is; all methods block, and raise `OSError` and what fsspec does.

    Attributes
    ----------
    name
        Path or URL, for people.
    """

    name: str

    def lock(self) -> None:
        """Keep other schedulers off; `BlockingIOError` if one has it."""

    def unlock(self) -> None:
        """Let other schedulers use it."""

    def read(self) -> bytes | None:
        """Return what is there; None if there is nothing."""

    def write(self, data: bytes) -> None:
        """Put other content in its place."""

    def set_aside(self) -> str:
        """Give it another name; return that."""

    def probe(self) -> None:
        """Raise if something could not be written."""


def open_state_file(where: str) -> StateFile:
    """Return the state file of a path or fsspec URL; nothing is touched yet.

    Parameters
    ----------
    where
        Such as ``/scratch/me/serve.state`` or ``s3://bucket/serve.state``.

    Returns
    -------
    StateFile
        The file.
    """
    scheme, found, path = where.rpartition("://")
    if not found or scheme in ("file", "local"):
        return LocalFile(Path(path))
    return RemoteFile(where)


class LocalFile:
    """A file of this host, or of a file system that it has mounted."""

    def __init__(self, path: Path) -> None:
        self._given = path.expanduser().absolute()
        # The rename is to replace what a link names, not the link.
        self._path = self._given.resolve()
        self.name = str(self._path)
        self._lock = FileLock(self._path)

    def lock(self) -> None:
        """Keep other schedulers off; `BlockingIOError` if one has it."""
        check_path(self._given)
        self._lock.acquire()

    def unlock(self) -> None:
        """Let other schedulers use it."""
        self._lock.release()

    def read(self) -> bytes | None:
        """Return what is there; None if there is nothing."""
        check_path(self._given)
        try:
            with open(self._path, "rb", opener=_open_no_link) as file:
                check_file(self._path, os.fstat(file.fileno()))
                return file.read()
        except FileNotFoundError:
            return None

    def write(self, data: bytes) -> None:
        """Put other content in its place."""
        temporary = self._write_beside(data)
        try:
            temporary.replace(self._path)
        except OSError:
            temporary.unlink()
            raise
        if sys.platform == "win32":
            return
        directory = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the name, that is
        finally:
            os.close(directory)

    def set_aside(self) -> str:
        """Give it another name; return that."""
        other = self._path.with_name(_aside(self._path.name))
        self._path.rename(other)
        return str(other)

    def probe(self) -> None:
        """Raise if something could not be written."""
        self._write_beside(b"probe").unlink()

    def _write_beside(self, data: bytes) -> Path:
        check_path(self._given)
        # It may hold a token: `mkstemp` lets only the owner read it.
        handle, name = tempfile.mkstemp(
            prefix=f".{self._path.name}.", dir=self._path.parent
        )
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(handle)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        return Path(name)


class RemoteFile:
    """What fsspec reaches. Who may read it is for the store to say."""

    def __init__(self, url: str) -> None:
        self.name = url

    def lock(self) -> None:
        """Do nothing: fsspec has no locks."""

    def unlock(self) -> None:
        """Do nothing."""

    def read(self) -> bytes | None:
        """Return what is there; None if there is nothing."""
        fs, path = self._open()
        try:
            data: bytes = fs.cat_file(path)
        except FileNotFoundError:
            return None
        return data

    def write(self, data: bytes) -> None:
        """Put other content in its place."""
        fs, path = self._open()
        # Those that can do so put it into place at the end; for all there is the
        # checksum.
        with fs.transaction, fs.open(path, "wb") as file:
            file.write(data)

    def set_aside(self) -> str:
        """Give it another name; return that."""
        fs, path = self._open()
        other = _aside(path)
        fs.mv(path, other)
        return other

    def probe(self) -> None:
        """Raise if something could not be written."""
        fs, path = self._open()
        fs.pipe_file(f"{path}.probe", b"probe")
        fs.rm_file(f"{path}.probe")

    def _open(self) -> tuple[Any, str]:
        import fsspec  # dask brings it; it need not be imported without a URL

        fs, path = fsspec.core.url_to_fs(self.name, use_listings_cache=False)
        return fs, path


def _open_no_link(path: str, flags: int) -> int:
    # Nothing is put in its place between a look and this; nor is a pipe waited for.
    more = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.open(path, flags | more)


def _aside(name: str) -> str:
    return f"{name}.unreadable-{datetime.now():%Y%m%dT%H%M%S-%f}"
