"""The HTTP server of a proxy: a socket and uvicorn on the transport loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import uvicorn
from distributed.utils import get_ip_interface

from daskserve.config import HTTPOptions
from daskserve.exceptions import ProxyStartError
from daskserve.proxy.express import Express
from daskserve.proxy.forwarded import ForwardedHeaders
from daskserve.proxy.forwarder import Forwarder
from daskserve.proxy.front import wrap
from daskserve.proxy.guard import SWEEP_S, Guard
from daskserve.proxy.steering import accept_all, reset, steer_away
from daskserve.proxy.websocket_protocol import WebSocketProtocol
from daskserve.proxy.windows import Windows
from daskserve.transport.dispatcher import Dispatcher
from daskserve.transport.forks import close_in_children
from daskserve.transport.handshakes import TlsListener
from daskserve.transport.silence import keep_alive

logger = logging.getLogger(__name__)

BACKLOG = 2048
_CAN_SHARE = hasattr(socket, "SO_REUSEPORT")
#: How often a WebSocket's client is asked whether it is there, and how long it may
#: take to answer.
PING_INTERVAL_S = 20.0
PING_TIMEOUT_S = 20.0
#: How long handshakes with clients may take that had begun when others took over.
HANDSHAKE_S = 0.3


class HTTPServer:
    """One HTTP server; everything on the dispatcher's loop.

    Parameters
    ----------
    dispatcher
        The process's way to the replicas.
    options
        The instance's HTTP options.
    windows
        What it may hold of responses.
    where
        How errors name this process, such as ``"worker tcp://..."``.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        options: HTTPOptions,
        windows: Windows,
        where: str,
    ) -> None:
        self.url = ""
        self.port = 0
        self._dispatcher = dispatcher
        self._options = options
        self._where = where
        self._forwarder = Forwarder(dispatcher, options, windows)
        self._guard = Guard(options)
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None
        self._sock: socket.socket | None = None
        self._unix_inode: int | None = None
        self._adopting: set[asyncio.Task[Any]] = set()
        close_in_children(self)

    def files(self) -> Iterable[int]:
        """Return the files of all sockets, for forked children to close."""
        if self._sock is not None:
            yield self._sock.fileno()
        if self._server is not None:
            for connection in list(self._server.server_state.connections):
                sock = connection.transport.get_extra_info("socket")
                if sock is not None:
                    yield sock.fileno()

    async def start(
        self, *, port: int, share_port: bool, probe: bool, routes: Mapping[str, str]
    ) -> str:
        """Bind and serve; return the URL.

        Parameters
        ----------
        port
            TCP port; 0 for any.
        share_port
            Whether other workers of this host bind the same port (``SO_REUSEPORT``).
        probe
            Whether nobody may hold the port yet, not even for sharing. Without, the
            path of a Unix socket is taken over from who listens there.
        routes
            The routing table to begin with.

        Raises
        ------
        ProxyStartError
            The address cannot be bound, or TLS or a middleware cannot be set up.
        """
        options = self._options
        try:
            sock = self._sock = self._bind(port, share_port, probe)
        except (OSError, ValueError) as err:
            raise ProxyStartError(self._bind_error(port, err)) from err
        try:
            self._forwarder.set_routes(dict(routes))
            self._check_files()
            config = self._config()
            config.load()
        except Exception as err:
            sock.close()
            why = str(err) if isinstance(err, OSError) else repr(err)
            raise ProxyStartError(
                f"cannot start an HTTP server on {self._where}: {why}"
            ) from err
        scheme = "https" if options.ssl_certfile else "http"
        if options.uds is not None:
            self.url = f"{scheme}+unix://{options.uds}"
        else:
            host, self.port = sock.getsockname()[:2]
            self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._dispatcher.listeners.append(self._take_snapshot)
        self._server = _Server(config, self._guard)
        self._task = asyncio.ensure_future(self._server.serve(sockets=[sock]))
        await self._server.ready.wait()
        return self.url

    def refuse(self, reason: str) -> None:
        """Answer all requests with 503 and `reason`; "" ends that; any thread."""
        self._forwarder.unavailable = reason

    def share(self, shared: bool) -> None:
        """Let others of the same user bind the port as well, or nobody any more.

        What new connections were told of a listener that has left is forgotten.
        """
        if self._sock is not None and self._options.uds is None and _CAN_SHARE:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
            reset(self._sock)

    async def unlisten(self, others: int) -> None:
        """Leave new connections to the `others` that listen on the same port.

        Those that have come this far are served on.
        """
        sock, server = self._sock, self._server
        if sock is None or server is None:
            return
        if self._options.uds is None:
            self._adopt(steer_away(sock, others) or [])
        if others:
            await asyncio.sleep(HANDSHAKE_S)
        last = accept_all(sock)
        for listener in server.servers:
            listener.close()
        sock.close()
        self._sock = None
        self._adopt(last)

    def _adopt(self, connections: list[socket.socket]) -> None:
        """Serve connections that were not accepted by the loop."""
        loop = asyncio.get_running_loop()
        assert self._server is not None
        for connection in connections:
            if self._guard.listener is not None:
                self._guard.listener.begin(connection)
                continue
            connection.setblocking(False)
            task = loop.create_task(
                loop.connect_accepted_socket(self._server.make_protocol, connection)
            )
            self._adopting.add(task)
            task.add_done_callback(self._adopted)

    def _adopted(self, task: asyncio.Task[Any]) -> None:
        self._adopting.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.debug("that client has gone already", exc_info=task.exception())

    async def retire(self, drain_s: float, idle_s: float) -> None:
        """Stop when clients have gone elsewhere, which they are asked to do.

        Parameters
        ----------
        drain_s
            How long that may take.
        idle_s
            After how long without a request connections are closed.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + drain_s
        self._guard.close_gently()
        while self._guard.connections and loop.time() < end:
            self._guard.close_idle(idle_s, loop.time())
            await asyncio.sleep(0.05)
        await self.stop(max(0.0, end - loop.time()))

    async def stop(self, drain_s: float) -> None:
        """Stop listening, let requests finish for up to `drain_s`, close."""
        if self._server is None or self._task is None:
            return
        self._forwarder.draining = True
        self._dispatcher.listeners.remove(self._take_snapshot)
        self._server.should_exit = True
        await asyncio.wait([self._task], timeout=drain_s)
        self._server.force_exit = True
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        await asyncio.wait([self._task], timeout=1)
        self._guard.release_files()
        if self._options.uds is not None:
            with contextlib.suppress(OSError):
                if os.stat(self._options.uds).st_ino == self._unix_inode:
                    os.unlink(self._options.uds)

    def _take_snapshot(self, snapshot: Mapping[str, Any]) -> None:
        self._forwarder.set_routes(dict(snapshot["routes"]))

    def _check_files(self) -> None:
        """Raise an error that names the file, if one cannot be read: ssl's do not."""
        options = self._options
        for path in (options.ssl_certfile, options.ssl_keyfile, options.ssl_ca_certs):
            if path is not None:
                open(path, "rb").close()

    def _config(self) -> uvicorn.Config:
        options = self._options
        password = options.ssl_keyfile_password
        front = wrap(self._forwarder, options)
        app = ForwardedHeaders(
            front, options.trusted_proxies, unix=options.uds is not None
        )
        if not options.middlewares:
            self._guard.express = Express(app, front, self._forwarder)
        return uvicorn.Config(
            app,
            interface="asgi3",
            http=self._guard.protocol,  # type: ignore[arg-type]
            ws=WebSocketProtocol,
            ws_ping_interval=PING_INTERVAL_S,
            ws_ping_timeout=PING_TIMEOUT_S,
            lifespan="off",
            proxy_headers=False,  # done above, also for Unix sockets and prefixes
            log_config=None,
            log_level="error",  # INFO has query strings, and WARNING what clients cause
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
            ssl_keyfile_password=(
                None if password is None else password.get_secret_value()
            ),
            ssl_ca_certs=options.ssl_ca_certs,
            ssl_cert_reqs=2 if options.ssl_ca_certs else 0,
        )

    def _bind(self, port: int, share_port: bool, probe: bool) -> socket.socket:
        if self._options.uds is not None:
            if not hasattr(socket, "AF_UNIX"):
                raise ValueError("this system has no Unix sockets; leave out uds")
            replace = share_port and not probe
            sock = _bind_unix(self._options.uds, replace)
            self._unix_inode = os.stat(self._options.uds).st_ino
            return sock
        assert self._options.host is not None
        host = _address(self._options.host)
        if probe and port:
            # Whoever shares the port is to be ours: without sharing, the kernel tells
            # whether a stranger, or another instance of daskserve, holds it already.
            _bind_tcp(host, port, share_port=False).close()
        sock = _bind_tcp(host, port, share_port=share_port)
        sock.listen(BACKLOG)
        sock.setblocking(False)
        return sock

    def _bind_error(self, port: int, error: OSError | ValueError) -> str:
        target = self._options.uds or f"{self._options.host}:{port}"
        text = f"cannot start an HTTP server on {self._where} at {target}: "
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            shared = "" if _CAN_SHARE else ", and servers cannot share one here"
            return (
                f"{text}the address is in use already{shared}. Give another port in "
                f"http_options, or port 0 for any free one."
            )
        return f"{text}{error}"


class _Server(uvicorn.Server):
    """uvicorn's server without its hands on the process's signals."""

    def __init__(self, config: uvicorn.Config, guard: Guard) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()
        self._guard = guard

    def make_protocol(self) -> asyncio.Protocol:
        """Make the protocol of a connection, as uvicorn does for its own."""
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        return protocol

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        context = self.config.ssl
        if context is None or sockets is None:
            await super().startup(sockets)
        else:
            await super().startup([])
            guard = self._guard
            guard.listener = TlsListener(
                sockets[0],
                context,
                self.make_protocol,
                guard.header_timeout_s,
                guard.admit_handshake,
            )
            self.servers = [guard.listener]  # type: ignore[list-item]
        self.ready.set()

    async def on_tick(self, counter: int) -> bool:
        if counter % round(SWEEP_S / 0.1) == 0:  # uvicorn calls it every 0.1 s
            self._guard.sweep(asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _address(host: str) -> str:
    """Return what to bind; `ValueError` if there is no such interface here."""
    if host.startswith("interface:"):
        return str(get_ip_interface(host.removeprefix("interface:")))
    return host


def _bind_tcp(host: str, port: int, *, share_port: bool) -> socket.socket:
    found = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections take it from here. A client whose machine has lost its power or
        # its network says no goodbye.
        keep_alive(sock, 60, 15, 4)
        if share_port and _CAN_SHARE:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_deserted(path: str) -> None:
    """Remove a Unix socket that a server left behind which was killed."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)


def _bind_unix(path: str, replace: bool) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound = f"{path}.{os.getpid()}" if replace else path
    # The permissions are set by the mask, so that there is no moment without them.
    mask = os.umask(0o177)
    try:
        _remove_deserted(bound)
        sock.bind(bound)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(mask)
    sock.listen(BACKLOG)
    sock.setblocking(False)
    if replace:
        os.rename(bound, path)  # at once: there is no moment without a listener
    return sock
