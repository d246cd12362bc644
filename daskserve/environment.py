"""Is daskserve, of this version, on the scheduler and all workers? Client side.

Without these checks a missing package shows up as an unpickling error in some log, or
as a worker that does not start.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from types import FunctionType
from typing import Any

import cloudpickle
from distributed import Client

from daskserve.exceptions import EnvironmentMismatchError


def _probe() -> str | None:
    import importlib
    from importlib.metadata import version

    try:
        importlib.import_module("daskserve")
        return version("daskserve")
    except ImportError:  # PackageNotFoundError is one
        return None


def _by_value(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy that is pickled by value, for where this module is missing."""
    assert isinstance(function, FunctionType)
    copy = FunctionType(
        function.__code__, {"__builtins__": __builtins__}, function.__name__
    )
    copy.__module__ = "__main__"
    return copy


def _load(pickled: bytes) -> object:
    import logging
    import pickle

    from distributed.diagnostics.plugin import WorkerPlugin

    try:
        return pickle.loads(pickled)
    except ImportError as err:
        logging.getLogger("distributed.worker").warning(
            "daskserve cannot be imported here, so this worker serves nothing: %s", err
        )
        return WorkerPlugin()


class _Guarded:
    """Stands for a worker plugin that is replaced by an idle one if it fails to load.

    Workers that join later were not seen by `check`, and Dask does not start one whose
    plugins cannot be loaded.
    """

    def __init__(self, plugin: object) -> None:
        self._plugin = plugin

    def __reduce__(self) -> tuple[Any, ...]:
        return _by_value(_load), (cloudpickle.dumps(self._plugin),)


def guarded(plugin: object) -> bytes:
    """Pickle a worker plugin so that it can be loaded where daskserve is missing.

    Parameters
    ----------
    plugin
        The plugin.

    Returns
    -------
    bytes
        For Dask's ``register_worker_plugin``. Where daskserve cannot be imported they
        load as a plugin that does nothing but say so in the log.
    """
    pickled: bytes = cloudpickle.dumps(_Guarded(plugin))
    return pickled


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
