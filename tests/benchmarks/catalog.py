"""All rows that there are; in the process of the command."""

from __future__ import annotations

from tests.benchmarks import bodies, handles, requests, streams

BENCHES = [*requests.BENCHES, *handles.BENCHES, *bodies.BENCHES, *streams.BENCHES]
