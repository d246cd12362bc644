"""Apps without a cluster: everything in the process that asked, for tests.

The same replicas, threads and calls as in a worker, but there is no HTTP, and classes
and functions are used as they are, not as copies, so that breakpoints and patches hold.
Arguments are pickled as ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Hashable
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from distributed import Future, default_client

from daskserve import pickling
from daskserve.composition import Application, MakePickler, Node, build
from daskserve.config import DeploymentOptions
from daskserve.exceptions import (
    DeploymentFailedError,
    ServeError,
    ServeNotRunningError,
)
from daskserve.handle import DeploymentHandle
from daskserve.replica.actor import ReplicaSpec
from daskserve.replica.runner import STOP_MARGIN_S, Runner
from daskserve.session import Session
from daskserve.transport.dispatcher import Dispatcher
from daskserve.transport.loops import LoopThread
from daskserve.transport.values import load_error

T = TypeVar("T")

#: Stands for the address of this process's worker, which it has not.
LOCAL = "local"

_numbers = count(1)
#: Classes, functions and apps that pickled arguments and code refer to by number.
_referred: dict[int, Any] = {}
_apps: dict[str, LocalApp] = {}
_lock = threading.Lock()


class LocalSession(Session):
    """The tie of a local app to itself: calls go to the replicas in this process."""

    #: There is no Dask worker.
    worker: Any = None

    def __init__(self) -> None:
        super().__init__(LOCAL, {})
        self.runners: dict[int, Runner] = {}
        self._thread = LoopThread("daskserve-local")
        self._thread.start()
        self._deployments: dict[str, Any] = {}
        self._versions = count(1)

        async def make_dispatcher() -> Dispatcher:
            return Dispatcher(
                self._thread.loop,
                self.connect,
                local_address=LOCAL,
                inboxes=self.runners,
            )

        self._dispatcher = self._thread.submit(make_dispatcher()).result()

    @property
    def dispatcher(self) -> Dispatcher:
        """Where handle calls go out."""
        return self._dispatcher

    def route(self, name: str, entry: dict[str, Any] | None) -> None:
        """Let calls of a deployment go to replicas, or to none any more."""
        if entry is None:
            self._deployments.pop(name, None)
        else:
            self._deployments[name] = entry
        snapshot = {"routes": {}, "deployments": dict(self._deployments)}

        async def update() -> None:
            self._dispatcher.update(next(self._versions), snapshot)

        self._thread.submit(update()).result()

    def direct_listener(self) -> None:
        """No replica has a port of its own."""

    def run(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Any:
        """Run a coroutine function and wait for it."""
        return self._thread.submit(function(*args)).result()

    async def gather(self, keys: tuple[Hashable, ...]) -> dict[Hashable, Any]:
        """Fetch the values of Dask futures by the client of this process."""
        client: Any = default_client()
        make: Any = Future
        futures = [make(key, client) for key in keys]
        values = await asyncio.to_thread(client.gather, futures)
        return dict(zip(keys, values, strict=True))

    def close(self) -> None:
        """End the thread."""
        self._thread.submit(self._dispatcher.close()).result(5)
        self._thread.stop()

    async def _call_scheduler(self, op: str, message: dict[str, Any]) -> Any:
        raise ServeNotRunningError("an app that was run with local=True has no cluster")


class LocalApp:
    """An app in this process.

    Parameters
    ----------
    root
        The ingress.
    name
        The app's name.

    Raises
    ------
    DeploymentFailedError
        A constructor raised; nothing is left of the app.
    """

    def __init__(self, root: Application, name: str) -> None:
        self.session: LocalSession | None = None
        self.name = name
        self._reports: SimpleQueue[tuple[str, dict[str, Any]]] = SimpleQueue()
        self._number = _refer_to(self)
        self._code: list[int] = []
        #: Deployments in the order in which they were started.
        self._started: dict[str, tuple[DeploymentOptions, list[Runner]]] = {}

        def make(node: Node[_Parts], pickler: MakePickler) -> _Parts:
            return _Parts(node, pickler)

        def handle(deployment: str) -> Any:
            return _handle, (self._number, deployment)

        try:
            stages = build(root, name, handle, make)
            self.session = LocalSession()
            for stage in stages:
                self._start([node.made for node in stage if node.made is not None])
        except BaseException:
            self.close()
            raise
        self._ingress = stages[-1][0].name

    def handle(self, deployment: str | None = None) -> DeploymentHandle:
        """Return a handle of the ingress, or of another one of its deployments."""
        name = deployment or self._ingress
        if name not in self._started:
            there_are = ", ".join(self._started)
            raise KeyError(f"no deployment named {name!r}; there are: {there_are}")
        return DeploymentHandle(name, _session=self.session)

    def close(self) -> None:
        """Stop all replicas, those of callers first."""
        session = self.session
        for name, (options, runners) in reversed(self._started.items()):
            assert session is not None
            session.route(name, None)
            self._stop(runners, options)
            for runner in runners:
                del session.runners[runner.spec.replica_id]
        self._started = {}
        if session is not None:
            session.close()
        for number in [self._number, *self._code]:
            _referred.pop(number, None)

    def _start(self, stage: list[_Parts]) -> None:
        """Start the replicas of deployments that do not call each other."""
        assert self.session is not None
        for parts in stage:
            options = parts.options
            self._code.append(code := _refer_to(parts.target))
            runners = []
            for _ in range(options.num_replicas):
                replica_id = next(_numbers)
                tag = f"{parts.name}#local{replica_id}"

                def report(news: dict[str, Any], tag: str = tag) -> None:
                    self._reports.put((tag, news))

                spec = ReplicaSpec(
                    replica_id=replica_id,
                    tag=tag,
                    deployment=parts.name,
                    code=pickling.dumps(_Reference(code), what="a reference"),
                    init=parts.init,
                    user_config=parts.user_config,
                    config_generation=1,
                    max_ongoing_requests=options.max_ongoing_requests,
                    max_websockets=options.max_websockets,
                    health_check_period_s=options.health_check_period_s,
                    health_check_timeout_s=options.health_check_timeout_s,
                    threads=options.threads,
                    session_affinity=options.session_affinity,
                )
                runner = Runner(
                    spec, report, self.session, self.session.settings.window_bytes
                )
                self.session.runners[replica_id] = runner
                runners.append(runner)
            self._started[parts.name] = (options, runners)
            for runner in runners:
                runner.start()
        waiting = sum(parts.options.num_replicas for parts in stage)
        while waiting:
            tag, news = self._reports.get()
            if news["event"] == "failed":
                text = f"{tag} failed to start:\n\n{news['text']}"
                raise DeploymentFailedError(text) from load_error(news["cause"])
            waiting -= news["event"] == "started"
        for parts in stage:
            self.session.route(parts.name, self._routing_entry(parts.name))

    def _stop(self, runners: list[Runner], options: DeploymentOptions) -> None:
        grace_s = options.graceful_shutdown_timeout_s
        for runner in runners:
            runner.stop(grace_s, options.graceful_shutdown_wait_loop_s)
        left = {runner.spec.tag for runner in runners}
        deadline = time.monotonic() + grace_s + STOP_MARGIN_S
        with contextlib.suppress(Empty):
            while left:
                tag, news = self._reports.get(timeout=deadline - time.monotonic())
                if news["event"] in ("stopped", "failed"):
                    left.discard(tag)
        for runner in runners:
            runner.abandon()

    def _routing_entry(self, name: str) -> dict[str, Any]:
        options, runners = self._started[name]
        return {
            "replicas": [
                [r.spec.replica_id, r.spec.tag, LOCAL, None, r.first_limit]
                for r in runners
            ],
            "max_ongoing": options.max_ongoing_requests,
            "max_queued": options.max_queued_requests,
            "max_websockets": options.max_websockets,
            "timeout_s": options.request_timeout_s,
            "hopeless": False,
            "session_affinity": options.session_affinity,
        }


class _Parts:
    """A deployment's parts; arguments are pickled as for a cluster."""

    def __init__(self, node: Node[_Parts], pickler: MakePickler) -> None:
        deployment = node.application.deployment
        options: DeploymentOptions = deployment._options
        self.name = node.name
        self.options = options
        self.target = deployment.func_or_class
        self.init = pickling.dumps(
            (options.init_args, options.init_kwargs),
            what=f"the init_args of {node.name!r}",
            pickler=pickler,
        )
        self.user_config = None
        if options.user_config is not None:
            what = f"the user_config of {node.name!r}"
            self.user_config = pickling.dumps(options.user_config, what=what)


class _Reference:
    """Is pickled as the number of something in this process, and loads as that."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> Any:
        return _find, (self._number,)


def run(target: Application, name: str) -> DeploymentHandle:
    """Run an app in this process, in the place of one of that name; see `apps.run`."""
    app = LocalApp(target, name)
    with _lock:
        former = _apps.pop(name, None)
        _apps[name] = app
    if former is not None:
        former.close()
    return app.handle()


def get(name: str) -> LocalApp | None:
    """Return a local app by name, if there is one."""
    return _apps.get(name)


def delete(name: str) -> bool:
    """End a local app; False if there is none of that name."""
    with _lock:
        app = _apps.pop(name, None)
    if app is not None:
        app.close()
    return app is not None


def shutdown() -> bool:
    """End all local apps; False if there are none."""
    return any([delete(name) for name in list(_apps)])


def _refer_to(thing: object) -> int:
    number = next(_numbers)
    _referred[number] = thing
    return number


def _find(number: int) -> Any:
    try:
        return _referred[number]
    except KeyError:
        raise ServeError("the app that was run with local=True has ended") from None


def _handle(number: int, deployment: str) -> DeploymentHandle:
    app: LocalApp = _find(number)
    return DeploymentHandle(deployment, _session=app.session)
