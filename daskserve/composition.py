"""Apps of several deployments: the graph that ``bind`` calls make. Any process, pure.

A bound deployment among the constructor's arguments of another one, at any depth, means
a handle there. All is pickled before anything is deployed: what cannot travel, and what
leads back to itself, is an error where the app is written.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any, Generic, TypeVar

from daskserve import pickling

T = TypeVar("T")
#: Makes the pickler of a deployment's arguments.
MakePickler = Callable[[io.BytesIO], pickling.Pickler]

#: The app that is meant when none is named.
DEFAULT_APP = "default"


class Application:
    """A deployment and the arguments of its constructor, other such ones among them.

    Made by `Deployment.bind`, for `run`. The same object in several places is one
    deployment; bound twice it is two.

    Parameters
    ----------
    deployment
        The deployment, with the arguments in its options.

    Examples
    --------
    >>> app = Ingress.bind(Model.bind("v1"), threshold=0.5)  # doctest: +SKIP
    >>> handle = serve.run(app)  # doctest: +SKIP
    """

    __slots__ = ("deployment",)

    def __init__(self, deployment: Any) -> None:
        self.deployment = deployment

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(
            f"a bound deployment has no {name!r}: serve.run(...) returns a handle of "
            f"it, and the constructor that it is an argument of gets one"
        )

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{self!r} is not deployed by being passed on: serve.run(...) deploys what "
            f"is bound"
        )

    def __repr__(self) -> str:
        return f"{self.deployment.name}.bind(...)"


@dataclass(eq=False, slots=True)
class Node(Generic[T]):
    """One deployment of an app.

    Parameters
    ----------
    name
        Under which it is deployed.
    application
        What was bound.
    """

    name: str
    application: Application
    #: What its deployment was made into, arguments pickled.
    made: T | None = None
    #: Those that its arguments have handles of.
    callees: set[str] = field(default_factory=set)


def qualified(app: str, name: str) -> str:
    """Return the name under which an app's deployment is known on the cluster.

    Examples
    --------
    >>> qualified("default", "Model"), qualified("shop", "Model")
    ('Model', 'shop:Model')
    """
    return name if app == DEFAULT_APP else f"{app}:{name}"


def build(
    root: Application,
    app: str,
    handle: Callable[[str], Any],
    make: Callable[[Node[T], MakePickler], T],
) -> list[list[Node[T]]]:
    """Name and pickle all deployments of an app.

    Parameters
    ----------
    root
        The ingress.
    app
        The app's name.
    handle
        Returns what a deployment's name is pickled as in the place of its node.
    make
        Pickles a node's arguments with the pickler that it is given.

    Returns
    -------
    list of list of Node
        In stages, callees first: those of one stage do not call each other. The last
        has the ingress only.

    Raises
    ------
    ValueError
        Bound deployments lead back to themselves: the text says how.
    PicklingError
        An argument cannot travel.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> model = Application(SimpleNamespace(name="Model", init_args=()))
    >>> root = Application(SimpleNamespace(name="Ingress", init_args=([model],)))
    >>> def make(node, pickler):
    ...     args = node.application.deployment.init_args
    ...     return pickling.dumps(args, what="args", pickler=pickler)
    >>> stages = build(root, "default", lambda name: (str, (name,)), make)
    >>> [[node.name for node in stage] for stage in stages]
    [['Model'], ['Ingress']]
    """
    nodes: dict[int, Node[T]] = {}
    taken: set[str] = set()
    found: deque[Node[T]] = deque()

    def meet(application: Application) -> Node[T]:
        node = nodes.get(id(application))
        if node is None:
            name = qualified(app, _free(application.deployment.name, app, taken))
            taken.add(name)
            node = nodes[id(application)] = Node(name, application)
            found.append(node)
        return node

    def pickler_of(node: Node[T]) -> MakePickler:
        def reduce(application: Application) -> Any:
            callee = meet(application)
            node.callees.add(callee.name)
            return handle(callee.name)

        return lambda file: _NodePickler(file, reduce)

    meet(root)
    while found:
        node = found.popleft()
        node.made = make(node, pickler_of(node))
    return _stages({node.name: node for node in nodes.values()})


class _NodePickler(pickling.Pickler):
    """Pickle arguments; what is bound goes as a handle."""

    def __init__(self, file: io.BytesIO, reduce: Callable[[Application], Any]) -> None:
        super().__init__(file)
        self._reduce = reduce

    def reducer_override(self, obj: Any) -> Any:
        """Reduce what `pickling.Pickler` does not."""
        if type(obj) is Application:
            return self._reduce(obj)
        return super().reducer_override(obj)


def _free(name: str, app: str, taken: set[str]) -> str:
    """Return the name, or the first of name_1, name_2 ... that the app has not yet."""
    free, number = name, 0
    while qualified(app, free) in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def _stages(nodes: dict[str, Node[T]]) -> list[list[Node[T]]]:
    sorter = TopologicalSorter({name: node.callees for name, node in nodes.items()})
    try:
        sorter.prepare()
    except CycleError as err:
        # From caller to callee, as it is written.
        way = " -> ".join(reversed(err.args[1]))
        raise ValueError(
            f"deployments cannot be bound to themselves, not by way of others either: "
            f"{way}"
        ) from None
    stages = []
    while sorter.is_active():
        ready = sorter.get_ready()
        stages.append([nodes[name] for name in sorted(ready)])
        sorter.done(*ready)
    return stages
