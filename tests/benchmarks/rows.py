"""The rows of requests, each measured A B A B."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.benchmarks.apps import PLAIN
from tests.benchmarks.load import Figures, load
from tests.benchmarks.servers import daskserve, deploy, plain_uvicorn

VARIANTS = ("head-far", "head-near", "every-1", "every-2")
CONNECTIONS = (1, 10, 100)


@dataclass
class Row:
    """All figures of one row; the n-th of both were measured one after the other."""

    name: str
    plain: list[Figures] = field(default_factory=list)
    ours: list[Figures] = field(default_factory=list)


def name_of(app: str, variant: str, connections: int) -> str:
    return f"{app}/{variant}/c={connections}"


def names(pattern: str) -> list[str]:
    every = [name_of(a, v, c) for v in VARIANTS for a in PLAIN for c in CONNECTIONS]
    return [name for name in every if re.search(pattern, name)]


def measure(pattern: str, seconds: float, rounds: int) -> Iterator[Row]:
    chosen = names(pattern)
    for variant in VARIANTS:
        if not any(f"/{variant}/" in name for name in chosen):
            continue
        with daskserve(variant) as site:
            for app in PLAIN:
                counts = [c for c in CONNECTIONS if name_of(app, variant, c) in chosen]
                if not counts:
                    continue
                url = deploy(site, app, variant)
                with plain_uvicorn(PLAIN[app]) as plain:
                    for c in counts:
                        row = Row(name_of(app, variant, c))
                        for _ in range(rounds):
                            row.plain.append(load(plain, c, seconds))
                            row.ours.append(load(url, c, seconds))
                        yield row
                site.clean()
