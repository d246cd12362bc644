from __future__ import annotations

import ast
import contextvars
import functools
import gc
import pickle
import sqlite3
import subprocess
import sys
import textwrap
import threading
import traceback
from pathlib import Path
from types import ModuleType
from typing import NewType
from weakref import WeakSet, ref

import numpy as np
import pytest
from fastapi import APIRouter, FastAPI
from starlette.datastructures import State

from daskserve.exceptions import PicklingError
from daskserve.pickling import Pickler, check_code, dumps, is_plain, loads, names_in
from tests.utils import run_script

#: Cannot be pickled, and has a type that error texts can be searched for.
connection = sqlite3.connect(":memory:", check_same_thread=False)


@pytest.fixture(scope="module", autouse=True)
def close_connection():
    yield
    connection.close()


def round_trip(obj):
    return loads(dumps(obj, what="a thing"))


def test_functions_travel_by_value():
    factor = 3
    assert round_trip(lambda x: x * factor)(2) == 6


def test_protocol_5():
    assert dumps(1, what="one")[:2] == b"\x80\x05"


@pytest.mark.parametrize("factory", [threading.Lock, threading.RLock])
def test_locks_arrive_new_and_unlocked(factory):
    lock = factory()
    with lock:
        copy = round_trip(lock)
    assert type(copy) is type(lock) and copy is not lock
    acquired = []

    def acquire():
        acquired.append(copy.acquire(blocking=False))
        copy.release()

    thread = threading.Thread(target=acquire)
    thread.start()
    thread.join()
    assert acquired == [True]


def test_state_keeps_its_values_and_its_class():
    class MyState(State):
        pass

    state = State({"a": 1})
    state.own = MyState({"b": 2})
    state.me = state
    copy = round_trip(state)
    assert copy.a == 1
    assert copy.own.b == 2
    assert type(copy.own).__name__ == "MyState"
    assert copy.me is copy
    with pytest.raises(AttributeError):
        copy.missing  # noqa: B018


def test_state_set_apart_from_the_original():
    state = State({"a": 1})
    copy = round_trip(state)
    copy.a = 2
    assert state.a == 1


def test_fastapi_app_with_routers():
    app = FastAPI()
    router = APIRouter()

    @router.get("/x")
    def x():
        return 1

    app.include_router(router, prefix="/p")
    assert "/p/x" in app.openapi()["paths"]
    app.openapi_schema = None
    assert "/p/x" in round_trip(app).openapi()["paths"]


def test_names_of_string_annotations_travel(tmp_path):
    (tmp_path / "script.py").write_text(
        "from __future__ import annotations\n"
        "import sys\n"
        "from decimal import Decimal\n"
        "from typing import Annotated\n"
        "from daskserve.pickling import dumps\n"
        "def f(x: Annotated[Decimal, 'note'], y: 'not valid(') -> None: ...\n"
        "sys.stdout.buffer.write(dumps(f, what='f'))\n"
    )
    data = run(tmp_path / "script.py")
    f = loads(data)
    assert f.__globals__["Decimal"].__name__ == "Decimal"
    assert "Annotated" in f.__globals__


FUTURE = """
from __future__ import annotations

class Trap:
    def __reduce__(self):
        raise TypeError("a global that is not used was pickled")

client = model = data = Trap()
"""


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("return dict(client=1, data=2)", {"client": 1, "data": 2}),
        ("return [len(word) for word in ('client', 'data')]", [6, 4]),
        ("return len({'model': 'client'}['model'])", 6),
        ("return [len(odd) for odd in ('\\ud800', '\\0', 'a b')]", [1, 1, 3]),
        ("model: str = 'data'; return model", "data"),
        ("def g(client='data'): return client\n    return g()", "data"),
        ("class A: model = 'client'\n    return A.model", "client"),
    ],
)
def test_words_in_code_are_no_annotations(tmp_path, code, answer):
    script = tmp_path / "script.py"
    script.write_text(
        f"{FUTURE}\ndef f():\n    {code}\n"
        "import sys\nfrom daskserve.pickling import dumps\n"
        "sys.stdout.buffer.write(dumps(f, what='f'))\n"
    )
    assert loads(run(script))() == answer


def test_inner_annotations_are_evaluated_in_a_replica(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from __future__ import annotations\n"
        "import sys, typing\n"
        "from decimal import Decimal\n"
        "from fractions import Fraction\n"
        "from pathlib import Path\n"
        "from uuid import UUID\n"
        "from daskserve.pickling import dumps\n"
        "def f(outside=None):\n"
        "    def g(a: Decimal, b=('UUID', 'x'), *, c: int = 1) -> Fraction:\n"
        "        return outside\n"
        "    class A:\n"
        "        path: Path = None\n"
        "    return typing.get_type_hints(g), typing.get_type_hints(A, globals())\n"
        "sys.stdout.buffer.write(dumps(f, what='f'))\n"
    )
    f = loads(run(script))
    of_function, of_class = f()
    assert {n: t.__name__ for n, t in of_function.items()} == {
        "a": "Decimal",
        "c": "int",
        "return": "Fraction",
    }
    assert of_class["path"].__name__ == "Path"
    assert "UUID" not in f.__globals__


OF_MAIN = """
import contextvars, dataclasses, functools, inspect, sys, threading, typing
import pydantic, typing_extensions
from daskserve.pickling import dumps

@functools.lru_cache(maxsize=3, typed=True)
def fibonacci(n):
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

@functools.cache
def settings():
    return {"name": "shop"}

class Model:
    @functools.lru_cache
    def load(self, n):
        return 2 * n

    @functools.cached_property
    def size(self):
        return 5

    @functools.singledispatchmethod
    def tell(self, x):
        return "object"

    @tell.register
    def _(self, x: int):
        return "int"

@functools.singledispatch
def kind(x):
    return "object"

@kind.register
def _(x: list):
    return [kind(each) for each in x]

@kind.register(int)
@kind.register(bool)
def _(x):
    return "number"

UserId = typing.NewType("UserId", int)
P = typing.ParamSpec("P")
T = typing.TypeVar("T", bound=int)
Ts = typing_extensions.TypeVarTuple("Ts")
Numbers = typing_extensions.TypeAliasType("Numbers", list[int])
Pair = typing_extensions.TypeAliasType("Pair", tuple[T, T], type_params=(T,))

def twice(f: typing.Callable[P, T]) -> typing.Callable[P, list[T]]:
    def call(*args: P.args, **kwargs: P.kwargs) -> list[T]:
        return [f(*args, **kwargs)] * 2
    return call

request = contextvars.ContextVar("request")
level = contextvars.ContextVar("level", default=[3])
own = threading.local()
own.value = 1

class Local(threading.local):
    def __init__(self):
        self.made = "here"

local = Local()

@dataclasses.dataclass
class Order:
    item: str
    tags: list = dataclasses.field(default_factory=list)
    number: int = 3
    _: dataclasses.KW_ONLY = 0
    extra: str = "x"

def use():
    request.set("r")
    fields = {f.name: f for f in dataclasses.fields(Order)}
    return dict(
        fibonacci=(fibonacci(30), fibonacci.cache_parameters()),
        settings=settings() is settings(),
        method=(Model().load(4), Model().size, Model().tell(1), Model().tell("")),
        kind=kind([1, "", [True]]),
        new_type=(UserId(5), UserId.__name__, UserId.__supertype__ is int),
        generic=(twice(abs)(-1), P.__name__, Ts.__name__, twice.__annotations__["f"]),
        alias=pydantic.TypeAdapter(Numbers).validate_python(["1"]),
        pair=pydantic.TypeAdapter(Pair[int]).validate_python(["1", 2]),
        context=(request.get(), level.get()),
        local=(hasattr(own, "value"), local.made),
        missing=[fields[n].default is dataclasses.MISSING for n in ("item", "number")],
        order=Order("pen", extra="y") == Order("pen", [], 3, extra="y"),
        signature=inspect.signature(use).return_annotation is inspect.Signature.empty,
    )

sys.stdout.buffer.write(dumps(use, what="use"))
"""


def test_what_main_has_is_made_anew(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(OF_MAIN)
    data = run(script)
    assert ("__main__", "fibonacci") not in names_in(data)
    found = loads(data)()
    generic = found.pop("generic")
    assert generic[:3] == ([1, 1], "P", "Ts")
    assert found == {
        "fibonacci": (832040, {"maxsize": 3, "typed": True}),
        "settings": True,
        "method": (8, 5, "int", "object"),
        "kind": ["number", "object", ["number"]],
        "new_type": (5, "UserId", True),
        "alias": [1],
        "pair": (1, 2),
        "context": ("r", [3]),
        "local": (False, "here"),
        "missing": [True, False],
        "order": True,
        "signature": True,
    }


def test_a_cached_dependency_and_its_override_are_one_object(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import functools, sys\n"
        "from typing import Annotated\n"
        "from fastapi import Depends, FastAPI\n"
        "from starlette.testclient import TestClient\n"
        "from daskserve.ingress import find_ingress, ingress\n"
        "from daskserve.pickling import dumps\n"
        "@functools.lru_cache\n"
        "def secret(): return 'real'\n"
        "app = FastAPI()\n"
        "app.dependency_overrides[secret] = lambda: 'fake'\n"
        "@ingress(app)\n"
        "class Shop:\n"
        "    @app.get('/')\n"
        "    def root(self, found: Annotated[str, Depends(secret)]): return found\n"
        "def ask():\n"
        "    with TestClient(find_ingress(Shop).build(Shop())) as client:\n"
        "        return client.get('/').json()\n"
        "sys.stdout.buffer.write(dumps(ask, what='it'))\n"
    )
    assert loads(run(script))() == "fake"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the statement is of 3.12")
def test_type_statements_of_main(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "type Numbers = list[int]\ntype Pair[T] = tuple[T, T]\n"
        "import pydantic, sys\nfrom daskserve.pickling import dumps\n"
        "def f():\n"
        "    both = pydantic.TypeAdapter(tuple[Numbers, Pair[int]])\n"
        "    return both.validate_python((['1'], ('2', 3)))\n"
        "sys.stdout.buffer.write(dumps(f, what='f'))\n"
    )
    assert loads(run(script))() == ([1], (2, 3))


def test_importable_things_go_by_name():
    for thing in (functools.cache, cached, UserId, marker):
        assert round_trip(thing) is thing
    assert round_trip([marker, {"k": marker}]) == [marker, {"k": marker}]
    own = object()
    pair = round_trip((own, own))
    assert pair[0] is pair[1] and pair[0] is not own


def test_an_object_of_main_does_not_go_by_name():
    script = """
    import multiprocessing  # by it, __main__ gets a second name
    from daskserve.pickling import dumps, names_in
    marker = object()
    print(list(names_in(dumps([marker], what="it"))))
    """
    assert run_script(textwrap.dedent(script)).stdout == "[('builtins', 'object')]\n"


def test_proxies_of_werkzeug_go_by_name(monkeypatch):
    local = pytest.importorskip("werkzeug.local")
    # As quart.globals and flask.globals have them.
    module = ModuleType("globals_of_a_library")
    module.session = local.LocalProxy(contextvars.ContextVar("v"), "session")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert round_trip([module.session])[0] is module.session


@functools.cache
def cached():
    return connection


UserId = NewType("UserId", int)
marker = object()


def test_names_of_main_are_refused(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "class Odd:\n    def __reduce__(self): return 'odd'\n"
        "odd = Odd()\ndef f(): return odd\n"
        "from daskserve.pickling import check_code, dumps\n"
        "data = dumps(f, what='f')\n"
        "try:\n    check_code(data, f, what='deployment 1')\n"
        "except Exception as err:\n    print(type(err).__name__, err)\n"
    )
    said = run(script).decode()
    assert said.startswith(
        "PicklingError deployment 1 cannot be pickled: 'odd' of __main"
    )
    assert "constructor" in said


def test_large_code_is_named():
    table = np.zeros(2_000_000)

    def by_closure():
        return table

    holder = Holder(deep=[{"weights": table}])

    def by_attribute():
        return holder

    for function, path in [
        (by_closure, "by_closure, closure variable 'table' of by_closure() is a numpy"),
        (by_attribute, "of by_attribute().deep[0]['weights'] is a numpy.ndarray"),
    ]:
        data = dumps(function, what="it")
        with pytest.warns(UserWarning, match="The code of it is 15.3 MiB") as caught:
            check_code(data, function, what="it")
        assert path in str(caught[0].message)
        assert "15.3 MiB. It is sent" in str(caught[0].message)


def test_code_of_ordinary_size_is_no_reason_to_warn(recwarn):
    data = dumps(by_global, what="it", pickler=Pickler)
    check_code(data, by_global, what="it")
    assert not recwarn.list


class Proxy:
    """As werkzeug's: it answers nothing outside of a request."""

    __slots__ = ("v",)

    def __getattr__(self, name):
        raise RuntimeError("outside of a request")

    @property
    def __dict__(self):
        raise RuntimeError("outside of a request")

    def __reduce__(self):
        return Proxy, ()


def test_looking_for_the_culprit_never_raises():
    with pytest.raises(PicklingError, match=r"Holder.b\[0\] is a sqlite3.Connection"):
        dumps(Holder(a=[Proxy()], b=[connection]), what="It")


def test_the_innermost_object_that_has_a_name_is_given():
    pool = WeakSet()
    with pytest.raises(PicklingError, match="Holder.engine.pool") as info:
        dumps(Holder(engine=Holder(pool=Holder(first=ref(pool)))), what="It")
    assert "weakref" in str(info.value)


def run(script: Path) -> bytes:
    root = str(Path(__file__).parents[1])
    return subprocess.run(
        [sys.executable, str(script)],
        check=True,
        capture_output=True,
        env={"PYTHONPATH": root},
    ).stdout


class Holder:
    def __init__(self, **attributes):
        vars(self).update(attributes)


class Slotted:
    __slots__ = ("inside",)


def by_global():
    def inner():
        return connection

    return inner


def by_closure():
    conn = connection

    def inner():
        return conn

    return inner


def by_class():
    class Local:
        conn = connection

    return Local


def by_default():
    def inner(*, conn=connection):
        return conn

    return inner


def slotted():
    obj = Slotted()
    obj.inside = connection
    return obj


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda: Holder(a=[0, {"k": connection}]), "Holder.a[1]['k'] is a"),
        (lambda: Holder(f=by_global()), ".f, global 'connection' of inner() is a"),
        (lambda: Holder(f=by_closure()), ".f, closure variable 'conn' of inner()"),
        (lambda: Holder(f=by_default()), ".f, default 'conn' of inner() is a"),
        (lambda: Holder(c=by_class()), "Holder.c.conn is a"),
        (lambda: Holder(s=State({"db": connection})), "Holder.s.db is a"),
        (lambda: Holder(s=slotted()), "Holder.s.inside is a"),
        (lambda: Holder(m=Holder(c=connection).__init__), "Holder.m.__self__.c is a"),
        (lambda: Holder(p=functools.partial(len, connection)), "Holder.p.args[0] is"),
        (lambda: Holder(s=staticmethod(by_closure())), "'conn' of inner() is a"),
    ],
)
def test_error_says_where_the_culprit_is(make, path):
    with pytest.raises(PicklingError) as info:
        dumps(make(), what="The thing")
    assert str(info.value).startswith("The thing cannot be pickled: ")
    assert path in str(info.value)
    assert "sqlite3.Connection" in str(info.value)
    assert isinstance(info.value.__cause__, TypeError)


def test_error_of_an_object_itself():
    with pytest.raises(PicklingError, match=r"conn cannot be pickled: cannot pickle"):
        dumps(connection, what="conn")


def test_error_for_a_culprit_that_cannot_be_found():
    class Hidden:
        def __getstate__(self):
            return {"made": iter(i for i in ())}

    hidden = Hidden()
    with pytest.raises(PicklingError, match="a builtins.generator object is in it"):
        dumps([hidden], what="It")


def test_any_exception_of_user_code_is_reported():
    class Broken:
        def __reduce__(self):
            raise KeyError("boom")

    with pytest.raises(PicklingError, match="boom") as info:
        dumps([Broken()], what="It")
    assert isinstance(info.value.__cause__, KeyError)


def test_recursion_is_reported():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(PicklingError, match="recursion"):
        dumps(deep, what="It")


def test_missing_module_is_named(tmp_path, monkeypatch):
    (tmp_path / "gone_module.py").write_text("def f(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    import gone_module

    data = dumps(gone_module.f, what="f")
    monkeypatch.delitem(sys.modules, "gone_module")
    (tmp_path / "gone_module.py").unlink()
    with pytest.raises(PicklingError, match="gone_module") as info:
        loads(data)
    assert "upload_file" in str(info.value)
    assert "register_pickle_by_value" in str(info.value)
    assert isinstance(info.value.__cause__, ModuleNotFoundError)


def test_missing_attribute_is_named(monkeypatch):
    data = dumps(Holder, what="Holder")
    monkeypatch.delattr(sys.modules[__name__], "Holder")
    with pytest.raises(PicklingError, match="Holder"):
        loads(data)


def test_errors_while_loading_are_explained():
    with pytest.raises(PicklingError, match="ZeroDivisionError.*constructor") as info:
        loads(dumps(Failing(), what="it"))
    assert isinstance(info.value.__cause__, ZeroDivisionError)
    with pytest.raises(pickle.UnpicklingError):
        loads(b"not a pickle")


class Failing:
    def __reduce__(self):
        return divmod, (1, 0)


def test_string_annotations_while_other_code_parses() -> None:
    # `ast.parse` fails then, before Python 3.11.8: in another thread, or, as here, in
    # what the garbage collector runs.
    def parse(phase: str, info: dict[str, int]) -> None:
        gc.callbacks.remove(parse)
        ast.parse("f(a, [b, c])")
        gc.callbacks.append(parse)

    source = "from __future__ import annotations\ndef f(x: " + "list[" * 30 + "int"
    space: dict[str, object] = {}
    exec(source + "]" * 30 + "): return x", space)
    threshold = gc.get_threshold()
    gc.set_threshold(5)
    gc.callbacks.append(parse)
    try:
        pickled = dumps(space["f"], what="f")
    finally:
        gc.callbacks.remove(parse)
        gc.set_threshold(*threshold)
    assert loads(pickled)(3) == 3


def test_tracebacks_keep_their_source_lines() -> None:
    def fails() -> None:
        raise LookupError("here")

    loaded = loads(dumps(fails, what="f"))
    assert loaded is not fails
    with pytest.raises(LookupError) as caught:
        loaded()
    assert 'raise LookupError("here")' in "".join(traceback.format_tb(caught.tb))


@pytest.mark.parametrize(
    "value",
    [None, 1, "text", b"bytes", (1, [2, {"a": (None, 2.5)}]), ((), {})],
    ids=repr,
)
def test_plain_values_need_no_pickler_of_ours(value):
    def refuse(file):
        raise AssertionError("asked for")

    assert loads(dumps(value, what="it", pickler=refuse)) == value


def test_what_is_not_plain_all_through_gets_the_pickler():
    class Text(str):
        pass

    deep: list[object] = []
    deep.append(deep)
    for value in (deep, [[threading.Lock()]], {"a": Text("b")}, {Text("a"): 1}):
        assert not is_plain(value)
        assert type(loads(dumps(value, what="it"))) is type(value)
    assert not is_plain([0] * 1000)  # not looked at
