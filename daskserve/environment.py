"""Is daskserve, of this version, on the scheduler and all workers? Client side.

Without this check a missing package shows up as an unpickling error in some log.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from types import FunctionType
from typing import Any

from distributed import Client

from daskserve.exceptions import EnvironmentMismatchError


def _probe() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("daskserve")
    except PackageNotFoundError:
        return None


def _by_value(function: Callable[[], Any]) -> Callable[[], Any]:
    """Return a copy that is pickled by value, for where this module is missing."""
    assert isinstance(function, FunctionType)
    copy = FunctionType(function.__code__, {"__builtins__": __builtins__}, "probe")
    copy.__module__ = "__main__"
    return copy


async def check(client: Client) -> None:
    """Compare daskserve's version everywhere with the one here.

    Parameters
    ----------
    client
        A client of the cluster.

    Raises
    ------
    EnvironmentMismatchError
        It is missing, or another one, somewhere; the text lists where.
    """
    here = version("daskserve")
    probe = _by_value(_probe)
    found = dict(await client.run(probe, on_error="return"))
    found["the scheduler"] = await client.run_on_scheduler(probe)
    wrong = {where: there for where, there in sorted(found.items()) if there != here}
    if wrong:
        listed = "; ".join(
            f"{where}: {'missing' if there is None else there}"
            for where, there in wrong.items()
        )
        raise EnvironmentMismatchError(
            f"daskserve {here} is needed on the scheduler and all workers, as it is "
            f"here ({sys.executable}). It is not so on {listed}. Install it there and "
            f"restart them."
        )
