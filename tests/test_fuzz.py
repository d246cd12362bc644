"""A short run of `tests.fuzz`, the same inputs each time."""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import main

pytestmark = [pytest.mark.slow, pytest.mark.long]


# The cluster, the state files and those limits come to the 45 seconds.
@pytest.mark.timeout(240)
def test_nothing_is_found(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "1", "--seconds", "45"]) == 0, capfd.readouterr().out
