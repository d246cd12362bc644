import ast
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


@pytest.mark.parametrize("folder", ["daskserve", "tests"])
def test_clusters_take_no_fixed_port(folder: str) -> None:
    """None for a dashboard's address means 8787, which others may have."""
    addresses = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "LocalCluster":
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                addresses.append((path.name, given.get("dashboard_address", "8787")))
    assert addresses
    assert [a for a in addresses if a[1] not in ("'127.0.0.1:0'", "':0'")] == []
