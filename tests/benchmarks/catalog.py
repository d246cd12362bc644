"""All rows that there are; in the process of the command."""

from __future__ import annotations

from tests.benchmarks import (
    batching,
    bodies,
    features,
    handles,
    idle,
    lifecycle,
    limits,
    places,
    requests,
    streams,
    upsets,
    work,
)

#: Those of the same place next to each other, so that it is started once.
BENCHES = [
    *requests.BENCHES,
    *features.BENCHES,
    *handles.BENCHES,
    *batching.BENCHES,
    *bodies.BENCHES,
    *streams.BENCHES,
    *lifecycle.BENCHES,
    *idle.BENCHES,
    *work.BENCHES,
    *upsets.BENCHES,
    *places.BENCHES,
    *limits.BENCHES,
]
