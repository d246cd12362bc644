"""One replica without a cluster: messages in, user code, messages out."""

from __future__ import annotations

import asyncio
import contextlib
import decimal
import functools
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

import daskserve as serve
from daskserve import packing, pickling
from daskserve.replica.actor import ReplicaSpec
from daskserve.replica.runner import Runner
from daskserve.transport import values
from daskserve.transport.affinity import Session
from daskserve.transport.messages import (
    BODY,
    CALL,
    CANCEL,
    CHUNK,
    CONNECT,
    CREDIT,
    CUT,
    END,
    ERROR,
    FOLLOW,
    GRANT,
    NOT_ENCODABLE,
    PUSH,
    REFUSED,
    REQUEST,
    RESPONSE,
    RESULT,
    SESSION,
    START,
    STOPPED,
    UNKNOWN_METHOD,
    USER_ERROR,
    Message,
)
from tests.utils import leftover_threads, poll

WINDOW = 100_000
HEAD = (
    "GET",
    "/D/x",
    b"/D/x",
    b"",
    [],
    "1.1",
    "http",
    ("c", 1),
    ("s", 2),
    "/D",
    "id1",
    False,
    WINDOW,
)


class Caller:
    """A caller's end of a channel that keeps what comes."""

    caller = "me"

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def send(self, message: Message) -> None:
        self.messages.append(message)

    def of(self, exchange_id: int, *ops: int) -> list[Message]:
        return [
            m
            for m in list(self.messages)
            if m[1] == exchange_id and (not ops or m[0] in ops)
        ]

    def wait(self, exchange_id: int, *ops: int) -> Message:
        return poll(lambda: self.of(exchange_id, *ops))[-1]


class Replica:
    """A runner, what it reported, and a caller."""

    def __init__(
        self,
        target: Any,
        *args: Any,
        wait: bool = True,
        busy_changed: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        spec = {
            "replica_id": 1,
            "tag": "D#1",
            "deployment": "D",
            "code": pickling.dumps(target, what="the test's code"),
            "init": pickling.dumps((args, {}), what="the test's arguments"),
            "user_config": None,
            "config_generation": 1,
            "max_ongoing_requests": 100,
            "health_check_period_s": 10.0,
            "health_check_timeout_s": 30.0,
        }
        self.reports: list[dict[str, Any]] = []
        self.caller = Caller()
        self.runner = Runner(
            ReplicaSpec(**{**spec, **options}),
            self.reports.append,
            SimpleNamespace(worker=None, direct_listener=lambda: None),
            WINDOW,
            busy_changed,
        )
        self._last_id = 0
        self.runner.start()
        if wait:
            self.wait_for("started", "failed")

    def wait_for(self, *events: str) -> dict[str, Any]:
        return poll(lambda: [r for r in list(self.reports) if r["event"] in events])[-1]

    def request(self, body: bytes = b"", more: bool = False, **head: Any) -> int:
        fields = (head.get("method", HEAD[0]), *HEAD[1:])
        return self.send(REQUEST, fields, body, more)

    def call(self, method: str = "__call__", *args: Any, **kwargs: Any) -> int:
        data, _ = values.pack_arguments(args, kwargs, what="arguments")
        return self.send(CALL, method, data, (), "id2", "", None)

    def send(self, op: int, *fields: Any) -> int:
        if op in (REQUEST, CALL):
            self._last_id += 1
        self.runner.put(self.caller, [(op, self._last_id, 1, *fields)])
        return self._last_id

    def result(self, exchange_id: int) -> Any:
        message = self.caller.wait(exchange_id, RESULT, ERROR)
        if message[0] == ERROR:
            raise values.restore(*message[3:])
        return packing.unpack(message[2])

    def body(self, exchange_id: int) -> bytes:
        message = self.caller.wait(exchange_id, RESPONSE, ERROR)
        assert message[0] == RESPONSE, message
        assert isinstance(message[4], bytes)
        return message[4]


@pytest.fixture
def replica() -> Iterator[Callable[..., Replica]]:
    made: list[Replica] = []

    def make(target: Any, *args: Any, **options: Any) -> Replica:
        made.append(Replica(target, *args, **options))
        return made[-1]

    yield make
    for each in made:
        each.runner.close()
    assert leftover_threads() == []


Make = Callable[..., Replica]


class Counter:
    def __init__(self, n: int = 0) -> None:
        self.n = n

    def __call__(self, request: Request) -> dict[str, int]:
        self.n += 1
        return {"n": self.n}

    async def add(self, k: int, *, times: int = 1) -> int:
        self.n += k * times
        return self.n

    def reconfigure(self, config: Any) -> None:
        if config == "bad":
            raise ValueError("not that")
        self.n = config["n"]


def test_a_class_answers_requests_and_calls(replica: Make) -> None:
    made = replica(Counter, 10)
    assert made.body(made.request()) == b'{"n":11}'
    assert made.result(made.call("add", 5, times=2)) == 21
    assert [report["event"] for report in made.reports] == ["initializing", "started"]


def test_functions_with_and_without_a_request(replica: Make) -> None:
    async def path(request: Request) -> str:
        return request.url.path

    made = replica(path)
    assert made.body(made.request()) == b"/D/x"
    made = replica(lambda: "nothing taken")
    assert made.body(made.request()) == b"nothing taken"
    with pytest.raises(TypeError, match="takes 0 positional arguments but 1 was"):
        made.result(made.call("__call__", "not taken"))


def test_partials_and_decorated_functions(replica: Make) -> None:
    def add(a: int, b: int) -> int:
        return a + b

    class Adder:
        def __init__(self) -> None:
            self.run = functools.partial(add, 1)

    made = replica(Adder)
    assert made.result(made.call("run", 2)) == 3


def test_an_async_constructor(replica: Make) -> None:
    class Slow:
        async def __init__(self, n: int) -> None:
            await asyncio.sleep(0)
            self.n = n

        def get(self) -> int:
            return self.n

    made = replica(Slow, 3)
    assert made.result(made.call("get")) == 3


def test_a_constructor_finds_a_running_loop(replica: Make) -> None:
    class Looped:
        def __init__(self) -> None:
            self.task = asyncio.get_running_loop().create_task(asyncio.sleep(0, "done"))

        async def get(self) -> str:
            return await self.task

    made = replica(Looped)
    assert made.result(made.call("get")) == "done"


ERRORS = [ValueError, SystemExit, KeyboardInterrupt, StopIteration, GeneratorExit]


@pytest.mark.parametrize("on_loop", [True, False])
@pytest.mark.parametrize("error", [*ERRORS, asyncio.CancelledError])
def test_a_constructor_that_raises(
    replica: Make, error: type[BaseException], on_loop: bool
) -> None:
    class Sync:
        def __init__(self) -> None:
            raise error("no good")

    class Mixed(Sync):
        async def __call__(self) -> None: ...

    report = replica(Mixed if on_loop else Sync).reports[-1]
    assert report["event"] == "failed"
    assert "no good" in report["text"] and "in __init__" in report["text"]
    if error is not StopIteration:  # no coroutine can let it through as it is
        first, where, source, *_, last = report["text"].splitlines()
        assert first == "Traceback (most recent call last):"
        assert __file__ in where and where.endswith("in __init__")
        assert source.strip() == 'raise error("no good")'
        assert last.endswith("no good")


ONLY_ONCE = """
from contextlib import asynccontextmanager
from fastapi import FastAPI

def make():
    started = []

    @asynccontextmanager
    async def lifespan(app):
        started.append(1)
        if len(started) > 1:
            raise RuntimeError("run() can be called only once")
        yield

    return FastAPI(lifespan=lifespan)

app = make()
made = []

def make_one():
    if made:
        raise ValueError("there is one")
    made.append(1)
    return FastAPI()

def never():
    raise ValueError("there is none")
"""


@pytest.mark.parametrize("attribute", ["app", "make"])
def test_an_app_that_is_named_itself_is_started_again(
    replica: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attribute: str
) -> None:
    name = f"only_once_{attribute}"
    (tmp_path / f"{name}.py").write_text(ONLY_ONCE)
    monkeypatch.syspath_prepend(tmp_path)

    @serve.ingress(f"{name}:{attribute}")
    class App: ...

    assert replica(App).reports[-1]["event"] == "started"
    again = replica(App).reports[-1]
    if attribute == "make":
        assert again["event"] == "started"
        return
    last = again["text"].splitlines()[-1]
    assert "RuntimeError: run() can be called only once" in last
    assert f"'{name}:app' is one object for all replicas" in last
    assert '"module:factory"' in last


@pytest.mark.parametrize("by_name", [True, False])
def test_a_factory_that_can_be_called_once_in_a_process(
    replica: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_name: bool
) -> None:
    name = f"made_once_{by_name}"
    (tmp_path / f"{name}.py").write_text(ONLY_ONCE)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(name)

    def last_line(attribute: str) -> str:
        given = f"{name}:{attribute}" if by_name else getattr(module, attribute)
        report = replica(serve.ingress(given)(type("App", (), {}))).reports[-1]
        return "" if report["event"] == "started" else report["text"].splitlines()[-1]

    assert last_line("make_one") == ""
    last = last_line("make_one")
    assert "ValueError: there is one (" in last
    assert "make_one" in last and "has made an app in this process before" in last
    for _ in range(2):  # none was made before
        assert last_line("never").endswith("ValueError: there is none")


class OneThread:
    """Notes in which threads it runs."""

    def __init__(self) -> None:
        self.tag = serve.get_replica_context().replica_tag
        self.threads = {"constructor": threading.get_ident()}

    def note(self, what: str) -> None:
        self.threads[what] = threading.get_ident()

    def reconfigure(self, config: Any) -> None:
        self.note("reconfigure")

    def check_health(self) -> None:
        self.note("check_health")

    def __call__(self) -> dict[str, int]:
        self.note("method")
        return self.threads

    def items(self) -> Iterator[int]:
        try:
            self.note("generator")
            yield len(self.threads)
        finally:
            self.note("generator's end")

    def get_tag(self) -> str:
        return self.tag

    def __del__(self) -> None:
        self.note("__del__")
        SEEN.append(self.threads)


#: What objects say when they end.
SEEN: list[Any] = []

VARIABLE: ContextVar[str] = ContextVar("variable", default="none")


def test_everything_of_a_sync_class_runs_on_one_thread(replica: Make) -> None:
    SEEN.clear()
    config = pickling.dumps(1, what="the test's config")
    made = replica(OneThread, user_config=config)
    made.result(made.call())
    data, _ = values.pack_arguments((), {}, what="arguments")
    asked = made.send(CALL, "items", data, (), "id2", "", 1000)
    made.caller.wait(asked, END)
    assert made.result(made.call("get_tag")) == "D#1"
    made.runner.stop(5, 0.1)
    made.wait_for("stopped")
    (threads,) = SEEN
    assert {*threads} == {
        *("constructor", "reconfigure", "check_health", "method"),
        *("generator", "generator's end", "__del__"),
    }
    assert len({*threads.values()}) == 1


class Exact:
    """Sets context variables; the settings of decimal and numpy are such."""

    def __init__(self) -> None:
        decimal.getcontext().prec = 5
        np.seterr(divide="raise")
        VARIABLE.set("constructor")
        self.seen = [VARIABLE.get()]

    def reconfigure(self, prec: int) -> None:
        self.seen.append(VARIABLE.get())
        VARIABLE.set("reconfigure")
        decimal.getcontext().prec = prec

    def check_health(self) -> None:
        self.seen.append(VARIABLE.get())

    def divide(self) -> tuple[str, list[str]]:
        with pytest.raises(FloatingPointError):
            np.array(1.0) / 0
        seen = [*self.seen, VARIABLE.get()]
        VARIABLE.set("a call")  # for itself only
        return str(1 / decimal.Decimal(3)), seen

    def __del__(self) -> None:
        SEEN.append(VARIABLE.get())


def test_variables_of_the_constructor_and_of_reconfigure_last(replica: Make) -> None:
    SEEN.clear()
    config = pickling.dumps(3, what="the test's config")
    decimal.getcontext().prec = 28  # this thread's is not the replica's
    made = replica(Exact, user_config=config)
    lines = ["constructor", "constructor", "reconfigure", "reconfigure"]
    assert made.result(made.call("divide")) == ("0.333", lines)
    assert made.result(made.call("divide")) == ("0.333", lines)
    made.runner.reconfigure(pickling.dumps(4, what="the test's config"), 2)
    made.wait_for("reconfigured")
    assert made.result(made.call("divide"))[0] == "0.3333"
    made.runner.stop(5, 0.1)
    made.wait_for("stopped")
    assert SEEN == ["reconfigure"]
    assert decimal.getcontext().prec == 28


def test_a_generator_over_http_runs_on_the_thread_too(replica: Make) -> None:
    class Stream:
        def __init__(self) -> None:
            self.threads = [threading.get_ident()]

        def __call__(self) -> Iterator[str]:
            try:
                for _ in range(3):
                    self.threads.append(threading.get_ident())
                    yield "item"
            finally:
                self.threads.append(threading.get_ident())

        def seen(self) -> list[int]:
            return self.threads

    made = replica(Stream)
    asked = made.request()
    assert made.caller.wait(asked, CHUNK)
    poll(lambda: made.runner.ongoing == 0)
    threads = made.result(made.call("seen"))
    assert len(threads) == 5
    assert len({*threads}) == 1


def test_generators_end_after_their_last_step(replica: Make) -> None:
    """With several threads another one has to wait for it."""
    _events["started"], _events["go"] = threading.Event(), threading.Event()

    class Stream:
        def __init__(self) -> None:
            self.lines: list[str] = []

        def __call__(self) -> Iterator[str]:
            try:
                _wait()
                self.lines.append("step")
                yield "item"
            finally:
                self.lines.append("end")

        def seen(self) -> list[str]:
            return self.lines

    made = replica(Stream, threads=4)
    asked = made.request()
    assert _events["started"].wait(5)
    made.runner.put(made.caller, [(CANCEL, asked, 1)])
    poll(lambda: made.runner._servable.deserted == 1)
    assert made.result(made.call("seen")) == []
    _events["go"].set()
    assert poll(lambda: len(s := made.result(made.call("seen"))) == 2 and s)
    assert made.result(made.call("seen")) == ["step", "end"]
    poll(lambda: made.runner.ongoing == 0)
    assert made.runner._servable.thread_jobs == 0


def test_sync_methods_run_on_several_threads(replica: Make) -> None:
    class Meeting:
        def __init__(self) -> None:
            self.barrier = threading.Barrier(3)

        def meet(self) -> str:
            self.barrier.wait(10)
            return "met"

    made = replica(Meeting, threads=3)
    for _ in range(3):
        ids = [made.call("meet") for _ in range(3)]
        assert [made.result(each) for each in ids] == ["met"] * 3


def test_stopped_while_the_constructor_runs(replica: Make) -> None:
    """It is waited for, and what it made ends as ever; there was no startup."""
    _events["started"], _events["go"] = threading.Event(), threading.Event()
    ENDED.clear()

    class Slow:
        def __init__(self) -> None:
            _wait()
            note("made")

        def reconfigure(self, config: Any) -> None:
            note("reconfigured")

        def __del__(self) -> None:
            note("ended")

    config = pickling.dumps(1, what="the test's config")
    made = replica(Slow, user_config=config, wait=False)
    assert _events["started"].wait(5)
    made.runner.stop(5, 0.1)
    _events["go"].set()
    made.wait_for("stopped")
    assert ENDED == ["made", "ended"]
    assert [report["event"] for report in made.reports] == ["initializing", "stopped"]


def test_stopped_while_the_constructor_hangs(
    replica: Make, caplog: pytest.LogCaptureFixture
) -> None:
    _events["started"], _events["go"] = threading.Event(), threading.Event()

    class Hangs:
        def __init__(self) -> None:
            _wait()

    made = replica(Hangs, wait=False)
    assert _events["started"].wait(5)
    made.runner.stop(0.1, 0.1)
    made.wait_for("stopped")
    assert "constructor of replica D#1 does not end" in caplog.text
    _events["go"].set()


def test_sync_methods_run_one_at_a_time_on_their_thread(replica: Make) -> None:
    class Busy:
        def __init__(self) -> None:
            self.now = self.most = 0
            self.threads: set[int] = set()

        def work(self) -> None:
            self.threads.add(threading.get_ident())
            self.now += 1
            self.most = max(self.most, self.now)
            time.sleep(0.005)
            self.now -= 1

        async def seen(self) -> tuple[int, int, bool]:
            on_loop = threading.get_ident() in self.threads
            return self.most, len(self.threads), on_loop

    made = replica(Busy)
    ids = [made.call("work") for _ in range(10)]
    for each in ids:
        made.result(each)
    assert made.result(made.call("seen")) == (1, 1, False)


def test_async_methods_run_side_by_side(replica: Make) -> None:
    class Meeting:
        def __init__(self) -> None:
            self.barrier = asyncio.Barrier(3)

        async def meet(self) -> str:
            await self.barrier.wait()
            return "met"

    made = replica(Meeting)
    ids = [made.call("meet") for _ in range(3)]
    assert [made.result(each) for each in ids] == ["met"] * 3


def test_max_ongoing_is_strict(replica: Make) -> None:
    class Held:
        def __init__(self) -> None:
            self.go = asyncio.Event()

        async def hold(self) -> str:
            await self.go.wait()
            return "held"

        async def free(self) -> None:
            self.go.set()

    made = replica(Held, max_ongoing_requests=2)
    held = [made.call("hold") for _ in range(2)]
    over = made.call("hold")
    assert made.caller.wait(over)[0] == REFUSED
    for each in held:
        made.runner.put(made.caller, [(CANCEL, each, 1)])
    poll(lambda: made.runner.ongoing == 0)
    assert made.result(made.call("free")) is None


def test_a_deserted_sync_call_still_counts(replica: Make) -> None:
    started, go = threading.Event(), threading.Event()
    _events["started"], _events["go"] = started, go

    class Stuck:
        def hold(self) -> None:
            _wait()

    made = replica(Stuck, max_ongoing_requests=1)
    held = made.call("hold")
    assert started.wait(5)
    made.runner.put(made.caller, [(CANCEL, held, 1)])
    poll(lambda: not made.runner._calls)
    assert made.runner.ongoing == 1
    servable = made.runner._servable
    assert (servable.deserted, servable.thread_jobs) == (1, 1)
    abandoned = servable.abandoned
    assert abandoned is not None and abandoned[0] <= made.runner.loop.time()
    assert abandoned[1] in {t.ident for t in threading.enumerate()}
    assert made.caller.wait(made.call("hold"))[0] == REFUSED
    go.set()
    poll(lambda: made.runner.ongoing == 0)
    assert (servable.thread_jobs, servable.abandoned) == (0, None)


_events: dict[str, threading.Event] = {}


def _wait() -> None:
    _events["started"].set()
    assert _events["go"].wait(10)


def test_errors_of_user_code(replica: Make) -> None:
    class Errors:
        def __call__(self, request: Request) -> Any:
            raise KeyError("secret")

        def plain(self) -> None:
            raise KeyError("a key")

        def stop(self) -> None:
            raise StopIteration

        async def leave(self) -> None:
            raise SystemExit(3)

        def strange(self) -> None:
            class Local(Exception):
                def __reduce__(self) -> Any:
                    raise TypeError("never")

            raise Local("local")

        def thing(self) -> Any:
            return (n for n in range(3))

    made = replica(Errors)
    with pytest.raises(KeyError, match="a key") as info:
        made.result(made.call("plain"))
    assert [entry.name for entry in info.traceback][-1] == "plain"
    with pytest.raises(RuntimeError, match="StopIteration"):
        made.result(made.call("stop"))
    with pytest.raises(serve.ServeError, match="SystemExit"):
        made.result(made.call("leave"))
    with pytest.raises(serve.ServeError, match="Local: local"):
        made.result(made.call("strange"))
    with pytest.raises(TypeError, match=r"the result of D\.thing\(\) cannot be"):
        made.result(made.call("thing"))
    message = made.caller.wait(made.call("nothing"))
    assert message[:1] + message[2:3] == (ERROR, UNKNOWN_METHOD)
    assert "'leave', 'plain', 'stop'" in message[4]
    message = made.caller.wait(made.request(), ERROR)
    assert message[2] == USER_ERROR and message[3] == "KeyError"
    assert made.runner.ongoing == 0


def test_a_result_that_cannot_be_encoded(replica: Make) -> None:
    made = replica(lambda: object())
    message = made.caller.wait(made.request(), ERROR)
    assert message[2] == NOT_ENCODABLE and "object" in message[4]


def test_a_class_without_call_cannot_answer_http(replica: Make) -> None:
    class Mute:
        def method(self) -> int:
            return 1

    made = replica(Mute)
    assert "neither __call__ nor" in made.caller.wait(made.request(), ERROR)[4]
    assert made.result(made.call("method")) == 1


def test_bodies_come_as_they_are_granted(replica: Make) -> None:
    async def size(request: Request) -> list[int]:
        return [len(chunk) async for chunk in request.stream() if chunk]

    made = replica(size)
    asked = made.request(b"a" * 10, more=True, method="POST")
    assert made.caller.wait(asked, GRANT)[2] == WINDOW
    made.send(BODY, b"b" * 20, True)
    made.send(BODY, b"c" * 30, False)
    assert made.body(asked) == b"[10,20,30]"
    assert [m[2] for m in made.caller.of(asked, GRANT)] == [WINDOW, 20, 30]


def test_a_slow_reader_slows_the_generator(replica: Make) -> None:
    class Flood:
        async def __call__(self) -> Any:
            async def chunks() -> Any:
                for _ in range(100):
                    yield b"x" * 10_000

            return chunks()

        async def turn(self) -> None:
            await asyncio.sleep(0.01)

    made = replica(Flood)
    asked = made.request()
    made.caller.wait(asked, START)
    poll(lambda: len(made.caller.of(asked, CHUNK)) >= WINDOW // 10_000)
    made.result(made.call("turn"))  # the loop has gone round, and nothing came
    before = len(made.caller.of(asked, CHUNK))
    assert before == WINDOW // 10_000
    made.runner.put(made.caller, [(CREDIT, asked, 1, 30_000)])
    poll(lambda: len(made.caller.of(asked, CHUNK)) == before + 3)
    made.runner.put(made.caller, [(CANCEL, asked, 1)])
    poll(lambda: made.runner.ongoing == 0)


def test_an_endless_stream_that_never_waits_is_cancelled(replica: Make) -> None:
    async def endless() -> Any:
        async def chunks() -> Any:
            while True:
                yield b"x" * 10_000

        return chunks()

    made = replica(endless)
    asked = made.request()
    poll(lambda: len(made.caller.of(asked, CHUNK)) >= WINDOW // 10_000)
    made.runner.put(made.caller, [(CANCEL, asked, 1)])
    poll(lambda: made.runner.ongoing == 0)
    assert len(made.caller.of(asked, CHUNK)) == WINDOW // 10_000


def test_a_stream_that_waits_is_cancelled_where_it_waits(replica: Make) -> None:
    """Its generator cleans up there; in `send` it would not know of anything."""
    ENDED.clear()

    class Holder:
        pass

    async def ticks() -> Any:
        try:
            while True:
                yield b"tick"
                time.sleep(0.001)  # noqa: ASYNC251 - the cancellation comes meanwhile
                await asyncio.sleep(0)
        finally:
            note("closed")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await StreamingResponse(ticks())(scope, receive, send)

    made = replica(serve.ingress(app)(Holder))
    for count in range(1, 11):
        asked = made.request()
        made.caller.wait(asked, CHUNK)
        made.runner.put(made.caller, [(CANCEL, asked, 1)])
        poll(lambda: made.runner.ongoing == 0)
        assert ENDED == ["closed"] * count


def test_a_stream_that_breaks_is_cut(replica: Make) -> None:
    async def breaks() -> Any:
        async def chunks() -> Any:
            yield b"begun"
            raise ValueError("in the middle")

        return chunks()

    made = replica(breaks)
    asked = made.request()
    message = made.caller.wait(asked, ERROR)
    assert message[2] == CUT
    assert [m[0] for m in made.caller.of(asked)] == [START, CHUNK, ERROR]


def app_of(endpoint: Any, **options: Any) -> type:
    class Holder:
        pass

    app = Starlette(routes=[Route("/x", endpoint)], **options)
    return serve.ingress(app)(Holder)


def test_an_app_gets_its_lifespan_and_prefix(replica: Make) -> None:
    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> Any:
        yield {"started": ["startup"]}

    async def endpoint(request: Request) -> PlainTextResponse:
        url = request.url_for("endpoint")
        return PlainTextResponse(f"{request.state.started} {url.path}")

    made = replica(app_of(endpoint, lifespan=lifespan))
    assert made.body(made.request()) == b"['startup'] /D/x"


def test_a_startup_that_fails_is_a_replica_that_fails(replica: Make) -> None:
    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> Any:
        raise OSError("no database")
        yield

    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("")

    report = replica(app_of(endpoint, lifespan=lifespan)).reports[-1]
    assert report["event"] == "failed" and "no database" in report["text"]


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("fails", ["reconfigure", "lifespan", "check_health"])
def test_a_failed_start_is_cleaned_up(replica: Make, fails: str, how: str) -> None:
    ENDED.clear()

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> Any:
        note("up")
        if fails == "lifespan":
            raise OSError("ill")
        yield
        note("down")

    class Base:
        def reconfigure(self, config: Any) -> None:
            if fails == "reconfigure":
                raise OSError("ill")

        def check_health(self) -> None:
            if fails == "check_health":
                raise OSError("ill")

    class Sync(Base):
        def __del__(self) -> None:
            note("gone")

    class Async(Base):
        async def __del__(self) -> None:
            await asyncio.sleep(0)
            note("gone")

    cls = Sync if how == "sync" else Async
    app = FastAPI(lifespan=lifespan)
    config = pickling.dumps({}, what="it")
    report = replica(serve.ingress(app)(cls), user_config=config).reports[-1]
    assert report["event"] == "failed" and "ill" in report["text"]
    # When that is known, and the next try may begin.
    assert (
        ENDED
        == {
            "reconfigure": ["gone"],
            "lifespan": ["up", "gone"],
            "check_health": ["up", "down", "gone"],
        }[fails]
    )


@pytest.mark.parametrize("slow", ["lifespan", "check_health"])
def test_a_stop_during_the_start_waits_for_it(replica: Make, slow: str) -> None:
    ENDED.clear()

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> Any:
        await hold("lifespan")
        note("up")
        yield
        note("down")

    async def hold(what: str) -> None:
        if what == slow:
            note("begun")
            await asyncio.sleep(4)  # longer than hooks may take at the end

    class Model:
        async def check_health(self) -> None:
            await hold("check_health")
            note("checked")

        def __del__(self) -> None:
            note("gone")

    app = FastAPI(lifespan=lifespan)
    made = replica(serve.ingress(app)(Model), wait=False)
    poll(lambda: "begun" in ENDED)
    made.runner.stop(20, 0)
    made.wait_for("stopped")
    assert [r["event"] for r in made.reports] == ["initializing", "stopped"]
    first = {
        "lifespan": ["begun", "up", "checked"],
        "check_health": ["up", "begun", "checked"],
    }[slow]
    assert ENDED == [*first, "down", "gone"]


def test_an_exception_that_is_raised_again_stays_as_it_is(replica: Make) -> None:
    cause = OSError(n for n in range(3))  # cannot travel
    error = KeyError("kept")

    class Model:
        def __call__(self) -> None:
            raise error from cause

    made = replica(lambda: None)
    made.runner._servable.object = Model()  # the same object here and there
    for _ in range(3):
        with pytest.raises(KeyError, match="kept") as info:
            made.result(made.call())
        [note] = info.value.__notes__
        assert note.count("Traceback in the replica") == 1
        assert note.count("KeyError: 'kept'") == 1
    assert error.__cause__ is cause
    assert not hasattr(error, "__notes__")


def test_an_app_that_says_nothing(replica: Make) -> None:
    class Holder:
        pass

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        pass

    made = replica(serve.ingress(silent)(Holder))
    message = made.caller.wait(made.request(), ERROR)
    assert "without completing its response" in message[4]


@pytest.mark.parametrize(
    ("events", "error"),
    [
        (["http.response.body"], "Expected 'http.response.start'"),
        (["http.response.start"] * 2, "second 'http.response.start'"),
        (["http.response.strange"], "Unexpected ASGI message"),
    ],
)
def test_events_in_a_wrong_order(replica: Make, events: list[str], error: str) -> None:
    class Holder:
        pass

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        for event in events:
            await send({"type": event, "status": 200, "headers": []})

    made = replica(serve.ingress(app)(Holder))
    message = made.caller.wait(made.request(), ERROR)
    assert error in message[4]


def test_after_the_response_the_client_is_gone_for_the_app(replica: Make) -> None:
    """Also if it has sent a body that the app has not read."""
    ENDED.clear()

    class Holder:
        pass

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await PlainTextResponse("done")(scope, receive, send)
        note((await receive())["type"])

    made = replica(serve.ingress(app)(Holder))
    assert made.body(made.request(b"not read", method="POST")) == b"done"
    poll(lambda: ENDED == ["http.disconnect"])


@pytest.mark.parametrize(
    ("length", "parts", "error"),
    [
        ("3", [b"four"], "longer than Content-Length"),
        ("5", [b"four"], "shorter than Content-Length"),
        ("three", [b"abc"], "Invalid content-length b'three'"),
        ("7", [b"four", b"", b"four"], "longer than Content-Length"),
        ("9", [b"four", b"", b"four"], "shorter than Content-Length"),
    ],
)
def test_bodies_of_a_wrong_length(
    replica: Make, length: str, parts: list[bytes], error: str
) -> None:
    """The app is told, as on any server, and so the log says whose fault it is."""

    class Holder:
        pass

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        headers = [(b"content-length", length.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        *others, last = parts
        for part in others:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": last})

    made = replica(serve.ingress(app)(Holder))
    asked = made.request()
    message = made.caller.wait(asked, ERROR)
    assert error in message[4]
    assert message[2] == (USER_ERROR if len(parts) == 1 else CUT)
    assert made.caller.of(asked, RESPONSE) == []
    assert all(more for _, _, _, more in made.caller.of(asked, CHUNK))


@pytest.mark.parametrize(
    ("name", "taken"),
    [(b"x/odd", True), (b"x-\xe4", True), (b"x odd", False), (b"", False)],
)
def test_names_of_headers_are_those_that_uvicorn_takes(
    replica: Make, name: bytes, taken: bool
) -> None:
    def odd() -> PlainTextResponse:
        response = PlainTextResponse("odd")
        response.raw_headers.append((name, b"1"))
        return response

    made = replica(odd)
    message = made.caller.wait(made.request(), RESPONSE, ERROR)
    assert message[0] == (RESPONSE if taken else ERROR)


@pytest.mark.parametrize(
    ("method", "status"), [("HEAD", 200), ("GET", 304), ("GET", 204)]
)
def test_lengths_of_bodies_that_are_not_sent(
    replica: Make, method: str, status: int
) -> None:
    class Holder:
        pass

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        headers = [(b"content-length", b"5")]
        start = {"type": "http.response.start", "status": status}
        await send({**start, "headers": headers})
        await send({"type": "http.response.body"})

    made = replica(serve.ingress(app)(Holder))
    assert made.body(made.request(method=method)) == b""


def test_cancel_reaches_the_task_and_the_app_sees_a_disconnect(replica: Make) -> None:
    ENDED.clear()

    class Holder:
        pass

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await receive()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            note((await receive())["type"])
            raise

    made = replica(serve.ingress(app)(Holder))
    asked = made.request()
    poll(lambda: made.runner.ongoing == 1)
    made.runner.put(made.caller, [(CANCEL, asked, 1)])
    poll(lambda: made.runner.ongoing == 0)
    assert ENDED == ["http.disconnect"]
    assert made.caller.of(asked) == []


def test_forget_cancels_all_of_one_caller(replica: Make) -> None:
    async def hold() -> None:
        await asyncio.sleep(60)

    made = replica(hold)
    made.request()
    made.call()
    other = Caller()
    made.runner.put(other, [(REQUEST, 1, 1, HEAD, b"", False)])
    poll(lambda: made.runner.ongoing == 3)
    made.runner.forget(made.caller)
    poll(lambda: made.runner.ongoing == 1)
    assert not other.of(1)


def test_reconfigure(replica: Make) -> None:
    config = pickling.dumps({"n": 5}, what="config")
    made = replica(Counter, user_config=config)
    assert made.result(made.call("add", 0)) == 5
    made.runner.reconfigure(pickling.dumps({"n": 7}, what="config"), 2)
    assert made.wait_for("reconfigured") == {
        "event": "reconfigured",
        "generation": 2,
        "error": None,
    }
    assert made.result(made.call("add", 0)) == 7
    made.runner.reconfigure(pickling.dumps("bad", what="config"), 3)
    poll(lambda: made.reports[-1].get("generation") == 3)
    assert "not that" in made.reports[-1]["error"]
    made.runner.reconfigure(None, 4)
    poll(lambda: made.reports[-1].get("generation") == 4)
    assert made.reports[-1]["error"] is None
    assert made.result(made.call("add", 0)) == 7


def test_user_config_without_reconfigure_is_an_error(replica: Make) -> None:
    class Without:
        pass

    config = pickling.dumps({"n": 5}, what="config")
    report = replica(Without, user_config=config).reports[-1]
    assert "has no method reconfigure" in report["text"]


ENDED: list[str] = []


def note(text: str) -> None:
    ENDED.append(text)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_stop_drains_then_runs_hooks_once(replica: Make, kind: str) -> None:
    import contextlib
    import gc

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> Any:
        yield
        note("shutdown")

    class Base:
        async def hold(self) -> str:
            await asyncio.sleep(0.1)
            return "held"

    class Sync(Base):
        def __del__(self) -> None:
            note("del")

    class Async(Base):
        async def __del__(self) -> None:
            await asyncio.sleep(0)
            note("del")

    ENDED.clear()
    app = Starlette(lifespan=lifespan)
    made = replica(serve.ingress(app)(Sync if kind == "sync" else Async))
    held = made.call("hold")
    poll(lambda: made.runner.ongoing == 1)
    made.runner.stop(grace_s=5, poll_s=0.01)
    assert made.result(held) == "held"
    made.wait_for("stopped")
    assert ENDED == ["shutdown", "del"]
    assert made.caller.wait(made.call("hold"))[0] == REFUSED
    gc.collect()
    assert ENDED == ["shutdown", "del"]


def test_stop_ends_what_outlives_the_grace_period(replica: Make) -> None:
    async def hold() -> None:
        await asyncio.sleep(60)

    made = replica(hold)
    asked, called = made.request(), made.call()
    poll(lambda: made.runner.ongoing == 2)
    made.runner.stop(grace_s=0.05, poll_s=0.01)
    made.wait_for("stopped")
    for each in (asked, called):
        message = made.caller.wait(each)
        assert message[:1] + message[2:3] == (ERROR, STOPPED)


def test_abandon_answers_for_code_that_blocks(replica: Make) -> None:
    started, go = threading.Event(), threading.Event()
    _events["started"], _events["go"] = started, go

    async def block() -> None:
        _wait()

    made = replica(block)
    asked = made.request()
    assert started.wait(5)
    made.runner.abandon()
    assert made.caller.wait(asked)[2] == STOPPED
    go.set()


def test_context_is_right_everywhere(replica: Make) -> None:
    class Asks:
        def __init__(self) -> None:
            self.first = serve.get_replica_context()

        def __call__(self, request: Request) -> str:
            return str(serve.get_replica_context().request_id)

        async def on_loop(self) -> Any:
            context = serve.get_replica_context()
            return context.deployment, context.replica_tag, context.request_id

        def same(self) -> bool:
            return serve.get_replica_context().servable_object is self

        def at_first(self) -> Any:
            return self.first.replica_tag, self.first.servable_object

    made = replica(Asks)
    assert made.body(made.request()) == b"id1"
    assert made.result(made.call("on_loop")) == ("D", "D#1", "id2")
    assert made.result(made.call("same")) is True
    assert made.result(made.call("at_first")) == ("D#1", None)
    with pytest.raises(serve.ServeError, match="outside of a replica"):
        serve.get_replica_context()


# Sessions.


async def login(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the headers that the query, or the subprotocols, have."""
    if scope["type"] == "lifespan":
        return
    if scope["type"] == "websocket":
        lines = [line.split("=", 1) for line in scope["subprotocols"]]
        headers = [(name.encode(), value.encode()) for name, value in lines]
        return await send({"type": "websocket.accept", "headers": headers})
    lines = [line.split(b"=", 1) for line in scope["query_string"].split(b"&") if line]
    start = {"type": "http.response.start", "status": 200, "headers": lines}
    await send(start)
    await send({"type": "http.response.body", "body": b"ok"})


@serve.ingress(login)
class Login: ...


class SessionsOf:
    """A replica, and what is asked of it and told."""

    def __init__(self, make: Make, **option: str) -> None:
        self.replica = make(Login, session_affinity=option)
        self.follower = Caller()

    def follow(self) -> None:
        self.replica.runner.put(self.follower, [(FOLLOW, 0, 1)])

    def get(self, makes: bytes = b"", *headers: tuple[bytes, bytes]) -> Any:
        """Send a request; return the response's message."""
        fields = (*HEAD[:3], makes, list(headers), *HEAD[5:])
        return self.replica.caller.wait(
            self.replica.send(REQUEST, fields, b"", False), RESPONSE
        )

    def told(self) -> list[bytes]:
        return [m[3] for m in self.follower.of(0, SESSION)]


def digest(session_id: bytes) -> bytes:
    return Session.of(session_id).digest


def test_sessions_that_an_app_begins_are_told_to_all(replica: Make) -> None:
    made = SessionsOf(replica, header="x-sid")
    made.get(b"X-Sid=a")
    made.get(b"x-sid=b", (b"x-sid", b"b"))  # of a session that it has already
    made.get(b"x-sid=c", (b"x-sid", b"b"))  # as after a login
    # Who asked knows before it has the response.
    caller = made.replica.caller
    assert [m[:1] + m[3:4] for m in caller.messages[:2]] == [
        (SESSION, digest(b"a")),
        (RESPONSE, [(b"x-sid", b"a")]),
    ]
    made.follow()
    poll(lambda: made.told() == [digest(b"a") + digest(b"c")])
    made.get(b"x-sid=d")
    poll(lambda: made.told()[1:] == [digest(b"d")])
    made.replica.runner.forget(made.follower)
    made.get(b"x-sid=e")
    made.get()
    assert len(made.told()) == 2
    assert len(caller.of(0, SESSION)) == 4


def test_the_newest_sessions_are_kept(
    replica: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daskserve.replica.sessions.MAX_TOLD", 2)
    made = SessionsOf(replica, cookie="sid")
    for name in (b"a", b"b", b"c"):
        made.get(b"set-cookie=sid=%s; Path=/" % name)
    made.follow()
    poll(lambda: made.told() == [digest(b"b") + digest(b"c")])


def test_a_cookie_for_clients_that_have_none(replica: Make) -> None:
    made = SessionsOf(replica, cookie="sid")
    (name, line), *more = made.get()[3]
    assert (name, more) == (b"set-cookie", [])
    assert line.startswith(b"sid=serve-1-") and b"; Path=/D; " in line
    pair = line.partition(b";")[0]
    # It names its replica: nobody has to be told.
    assert made.replica.caller.of(0, SESSION) == []
    assert made.get(b"", (b"cookie", pair))[3] == []
    assert made.get(b"", (b"cookie", b"sid=; a=b"))[3][0][1].startswith(b"sid=serve-1-")
    assert made.get(b"set-cookie=sid=mine")[3] == [(b"set-cookie", b"sid=mine")]


def test_sessions_of_websockets(replica: Make) -> None:
    made = SessionsOf(replica, cookie="sid")
    caller = made.replica.caller

    def connect(exchange_id: int, cookie: bytes, *protocols: str) -> Any:
        fields = (*HEAD[:4], [(b"cookie", cookie)], *HEAD[5:], protocols)
        made.replica.runner.put(caller, [(CONNECT, exchange_id, 1, fields)])
        return caller.wait(exchange_id, PUSH)[2]["headers"]

    assert connect(101, b"sid=a") == []
    assert connect(102, b"a=b")[0][1].startswith(b"sid=serve-1-")
    assert connect(103, b"a=b", "Set-Cookie=sid=b") == [(b"set-cookie", b"sid=b")]
    assert [m[3] for m in caller.of(0, SESSION)] == [digest(b"b")]


def test_without_the_option_nothing_is_looked_at(replica: Make) -> None:
    made = replica(Login)
    made.send(FOLLOW)
    fields = (*HEAD[:3], b"set-cookie=sid=a", *HEAD[4:])
    message = made.caller.wait(made.send(REQUEST, fields, b"", False), RESPONSE)
    assert message[3] == [(b"set-cookie", b"sid=a")]
    assert made.caller.of(0, SESSION) == []
    by_query = SessionsOf(replica, query="sid")
    assert by_query.get(b"set-cookie=sid=a")[3] == [(b"set-cookie", b"sid=a")]
    assert by_query.replica.caller.of(0, SESSION) == []


# Clients that go in the middle of a response.


@pytest.mark.parametrize("listens", [True, False])
def test_an_app_may_end_what_nobody_wants_any_more(
    replica: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listens: bool
) -> None:
    monkeypatch.setattr("daskserve.replica.runner.TOLD_S", 0.2)
    how = tmp_path / "how"

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        body = {"type": "http.response.body", "body": b"x", "more_body": True}
        await send(body)
        try:
            if listens:
                assert (await receive())["type"] == "http.disconnect"
            else:
                await asyncio.sleep(10)
            how.write_text("ended")
        except asyncio.CancelledError:
            how.write_text("cancelled")
            raise

    @serve.ingress(stream)
    class App: ...

    made = replica(App)
    number = made.request()
    made.caller.wait(number, CHUNK)
    began = time.monotonic()
    made.send(CANCEL)
    poll(how.exists)
    assert (time.monotonic() - began < 0.15) == listens
    assert how.read_text() == ("ended" if listens else "cancelled")
    poll(lambda: made.runner.ongoing == 0)
    assert made.caller.of(number, ERROR) == []
