"""What outlives a scheduler, as bytes: with a format version and a checksum. No I/O.

A header of one line, then msgpack. User code is in it as the opaque bytes that it is
everywhere in the scheduler; bytes that occur several times are written once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from daskserve.controller.history import Version
from daskserve.controller.records import OPAQUE, Spec
from daskserve.controller.saved import SavedDeployment
from daskserve.exceptions import EnvironmentMismatchError

MAGIC = b"daskserve-state"
FORMAT = 1

_MAX_HEADER_BYTES = 200


class UnreadableStateError(ValueError):
    """The bytes are damaged, or from a later version of daskserve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """A detached instance.

    Parameters
    ----------
    http
        The fields of `HTTPConfig`, with the port that was bound.
    deployments
        All that are wanted.
    """

    http: Mapping[str, Any]
    deployments: tuple[SavedDeployment, ...]


def encode(journal: Journal | None, epoch: float) -> bytes:
    """Write a journal down.

    Parameters
    ----------
    journal
        The journal. None: there is no instance, or one that ends with its client.
    epoch
        What to add to times for seconds since 1970.

    Returns
    -------
    bytes
        What `decode` reads.
    """
    writer = _Writer(epoch)
    body: dict[str, Any] = {"instance": None}
    if journal is not None:
        deployments = [writer.deployment(d) for d in journal.deployments]
        instance = {"http": dict(journal.http), "deployments": deployments}
        body = {"instance": instance, "specs": writer.specs, "blobs": writer.blobs}
    packed: bytes = msgpack.packb(body)
    digest = hashlib.sha256(packed).hexdigest()
    return b"%s %d %s\n%s" % (MAGIC, FORMAT, digest.encode(), packed)


def decode(data: bytes, epoch: float) -> Journal | None:
    """Read what `encode` wrote: all of it, or nothing.

    Parameters
    ----------
    data
        The bytes.
    epoch
        What to subtract from seconds since 1970.

    Returns
    -------
    Journal or None
        As it was given to `encode`.

    Raises
    ------
    UnreadableStateError
        If one bit is not as it was written, or the format is a later one, or the code
        is another Python's.
    """
    head, newline, packed = data.partition(b"\n")
    fields = head[:_MAX_HEADER_BYTES].split(b" ")
    if fields[0] != MAGIC or not newline or len(fields) < 3 or not fields[1].isdigit():
        raise UnreadableStateError("it is not a state file, or its beginning is lost")
    if fields[1] != b"%d" % FORMAT:
        raise UnreadableStateError(
            f"it was written by another daskserve (format {int(fields[1])}, this one "
            f"reads {FORMAT})"
        )
    if hashlib.sha256(packed).hexdigest().encode() != fields[2]:
        raise UnreadableStateError("it is damaged or truncated (wrong checksum)")
    try:
        return _read(msgpack.unpackb(packed), epoch)
    except EnvironmentMismatchError as err:
        raise UnreadableStateError(str(err)) from err
    except (LookupError, TypeError, ValueError) as err:
        raise UnreadableStateError(f"it does not hold what it should: {err!r}") from err


class _Writer:
    """Number specs and bytes, so that each is written once."""

    def __init__(self, epoch: float) -> None:
        self.specs: list[dict[str, Any]] = []
        self.blobs: list[bytes] = []
        self._epoch = epoch
        self._spec_numbers: dict[int, int] = {}
        self._blob_numbers: dict[bytes, int] = {}

    def deployment(self, d: SavedDeployment) -> dict[str, Any]:
        return {
            "name": d.name,
            "serving": self._spec(d.serving),
            "target": self._spec(d.target),
            "failure": d.failure,
            "versions": [
                [v.number, self._spec(v.spec), v.at + self._epoch] for v in d.versions
            ],
        }

    def _spec(self, spec: Spec | None) -> int | None:
        if spec is None:
            return None
        number = self._spec_numbers.setdefault(id(spec), len(self.specs))
        if number == len(self.specs):
            plain = spec.to_message()
            for field in OPAQUE:
                plain[field] = self._blob(plain[field])
            self.specs.append(plain)
        return number

    def _blob(self, blob: bytes | None) -> int | None:
        if blob is None:
            return None
        number = self._blob_numbers.setdefault(blob, len(self.blobs))
        if number == len(self.blobs):
            self.blobs.append(blob)
        return number


def _read(body: Mapping[str, Any], epoch: float) -> Journal | None:
    instance = body["instance"]
    if instance is None:
        return None
    blobs = body["blobs"]
    specs: list[Spec] = []
    for plain in body["specs"]:
        opaque = {f: None if plain[f] is None else blobs[plain[f]] for f in OPAQUE}
        specs.append(Spec.from_message({**plain, **opaque}))

    def spec(number: int | None) -> Spec | None:
        return None if number is None else specs[number]

    return Journal(
        http=instance["http"],
        deployments=tuple(
            SavedDeployment(
                name=d["name"],
                serving=spec(d["serving"]),
                target=spec(d["target"]),
                failure=d["failure"],
                versions=tuple(
                    Version(number, specs[which], at - epoch)
                    for number, which, at in d["versions"]
                ),
            )
            for d in instance["deployments"]
        ),
    )
