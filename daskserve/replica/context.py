"""What user code can ask of the replica it runs in; in a worker."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from daskserve.exceptions import ServeError
from daskserve.transport.messages import model_id_of


@dataclass(slots=True)  # not frozen: that would make it slow to make, see `Runner`
class ReplicaContext:
    """Where the running user code stands.

    Attributes
    ----------
    deployment
        Name of the deployment.
    replica_tag
        Name of this replica: new for each incarnation, kept across ``reconfigure``.
    servable_object
        The instance of the user's class, or the function; None in the constructor.
    request_id
        Id of the request at hand, as in the ``x-request-id`` header; None outside of
        requests.
    """

    deployment: str
    replica_tag: str
    servable_object: Any = None
    request_id: str | None = None
    #: The replica's loop and session, for handles in user code.
    _replica: Any = None
    #: Answers that user code waits for; cancelled along with the request.
    _children: set[Any] | None = field(default=None, repr=False, compare=False)
    #: The head of an HTTP request, which may name a model.
    _head: Any = field(default=None, repr=False, compare=False)
    #: The model that a call is for.
    _model_id: str = ""


current_replica: ContextVar[ReplicaContext | None] = ContextVar(
    "daskserve-replica", default=None
)


def leave_request(model_id: str = "") -> None:
    """Tell code that goes on for several requests that it runs on behalf of none.

    They may all be for one model.
    """
    context = current_replica.get()
    if context is not None:
        current_replica.set(
            replace(
                context,
                request_id=None,
                _children=None,
                _head=None,
                _model_id=model_id,
            )
        )


def get_multiplexed_model_id() -> str:
    """Return the id of the model that the request at hand is for.

    It is in the header ``serve_multiplexed_model_id`` of an HTTP request, or was given
    by ``handle.options(multiplexed_model_id=...)``.

    Returns
    -------
    str
        The id; "" if the request has none, and outside of requests.
    """
    context = current_replica.get()
    if context is None:
        return ""
    if context._head is not None:
        return model_id_of(dict(context._head.headers))
    return context._model_id


def get_replica_context() -> ReplicaContext:
    """Return the context of the replica whose code is running.

    It is right in async code, in sync code on its thread, and in FastAPI's thread
    pool. Threads that user code starts itself do not inherit it.

    Raises
    ------
    ServeError
        Not called from a replica.

    Examples
    --------
    >>> @serve.deployment
    ... def whoami():
    ...     return serve.get_replica_context().replica_tag  # doctest: +SKIP
    """
    context = current_replica.get()
    if context is None:
        raise ServeError(
            "get_replica_context() was called outside of a replica: it works in the "
            "constructor and the methods of a deployment, and in what they call."
        )
    return context
