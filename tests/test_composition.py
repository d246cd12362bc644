"""Graphs of bound deployments: no cluster."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

import daskserve as serve
from daskserve import pickling
from daskserve.composition import MakePickler, Node, build, qualified
from daskserve.exceptions import PicklingError


@serve.deployment
class Model:
    def __init__(self, weights: str = "v0") -> None:
        self.weights = weights


@serve.deployment
class Ingress:
    def __init__(self, *models: Any, **others: Any) -> None:
        self.models = models


def handle(name: str) -> Any:
    return "handle of {}".format, (name,)


def make(node: Node[bytes], pickler: MakePickler) -> bytes:
    options = node.application.deployment._options
    init = (options.init_args, options.init_kwargs)
    return pickling.dumps(init, what=f"the init_args of {node.name!r}", pickler=pickler)


def graph(root: serve.Application, app: str = "default") -> list[list[Node[bytes]]]:
    return build(root, app, handle, make)


def names(stages: list[list[Node[bytes]]]) -> list[list[str]]:
    return [[node.name for node in stage] for stage in stages]


def test_one_deployment_is_an_app() -> None:
    assert names(graph(Model.bind())) == [["Model"]]


def test_handles_stand_for_what_is_bound_at_any_depth() -> None:
    model = Model.bind("v1")
    root = Ingress.bind(model, [{"key": (Model.bind("v2"),)}], other=model)
    stages = graph(root)
    assert names(stages) == [["Model", "Model_1"], ["Ingress"]]
    assert stages[1][0].made is not None
    args, kwargs = pickling.loads(stages[1][0].made)
    assert args == ("handle of Model", [{"key": ("handle of Model_1",)}])
    assert kwargs == {"other": "handle of Model"}


def test_a_node_shared_by_others_is_one_deployment() -> None:
    shared = Model.bind()
    left, right = Ingress.bind(shared), Ingress.bind(shared)
    stages = graph(Ingress.options(name="Top").bind(left, right))
    assert names(stages) == [["Model"], ["Ingress", "Ingress_1"], ["Top"]]


def test_callees_come_first_however_deep() -> None:
    deep = Model.bind()
    middle = Ingress.bind(deep)
    root = Ingress.options(name="Top").bind(deep, middle, Model.bind())
    assert names(graph(root)) == [["Model", "Model_1"], ["Ingress"], ["Top"]]


def test_names_that_are_given_are_not_taken_twice() -> None:
    named = Model.options(name="Model_1").bind()
    root = Ingress.bind(named, Model.bind(), Model.bind())
    assert names(graph(root))[0] == ["Model", "Model_1", "Model_2"]


def test_apps_have_names_of_their_own() -> None:
    stages = graph(Ingress.bind(Model.bind(), Model.bind()), "shop")
    assert names(stages) == [["shop:Model", "shop:Model_1"], ["shop:Ingress"]]
    assert qualified("default", "Model") == "Model"


def test_arguments_in_the_options() -> None:
    root = Ingress.options(init_args=([Model.bind()],)).bind()
    assert names(graph(root)) == [["Model"], ["Ingress"]]


def test_cycles_are_errors() -> None:
    later: list[Any] = []
    root = Ingress.bind(Ingress.options(name="Inner").bind(later))
    later.append(root)
    with pytest.raises(ValueError, match=r"Ingress -> Inner -> Ingress|Inner -> Ing"):
        graph(root)
    myself: list[Any] = []
    alone = Ingress.bind(myself)
    myself.append(alone)
    with pytest.raises(ValueError, match="Ingress -> Ingress"):
        graph(alone)


def test_arguments_that_cannot_be_pickled_are_named() -> None:
    bad = Model.bind({"at": (n for n in range(3))})  # type: ignore[arg-type]
    with pytest.raises(PicklingError, match=r"init_args of 'Model'.*generator"):
        graph(Ingress.bind(bad))


@pytest.mark.parametrize(
    ("bind", "text"),
    [
        (lambda: Model.bind(1, 2), "do not fit Model"),
        (lambda: Model.bind(weight=2), "do not fit Model"),
    ],
)
def test_arguments_that_do_not_fit(bind: Callable[[], Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        bind()


def test_what_is_bound_is_not_a_handle() -> None:
    bound = Model.bind()
    with pytest.raises(AttributeError, match=r"serve.run\(...\) returns a handle"):
        bound.remote()
    with pytest.raises(PicklingError, match=r"serve.run\(...\) deploys"):
        pickling.dumps(bound, what="x")
    with pytest.raises(TypeError, match=r"Model.bind\(...\)"):
        serve.run(Model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="returns"):
        serve.run(threading.Lock())  # type: ignore[arg-type]
    for name in ("", None):
        with pytest.raises(TypeError, match="not empty"):
            serve.run(bound, name=name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no ':'"):
        serve.run(bound, name="a:b")
