"""Is all of the cluster of one Python and one daskserve? Client side.

Without these checks a missing package shows up as an unpickling error in some log, or
as a worker that does not start, and bytecode of another Python kills who runs it. So
what comes before them travels as source.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import cloudpickle
import dask.config
from dask.utils import parse_timedelta
from distributed import Client
from distributed.diagnostics.plugin import NannyPlugin

from daskserve.controller.records import PYTHON
from daskserve.exceptions import EnvironmentMismatchError, WorkersUnreachableError

#: Seconds that workers have to answer when others have.
GRACE_S = 5

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
    except Exception as err:  # what the file system says is not about connections
        return python, f"cannot be imported ({err!r})"


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
    WorkersUnreachableError
        The scheduler cannot reach some workers, or they do not answer in the time that
        Dask's ``comm.timeouts.connect`` gives; the text lists them.
    EnvironmentMismatchError
        One is missing, or another one, somewhere; the text lists where.
    """
    here = PYTHON, version("daskserve")
    found = await _ask(client)
    silent = {at: why for at, why in sorted(found.items()) if isinstance(why, OSError)}
    if silent:
        listed = "; ".join(f"{at}: {why!r}" for at, why in silent.items())
        raise WorkersUnreachableError(
            f"The scheduler does not reach workers that have connected to it: {listed}."
            " A firewall between them, a process that stands still, or code that holds "
            "the GIL is the cause. Let the scheduler reach their ports (`dask worker "
            "--worker-port`), or end them."
        )
    wrong = {where: there for where, there in sorted(found.items()) if there != here}
    if wrong:
        listed = "; ".join(f"{at}: {_named(there)}" for at, there in wrong.items())
        raise EnvironmentMismatchError(
            f"Python {here[0]} and daskserve {here[1]} are needed on the scheduler and "
            f"all workers, as they are here ({sys.executable}). It is not so on "
            f"{listed}. Install them there and restart, or take a client like these."
        )


async def _ask(client: Client) -> dict[str, Any]:
    """Return what is where, or the error of asking there."""
    probe = _by_source(_probe)
    limit_s = parse_timedelta(dask.config.get("distributed.comm.timeouts.connect"))
    found = {"the scheduler": await client.run_on_scheduler(eval, *probe)}
    asked = client.run(eval, *probe, on_error="return")
    try:
        # Dask itself gives up connecting after so long, and waits for ever after that.
        return found | dict(await asyncio.wait_for(asked, limit_s + GRACE_S))
    except TimeoutError:
        pass
    scheduler: Any = client.scheduler
    workers = (await scheduler.identity(n_workers=-1))["workers"]

    async def ask(worker: str) -> Any:
        asked = client.run(eval, *probe, workers=[worker], on_error="return")
        try:
            return (await asyncio.wait_for(asked, GRACE_S))[worker]
        except KeyError:
            return OSError("gone")
        except TimeoutError:
            return TimeoutError(f"no answer for {limit_s:g} s")

    return found | dict(
        zip(workers, await asyncio.gather(*map(ask, workers)), strict=True)
    )


def _named(found: Any) -> str:
    if isinstance(found, Exception):
        return repr(found)
    python, daskserve = found
    return f"Python {python}, daskserve {daskserve or 'missing'}"
