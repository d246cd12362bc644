"""User code's loop and threads; in a worker.

A replica has a thread with a loop for async code and constructors, and one more thread
for sync callables, which therefore run one at a time, as an actor's methods do. User
code that blocks either stalls neither Dask's loop, nor the proxy, nor its neighbours.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from distributed.threadpoolexecutor import ThreadPoolExecutor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from daskserve import pickling
from daskserve.ingress import find_ingress
from daskserve.replica.actor import ReplicaSpec
from daskserve.replica.asgi import HttpExchange, Lifespan
from daskserve.replica.context import ReplicaContext, current_replica
from daskserve.replica.encode import NotEncodableError, encode
from daskserve.replica.websocket import ClientDisconnectedError, WebSocketExchange
from daskserve.transport import values
from daskserve.transport.channel import ReplyTo
from daskserve.transport.loops import LoopThread, Mailbox
from daskserve.transport.messages import (
    BODY,
    CANCEL,
    CONNECT,
    CREDIT,
    CUT,
    END,
    ERROR,
    EVENT,
    NOT_ENCODABLE,
    OPENING,
    REFUSED,
    REQUEST,
    RESULT,
    STOPPED,
    UNKNOWN_METHOD,
    USER_ERROR,
    Message,
)

logger = logging.getLogger(__name__)

#: An exchange: who began it, and its number there.
Key: TypeAlias = tuple[ReplyTo, int]

#: How long shutdown hooks and ``__del__`` may take together, after the grace period.
HOOKS_TIMEOUT_S = 3.0


class Running(Protocol):
    """An exchange that is in user code."""

    task: asyncio.Task[None] | None


@dataclass(slots=True, eq=False)
class HandleCall:
    """One call through a handle that is in the replica."""

    task: asyncio.Task[None] | None


class Runner:
    """One replica: takes messages from channels, runs user code, sends the answers.

    Parameters
    ----------
    spec
        What to run.
    report
        Tells the controller of a change; called from any thread with a dict that has
        the key ``event``.
    session
        The worker's way to the cluster, for handles that user code holds and for Dask
        futures among the arguments of calls.
    window_bytes
        How much of one body may be on its way.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        report: Callable[[dict[str, Any]], None],
        session: Any,
        window_bytes: int,
    ) -> None:
        self.spec = spec
        self._window_bytes = window_bytes
        self._report = report
        self.session = session
        self._thread = LoopThread(f"daskserve-replica-{spec.tag}")
        self._sync_thread = ThreadPoolExecutor(
            1, thread_name_prefix=f"daskserve-sync-{spec.tag}"
        )
        self._inbox: Mailbox[tuple[ReplyTo, Message]] = Mailbox(
            self._thread.loop, self._deliver
        )
        self._http: dict[Key, HttpExchange] = {}
        self._websockets: dict[Key, WebSocketExchange] = {}
        self._calls: dict[Key, HandleCall] = {}
        #: Sync calls whose callers have gone; their thread cannot be stopped.
        self._deserted = 0
        self._accepting = False
        self._stopping = False
        self._idle = asyncio.Event()
        self._servable: Any = None
        self._app: ASGIApp | None = None
        self._lifespan: Lifespan | None = None
        self._answer: Callable[[Request], Any] | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop of async user code."""
        return self._thread.loop

    @property
    def ongoing(self) -> int:
        """Requests and calls that are in user code now."""
        exchanges = len(self._http) + len(self._websockets) + len(self._calls)
        return exchanges + self._deserted

    def start(self) -> None:
        """Start the threads and, on them, the constructor; returns at once."""
        self._thread.start()
        self._thread.submit(self._initialize())

    def put(self, reply_to: ReplyTo, message: Message) -> None:
        """Take a message from a channel; any thread."""
        self._inbox.put((reply_to, message))

    def forget(self, reply_to: ReplyTo) -> None:
        """Cancel everything that came from `reply_to`; any thread."""
        self._thread.call_soon(self._cancel_from, reply_to)

    def reconfigure(self, user_config: bytes | None, config_generation: int) -> None:
        """Give the user's object another config, and report how that went.

        It gets None if the deployment has no config any more.
        """
        self._thread.submit(
            self._reconfigure_and_report(user_config, config_generation)
        )

    def stop(self, grace_s: float, poll_s: float) -> None:
        """Take no more, let what runs finish, run the shutdown hooks, report."""
        self._thread.submit(self._stop(grace_s, poll_s))

    def abandon(self) -> None:
        """Answer for a replica whose user code does not let go; any thread."""
        self._accepting = False
        for key in [*self._http, *self._websockets, *self._calls]:
            self._send_stopped(*key)
        self.close(timeout_s=0)

    def close(self, timeout_s: float = 2) -> None:
        """End the threads; user code that blocks keeps them, they are daemons."""
        self._thread.stop(timeout_s)
        self._sync_thread.shutdown(wait=False)

    # Life: constructor, reconfigure, stop.

    async def _initialize(self) -> None:
        self._report({"event": "initializing", "pid": os.getpid()})
        current_replica.set(self._context(None))
        try:
            await self._construct()
            if self.spec.user_config is not None:
                await self._reconfigure(self.spec.user_config)
            await self._build_app()
        except (Exception, SystemExit, KeyboardInterrupt) as err:
            text = "".join(traceback.format_exception(err))
            logger.error("Replica %s failed to start:\n%s", self.spec.tag, text)
            self._report({"event": "failed", "text": text})
            return
        self._accepting = not self._stopping
        self._report({"event": "started", "pid": os.getpid()})

    async def _construct(self) -> None:
        target: Any = pickling.loads(self.spec.code)
        if not isinstance(target, type):
            self._servable = target
            return
        args, kwargs = pickling.loads(self.spec.init)
        constructor: Any = inspect.getattr_static(target, "__init__")
        if inspect.iscoroutinefunction(constructor):
            self._servable = object.__new__(target)
            await constructor(self._servable, *args, **kwargs)
        else:
            self._servable = target(*args, **kwargs)
        current_replica.set(self._context(None))

    async def _build_app(self) -> None:
        ingress = find_ingress(type(self._servable))
        if ingress is None:
            if callable(self._servable):
                self._answer = self._plain_callable(self._servable)
            return
        self._app = ingress.build(self._servable)
        self._lifespan = Lifespan(self._app)
        await self._lifespan.startup()

    async def _reconfigure(self, user_config: bytes | None) -> None:
        method = getattr(self._servable, "reconfigure", None)
        if method is None:
            raise TypeError(
                f"user_config was given, but deployment {self.spec.deployment!r} has "
                f"no method reconfigure(self, user_config) to take it."
            )
        value = None if user_config is None else pickling.loads(user_config)
        await self._invoke(method, (value,), {})

    async def _reconfigure_and_report(
        self, user_config: bytes | None, generation: int
    ) -> None:
        current_replica.set(self._context(None))
        error = None
        try:
            await self._reconfigure(user_config)
        except (Exception, SystemExit, KeyboardInterrupt) as err:
            error = "".join(traceback.format_exception(err))
        self._report(
            {"event": "reconfigured", "generation": generation, "error": error}
        )

    async def _stop(self, grace_s: float, poll_s: float) -> None:
        if self._stopping:
            return
        self._stopping, self._accepting = True, False
        self._wake_if_idle()
        for websocket in list(self._websockets.values()):
            websocket.go_away()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        left: dict[Key, Running] = {**self._http, **self._websockets, **self._calls}
        for key, exchange in left.items():
            self._send_stopped(*key)
            if exchange.task is not None:
                exchange.task.cancel()
        try:
            async with asyncio.timeout(HOOKS_TIMEOUT_S):
                await self._run_hooks()
        except (Exception, SystemExit, KeyboardInterrupt):
            logger.exception("Replica %s failed to shut down", self.spec.tag)
        self._report({"event": "stopped"})

    async def _run_hooks(self) -> None:
        try:
            if self._lifespan is not None:
                await self._lifespan.shutdown()
        finally:
            servable, self._servable = self._servable, None
            finalizer = getattr(type(servable), "__del__", None)
            if finalizer is not None:
                await self._invoke(finalizer, (servable,), {})
                _disarm(servable)

    # Messages.

    def _deliver(self, batch: list[tuple[ReplyTo, Message]]) -> None:
        for reply_to, message in batch:
            op = message[0]
            if op in OPENING:
                self._begin(reply_to, message)
            elif op == BODY:
                exchange = self._http.get((reply_to, message[1]))
                if exchange is not None:
                    exchange.body_arrived(message[3], message[4])
            elif op == CREDIT:
                key = (reply_to, message[1])
                credited = self._http.get(key) or self._websockets.get(key)
                if credited is not None:
                    credited.credit(message[3])
            elif op == EVENT:
                websocket = self._websockets.get((reply_to, message[1]))
                if websocket is not None:
                    websocket.event_arrived(message[3])
            elif op == CANCEL:
                self._cancel((reply_to, message[1]))

    def _begin(self, reply_to: ReplyTo, message: Message) -> None:
        if not self._accepting or self.ongoing >= self.spec.max_ongoing_requests:
            reason = "stopping" if self._stopping else "full"
            reply_to.send((REFUSED, message[1], reason))
            return
        key = (reply_to, message[1])
        if message[0] == REQUEST:
            exchange = HttpExchange(reply_to, message, self._window_bytes)
            self._http[key] = exchange
            exchange.task = self.loop.create_task(self._serve_http(exchange))
        elif message[0] == CONNECT:
            websocket = WebSocketExchange(reply_to, message, self._window_bytes)
            self._websockets[key] = websocket
            websocket.task = self.loop.create_task(self._serve_websocket(websocket))
        else:
            task = self.loop.create_task(self._serve_call(key, *message[3:]))
            self._calls[key] = HandleCall(task)

    def _cancel(self, key: Key) -> None:
        exchange = self._http.get(key)
        if exchange is not None:
            exchange.disconnect()
            if exchange.task is not None and not exchange.response_complete:
                exchange.task.cancel()
        websocket = self._websockets.get(key)
        if websocket is not None:
            websocket.disconnect()  # as on any server, the app is told and not cut off
        call = self._calls.get(key)
        if call is not None and call.task is not None:
            call.task.cancel()

    def _cancel_from(self, reply_to: ReplyTo) -> None:
        for key in [*self._http, *self._websockets, *self._calls]:
            if key[0] is reply_to:
                self._cancel(key)

    def _finished(self) -> None:
        if self._stopping:
            self._wake_if_idle()

    def _wake_if_idle(self) -> None:
        if self.ongoing == 0:
            self._idle.set()

    def _send_stopped(self, reply_to: ReplyTo, exchange_id: int) -> None:
        text = f"replica {self.spec.tag} was stopped with the request in it"
        reply_to.send((ERROR, exchange_id, STOPPED, "", text, "", None))

    # HTTP.

    async def _serve_http(self, exchange: HttpExchange) -> None:
        request_id = exchange.head["request_id"]
        current_replica.set(self._context(request_id))
        try:
            if self._app is not None:
                state = self._lifespan.state if self._lifespan is not None else None
                await self._app(exchange.scope(state), exchange.receive, exchange.send)
            else:
                await self._serve_plain(exchange)
            if not exchange.response_complete:
                raise RuntimeError("The app returned without completing its response.")
        except asyncio.CancelledError:
            _cancel_children()
            if not exchange.disconnected and not self._stopping:
                self._send_error(exchange, USER_ERROR, RuntimeError("Cancelled."))
        except (Exception, SystemExit, KeyboardInterrupt) as err:
            # A response that is complete was sent by the app's own error handler.
            kind = NOT_ENCODABLE if isinstance(err, NotEncodableError) else USER_ERROR
            logger.exception(
                "Request %s to deployment %r failed", request_id, self.spec.deployment
            )
            if not exchange.response_complete:
                self._send_error(exchange, kind, err)
        finally:
            del self._http[exchange.reply_to, exchange.exchange_id]
            self._finished()

    async def _serve_plain(self, exchange: HttpExchange) -> None:
        if self._answer is None:
            raise TypeError(
                f"Deployment {self.spec.deployment!r} cannot answer HTTP: its class "
                f"has neither __call__ nor @serve.ingress(app)."
            )
        scope = exchange.scope(None)
        try:
            result = await self._answer(Request(scope, exchange.receive))
        except HTTPException as err:
            result = _http_exception_response(err)
        encoded = encode(result)
        if isinstance(encoded, Response):
            await encoded(scope, exchange.receive, exchange.send)
            return
        content_type, body = encoded
        headers = [
            (b"content-length", b"%d" % len(body)),
            (b"content-type", content_type),
        ]
        start = {"type": "http.response.start", "status": 200, "headers": headers}
        await exchange.send(start)
        await exchange.send({"type": "http.response.body", "body": body})

    def _plain_callable(self, function: Callable[..., Any]) -> Callable[[Request], Any]:
        takes_request = _takes_arguments(function)

        async def answer(request: Request) -> Any:
            args = (request,) if takes_request else ()
            return await self._invoke(function, args, {})

        return answer

    def _send_error(
        self, exchange: HttpExchange, kind: str, error: BaseException
    ) -> None:
        if exchange.response_started:
            kind = CUT
        exchange.reply_to.send(_error_message(exchange.exchange_id, kind, error))

    # WebSockets.

    async def _serve_websocket(self, exchange: WebSocketExchange) -> None:
        request_id = exchange.head["request_id"]
        current_replica.set(self._context(request_id))
        reply: Message = (END, exchange.exchange_id)
        try:
            if self._app is None:
                await exchange.send({"type": "websocket.close"})  # a 403
            else:
                state = self._lifespan.state if self._lifespan is not None else None
                await self._app(exchange.scope(state), exchange.receive, exchange.send)
        except asyncio.CancelledError:
            _cancel_children()
        except ClientDisconnectedError:
            pass
        except (Exception, SystemExit, KeyboardInterrupt) as err:
            logger.exception(
                "WebSocket %s to deployment %r failed", request_id, self.spec.deployment
            )
            reply = _error_message(exchange.exchange_id, USER_ERROR, err)
        finally:
            del self._websockets[exchange.reply_to, exchange.exchange_id]
            exchange.reply_to.send(reply)
            self._finished()

    # Calls through handles.

    async def _serve_call(
        self,
        key: Key,
        method_name: str,
        arguments: bytes,
        future_keys: tuple[Any, ...],
        request_id: str | None,
    ) -> None:
        current_replica.set(self._context(request_id))
        reply_to, exchange_id = key
        try:
            fetched = await self.session.gather(future_keys) if future_keys else {}
            args, kwargs = values.loads_arguments(arguments, fetched)
            method = self._method(method_name)
            if not _takes_arguments(method):
                args, kwargs = (), {}
            result = await self._invoke(method, args, kwargs)
            what = f"the result of {self.spec.deployment}.{method_name}()"
            reply = (RESULT, exchange_id, pickling.dumps(result, what=what))
            reply_to.send(reply)
        except asyncio.CancelledError:
            _cancel_children()  # whoever cancelled told the caller, or was the caller
        except _UnknownMethodError as err:
            reply_to.send(_error_message(exchange_id, UNKNOWN_METHOD, err))
        except (Exception, SystemExit, KeyboardInterrupt) as err:
            reply_to.send(_error_message(exchange_id, USER_ERROR, err))
        finally:
            del self._calls[key]
            self._finished()

    def _method(self, name: str) -> Callable[..., Any]:
        servable = self._servable
        if inspect.isfunction(servable) and name == "__call__":
            return servable
        if not inspect.isfunction(servable) and hasattr(servable, name):
            method: Callable[..., Any] = getattr(servable, name)
            if callable(method):
                return method
        there_are = [
            attribute
            for attribute in dir(servable)
            if (attribute == "__call__" or not attribute.startswith("_"))
            and callable(getattr(servable, attribute, None))
        ]
        if inspect.isfunction(servable):
            there_are = ["__call__"]
        raise _UnknownMethodError(
            f"Deployment {self.spec.deployment!r} has no method {name!r}; "
            f"it has {there_are}."
        )

    # User code.

    async def _invoke(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call user code, sync code on its thread, and await what it returns."""
        if _is_async(function):
            return await function(*args, **kwargs)
        if inspect.isgeneratorfunction(inspect.unwrap(_bare(function))):
            return function(*args, **kwargs)  # its body runs when it is iterated
        result = await self._run_sync(functools.partial(function, *args, **kwargs))
        return await result if inspect.isawaitable(result) else result

    async def _run_sync(self, call: Callable[[], Any]) -> Any:
        context = current_replica.get()

        def run() -> Any:
            token = current_replica.set(context)
            try:
                return call()
            except StopIteration as err:  # a future cannot hold one
                raise RuntimeError("user code raised StopIteration") from err
            finally:
                current_replica.reset(token)

        job = self._sync_thread.submit(run)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            if not job.cancel() and not job.done():
                # It runs on: count it, so that max_ongoing_requests stays true.
                self._deserted += 1
                job.add_done_callback(
                    lambda _: self._thread.call_soon(self._deserted_ended)
                )
            raise

    def _deserted_ended(self) -> None:
        self._deserted -= 1
        self._finished()

    def _context(self, request_id: str | None) -> ReplicaContext:
        spec = self.spec
        return ReplicaContext(
            spec.deployment, spec.tag, self._servable, request_id, self
        )


class _UnknownMethodError(AttributeError):
    """A handle asked for a method that is not there."""


def _cancel_children() -> None:
    context = current_replica.get()
    assert context is not None
    for answer in list(context._children):
        answer.cancel()


def _bare(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function behind a bound method, a partial or an instance."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function) or isinstance(function, type):
        return function
    call: Callable[..., Any] = type(function).__call__
    return call


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(_bare(function))


@functools.lru_cache(maxsize=1024)
def _function_takes_arguments(function: Callable[..., Any], bound: bool) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return True
    return len(parameters) > int(bound)


def _takes_arguments(function: Callable[..., Any]) -> bool:
    if inspect.ismethod(function):
        return _function_takes_arguments(function.__func__, True)
    bare = _bare(function)
    return _function_takes_arguments(bare, bare is not function)


def _error_message(exchange_id: int, kind: str, error: BaseException) -> Message:
    return (ERROR, exchange_id, kind, *values.describe(error))


def _http_exception_response(error: HTTPException) -> Response:
    if error.status_code in {204, 304}:
        return Response(status_code=error.status_code, headers=error.headers)
    make = PlainTextResponse if isinstance(error.detail, str) else JSONResponse
    return make(error.detail, status_code=error.status_code, headers=error.headers)


def _disarm(servable: Any) -> None:
    """Keep the garbage collector from calling ``__del__`` a second time."""
    cls = type(servable)
    quiet = type(cls.__name__, (cls,), {"__slots__": (), "__del__": lambda self: None})
    with contextlib.suppress(TypeError):  # a layout that cannot be swapped
        servable.__class__ = quiet
