"""Deployments as users write them: the decorator, and what it makes. Any process."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast, overload

from distributed import Future

from daskserve import pickling
from daskserve.arguments import compute, finished
from daskserve.composition import Application, MakePickler
from daskserve.config import AutoscalingConfig, Default, DeploymentOptions
from daskserve.controller.records import Spec
from daskserve.handle import DeploymentHandle
from daskserve.ingress import dump_target
from daskserve.links import URL
from daskserve.mapping import map_collection
from daskserve.replica.methods import is_threaded
from daskserve.session import Session, current_session
from daskserve.transport import values

#: What of the options reads back as it was given.
_READABLE = {name: name for name in DeploymentOptions.model_fields}
_READABLE["max_concurrent_queries"] = "max_ongoing_requests"  # its older name


class Deployment:
    """A class or function and how it is to be served; never changed once made.

    Made by `deployment`, and found again by `get_deployment`. The options read back as
    attributes: ``Counter.num_replicas``.

    Parameters
    ----------
    target
        The class or function, or the bytes of one that came from the cluster.
    options
        Checked options.
    """

    __slots__ = ("_options", "_target")

    _options: DeploymentOptions
    _target: Callable[..., Any] | bytes

    def __init__(
        self, target: Callable[..., Any] | bytes, options: DeploymentOptions
    ) -> None:
        object.__setattr__(self, "_target", target)
        object.__setattr__(self, "_options", options)

    # What was given.

    @property
    def func_or_class(self) -> Callable[..., Any]:
        """The class or function.

        Raises
        ------
        PicklingError
            It came from the cluster and needs a module that is missing here.
        """
        if isinstance(self._target, bytes):
            return cast("Callable[..., Any]", pickling.loads(self._target))
        return self._target

    @property
    def route_prefix(self) -> str | None:
        """The route prefix as it was given; None if it was not."""
        given = self._options.route_prefix
        return None if isinstance(given, Default) else given

    @property
    def url(self) -> str | None:
        """Where HTTP finds the deployment; None if it is not served over HTTP."""
        session = current_session()
        url: URL | None = session.run(self._url, session)
        return url

    def __getattr__(self, name: str) -> Any:
        if name in _READABLE:
            return getattr(self._options, _READABLE[name])
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    # What can be done with it.

    def options(self, **changes: Any) -> Deployment:
        """Return another deployment that differs in some options.

        Parameters
        ----------
        **changes
            As for `deployment`.

        Raises
        ------
        ValueError, TypeError
            As for `deployment`.

        Examples
        --------
        >>> Counter.options(num_replicas=4).deploy()  # doctest: +SKIP
        """
        return _make(self._target, self._options.replace(**changes))

    def deploy(self, *init_args: Any, **init_kwargs: Any) -> Any:
        """Deploy, or update what is deployed under this name, and wait until it runs.

        When it returns, every proxy and handle knows of it. An update starts the new
        replicas before it stops the old ones; if it fails the old ones go on.

        Parameters
        ----------
        *init_args, **init_kwargs
            Arguments of the constructor; without any, the options' ``init_args`` and
            ``init_kwargs``. A Dask future among them, at any depth, is waited for and
            arrives as its value, from worker to worker, and a collection is computed;
            the values are kept on the cluster for as long as a version needs them.

        Raises
        ------
        DeploymentFailedError
            The replicas do not start. The text has what they wait for, or the last
            traceback, unless what the constructor raised is its ``__cause__``.
        ValueError
            The route prefix is taken, or ``prev_version`` is not what is there.
        TypeError
            The arguments do not fit the constructor.
        PicklingError
            The class, function or an argument cannot travel.
        ServeNotRunningError
            There is no instance: call `start` first.

        Examples
        --------
        >>> Counter.deploy(10)  # doctest: +SKIP
        """
        options = self._options
        if init_args or init_kwargs:
            options = options.replace(init_args=init_args, init_kwargs=init_kwargs)
        session = current_session()
        spec, futures = Deployment(self._target, options)._spec()
        return session.run(_deploy, session, spec, options.prev_version, futures)

    def rollback(self, *, to: int | None = None) -> Any:
        """Deploy what was deployed under this name before, and wait until it runs.

        As ever, new replicas start before the old ones stop; if that fails, what runs
        goes on. What this object says does not matter: see `get_deployment`.

        Parameters
        ----------
        to
            The number of a version in `history`. None: the former one; if the last
            ``deploy()`` failed, or is in progress, the one that still serves.

        Raises
        ------
        KeyError
            There is no such deployment.
        ValueError
            There is no such version.
        DeploymentFailedError
            As for `deploy`.
        """
        session = current_session()
        return session.run(_rollback, session, self._options.name, to)

    def delete(self) -> Any:
        """Delete what is deployed under this name, and wait until it is gone.

        Requests that run may finish, within ``graceful_shutdown_timeout_s``.

        Raises
        ------
        KeyError
            There is no such deployment.
        """
        session = current_session()
        return session.run(_delete, session, self._options.name)

    def bind(self, *init_args: Any, **init_kwargs: Any) -> Application:
        """Return a part of an app, for `run`, or for the arguments of other such parts.

        Nothing is deployed yet. A constructor gets a handle of what is bound among its
        arguments, at any depth.

        Parameters
        ----------
        *init_args, **init_kwargs
            Arguments of the constructor, as for `deploy`.

        Raises
        ------
        TypeError
            The arguments do not fit the constructor.

        Examples
        --------
        >>> app = Ingress.bind(Model.bind("v1"), threshold=0.5)  # doctest: +SKIP
        >>> serve.run(app)  # doctest: +SKIP
        """
        options = self._options
        if init_args or init_kwargs:
            options = options.replace(init_args=init_args, init_kwargs=init_kwargs)
        self._check_arguments(options)
        return Application(Deployment(self._target, options))

    def get_handle(self) -> DeploymentHandle:
        """Return a handle to call the deployment from Python.

        It is valid across redeploys; a deployment that is not there fails in the call.
        """
        return DeploymentHandle(self._options.name)

    def map(
        self,
        collection: Any,
        *args: Any,
        method_name: str = "__call__",
        **kwargs: Any,
    ) -> Any:
        """Put a Dask collection through the replicas, partition by partition.

        Each partition is an argument of one call, made from a task on the worker that
        has it; a replica on the same worker is preferred. A partition whose replica is
        lost goes to another one.

        Parameters
        ----------
        collection
            A Dask bag (the method gets lists), array (numpy blocks), dataframe or
            series (those of pandas).
        *args
            More arguments of the method.
        method_name
            The method that is called.
        **kwargs
            Options of Dask's ``map_blocks`` and ``map_partitions``, such as ``dtype``
            and ``meta``, which say what comes out. Without them the deployment is
            asked, by a partition with two rows of zeros or examples.

        Returns
        -------
        dask.bag.Bag, dask.array.Array or dask.dataframe
            Of the same kind, lazy as ever: ``.compute()`` it, ``.persist()`` it, write
            it to files.

        Raises
        ------
        TypeError
            It is no collection of these.

        Examples
        --------
        >>> Model.map(images, method_name="predict").compute()  # doctest: +SKIP
        """
        handle = self.get_handle().options(method_name=method_name)
        return map_collection(handle, collection, args, kwargs)

    # As a value.

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Say what to do instead."""
        name = self._options.name
        raise RuntimeError(
            f"a deployment is not called itself: {name}.deploy() serves it, and "
            f"{name}.get_handle().remote() calls it then"
        )

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"a deployment does not change: use .options({name}=...) for another one"
        )

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a deployment does not change")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Deployment):
            return NotImplemented
        return self._options == other._options and self._code() == other._code()

    def __hash__(self) -> int:
        return hash((Deployment, self._options.name, self._options.version))

    def __reduce__(self) -> Any:
        # The class's name means this deployment now, so pickle would not find it.
        return Deployment, (self._code(), self._options)

    def __daskserve_reduce__(self) -> Any:
        """Reduce within `pickling.dumps`, where the class may be what is pickled."""
        return Deployment, (self._target, self._options)

    def __repr__(self) -> str:
        version = self._options.version
        route = self._options.effective_route_prefix
        return (
            f"Deployment(name={self._options.name!r}, version={version!r}, "
            f"route_prefix={route!r}, num_replicas={self._options.num_replicas})"
        )

    # Parts.

    def _code(self) -> bytes:
        if isinstance(self._target, bytes):
            return self._target
        return dump_target(self._target, what=f"deployment {self._options.name!r}")

    def _spec(
        self, make_pickler: MakePickler = pickling.Pickler
    ) -> tuple[Spec, list[Future[Any]]]:
        """Return what is wanted, and the Dask futures among the arguments."""
        options = self._options
        pickler = values.FuturePickler(make_pickler, compute)
        self._check_arguments(options)
        name = options.name
        init = (options.init_args, options.init_kwargs)
        user_config = options.user_config
        code = self._code()
        if code is not self._target:
            pickling.check_code(code, self._target, what=f"deployment {name!r}")
        spec = Spec(
            name=name,
            version=options.version,
            code=code,
            init=pickling.dumps(
                init, what=f"the init_args of {name!r}", pickler=pickler
            ),
            user_config=(
                None
                if user_config is None
                else pickling.dumps(user_config, what=f"the user_config of {name!r}")
            ),
            route_prefix=options.effective_route_prefix,
            num_replicas=options.num_replicas,
            max_ongoing_requests=options.max_ongoing_requests,
            max_websockets=options.max_websockets,
            max_queued_requests=options.max_queued_requests,
            session_affinity=options.session_affinity,
            max_unavailable=options.max_unavailable,
            max_surge=options.max_surge,
            resources=options.resources or {},
            workers=options.workers or (),
            request_timeout_s=options.request_timeout_s,
            deploy_timeout_s=options.deploy_timeout_s,
            health_check_period_s=options.health_check_period_s,
            health_check_timeout_s=options.health_check_timeout_s,
            graceful_shutdown_timeout_s=options.graceful_shutdown_timeout_s,
            graceful_shutdown_wait_loop_s=options.graceful_shutdown_wait_loop_s,
            options=pickling.dumps(
                options, what=f"the options of {name!r}", pickler=pickler
            ),
            autoscaling=(
                None
                if options.autoscaling_config is None
                else AutoscalingConfig(**options.autoscaling_config).model_dump()
            ),
            threads=options.threads,
            abandoned_call_timeout_s=options.abandoned_call_timeout_s,
        )
        futures = list(pickler.futures.values())
        keys = tuple(dict.fromkeys(future.key for future in futures))
        return replace(spec, future_keys=keys), futures

    def _check_arguments(self, options: DeploymentOptions) -> None:
        target = self._target
        if isinstance(target, bytes):
            return
        if not isinstance(target, type):
            if options.init_args or options.init_kwargs:
                raise TypeError(
                    f"deployment {options.name!r} is a function and takes no init_args"
                )
            return
        try:
            signature = inspect.signature(target)
        except (TypeError, ValueError):  # a class whose constructor is written in C
            return
        try:
            signature.bind(*options.init_args, **options.init_kwargs)
        except TypeError as err:
            raise TypeError(
                f"the arguments do not fit {target.__name__}{signature}: {err}"
            ) from None

    async def _url(self, session: Session) -> URL | None:
        prefix = self._options.effective_route_prefix
        info = await session.rpc("serve_info")
        if prefix is None or not info["http_urls"]:
            return None
        return URL(info["http_urls"][0] + prefix)


@overload
def deployment(target: Callable[..., Any], /, **options: Any) -> Deployment: ...
@overload
def deployment(
    target: str | None = None, /, **options: Any
) -> Callable[[Callable[..., Any]], Deployment]: ...
def deployment(
    target: Callable[..., Any] | str | None = None, /, **options: Any
) -> Deployment | Callable[[Callable[..., Any]], Deployment]:
    """Make a deployment of a class or a function; a decorator, with options or without.

    A class's instance is called with a Starlette ``Request`` (``__call__``), or serves
    an app (`ingress`). A function takes a request, or nothing. Both may be ``async``.

    Parameters
    ----------
    target
        The class or function, or the name of the deployment.
    **options
        ``name`` (default: the class's), ``route_prefix`` (default ``/{name}``, None for
        no HTTP), ``num_replicas`` (1), ``init_args``, ``init_kwargs``, ``version``,
        ``prev_version``, ``user_config``, ``max_ongoing_requests`` (100 in each
        replica), ``max_websockets`` (1000) and ``threads`` (1), likewise,
        ``max_queued_requests`` (1000), ``session_affinity`` (None; where the id of a
        session is, such as ``{"cookie": "session"}``), ``max_unavailable`` and
        ``max_surge`` (during updates: None, a number or a part as ``"25%"``),
        ``resources`` and ``workers`` (as in Dask), ``request_timeout_s`` (default: the
        instance's), ``deploy_timeout_s`` (300), ``graceful_shutdown_timeout_s`` (20),
        ``graceful_shutdown_wait_loop_s`` (2), ``health_check_period_s`` (10),
        ``health_check_timeout_s`` (30), ``abandoned_call_timeout_s`` (600): see the
        notes. Times are seconds or strings such as ``"500ms"``.

    Raises
    ------
    ValueError
        An option is unknown or its value is not allowed.
    TypeError
        What is decorated is neither a class nor a function, or an option of a wrong
        type.

    Notes
    -----
    Async methods run on the event loop of their replica, sync ones on its threads: one
    call after the other by default, or as many at once as ``threads`` says, which is
    for code that waits (for files, a database), and must then be thread-safe. A class
    whose methods are all sync is also made there, and with one thread everything of it
    runs on the same: the constructor, ``reconfigure()``, ``check_health()``, methods,
    generators and ``__del__``. A class with an async method, or with an app
    (`ingress`), is made on the event loop; FastAPI's sync endpoints have its threads.

    The health of a replica is checked in each period, on the event loop that runs its
    async code. It is replaced

    - when the class has a method ``check_health()``, sync or async, and that raises
      three times in a row (or returns False), or takes longer than the timeout. A sync
      one is made while a thread of sync code is idle;
    - when the loop does not answer within the timeout, for a blocking call in async
      code. A sync method that takes long is no fault: the replica is busy;
    - ``abandoned_call_timeout_s`` after a call of sync code timed out, was cancelled or
      was left by its client, if it still runs: its thread cannot be stopped. Until then
      the status says where it is;
    - when its whole worker says nothing for period and timeout together.

    It gets no requests from then on, and those in it may end, as in one that stops.

    Examples
    --------
    >>> @serve.deployment(route_prefix="/hello", num_replicas=2)  # doctest: +SKIP
    ... def hello(request):
    ...     return "Hello, world!"
    """
    if isinstance(target, str):
        if "name" in options:
            raise TypeError(f"two names: {target!r} and name={options['name']!r}")
        options["name"] = target
    elif target is not None:
        return _named(target, options)
    # Checked now, so that a mistake shows where it stands.
    _checked({"name": "name", **options})

    def decorate(target: Callable[..., Any]) -> Deployment:
        return _named(target, options)

    return decorate


def _named(target: Callable[..., Any], options: dict[str, Any]) -> Deployment:
    if not _deployable(target):
        raise _not_deployable(target)
    return _make(target, _checked({"name": target.__name__, **options}))


def _make(target: Any, options: DeploymentOptions) -> Deployment:
    unlimited = options.max_ongoing_requests is None
    if unlimited and not isinstance(target, bytes) and is_threaded(target):
        raise ValueError(
            f"max_ongoing_requests=None is for async code, and all of "
            f"{options.name!r} is sync: it runs threads={options.threads} calls at a "
            f"time, what waits is limited by max_queued_requests; give a number"
        )
    return Deployment(target, options)


def _checked(options: dict[str, Any]) -> DeploymentOptions:
    return DeploymentOptions(**options)


def _deployable(target: object) -> bool:
    return isinstance(target, type) or inspect.isroutine(target)


def _not_deployable(target: object) -> TypeError:
    return TypeError(
        f"@serve.deployment takes a class or a function, and options by keyword; "
        f"not {target!r}"
    )


async def _deploy(
    session: Session,
    spec: Spec,
    prev_version: str | None,
    futures: list[Future[Any]],
) -> None:
    await finished(futures)
    message = spec.to_message()
    await session.rpc("serve_deploy", spec=message, prev_version=prev_version)


async def _rollback(session: Session, name: str, number: int | None) -> None:
    await session.rpc("serve_rollback", name=name, number=number)


async def _delete(session: Session, name: str) -> None:
    await session.rpc("serve_delete", name=name)
