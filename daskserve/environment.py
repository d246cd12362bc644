"""Is all of the cluster of one Python and one daskserve? Client side.

Without these checks a missing package shows up as an unpickling error in some log, or
as a worker that does not start, and bytecode of another Python kills who runs it. So
what comes before them travels as source.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import cloudpickle
from distributed import Client
from distributed.diagnostics.plugin import NannyPlugin

from daskserve.controller.records import PYTHON
from daskserve.exceptions import EnvironmentMismatchError

_CALL = "(exec(source, namespace := {}), namespace[name](*args))[1]"


def _by_source(function: Callable[..., Any], *args: Any) -> tuple[str, dict[str, Any]]:
    """Return what `eval` takes to call a function where this module is missing."""
    source = inspect.getsource(function)
    return _CALL, {"source": source, "name": function.__name__, "args": args}


def _probe() -> tuple[str, str | None]:
    import importlib
    import sys
    from importlib.metadata import version

    python = "%d.%d" % sys.version_info[:2]  # noqa: UP031
    try:
        importlib.import_module("daskserve")
        return python, version("daskserve")
    except ImportError:  # PackageNotFoundError is one
        return python, None


def _load(pickled: bytes, python: str, kind: str = "WorkerPlugin") -> object:
    import logging
    import pickle
    import sys

    from distributed.diagnostics import plugin

    here = "%d.%d" % sys.version_info[:2]  # noqa: UP031
    try:
        if here != python:
            raise ImportError(f"Python {here} runs here, on the scheduler {python}")
        return pickle.loads(pickled)
    except ImportError as err:
        logging.getLogger("distributed.worker").warning(
            "daskserve cannot be used here, so this worker serves nothing: %s", err
        )
        return getattr(plugin, kind)()


class _Guarded:
    """Stands for a plugin that is replaced by an idle one if it fails to load.

    Workers that join later were not seen by `check`, and Dask does not start one whose
    plugins cannot be loaded, or whose nanny's.
    """

    def __init__(self, plugin: object) -> None:
        self._plugin = plugin

    def __reduce__(self) -> tuple[Any, ...]:
        nanny = isinstance(self._plugin, NannyPlugin)
        kind = "NannyPlugin" if nanny else "WorkerPlugin"
        return eval, _by_source(_load, cloudpickle.dumps(self._plugin), PYTHON, kind)


def guarded(plugin: object) -> bytes:
    """Pickle a plugin so that it can be loaded by any worker or nanny.

    Parameters
    ----------
    plugin
        The plugin.

    Returns
    -------
    bytes
        For Dask's ``register_worker_plugin`` or ``register_nanny_plugin``. Where
        daskserve cannot be imported, or Python is another one, they load as a plugin
        that only says so in the log.
    """
    pickled: bytes = cloudpickle.dumps(_Guarded(plugin))
    return pickled


async def check(client: Client) -> None:
    """Compare Python's minor version and daskserve's everywhere with those here.

    Parameters
    ----------
    client
        A client of the cluster.

    Raises
    ------
    EnvironmentMismatchError
        One is missing, or another one, somewhere; the text lists where.
    """
    here = PYTHON, version("daskserve")
    probe = _by_source(_probe)
    found = dict(await client.run(eval, *probe, on_error="return"))
    found["the scheduler"] = await client.run_on_scheduler(eval, *probe)
    wrong = {where: there for where, there in sorted(found.items()) if there != here}
    if wrong:
        listed = "; ".join(f"{at}: {_named(there)}" for at, there in wrong.items())
        raise EnvironmentMismatchError(
            f"Python {here[0]} and daskserve {here[1]} are needed on the scheduler and "
            f"all workers, as they are here ({sys.executable}). It is not so on "
            f"{listed}. Install them there and restart, or take a client like these."
        )


def _named(found: Any) -> str:
    if isinstance(found, Exception):
        return repr(found)
    python, daskserve = found
    return f"Python {python}, daskserve {daskserve or 'missing'}"
