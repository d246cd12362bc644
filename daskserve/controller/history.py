"""The versions of a deployment that have served, to go back to. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from daskserve.controller.records import OPAQUE, Spec

MAX_VERSIONS = 10


@dataclass(frozen=True, slots=True)
class Version:
    """A wish that was reached once.

    Parameters
    ----------
    number
        Counts the versions of one deployment, from 1.
    spec
        The wish.
    at
        When it was reached, in seconds.
    """

    number: int
    spec: Spec
    at: float


class History:
    """The last versions of one deployment; the newest is the one that serves.

    Parameters
    ----------
    versions
        Those of before, the oldest first.
    """

    def __init__(self, versions: Iterable[Version] = ()) -> None:
        self._versions = deque(versions, maxlen=MAX_VERSIONS)

    @property
    def versions(self) -> tuple[Version, ...]:
        """All that are remembered, the oldest first."""
        return tuple(self._versions)

    def add(self, spec: Spec, now: float) -> Spec:
        """Note that a wish is reached; the same one twice in a row counts once.

        Parameters
        ----------
        spec
            The wish.
        now
            Time in seconds.

        Returns
        -------
        Spec
            An equal one that shares its bytes with the others, to be used instead.
        """
        spec = self._shared(spec)
        last = self._versions[-1] if self._versions else None
        if last is None or not last.spec.same_wish(spec):
            number = 1 if last is None else last.number + 1
            self._versions.append(Version(number, spec, now))
        return spec

    def former(self, name: str) -> Spec:
        """Find what served before that which serves.

        Parameters
        ----------
        name
            Name of the deployment, for the error.

        Returns
        -------
        Spec
            The wish.

        Raises
        ------
        ValueError
            If there was nothing.
        """
        if len(self._versions) < 2:
            raise ValueError(f"deployment {name!r} has no former version to go back to")
        return self._versions[-2].spec

    def find(self, number: int, name: str) -> Spec:
        """Find a version by its number.

        Parameters
        ----------
        number
            The number.
        name
            Name of the deployment, for the error.

        Returns
        -------
        Spec
            The wish.

        Raises
        ------
        ValueError
            If it is not, or no longer, remembered.
        """
        for version in self._versions:
            if version.number == number:
                return version.spec
        known = ", ".join(str(v.number) for v in self._versions) or "none"
        raise ValueError(
            f"deployment {name!r} has no version number {number!r}; there are: {known}"
        )

    def report(self, now: float) -> list[dict[str, Any]]:
        """Describe the versions for people.

        Parameters
        ----------
        now
            Time in seconds.

        Returns
        -------
        list of dict
            Plain values, the oldest first.
        """
        return [
            {
                "number": v.number,
                "version": v.spec.version,
                "ago_s": now - v.at,
                "num_replicas": v.spec.num_replicas,
                "route_prefix": v.spec.route_prefix,
                "options": v.spec.options,
                "current": v is self._versions[-1],
            }
            for v in self._versions
        ]

    def _shared(self, spec: Spec) -> Spec:
        changes: dict[str, Any] = {}
        for field in OPAQUE:
            value = getattr(spec, field)
            for version in self._versions:
                if getattr(version.spec, field) == value:
                    changes[field] = getattr(version.spec, field)
        return replace(spec, **changes)
