"""Every error that daskserve raises of its own. Imports nothing; any process.

ServeError
├── ServeNotRunningError   (RuntimeError)   no instance on the cluster
├── ServeConfigError       (ValueError)     options contradict each other
├── EnvironmentMismatchError                daskserve missing or another one
├── WorkersUnreachableError                 that are behind a firewall, or stand still
├── ProxyStartError        (RuntimeError)   an HTTP server could not be started
├── PicklingError          (TypeError)      user code or a value that cannot travel
├── DeploymentFailedError  (RuntimeError)   deploy() did not end with healthy replicas
├── RequestError                            one request or handle call went wrong
│   ├── DeploymentError                     user code raised what cannot travel
│   ├── DeploymentUnavailableError          nothing can take the request
│   ├── QueueFullError                      over ``max_queued_requests``
│   ├── RequestTimeoutError (TimeoutError)  over ``request_timeout_s``
│   ├── ReplicaDiedError                    the replica was lost with the request in it
│   ├── ModelIdError           (ValueError) the request names no model
│   └── RequestTooLargeError                over ``max_request_body_bytes``

``RequestError`` classes carry the HTTP status a client gets for them, so that the
mapping is data.
"""

from __future__ import annotations

from typing import ClassVar


class ServeError(Exception):
    """Base class of all errors of daskserve."""


class ServeNotRunningError(ServeError, RuntimeError):
    """There is no instance on the cluster, or no cluster at all."""


class ServeConfigError(ServeError, ValueError):
    """Options that contradict each other or the running instance."""


class EnvironmentMismatchError(ServeError):
    """daskserve is missing or of another version on a part of the cluster."""


class WorkersUnreachableError(ServeError, RuntimeError):
    """The scheduler does not reach workers that have connected to it."""


class ProxyStartError(ServeError, RuntimeError):
    """An HTTP server could not be started; the text names worker, host and port."""


class PicklingError(ServeError, TypeError):
    """User code or a value cannot travel to another process."""


class DeploymentFailedError(ServeError, RuntimeError):
    """``deploy()`` did not end with healthy replicas; the text has the reason.

    ``__cause__`` is the exception that a constructor raised last, if it can be pickled.
    """


class RequestError(ServeError):
    """One request or handle call went wrong."""

    #: The HTTP status that a client of a proxy gets.
    status_code: ClassVar[int] = 500


class DeploymentError(RequestError):
    """User code raised an exception that could not travel itself.

    Parameters
    ----------
    type_name
        Qualified name of the exception's class.
    text
        ``str()`` of the exception.
    traceback
        Formatted traceback in the replica.
    """

    def __init__(self, type_name: str, text: str, traceback: str) -> None:
        super().__init__(type_name, text, traceback)
        self.type_name = type_name
        self.text = text
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.type_name}: {self.text}\n\n{self.traceback}".rstrip()


class DeploymentUnavailableError(RequestError):
    """No replica can take the request: deleted, failed to deploy or draining."""

    status_code = 503


class QueueFullError(RequestError):
    """The deployment has ``max_queued_requests`` waiting already."""

    status_code = 503


class RequestTimeoutError(RequestError, TimeoutError):
    """No answer began within the time limit."""

    status_code = 504


class ReplicaDiedError(RequestError):
    """The replica was lost, or stopped, while the request was in it."""

    status_code = 502


class ModelIdError(RequestError, ValueError):
    """The request names no model, and is for what is ``@serve.multiplexed``."""

    status_code = 400


class RequestTooLargeError(RequestError):
    """The body is larger than ``max_request_body_bytes``."""

    status_code = 413
