"""All rows that there are; in the process of the command."""

from __future__ import annotations

from tests.benchmarks import handles, requests

BENCHES = [*requests.BENCHES, *handles.BENCHES]
