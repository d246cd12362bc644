"""The state file's I/O: whole or not at all, for nobody else to read. Any thread.

A path is written to a temporary file beside it, synced and renamed. A URL goes the way
that its fsspec file system has for writing all or nothing, if it has one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol


class StateFile(Protocol):
    """Where the state is; all methods block, and raise `OSError` and what fsspec does.

    Attributes
    ----------
    name
        Path or URL, for people.
    """

    name: str

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
    if "://" not in where or where.startswith("file://"):
        return LocalFile(Path(where.removeprefix("file://")))
    return RemoteFile(where)


class LocalFile:
    """A file of this host, or of a file system that it has mounted."""

    def __init__(self, path: Path) -> None:
        # The rename is to replace what a link names, not the link.
        self._path = path.expanduser().resolve()
        self.name = str(self._path)

    def read(self) -> bytes | None:
        """Return what is there; None if there is nothing."""
        try:
            return self._path.read_bytes()
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
        if self._path.exists() and not self._path.is_file():
            # A device would be replaced as if it were one.
            raise OSError(errno.EINVAL, "Not a regular file", self.name)
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


def _aside(name: str) -> str:
    return f"{name}.unreadable-{datetime.now():%Y%m%dT%H%M%S-%f}"
