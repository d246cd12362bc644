import subprocess
import sys

import pytest

from tests.utils import ROOT


@pytest.mark.slow
@pytest.mark.timeout(240)  # mypy reads dask and distributed when it has no cache
@pytest.mark.parametrize(
    "command",
    ["ruff check .", "ruff format --check .", "mypy --strict daskserve"],
)
def test_lint(command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}"
