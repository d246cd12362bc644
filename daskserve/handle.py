"""Handles: calling a deployment from Python, in any process of the cluster."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Generator
from datetime import timedelta
from typing import Any

from distributed.actor import BaseActorFuture

from daskserve import arguments, packing, pickling
from daskserve.config import duration
from daskserve.exceptions import RequestTimeoutError
from daskserve.replica.context import ReplicaContext, current_replica
from daskserve.response_stream import (
    DeploymentResponseGenerator,
    check_blocking,
    error_of,
    settled,
)
from daskserve.session import Session, current_session
from daskserve.transport import values
from daskserve.transport.affinity import Session as CallSession
from daskserve.transport.calls import Answer, CallRequest
from daskserve.transport.items import Items
from daskserve.transport.messages import RESULT, Message

#: Of a `session_id` of a handle.
MAX_SESSION_ID_BYTES = 1024


class DeploymentResponse(BaseActorFuture[Any]):
    """The answer to come of a call through a handle.

    It can be awaited, on any loop and by many tasks, or asked for its `result`.
    """

    __slots__ = ("_answer", "_awaiting", "_keep_alive", "_session", "_value")

    def __init__(
        self,
        answer: Answer,
        session: Session,
        keep_alive: object,
    ) -> None:
        self._answer = answer
        self._session = session
        # Dask futures among the arguments live at least until the answer is there.
        self._keep_alive = keep_alive
        self._awaiting = 0
        self._value: Any = None

    def result(
        self,
        timeout: str | timedelta | float | None = None,
        *,
        timeout_s: str | timedelta | float | None = None,
    ) -> Any:
        """Wait for the answer and return it.

        Parameters
        ----------
        timeout, timeout_s
            Two names for the longest wait: seconds, or a string such as ``"500ms"``;
            default: no limit. The call goes on after a timeout.

        Raises
        ------
        RequestTimeoutError
            A `TimeoutError`: there was no answer in time.
        RuntimeError
            It could only block for ever: called on the loop of a Dask worker, or, by a
            replica, for what only its busy thread could run. ``await`` it.
        Exception
            What the deployment raised, if it can be pickled, with its traceback in
            the replica; else a `DeploymentError` that has its text and traceback.
        """
        limit = timeout_s if timeout_s is not None else timeout
        seconds = None if limit is None else duration(limit)
        if not self.done():
            check_blocking(self._session, self._answer, "result()", "await response")
        try:
            message = self._answer.result(seconds)
        except concurrent.futures.TimeoutError as err:
            if self._answer.done():
                raise
            raise RequestTimeoutError(
                f"no answer within {seconds:g} s; the call goes on, cancel() ends it"
            ) from err
        return self._decode(message)

    def done(self) -> bool:
        """Return whether the answer is there, or the call failed or was cancelled."""
        return self._answer.done()

    def cancelled(self) -> bool:
        """Return whether the call was cancelled."""
        return self._answer.cancelled()

    def cancel(self) -> bool:
        """Cancel the call, and the user code that runs for it.

        Returns
        -------
        bool
            False if the answer is there already.
        """
        return self._answer.cancel()

    def __await__(self) -> Generator[Any, None, Any]:
        return self._wait().__await__()

    def __repr__(self) -> str:  # type: ignore[override]
        state = "pending"
        if self._answer.cancelled():
            state = "cancelled"
        elif self._answer.done():
            state = "done"
        return f"<DeploymentResponse: {state}>"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a DeploymentResponse cannot be pickled: pass it to another handle, or "
            "pass on its result, 'await response' or response.result()"
        )

    async def _wait(self) -> Any:
        self._awaiting += 1
        try:
            await settled(self._answer)
        except asyncio.CancelledError:
            # Whoever waited is gone. Others who wait still want the answer.
            if self._awaiting == 1:
                self.cancel()
            raise
        finally:
            self._awaiting -= 1
        if self._answer.cancelled():
            raise asyncio.CancelledError
        return self._decode(self._answer.result())

    def _decode(self, message: Message) -> Any:
        if message[0] == RESULT:
            packed = message[2]
            return packing.unpack(
                packed if type(packed) is bytes else self._answer.packed()
            )
        raise error_of(message)


class DeploymentHandle:
    """Call a deployment from Python.

    Handles are small: pickle them, keep them across redeploys, use them from any thread
    and any loop. Two of the same deployment and method are equal.

    Parameters
    ----------
    deployment
        The deployment's name.
    method_name
        The method that `remote` calls.
    multiplexed_model_id
        The model that its calls are for; see `daskserve.multiplexed`.
    stream
        Whether calls return the items of a generator, one by one.
    session_id
        The session that its calls belong to; "": none.

    Examples
    --------
    >>> handle = Counter.get_handle()  # doctest: +SKIP
    >>> handle.remote(1).result(timeout_s=5)  # doctest: +SKIP
    >>> await handle.increment.remote(by=2)  # doctest: +SKIP
    """

    __slots__ = ("_deployment", "_method_name", "_model_id", "_session", "_session_id",
                 "_stream")  # fmt: skip

    def __init__(
        self,
        deployment: str,
        method_name: str = "__call__",
        multiplexed_model_id: str = "",
        stream: bool = False,
        session_id: str = "",
        *,
        _session: Session | None = None,
    ) -> None:
        self._deployment = deployment
        self._method_name = method_name
        self._model_id = multiplexed_model_id
        self._stream = stream
        self._session_id = session_id
        self._session = _session

    @property
    def deployment_name(self) -> str:
        """The deployment's name."""
        return self._deployment

    def options(
        self,
        *,
        method_name: str | None = None,
        multiplexed_model_id: str | None = None,
        stream: bool | None = None,
        session_id: str | None = None,
    ) -> DeploymentHandle:
        """Return another handle of the same deployment; what is not given is as here.

        Parameters
        ----------
        method_name
            The method that its `remote` calls.
        multiplexed_model_id
            The model that its calls are for: they go to a replica that has it.
        stream
            Whether its calls return a `DeploymentResponseGenerator`: the method is a
            generator, sync or async.
        session_id
            The session that its calls belong to, up to 1 KiB: they go to one replica
            while that lives and has room. It is the replica of HTTP requests with this
            id, where the deployment has ``session_affinity``. "" for none.
        """
        for option, value in (
            ("method_name", method_name),
            ("multiplexed_model_id", multiplexed_model_id),
            ("session_id", session_id),
        ):
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{option}={value!r} is not a string")
        if stream is not None and not isinstance(stream, bool):
            raise TypeError(f"stream={stream!r} is not a bool")
        session = self._session_id if session_id is None else session_id
        size = len(_session_bytes(session))
        if size > MAX_SESSION_ID_BYTES:
            raise ValueError(
                f"session_id has {size} bytes; {MAX_SESSION_ID_BYTES} are allowed"
            )
        model_id = multiplexed_model_id
        return DeploymentHandle(
            self._deployment,
            method_name or self._method_name,
            self._model_id if model_id is None else model_id,
            self._stream if stream is None else stream,
            session,
            _session=self._session,
        )

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Call the deployment; returns at once.

        Arguments are copied; what nobody can change, as ``bytes`` and read-only arrays,
        is not if it is large, and in the same process it is shared. A Dask future among
        them, at any depth, is waited for and replaced by its value, which goes from
        worker to worker, to a replica near it; a Dask collection is computed and
        treated likewise. As in tasks, such a value is not to be changed. A response of
        another call is replaced by its result, for which nobody waits here.

        Returns
        -------
        DeploymentResponse
            With ``stream=True`` a `DeploymentResponseGenerator`.

        Raises
        ------
        PicklingError
            An argument cannot travel; the text says which. Everything else that goes
            wrong is in the response.
        """
        session = self._session or current_session()
        context = current_replica.get()
        plain = pickling.dumps_plain((args, kwargs))
        if plain is not None:  # as mostly: nothing to wait for, nothing to look for
            request = self._request(session, context)
            request.arguments = plain
            session.calls.send(request)
            return _response(request, session, context, None)
        unread = values.unread_requests(args, kwargs)
        if unread and context is not None:
            loop = context._replica.loop
            if not _is_running(loop):
                for read in unread:
                    asyncio.run_coroutine_threadsafe(read.body(), loop).result()
            else:
                return self._remote_later(session, context, unread, args, kwargs)
        request = self._request(session, context)
        awaited = self._fill(request, args, kwargs)
        arguments.send(request, awaited, session)
        return _response(request, session, context, awaited.futures)

    def _remote_later(
        self,
        session: Session,
        context: ReplicaContext,
        unread: list[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Read the bodies of requests among the arguments first, on their loop."""
        call = self._request(session, context)

        async def read_and_send() -> None:
            try:
                for request in unread:
                    await request.body()
                awaited = self._fill(call, args, kwargs)
                arguments.send(call, awaited, session)
            except Exception as err:
                arguments.fail(call.answer, err)

        _background.add(task := asyncio.ensure_future(read_and_send()))
        task.add_done_callback(_background.discard)
        return _response(call, session, context, None)

    def _request(self, session: Session, context: ReplicaContext | None) -> CallRequest:
        request = CallRequest(
            self._deployment,
            self._method_name,
            b"",
            (),
            None if context is None else context.request_id,
            self._model_id,
        )
        if self._session_id:
            request.session = CallSession.of(_session_bytes(self._session_id))
        if self._stream:
            request.items = Items(session.settings.window_bytes)
        return request

    def _fill(
        self,
        request: CallRequest,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> values.Awaited:
        """Put the arguments into a call; return what has its value elsewhere."""
        what = f"an argument of {self._deployment}.{self._method_name}()"
        request.arguments, awaited = values.pack_arguments(
            args, kwargs, what=what, compute=arguments.compute
        )
        if awaited.futures:
            request.future_keys = tuple(future.key for future in awaited.futures)
        return awaited

    def __getattr__(self, name: str) -> DeploymentHandle:
        if name.startswith("_"):
            raise AttributeError(name)
        return self.options(method_name=name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DeploymentHandle):
            return NotImplemented
        return self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __reduce__(self) -> Any:
        return DeploymentHandle, self._identity

    def __repr__(self) -> str:
        model = self._model_id
        last = f", multiplexed_model_id={model!r}" if model else ""
        last += ", stream=True" if self._stream else ""
        return (
            f"DeploymentHandle({self._deployment!r}, "
            f"method_name={self._method_name!r}{last})"
        )

    @property
    def _identity(self) -> tuple[str, str, str, bool, str]:
        return (
            self._deployment,
            self._method_name,
            self._model_id,
            self._stream,
            self._session_id,
        )


def _session_bytes(session_id: str) -> bytes:
    return session_id.encode("utf-8", "surrogatepass")


_background: set[asyncio.Task[None]] = set()


def _response(
    request: CallRequest,
    session: Session,
    context: ReplicaContext | None,
    keep_alive: object,
) -> DeploymentResponse | DeploymentResponseGenerator:
    answer = request.answer
    if context is not None:  # cancelled along with the request that made it
        children = context._children
        if children is None:
            children = context._children = set()
        children.add(answer)
        if request.deployment == context.deployment:
            answer.self_call = context, request.method_name
        answer.add_done_callback(children.discard)
    if request.items is not None:
        return DeploymentResponseGenerator(answer, request.items, session, keep_alive)
    return DeploymentResponse(answer, session, keep_alive)


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    with contextlib.suppress(RuntimeError):
        return asyncio.get_running_loop() is loop
    return False
