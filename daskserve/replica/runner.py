"""One replica: messages from channels in, user code run, answers out; in a worker.

A replica has a thread with a loop of its own, so that user code that blocks stalls
neither Dask's loop, nor the proxy, nor its neighbours.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextvars import Context
from typing import Any, Protocol, TypeAlias, TypeVar

from distributed.worker import _worker_cvar
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import (
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)

from daskserve import packing
from daskserve.exceptions import RequestError
from daskserve.packing import Packed
from daskserve.replica.actor import ReplicaSpec
from daskserve.replica.admission import Caller
from daskserve.replica.asgi import HttpExchange, Starts
from daskserve.replica.client import ReplicaClients, worker_of_replica
from daskserve.replica.context import ReplicaContext, current_replica
from daskserve.replica.encode import NotEncodableError, encode
from daskserve.replica.handle_calls import HandleCall, StreamCall, is_stream
from daskserve.replica.intake import Intake
from daskserve.replica.servable import Servable, UnknownMethodError
from daskserve.replica.sessions import Sessions
from daskserve.replica.websocket import ClientDisconnectedError, WebSocketExchange
from daskserve.transport import values
from daskserve.transport.affinity import Affinity
from daskserve.transport.channel import ReplyTo
from daskserve.transport.direct import DirectListener
from daskserve.transport.loops import LoopThread, Mailbox
from daskserve.transport.messages import (
    BODY,
    CANCEL,
    CONNECT,
    CREDIT,
    CUT,
    DECLINE,
    END,
    ERROR,
    EVENT,
    FOLLOW,
    FULL,
    FULL_OF_WEBSOCKETS,
    MODELS,
    NOT_ENCODABLE,
    OPENING,
    REFUSED,
    REQUEST,
    RESULT,
    STOPPED,
    UNKNOWN_METHOD,
    USER_ERROR,
    WANT,
    Head,
    Message,
    error_response,
)
from daskserve.transport.silence import SilenceWatch

T = TypeVar("T")
logger = logging.getLogger(__name__)

#: An exchange: who began it, and its number there.
Key: TypeAlias = tuple[ReplyTo, int]

#: Of how many models callers are told, the last used ones.
MAX_TOLD = 1000
#: How long cancelled requests may take to clean up.
CANCEL_TIMEOUT_S = 1.0
#: How long an app may take to end a response that nobody wants any more by itself.
TOLD_S = 1.0
#: How many bytes of an exception that a replica did not start by are passed on.
LARGEST_CAUSE = 2**16
#: Beyond the grace period, how long a replica may take before it is given up.
STOP_MARGIN_S = 4.0
#: How long shutdown hooks and ``__del__`` may take together, after the grace period.
HOOKS_TIMEOUT_S = 3.0


class Running(Protocol):
    """An exchange that is in user code."""

    task: asyncio.Task[None] | None


class Admitted(Protocol):
    """An exchange that has a slot."""

    #: Whose it is, while it has it, and since when, by `time.perf_counter`.
    slot: Caller | None
    began: float


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
    busy_changed
        Called on the replica's loop when `abandoned` is another.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        report: Callable[[dict[str, Any]], None],
        session: Any,
        window_bytes: int,
        busy_changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.spec = spec
        #: Seconds between two health checks, and seconds that one may take.
        self.rhythm = spec.health_check_period_s, spec.health_check_timeout_s
        #: For how many seconds a call may run on that nobody waits for; None: for ever.
        self.abandoned_call_timeout_s = spec.abandoned_call_timeout_s
        self._window_bytes = window_bytes
        self._report = report
        self.session = session
        self._thread = LoopThread(f"daskserve-replica-{spec.tag}", user_code=True)
        self._inbox: Mailbox[tuple[ReplyTo, list[Message]]] = Mailbox(
            self._thread.loop, self._deliver
        )
        # What user code runs in: `distributed.get_client()` works as in Dask's tasks.
        self._context = Context()
        #: For `get_client` in user code.
        self.clients = ReplicaClients(session.worker, self._thread.loop)
        if session.worker is not None:
            worker = worker_of_replica(session.worker, self.clients)
            self._context.run(_worker_cvar.set, worker)
        self._starts = Starts(self._thread.loop)
        self._http: dict[Key, HttpExchange] = {}
        self._websockets: dict[Key, WebSocketExchange] = {}
        self._calls: dict[Key, HandleCall] = {}
        self._listener: DirectListener | None = None
        self._warned_at = -math.inf
        affinity = Affinity.of(spec.session_affinity)
        self._sessions: Sessions | None = None
        if affinity is not None:
            self._sessions = Sessions(affinity, spec.replica_id)
        self._accepting = False
        self._stopping = False
        #: How long requests have when it stops.
        self._patience: asyncio.Timeout | None = None
        self._idle = asyncio.Event()
        self._initialized = asyncio.Event()
        self._reconfiguring = asyncio.Lock()
        self._busy_changed = busy_changed
        self._servable = Servable(
            spec, self.loop, self._context, self._abandoned, self._abandoned_ended
        )
        self._intake = Intake(self.loop, spec, self._servable)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop of async user code."""
        return self._thread.loop

    @property
    def deserted(self) -> int:
        """Calls that run on though nobody waits for them."""
        return self._servable.deserted

    @property
    def first_limit(self) -> int | None:
        """How many requests callers send before they have heard; None: all."""
        return self._intake.first_limit

    @property
    def tag(self) -> str:
        """The replica's name for users."""
        return self.spec.tag

    @property
    def checkable(self) -> bool:
        """Whether it takes requests, and no ``reconfigure()`` may keep its loop."""
        return self._accepting and not self._reconfiguring.locked()

    @property
    def ongoing(self) -> int:
        """Requests and calls that are in user code now."""
        exchanges = len(self._http) + len(self._websockets) + len(self._calls)
        return exchanges + self._servable.deserted

    @property
    def needs_s(self) -> float:
        """How long what is in progress may take, in seconds; any thread."""
        admitted: list[Admitted] = [*self._http.values(), *self._calls.values()]
        began = [each.began for each in admitted if each.slot is not None]
        oldest_s = time.perf_counter() - min(began) if began else 0.0
        return self._intake.needs_s(oldest_s)

    def waits_for_itself(self, method_name: str) -> bool:
        """Whether who waits for a call of this deployment here keeps it from running.

        Asked on the thread that would wait.
        """
        if self.spec.threads > 1 or not self._servable.waits_for(method_name):
            return False
        group = self.session.dispatcher.groups.get(self.spec.deployment)
        if group is None or group.info is None or "load_interval_s" in group.info:
            return False  # one that scales may get another replica
        return len(group.router.slots) == 1

    def start(self) -> None:
        """Start the threads and, on them, the constructor; returns at once."""
        self._thread.start()
        initialized = self._submit(self._initialize())
        initialized.add_done_callback(
            lambda _: self._thread.call_soon(self._initialized.set)
        )

    def put(self, reply_to: ReplyTo, batch: list[Message]) -> None:
        """Take messages from a channel; any thread."""
        self._inbox.put((reply_to, batch))

    def forget(self, reply_to: ReplyTo) -> None:
        """Cancel everything that came from `reply_to`; any thread."""
        self._thread.call_soon(self._cancel_from, reply_to)

    def reconfigure(self, user_config: bytes | None, config_generation: int) -> None:
        """Give the user's object another config, and report how that went."""
        self._submit(self._reconfigure_and_report(user_config, config_generation))

    def models_changed(self, models: Iterable[Any]) -> None:
        """Tell callers which models are loaded here; on the loop."""
        models = list(models)
        limits = [each.limit for each in models if each.limit is not None]
        ids = [model_id for each in models for model_id in each.ids]
        load_us = int(max(each.load_s for each in models) * 1e6)
        news = min(limits, default=0), load_us, tuple(ids[-MAX_TOLD:])
        self._intake.greet((MODELS, 0, self.spec.replica_id, *news))

    def check_health(self, began: Callable[[], None]) -> Future[bool]:
        """Call `began`, and the user's ``check_health()``, on the loop; any thread.

        False comes back if that was passed over, for no thread is idle.
        """
        return self._submit(self._check_health(began))

    def thread_ids(self) -> list[int | None]:
        """Return the threads where a check may be kept: the loop's, and its own."""
        return [self._thread.ident, self._servable.checking]

    @property
    def abandoned(self) -> tuple[float, int] | None:
        """Since when nobody waits for a sync call that runs on, and on which thread."""
        return self._servable.abandoned

    def stop(self, grace_s: float, poll_s: float) -> None:
        """Take no more, let what runs finish, run the shutdown hooks, report."""
        self._submit(self._stop(grace_s, poll_s))

    def abandon(self) -> None:
        """Answer for a replica whose user code does not let go; any thread."""
        self._accepting = False
        for key in [*self._http, *self._websockets, *self._calls]:
            self._send_stopped(*key)
        for reply_to, batch in self._inbox.take_all():
            for message in batch:
                if message[0] in OPENING:  # never handed to user code
                    reply_to.send((REFUSED, message[1], "stopping"))
        self.close(timeout_s=0)

    def close(self, timeout_s: float = 2) -> None:
        """End the threads; user code that blocks keeps them, they are daemons."""
        if self._listener is not None:
            self._thread.call_soon(self._listener.close)
        self._thread.stop(timeout_s)
        self._servable.close()

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        # The context of whoever asks is none of user code's business.
        return self._context.copy().run(self._thread.submit, coroutine)

    # Life: constructor, reconfigure, stop.

    async def _initialize(self) -> None:
        self._report({"event": "initializing", "pid": os.getpid()})
        self._enter_outside()
        failure = None
        try:
            keys = self.spec.future_keys
            with values.given(await self.session.gather(keys) if keys else {}):
                await self._servable.construct()
            if self._stopping:
                return  # `_stop` has waited for what it ends
            self._enter_outside()
            await self._servable.startup()
            await self._first_check()
        except BaseException as err:
            if _was_cancelled(err):
                return
            failure = values.describe(err)
        if failure is not None:
            _, _, text, cause = failure
            logger.error("Replica %s failed to start:\n%s", self.spec.tag, text)
            # What it has, such as a device, may be needed for the next try.
            self._enter_outside()
            await self._shut_down()
            await self.clients.close()
            if cause is not None and len(cause) > LARGEST_CAUSE:
                cause = None
            self._report({"event": "failed", "text": text, "cause": cause})
        else:
            await self._open()

    async def _open(self) -> None:
        if self._stopping:
            return
        direct = await self._listen()
        self._intake.started()
        self._accepting = not self._stopping
        started = {"event": "started", "pid": os.getpid(), "direct": direct}
        self._report({**started, "limit": self.first_limit})

    async def _first_check(self) -> None:
        """Let a replica that is ill from the beginning count as one that fails."""
        timeout_s = self.rhythm[1]
        try:
            async with asyncio.timeout(timeout_s) as limit:
                await self._servable.check_health()
        except TimeoutError:
            if not limit.expired():
                raise
            text = f"check_health() did not end within {timeout_s:g} s"
            raise TimeoutError(text) from None

    async def _check_health(self, began: Callable[[], None]) -> bool:
        began()
        self._enter_outside()
        return await self._servable.check_health()

    async def _listen(self) -> list[Any] | None:
        """Open the replica's own port; None if there is to be none."""
        try:
            address = self.session.direct_listener()
            if address is None:
                return None
            watch = SilenceWatch(self.loop, self.session.settings.silence_timeout_s)
            self._listener = DirectListener(self, self._take_all, watch)
            return (await self._listener.start(*address)).to_message()
        except Exception as err:  # requests come by way of the worker's port then
            logger.warning("Replica %s has no port of its own: %s", self.spec.tag, err)
            return None

    async def _reconfigure_and_report(
        self, user_config: bytes | None, generation: int
    ) -> None:
        error = None
        try:
            async with self._reconfiguring:  # in order: the last one asked for wins
                self._enter_outside()
                await self._servable.reconfigure(user_config)
        except BaseException as err:
            error = values.format_error(err)
        self._report(
            {"event": "reconfigured", "generation": generation, "error": error}
        )

    async def _stop(self, grace_s: float, poll_s: float) -> None:
        if self._stopping:
            if self._patience is not None and not self._patience.expired():
                # It is to be sooner now.
                at = min(self._patience.when() or math.inf, self.loop.time() + grace_s)
                self._patience.reschedule(at)
            return
        self._stopping, self._accepting = True, False
        self._intake.close()
        self._enter_outside()
        self._wake_if_idle()
        for websocket in list(self._websockets.values()):
            websocket.go_away()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s) as self._patience:
                await self._initialized.wait()
                await self._idle.wait()
        self._patience = None
        left: dict[Key, Running] = {**self._http, **self._websockets, **self._calls}
        for key, exchange in left.items():
            self._send_stopped(*key)
            if isinstance(exchange, HttpExchange):
                self._cancel_http(exchange, key)
            elif isinstance(exchange, HandleCall):
                self._cancel_call(exchange, key)
            elif exchange.task is not None:
                exchange.task.cancel()
        if not self._servable.constructed.is_set():
            logger.warning(
                "The constructor of replica %s does not end. Its thread is left to "
                "itself.",
                self.spec.tag,
            )
        tasks = [e.task for e in left.values() if e.task is not None]
        if tasks:  # their cleanup still needs the user's object
            await asyncio.wait(tasks, timeout=CANCEL_TIMEOUT_S)
        await self._shut_down()
        await self.clients.close()
        if self._listener is not None:
            await self._listener.say_goodbye()
        self._report({"event": "stopped"})

    async def _shut_down(self) -> None:
        try:
            async with asyncio.timeout(HOOKS_TIMEOUT_S):
                await self._servable.shutdown()
        except BaseException:
            logger.exception("Replica %s failed to shut down", self.spec.tag)

    # Messages.

    def _deliver(self, batches: list[tuple[ReplyTo, list[Message]]]) -> None:
        for reply_to, batch in batches:
            self._take_all(reply_to, batch)

    def _take_all(self, reply_to: ReplyTo, batch: Iterable[Message]) -> None:
        for message in batch:
            op = message[0]
            if op in OPENING:
                self._begin(reply_to, message)
            elif op == BODY:
                exchange = self._http.get((reply_to, message[1]))
                if exchange is not None:
                    exchange.body_arrived(message[3], message[4])
            elif op == CREDIT:
                key = (reply_to, message[1])
                credited = (
                    self._http.get(key)
                    or self._websockets.get(key)
                    or self._calls.get(key)
                )
                if credited is not None:
                    credited.credit(message[3])
            elif op == EVENT:
                websocket = self._websockets.get((reply_to, message[1]))
                if websocket is not None:
                    websocket.event_arrived(message[3])
            elif op == CANCEL:
                self._cancel((reply_to, message[1]))
            elif op == WANT:
                self._intake.want(reply_to, int(message[3]))
            elif op == DECLINE:
                self._intake.decline(reply_to)
            elif op == FOLLOW:
                self._intake.tell_models(reply_to)
                if self._sessions is not None:
                    self._sessions.follow(reply_to)

    def _begin(self, reply_to: ReplyTo, message: Message) -> None:
        slot = None
        refusal = None if self._accepting else "stopping"
        if refusal is None and message[0] == CONNECT:
            refusal = self._websocket_refusal()
        elif refusal is None:
            slot = self._intake.take(reply_to)
            refusal = FULL if slot is None else None
        if refusal is not None:
            reply_to.send((REFUSED, message[1], refusal))
            return
        key = (reply_to, message[1])
        # Tasks not by the loop's factory: what serves catches what user code raises.
        if message[0] == REQUEST:
            exchange = HttpExchange(
                reply_to, message, self._window_bytes, self._starts, self._sessions
            )
            exchange.slot = slot
            self._http[key] = exchange
            exchange.task = asyncio.Task(
                self._serve_http(exchange, key),
                loop=self._thread.loop,
                context=self._context.copy(),
            )
        elif message[0] == CONNECT:
            websocket = WebSocketExchange(
                reply_to, message, self._window_bytes, self._sessions
            )
            self._websockets[key] = websocket
            serving = self._serve_websocket(websocket)
            websocket.task = self._spawn(self._websockets, key, serving)
        else:
            window_bytes: int | None = message[8]
            if window_bytes is None:
                call = HandleCall()
            else:
                call = StreamCall(reply_to, message[1], window_bytes)
            call.slot = slot
            self._calls[key] = call
            call.task = asyncio.Task(
                self._serve_call(call, key, *message[3:]),
                loop=self._thread.loop,
                context=self._context.copy(),
            )

    def _websocket_refusal(self) -> str | None:
        """Return why there is no room for one more, or None."""
        limit = self.spec.max_websockets
        if len(self._websockets) < limit:
            return None
        if self.loop.time() > self._warned_at + 1.0:
            self._warned_at = self.loop.time()
            logger.warning(
                "Replica %s refuses WebSockets: %d are open (max_websockets=%d)",
                self.spec.tag,
                len(self._websockets),
                limit,
            )
        return FULL_OF_WEBSOCKETS

    def _spawn(
        self, running: dict[Key, Any], key: Key, serving: Coroutine[Any, Any, None]
    ) -> asyncio.Task[None]:
        def ended(task: asyncio.Task[None]) -> None:
            # Not in the coroutine: cancelled before its first step, it never runs.
            del running[key]
            if self._stopping:
                self._wake_if_idle()

        task = asyncio.Task(
            serving, loop=self._thread.loop, context=self._context.copy()
        )
        task.add_done_callback(ended)
        return task

    def _cancel(self, key: Key) -> None:
        exchange = self._http.get(key)
        if exchange is not None:
            exchange.disconnect()
            if exchange.response_started and self._servable.app is not None:
                # It is told, as on any server. Some take a cancellation for a failure
                # of what the client has read already, and undo that.
                self.loop.call_later(TOLD_S, self._cancel_told, exchange, key)
            elif not exchange.response_complete:
                self._cancel_http(exchange, key)
        websocket = self._websockets.get(key)
        if websocket is not None:
            websocket.disconnect()  # as on any server, the app is told and not cut off
        call = self._calls.get(key)
        if call is not None:
            self._cancel_call(call, key)

    def _cancel_told(self, exchange: HttpExchange, key: Key) -> None:
        if self._http.get(key) is exchange and not exchange.response_complete:
            self._cancel_http(exchange, key)

    def _cancel_http(self, exchange: HttpExchange, key: Key) -> None:
        assert exchange.task is not None
        exchange.task.cancel()
        if not exchange.entered:  # it never runs, not even to its ``finally``
            del self._http[key]
            self._give_back(exchange)

    def _cancel_call(self, call: HandleCall, key: Key) -> None:
        assert call.task is not None
        call.task.cancel()
        if not call.entered:
            del self._calls[key]
            self._give_back(call)

    def _cancel_from(self, reply_to: ReplyTo) -> None:
        self._intake.forget(reply_to)
        if self._sessions is not None:
            self._sessions.forget(reply_to)
        for key in [*self._http, *self._websockets, *self._calls]:
            if key[0] is reply_to:
                self._cancel(key)

    def _give_back(self, exchange: Admitted) -> None:
        """Let another request have the slot of one that has ended, or left its thread.

        May be called again when that ends.
        """
        slot, exchange.slot = exchange.slot, None
        if slot is not None:
            self._intake.give_back(slot, exchange.began)
        if self._stopping:
            self._wake_if_idle()

    def _abandoned(self) -> None:
        self._intake.abandoned_changed()
        self._busy_changed()

    def _abandoned_ended(self) -> None:
        self._abandoned()
        if self._stopping:
            self._wake_if_idle()

    def _wake_if_idle(self) -> None:
        if self.ongoing == 0:
            self._idle.set()

    def _send_stopped(self, reply_to: ReplyTo, exchange_id: int) -> None:
        text = f"replica {self.spec.tag} was stopped with the request in it"
        reply_to.send((ERROR, exchange_id, STOPPED, "", text, "", None))

    # HTTP.

    async def _serve_http(self, exchange: HttpExchange, key: Key) -> None:
        exchange.entered = True
        request_id = exchange.head.request_id
        try:
            self._enter(request_id, exchange.head)
            servable = self._servable
            if servable.app is not None:
                scope = exchange.scope(servable.state)
                await servable.app(scope, exchange.receive, exchange.send)
            else:
                await self._serve_plain(exchange)
            if not exchange.response_complete and not exchange.disconnected:
                raise RuntimeError("The app returned without completing its response.")
            exchange.send_held()
        except BaseException as err:
            if _was_cancelled(err):
                return _cancel_children()  # whoever cancelled knows
            refusal = values.request_error(err)
            if refusal is not None and refusal.status_code != 500:
                return self._refuse(exchange, refusal)
            kind = NOT_ENCODABLE if isinstance(err, NotEncodableError) else USER_ERROR
            logger.exception(
                "Request %s to deployment %r failed", request_id, self.spec.deployment
            )
            if not exchange.head.debug:
                exchange.send_held()
            # A response that is complete was sent by the app's own error handler.
            if not exchange.response_complete or exchange.drop_held():
                self._send_error(exchange, kind, err)
        finally:
            self._http.pop(key, None)
            self._give_back(exchange)

    def _refuse(self, exchange: HttpExchange, error: RequestError) -> None:
        """Pass on the status of a call that user code made and that went wrong."""
        request_id, name = exchange.head.request_id, self.spec.deployment
        logger.warning("Request %s to deployment %r: %s", request_id, name, error)
        if exchange.response_complete and not exchange.drop_held():
            return  # by the app's own error handler
        if exchange.response_started:
            self._send_error(exchange, CUT, error)
        else:
            exchange.respond(*error_response(error))

    async def _serve_plain(self, exchange: HttpExchange) -> None:
        scope = exchange.scope(None)
        result: Any = None

        def finish(returned: Any) -> tuple[bytes, bytes] | Response:
            nonlocal result
            if isinstance(returned, Iterator):  # for the threads of sync code
                returned = self._servable.iterate(returned)
            result = returned
            return encode(returned)

        encoded: tuple[bytes, bytes] | Response
        try:
            request = Request(scope, exchange.receive)
            encoded = await self._servable.answer(request, finish)
            if type(encoded) is StreamingResponse and encoded is not result:
                encoded.body_iterator = await _begun(result)
        except HTTPException as err:
            encoded = _http_exception_response(err)
        except MultiPartException as err:  # Starlette's, where there is no app
            encoded = PlainTextResponse(err.message, status_code=400)
        if self._servable.threaded:
            self._give_back(exchange)
        if isinstance(encoded, Response):
            try:
                await encoded(scope, exchange.receive, exchange.send)
            finally:
                await _close_generator(result)
            return
        content_type, body = encoded
        headers = [
            (b"content-length", b"%d" % len(body)),
            (b"content-type", content_type),
        ]
        start = {"type": "http.response.start", "status": 200, "headers": headers}
        await exchange.send(start)
        await exchange.send({"type": "http.response.body", "body": body})

    def _send_error(
        self, exchange: HttpExchange, kind: str, error: BaseException
    ) -> None:
        if exchange.response_started:
            kind = CUT
        exchange.reply_to.send(_error_message(exchange.exchange_id, kind, error))

    # WebSockets.

    async def _serve_websocket(self, exchange: WebSocketExchange) -> None:
        request_id = exchange.head.request_id
        self._enter(request_id, exchange.head)
        reply: Message = (END, exchange.exchange_id)
        try:
            servable = self._servable
            if servable.app is None:
                await exchange.send({"type": "websocket.close"})  # a 403
            else:
                scope = exchange.scope(servable.state)
                await servable.app(scope, exchange.receive, exchange.send)
        except ClientDisconnectedError:
            pass
        except BaseException as err:
            if _was_cancelled(err):
                return _cancel_children()
            logger.exception(
                "WebSocket %s to deployment %r failed", request_id, self.spec.deployment
            )
            reply = _error_message(exchange.exchange_id, USER_ERROR, err)
        exchange.reply_to.send(reply)

    # Calls through handles.

    async def _serve_call(
        self,
        call: HandleCall,
        key: Key,
        method_name: str,
        arguments: Packed,
        future_keys: tuple[Any, ...],
        request_id: str | None,
        model_id: str,
        window_bytes: int | None,
        *results: Packed,
    ) -> None:
        call.entered = True
        self._enter(request_id, None, model_id)
        reply_to, exchange_id = key
        try:
            fetched = await self.session.gather(future_keys) if future_keys else {}
            args, kwargs = values.unpack_arguments(arguments, fetched, results)
            what = f"the result of {self.spec.deployment}.{method_name}()"
            if isinstance(call, StreamCall):
                result = await self._servable.call(method_name, args, kwargs)
                if self._servable.threaded:
                    self._give_back(call)
                await self._send_items(call, result, what)
                reply_to.send((END, exchange_id))
            else:
                pack = functools.partial(_pack_result, what=what)
                packed = await self._servable.call(method_name, args, kwargs, pack)
                reply_to.send((RESULT, exchange_id, packed))
        except UnknownMethodError as err:
            reply_to.send(_error_message(exchange_id, UNKNOWN_METHOD, err))
        except BaseException as err:
            if _was_cancelled(err):
                return _cancel_children()  # whoever cancelled told the caller, or is it
            reply_to.send(_error_message(exchange_id, USER_ERROR, err))
        finally:
            del self._calls[key]
            self._give_back(call)

    async def _send_items(self, call: StreamCall, result: Any, what: str) -> None:
        if not is_stream(result):
            raise TypeError(
                f"{what} is no generator but of type {type(result).__name__}: call it "
                f"without stream=True"
            )
        async with contextlib.aclosing(self._servable.iterate(result)) as items:
            async for item in items:
                await call.send(packing.pack(item, what=f"an item of {what}"))

    def _enter(
        self, request_id: str | None, head: Head | None = None, model_id: str = ""
    ) -> None:
        """Tell the code of the running task where it is."""
        spec, servable = self.spec, self._servable.object
        current_replica.set(
            ReplicaContext(
                spec.deployment,
                spec.tag,
                servable,
                request_id,
                self,
                None,
                head,
                model_id,
            )
        )

    def _enter_outside(self) -> None:
        """Likewise, for code that runs for no request, in whatever context."""
        for variable, value in self._context.items():
            variable.set(value)
        self._enter(None)


def _was_cancelled(error: BaseException) -> bool:
    """Whether the running task was cancelled, and `error` is not user code's own."""
    task = asyncio.current_task()
    assert task is not None
    return isinstance(error, asyncio.CancelledError) and task.cancelling() > 0


def _pack_result(result: Any, what: str) -> Packed:
    if is_stream(result):
        raise TypeError(
            f"{what} cannot be pickled, it is a generator: call it by "
            f"handle.options(stream=True)"
        )
    return packing.pack(result, what=what)


async def _begun(items: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Wait for the first item: what a generator raises before it is no stream yet."""
    try:
        first = await anext(items)
    except StopAsyncIteration:
        return _following((), items)
    return _following((first,), items)


async def _following(
    first: Iterable[Any], items: AsyncIterator[Any]
) -> AsyncIterator[Any]:
    for item in first:
        yield item
    async for item in items:
        yield item


async def _close_generator(result: Any) -> None:
    """Run a generator's cleanup now, rather than when it is collected."""
    if inspect.isasyncgen(result):
        await result.aclose()


def _cancel_children() -> None:
    context = current_replica.get()
    assert context is not None
    for answer in list(context._children or ()):
        answer.cancel()


def _error_message(exchange_id: int, kind: str, error: BaseException) -> Message:
    return (ERROR, exchange_id, kind, *values.describe(error))


def _http_exception_response(error: HTTPException) -> Response:
    if error.status_code in {204, 304}:
        return Response(status_code=error.status_code, headers=error.headers)
    make = PlainTextResponse if isinstance(error.detail, str) else JSONResponse
    return make(error.detail, status_code=error.status_code, headers=error.headers)
