"""Short runs of `tests.fuzz`, the same inputs each time, and of its sieges."""

from __future__ import annotations

import pytest

from tests.fuzz import siege
from tests.fuzz.__main__ import main
from tests.utils import need_program

pytestmark = [pytest.mark.slow, pytest.mark.long]


# The cluster, the state files and those limits come to the 45 seconds.
@pytest.mark.timeout(240)
def test_nothing_is_found(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "1", "--seconds", "45"]) == 0, capfd.readouterr().out


#: Those that something was found by, in the hands of others.
OFTEN = ["bombs", "handshakes", "silent-tls", "too-large"]
#: Slow reading of much keeps few processors busy for seconds, as with plain uvicorn.
SELDOM = sorted({*siege.NAMES} - {*OFTEN, "slow-read"})


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "names", [OFTEN, pytest.param(SELDOM, marks=pytest.mark.by_hand)], ids=len
)
def test_sieges_are_withstood(
    names: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    need_program("slowhttptest")
    # A machine in use adds to each wait.
    arguments = ["--seconds", "3", "--only", *names]
    assert siege.main(arguments, p99_s=1) == 0, capfd.readouterr().out
