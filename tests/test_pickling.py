from __future__ import annotations

import ast
import functools
import gc
import pickle
import sqlite3
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest
from fastapi import APIRouter, FastAPI
from starlette.datastructures import State

from daskserve.exceptions import PicklingError
from daskserve.pickling import dumps, is_plain, loads

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


def test_other_errors_while_loading_are_left_alone():
    with pytest.raises(ZeroDivisionError):
        loads(dumps(Failing(), what="it"))
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
