"""What a row is, and how rows are measured; in the process of the command."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import groupby
from statistics import median
from typing import Any

#: By name, such as "req/s" and "p50 us".
Figures = dict[str, float]
Measure = Callable[[], Figures]


@dataclass(frozen=True)
class Sides:
    """The two that are measured in turn; `theirs` is None if there is no opponent."""

    ours: Measure
    theirs: Measure | None = None


@dataclass(frozen=True)
class Bench:
    """A row to come.

    Parameters
    ----------
    name
        What the pattern of the command is searched in.
    against
        The opponent; "" for none.
    place
        Starts what is shared by the rows next to each other that have the same place.
    sides
        Starts the rest, given what the place gave, and the seconds of a measurement.
    """

    name: str
    against: str
    place: Callable[[], AbstractContextManager[Any]]
    sides: Callable[[Any, float], AbstractContextManager[Sides]]


@dataclass
class Row:
    """All figures of one row; the n-th of both were measured one after the other."""

    name: str
    against: str = ""
    theirs: list[Figures] = field(default_factory=list)
    ours: list[Figures] = field(default_factory=list)
    error: str | None = None


def measure(
    benches: Sequence[Bench], pattern: str, seconds: float, rounds: int
) -> Iterator[Row]:
    """Measure the rows whose names match; one that fails does not end the others."""
    chosen = [bench for bench in benches if re.search(pattern, bench.name)]
    for place, group in groupby(chosen, key=lambda bench: bench.place):
        left = [*group]
        last = f"end of {left[-1].name}"
        try:
            with place() as it:
                while left:
                    yield _row(left.pop(0), it, seconds, rounds)
        except Exception:
            # Those left have no place; and one that does not end well is a failure too.
            for name in [bench.name for bench in left] or [last]:
                yield Row(name, error=traceback.format_exc())


def _row(bench: Bench, place: Any, seconds: float, rounds: int) -> Row:
    row = Row(bench.name, bench.against)
    try:
        with bench.sides(place, seconds) as sides:
            for _ in range(rounds):
                if sides.theirs is not None:
                    row.theirs.append(sides.theirs())
                row.ours.append(sides.ours())
    except Exception:
        row.error = traceback.format_exc()
    return row


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def repeated(call: Callable[[], int], seconds: float) -> float:
    """Call for so long, at least once; return the sum of what it gave, a second."""
    done, began = 0, time.perf_counter()
    while not done or time.perf_counter() - began < seconds:
        done += call()
    return done / (time.perf_counter() - began)


def medians(row: Row) -> dict[str, dict[str, float]]:
    """Return ours, theirs, and the median ratio of pairs, of each figure there is."""
    found: dict[str, dict[str, float]] = {}
    for name in row.ours[0] if row.ours else ():
        found[name] = {"ours": median(f[name] for f in row.ours)}
        # The last of theirs has no pair if ours failed after it.
        rounds = zip(row.theirs, row.ours, strict=False)
        pairs = [(a[name], b[name]) for a, b in rounds if name in a]
        if pairs:
            found[name]["theirs"] = median(a for a, _ in pairs)
            if all(a for a, _ in pairs):
                found[name]["ratio"] = median(b / a for a, b in pairs)
    return found
