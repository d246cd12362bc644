"""All rows that there are; in the process of the command."""

from __future__ import annotations

from tests.benchmarks import requests

BENCHES = [*requests.BENCHES]
