"""A local HTTP server for a cluster that only Dask's connections reach. Client process.

It is a proxy as those in the cluster are, on the transport loop of a client. Requests
take the client's ways to the replicas: direct ones, or by way of the scheduler.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import html
import logging
from concurrent.futures import CancelledError, Future
from ipaddress import ip_address
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from distributed import Client

from daskserve import pickling
from daskserve.config import HTTPOptions
from daskserve.exceptions import ServeConfigError, ServeError
from daskserve.links import URL, link
from daskserve.session import ClientSession, client_session, current_session

if TYPE_CHECKING:
    from daskserve.proxy.server import HTTPServer

logger = logging.getLogger(__name__)

#: How long requests in progress may take to end when a tunnel closes.
DRAIN_S = 1.0
#: How often it looks whether cluster and instance are still there.
LOOK_S = 0.1
#: How many times it looks here before it asks there.
LOOKS = 10
#: What the instance's options say of its own servers only, and what a tunnel has.
NO_TLS: dict[str, Any] = {
    "location": "HeadOnly",
    "ssl_certfile": None,
    "ssl_keyfile": None,
    "ssl_keyfile_password": None,
    "ssl_ca_certs": None,
    "allow_plain_http": False,
}


class Tunnel:
    """An HTTP server on this machine for a cluster; what `tunnel` returns.

    A context manager, also with ``async with``. It ends with its client, too.

    Attributes
    ----------
    url : str
        Where it listens.
    trouble : str
        Why all requests get a 503 at present; "" if they do not.
    closed : bool
        Whether it has ended.
    """

    def __init__(
        self,
        session: ClientSession,
        server: HTTPServer,
        options: HTTPOptions,
        asynchronous: bool,
    ) -> None:
        self.url = URL()
        self.trouble = ""
        self.closed = False
        self._session = session
        self._dispatcher = session.dispatcher
        # As long as there is a tunnel, its client need not be held by anybody else.
        self._client = session.client
        self._asynchronous = asynchronous
        self._server = server
        self._options = options
        self._unsure = False
        self._stopping: asyncio.Future[None] | None = None

    def close(self) -> Any:
        """Stop the server; requests in progress get a second. May be called twice."""
        try:
            stopped = self._session.submit(self.stop())
        except RuntimeError:  # with the client
            stopped = Future()
            stopped.set_result(None)
        return asyncio.wrap_future(stopped) if self._asynchronous else _wait(stopped)

    def _close_at_exit(self) -> None:
        with contextlib.suppress(RuntimeError):
            _wait(self._session.submit(self.stop()))

    async def stop(self) -> None:
        """Stop the server; on its loop."""
        if self._stopping is None:
            self.closed = True
            self._session.servers.discard(self)
            atexit.unregister(self._close_at_exit)
            self._stopping = asyncio.ensure_future(self._server.stop(DRAIN_S))
        await asyncio.wait([self._stopping])

    def instance_may_be_new(self) -> None:
        """Take no request until it is known to want no other token, or none."""
        self._unsure = True
        self._server.refuse("Another instance may have come.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.trouble or "open"
        return f"<Tunnel {self.url} to {self._session.address}: {state}>"

    def _repr_html_(self) -> str:
        address = html.escape(self._session.address)
        shown = link(f"{self.url}/-/routes", self.url)
        return f"<b>daskserve</b> on <code>{address}</code>: {shown}"

    # Steps.

    async def _start(self) -> None:
        """Serve; on the transport loop."""
        dispatcher = self._dispatcher
        await dispatcher.informed()
        dispatcher.connect_ahead()
        await dispatcher.connected()
        self._session.servers.add(self)
        try:
            url = await self._server.start(
                port=self._options.port,
                share_port=False,
                probe=False,
                routes=dispatcher.snapshot["routes"],
            )
            self.url = URL(url)
        except BaseException:
            self._session.servers.discard(self)
            raise

    async def _watch(self) -> None:
        """Tell what is wrong with the cluster, to who asks; on Dask's loop."""
        looked = 0
        while not self.closed:
            await asyncio.sleep(LOOK_S)
            looked += 1
            # Where nothing is deployed, the instance may have ended.
            due = self.trouble or not self._dispatcher.groups
            status = self._client.status
            if status in ("closing", "closed"):
                return
            if status != "running":
                self._set_trouble("The scheduler does not answer.")
            elif self._unsure or (due and looked >= LOOKS):
                looked, self._unsure = 0, False
                self._set_trouble(await self._find_trouble())

    async def _find_trouble(self) -> str:
        try:
            options = await _options(self._session, self._options)
        except ServeError as err:
            return str(err)
        if options.difference(self._options):
            return "Another instance, with other http_options: open another tunnel."
        return ""

    def _set_trouble(self, trouble: str) -> None:
        if trouble != self.trouble:
            logger.warning("%s: %s", self.url, trouble or "All is well again.")
        self.trouble = trouble
        if not self._unsure:
            self._server.refuse(trouble)


def tunnel(
    client: Client | None = None,
    *,
    port: int = 8000,
    host: str = "127.0.0.1",
    uds: str | None = None,
) -> Tunnel:
    """Serve a cluster's deployments on this machine, through the client's connections.

    For clusters whose HTTP servers cannot be reached from here, or that have none.
    Requests go to workers directly where that is possible, else by way of the
    scheduler. The instance's ``http_options`` hold, its ``token`` too, but for those
    that say where and how servers listen: there is no TLS on the way to the tunnel.

    Parameters
    ----------
    client
        The Dask client of the cluster; default: the current one.
    port
        0 to 65535; 0 takes any free one.
    host
        A loopback address: the tunnel is for this machine only.
    uds
        Path of a Unix socket to bind in place of `host` and `port`: for this user only.

    Returns
    -------
    Tunnel
        With an asynchronous client, an awaitable of one. It serves in the background
        until it is closed, or the client is.

    Raises
    ------
    ServeNotRunningError
        No instance runs there.
    ProxyStartError
        The port is taken, or the address cannot be bound.
    ServeConfigError
        The instance's middlewares cannot be imported here.
    ValueError
        `host` is not a loopback address, or an option has a value that is not allowed.

    Examples
    --------
    >>> with serve.tunnel(client) as tunnel:  # doctest: +SKIP
    ...     print(httpx.get(f"{tunnel.url}/counter").text)
    """
    where = HTTPOptions(host=host, port=port, uds=uds, **NO_TLS)
    if uds is None and not _is_loopback(host):
        raise ValueError(
            f"host={host!r} is not a loopback address: a tunnel is for its own machine "
            f"only. Give 127.0.0.1, ::1 or localhost, or uds"
        )
    session = current_session() if client is None else client_session(client)
    if not isinstance(session, ClientSession):
        raise ServeError(
            "a tunnel is opened beside a Dask client, not in a worker or a replica"
        )
    return cast(Tunnel, session.run(_open, session, where, session.client.asynchronous))


async def _open(
    session: ClientSession, where: HTTPOptions, asynchronous: bool
) -> Tunnel:
    # Only here does a client need uvicorn.
    from daskserve.proxy.server import HTTPServer
    from daskserve.proxy.windows import Windows

    options = await _options(session, where)
    settings = session.settings
    windows = Windows(settings.proxy_buffer_bytes, settings.window_bytes)
    server = HTTPServer(session.dispatcher, options, windows, "this machine")
    opened = Tunnel(session, server, options, asynchronous)
    await asyncio.wrap_future(session.submit(opened._start()))
    atexit.register(opened._close_at_exit)
    cast(Any, session.client.loop).add_callback(opened._watch)
    return opened


async def _options(session: ClientSession, where: HTTPOptions) -> HTTPOptions:
    """Return the instance's options, with those of `where` that say where."""
    info = await session.rpc("serve_info")
    try:
        options = pickling.loads(info["options"])
    except Exception as err:
        raise ServeConfigError(
            f"the instance's http_options cannot be read here ({err!r}): what they "
            f"use, such as middlewares, has to be importable here too"
        ) from err
    assert isinstance(options, HTTPOptions)
    own = {name: getattr(where, name) for name in ("host", "port", "uds", *NO_TLS)}
    return options.model_copy(update=own)


def _wait(stopped: Future[None]) -> None:
    with contextlib.suppress(CancelledError):  # the thread has ended meanwhile
        stopped.result()


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name or an interface
        return host == "localhost"
