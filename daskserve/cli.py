"""``dask serve ...``: the command line, in a process of its own.

The `dask` command imports this module whatever it is asked to do: what takes long to
import is imported in the commands.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from distributed import Client, Security

    from daskserve.api import ServeInstance

F = TypeVar("F", bound=Callable[..., Any])

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: What the demo imports, and the packages that bring it.
DEMO_MODULES = {"sklearn": "scikit-learn", "PIL": "pillow"}


@click.group()
def serve() -> None:
    """Serve Python over HTTP from a Dask cluster (daskserve)."""


@serve.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="To bind.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="To bind; 0 for any that is free.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Processes of the Dask cluster.",
)
def demo(host: str, port: int, workers: int) -> None:
    """Start a Dask cluster on this machine and serve an example app.

    It runs until Ctrl-C or SIGTERM, and then exits with 0.
    """
    _check_demo_modules()
    with _caught_signals() as caught:
        _run_demo(host, port, workers, caught)
        click.echo("Stopped.")


def _cluster_options(command: F) -> F:
    """Add the options that say which cluster, and how to connect to it."""

    @functools.wraps(command)
    def with_address(
        scheduler: str | None, scheduler_file: str | None, **options: Any
    ) -> Any:
        return command(scheduler=_address(scheduler, scheduler_file), **options)

    decorated: Any = with_address
    for option in reversed(
        [
            click.option(
                "--scheduler",
                metavar="ADDRESS",
                envvar="DASK_SCHEDULER_ADDRESS",
                show_envvar=True,
                help="Such as tcp://127.0.0.1:8786.",
            ),
            click.option(
                "--scheduler-file",
                metavar="FILE",
                type=click.Path(exists=True, dir_okay=False, readable=True),
                help="Instead: what `dask scheduler --scheduler-file` wrote.",
            ),
            click.option("--tls-ca-file", help="PEM file of the cluster's CA."),
            click.option("--tls-cert", help="PEM file of a certificate for clients."),
            click.option("--tls-key", help="PEM file of that certificate's key."),
            click.option(
                "--timeout",
                type=click.FloatRange(0, min_open=True),
                default=10,
                show_default=True,
                help="Seconds that connecting may take.",
            ),
        ]
    ):
        decorated = option(decorated)
    return cast(F, decorated)


def _address(scheduler: str | None, scheduler_file: str | None) -> str:
    """Return the scheduler's address; what the command line says comes first."""
    if scheduler_file is None:
        if scheduler is None:
            raise click.UsageError(
                "Which cluster? Give --scheduler ADDRESS or --scheduler-file FILE, or "
                "set DASK_SCHEDULER_ADDRESS."
            )
        return scheduler
    source = click.get_current_context().get_parameter_source("scheduler")
    if source is ParameterSource.COMMANDLINE:
        raise click.UsageError(
            f"Which cluster? --scheduler {scheduler} and --scheduler-file "
            f"{scheduler_file} are two: give one."
        )
    try:
        address = json.loads(Path(scheduler_file).read_bytes())["address"]
        if isinstance(address, str):
            return address
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise click.UsageError(
        f"{scheduler_file} names no scheduler: it has to be what `dask scheduler "
        "--scheduler-file` writes."
    )


@serve.command()
@_cluster_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(as_json: bool, **cluster: Any) -> None:
    """Show what is deployed on a cluster.

    Exits with 1 if there is no daskserve instance or no scheduler.
    """
    from daskserve.exceptions import ServeError

    with _client(**cluster) as client:
        try:
            found = _connect(client).status()
        except ServeError as err:
            raise click.ClickException(str(err)) from err
        click.echo(json.dumps(asdict(found)) if as_json else str(found))


@serve.command()
@_cluster_options
def shutdown(**cluster: Any) -> None:
    """End daskserve and all its deployments on a cluster; the cluster stays.

    Exits with 0 if there is no daskserve instance, and with 1 if there is no scheduler.
    """
    from daskserve.exceptions import ServeError, ServeNotRunningError

    with _client(**cluster) as client:
        try:
            _connect(client).shutdown()
        except ServeNotRunningError:
            click.echo(f"There is no daskserve instance on {cluster['scheduler']}.")
        except ServeError as err:
            raise click.ClickException(str(err)) from err
        else:
            click.echo(f"Shut down daskserve on {cluster['scheduler']}.")


@serve.command()
@_cluster_options
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="To bind, of 127.0.0.1; 0 for any that is free.",
)
@click.option("--uds", help="Path of a Unix socket to bind instead.")
def tunnel(port: int, uds: str | None, **cluster: Any) -> None:
    """Serve a cluster's deployments on this machine.

    Through the connection to the scheduler, and to workers where they can be reached.

    It runs until Ctrl-C or SIGTERM, and then exits with 0; and with 1 if the scheduler
    is lost and not found again within --timeout. Until then, requests get a 503.
    """
    from daskserve.exceptions import ProxyStartError, ServeError
    from daskserve.tunnel import tunnel as open_tunnel

    with _caught_signals() as caught, _client(**cluster) as client:
        try:
            opened = open_tunnel(client, port=port, uds=uds)
        except ProxyStartError as err:
            raise click.ClickException(f"{err} Here, that is --port.") from err
        except (ServeError, ValueError) as err:
            raise click.ClickException(str(err)) from err
        with opened:
            click.echo(f"Serving {cluster['scheduler']} at {opened.url}")
            click.echo("End with Ctrl-C.")
            while not caught and not opened.closed:
                time.sleep(0.1)
        if not caught:
            raise click.ClickException(f"{cluster['scheduler']} is lost")
        click.echo("Stopped.")


def _connect(client: Client) -> ServeInstance:
    from daskserve.api import connect

    return connect(client)


@contextmanager
def _client(
    scheduler: str,
    timeout: float,
    tls_ca_file: str | None,
    tls_cert: str | None,
    tls_key: str | None,
) -> Iterator[Client]:
    from distributed import Client, Security

    security = None
    try:
        if tls_ca_file or tls_cert or tls_key:
            security = Security(
                require_encryption=True,
                tls_ca_file=tls_ca_file,
                tls_client_cert=tls_cert,
                tls_client_key=tls_key,
            )
        asyncio.run(_try_to_connect(scheduler, security or Security(), timeout))
        client = Client(
            scheduler, security=security, timeout=timeout, set_as_default=False
        )
    except (OSError, TypeError, ValueError) as err:
        reason = " ".join(str(err).split())
        raise click.ClickException(
            f"cannot connect to a scheduler at {scheduler}: {reason}"
        ) from err
    with client:
        yield client


async def _try_to_connect(scheduler: str, security: Security, timeout_s: float) -> None:
    """Find out before there is a `Client`: one that failed to start closes badly."""
    from distributed.comm.core import connect

    arguments = security.get_connection_args("client")
    comm = await connect(scheduler, timeout=timeout_s, **arguments)
    await comm.close()


def _check_demo_modules() -> None:
    missing = [
        package
        for module, package in DEMO_MODULES.items()
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise click.ClickException(
            f"the demo needs {' and '.join(missing)}: run pip install 'daskserve[demo]'"
        )


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collect the signals that are to end the process, in place of what they do."""
    caught: list[int] = []
    former = {
        signum: signal.signal(signum, lambda signum, _: caught.append(signum))
        for signum in STOP_SIGNALS
    }
    try:
        yield caught
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Make threads, and the processes that they start, that signals do not reach.

    A terminal sends SIGINT to workers too. They would end before the deployments, each
    with a traceback, and be started again.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    # Where it is started, the signals are unblocked afterwards.
    resource_tracker.ensure_running()
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _run_demo(host: str, port: int, workers: int, caught: list[int]) -> None:
    from distributed import Client, LocalCluster

    from daskserve.api import start
    from daskserve.demo.app import DEPLOYMENTS
    from daskserve.exceptions import ProxyStartError, ServeError

    # The scheduler is in this process: what the controller warns of, start() raises.
    logging.getLogger("daskserve.controller").setLevel(logging.ERROR)
    click.echo(f"Starting a Dask cluster with {workers} workers ...")
    with _blocked_signals():
        cluster = LocalCluster(
            n_workers=workers, threads_per_worker=2, dashboard_address="127.0.0.1:0"
        )
    with cluster, Client(cluster, set_as_default=True) as client:
        try:
            options = {"host": host, "port": port}
            with start(client, http_options=options) as instance:
                click.echo("Deploying ...")
                for deployment in DEPLOYMENTS:
                    if caught:
                        return
                    deployment.options(deploy_timeout_s=60).deploy()
                _print_demo(instance)
                # Not an Event: its lock is not made for signal handlers.
                while not caught:
                    time.sleep(0.1)
                click.echo("Stopping ...")
        except ProxyStartError as err:
            raise click.ClickException(f"{err} Here, that is --port.") from err
        except (ServeError, ValueError) as err:
            raise click.ClickException(str(err)) from err


def _print_demo(instance: ServeInstance) -> None:
    from daskserve.demo.app import DEPLOYMENTS
    from daskserve.demo.digits import EXAMPLE_DIGIT, curl_line

    base = instance.http_urls[0]
    click.echo(f"\nServing at {base}\n")
    for deployment in DEPLOYMENTS:
        url = f"{base}{deployment.route_prefix}"
        click.echo(f"  {url:<32}  {deployment.func_or_class.__doc__}")
    click.echo(f"  {base + '/-/routes':<32}  All routes, as JSON.")
    click.echo(f"\nTry this; the digit in the answer is to be {EXAMPLE_DIGIT}:\n")
    click.echo(curl_line(f"{base}/digits/predict"))
    click.echo("\nEnd with Ctrl-C.")
