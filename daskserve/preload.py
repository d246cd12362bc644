"""``dask scheduler --preload daskserve [--state FILE]``: run in the scheduler.

Dask finds `dask_setup` in the package's root.
"""

from __future__ import annotations

import logging
from typing import Any

import click
from distributed import Scheduler

from daskserve import environment
from daskserve.config import Settings
from daskserve.controller.keeper import StateKeeper
from daskserve.controller.plugin import NAME, ServeController
from daskserve.controller.state_file import open_state_file
from daskserve.nanny import ServeNannyPlugin
from daskserve.worker import ServeWorkerPlugin

logger = logging.getLogger(__name__)


def _check_state(
    context: click.Context, parameter: click.Parameter, where: str | None
) -> str | None:
    """Refuse what cannot be written before the scheduler starts."""
    if where is not None:
        try:
            file = open_state_file(where)
            file.probe()
            file.lock()
            file.unlock()
        except Exception as err:  # fsspec's file systems raise what they like
            raise click.BadParameter(f"{where} cannot be written: {err}") from err
    return where


@click.command(name="daskserve")
@click.option(
    "--state",
    metavar="FILE",
    callback=_check_state,
    help="Path or fsspec URL where to keep what is deployed, for a scheduler after "
    "this one. Who can write it runs code on the cluster: a path is refused if other "
    "users can, and locked; of a URL, the store's own permissions have to see to that, "
    "and each scheduler needs one of its own. "
    "Default: `daskserve.state` of Dask's configuration.",
)
def dask_setup(server: Any, state: str | None) -> None:
    """Have daskserve in a scheduler from its start; with a state file, all of it."""
    if not isinstance(server, Scheduler):
        logger.warning("daskserve is preloaded by schedulers; here it does nothing")
        return
    where = state or Settings.load().state
    keeper = None if where is None else StateKeeper(open_state_file(where))
    plugins = [environment.guarded(p()) for p in (ServeWorkerPlugin, ServeNannyPlugin)]
    # The scheduler calls its `start`.
    server.add_plugin(ServeController(keeper, *plugins), name=NAME)
