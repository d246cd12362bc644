"""Calling deployments from Python, from everywhere that Python runs; end to end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import pickle
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import httpx
import numpy as np
import pytest
from distributed import Client
from fastapi import FastAPI
from starlette.requests import Request

import daskserve as serve
from daskserve.exceptions import (
    DeploymentError,
    DeploymentUnavailableError,
    PicklingError,
    ReplicaDiedError,
    RequestTimeoutError,
)
from tests.utils import ProcessCluster, leftover_threads, poll, run_script

pytestmark = pytest.mark.slow


class RefusedError(Exception):
    """An exception as users write them."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text, code)
        self.code = code


class OddError(Exception):
    """One that pickles and does not load by itself: as many of them are."""

    def __init__(self, name: str, *, code: int) -> None:
        super().__init__(f"{name} is odd ({code})")


def note(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(f"{line}\n")


@serve.deployment(num_replicas=2, version="1")
class Kit:
    def __init__(self) -> None:
        self.inside = 0

    def __call__(self, number: int = 0) -> int:
        return number + 1

    async def add(self, a: int, b: int = 0) -> int:
        await asyncio.sleep(0)
        return a + b

    def echo(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    def nothing(self) -> str:
        return "nothing"

    async def nothing_async(self) -> str:
        return "nothing"

    def fail(self, kind: str) -> None:
        if kind == "builtin":
            raise ValueError("7 is too much")
        if kind == "own":
            raise RefusedError("not today", 7)
        if kind == "odd":
            raise OddError("it", code=7)
        if kind == "unpicklable":
            error = ValueError("has a generator")
            error.generator = (n for n in range(3))  # type: ignore[attr-defined]
            raise error
        if kind == "from unpicklable":
            try:
                self.fail("unpicklable")
            except ValueError as err:
                raise RefusedError("not today", 7) from err
        if kind == "exit":
            raise SystemExit(3)
        raise StopIteration(kind)

    async def fail_async(self, kind: str) -> None:
        self.fail(kind)

    def unpicklable(self) -> object:
        return {"it": (n for n in range(3))}

    async def wait(self, path: Path) -> str:
        note(path, "begin")
        try:
            while not (path.parent / "go").exists():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            note(path, "cancelled")
            raise
        note(path, "end")
        return "went"

    def alone(self) -> int:
        self.inside += 1
        time.sleep(0.005)
        inside = self.inside
        self.inside -= 1
        return inside

    async def where(self) -> Any:
        return self._where()

    def where_sync(self) -> Any:
        return self._where()

    def _where(self) -> Any:
        context = serve.get_replica_context()
        same = context.servable_object is self
        return context.deployment, context.replica_tag, context.request_id, same

    async def read(self, request: Request) -> Any:
        body = (await request.body()).decode()
        query = request.query_params.get("q")
        path, header = request.url.path, request.headers["x-mine"]
        return type(request).__name__, request.method, path, query, header, body

    def _private(self) -> str:
        return "private"

    limit = 5


@pytest.fixture(scope="module")
def cluster() -> Iterator[ProcessCluster]:
    with ProcessCluster(2, nanny=[True, False], nthreads=2) as cluster:
        yield cluster
    assert leftover_threads() == []


@pytest.fixture(scope="module")
def client(cluster: ProcessCluster) -> Iterator[Client]:
    with cluster.client() as client:
        yield client


@pytest.fixture(scope="module")
def url(client: Client) -> Iterator[str]:
    with serve.start(http_options={"port": 0}) as instance:
        Kit.deploy()
        yield instance.http_urls[0]


@pytest.fixture
def kit(url: str) -> Iterator[serve.DeploymentHandle]:
    yield Kit.get_handle()
    for name, deployment in serve.list_deployments().items():
        if name != "Kit":
            deployment.delete()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.touch()
    return path


def wait_for(log: Path, line: str) -> None:
    poll(lambda: line in log.read_text().splitlines())


# The ways to ask for an answer.


def test_remote_and_result(kit: serve.DeploymentHandle) -> None:
    assert kit.remote(1).result(timeout_s=10) == 2
    assert kit.remote(number=2).result(10) == 3
    assert kit.remote().result() == 1
    assert kit.add.remote(1, b=2).result("10s") == 3
    args, kwargs = kit.echo.remote(1, [2, {"a": (3,)}], b=None, c=b"x").result()
    assert args == (1, [2, {"a": (3,)}])
    assert kwargs == {"b": None, "c": b"x"}
    assert kit.nothing.remote().result(10) == "nothing"
    response = kit.remote(5)
    assert response.result(10) == 6
    assert response.result(10) == 6
    assert response.done()
    assert not response.cancelled()
    assert not response.cancel()
    assert "done" in repr(response)
    with pytest.raises(TypeError, match="result"):
        pickle.dumps(response)


def test_await(kit: serve.DeploymentHandle) -> None:
    async def main() -> None:
        assert await kit.remote(1) == 2
        assert await kit.add.remote(1, b=2) == 3
        response = kit.remote(5)
        assert [await response, await response] == [6, 6]
        assert await asyncio.gather(*(kit.remote(n) for n in range(20))) == [
            *range(1, 21)
        ]
        async with asyncio.timeout(10):
            assert await kit.remote(2) == 3

    for _ in range(4):  # many loops in turn
        asyncio.run(main())


def test_response_outlives_its_loop(kit: serve.DeploymentHandle) -> None:
    async def make() -> serve.DeploymentResponse:
        return kit.remote(1)

    async def wait(response: serve.DeploymentResponse) -> Any:
        return await response

    response = asyncio.run(make())
    assert asyncio.run(wait(response)) == 2
    assert asyncio.run(wait(response)) == 2
    assert response.result(10) == 2


def test_blocking_inside_of_a_loop(kit: serve.DeploymentHandle) -> None:
    async def main() -> Any:
        return kit.remote(1).result(timeout_s=10)

    assert asyncio.run(main()) == 2


def test_awaited_by_several(kit: serve.DeploymentHandle, log: Path) -> None:
    async def wait(response: serve.DeploymentResponse) -> Any:
        return await response

    async def main() -> None:
        response = kit.wait.remote(log)
        tasks = [asyncio.ensure_future(wait(response)) for _ in range(3)]
        await asyncio.to_thread(wait_for, log, "begin")
        # One of them does not want it any more: the others still do.
        tasks[0].cancel()
        assert isinstance(
            (await asyncio.gather(tasks[0], return_exceptions=True))[0],
            asyncio.CancelledError,
        )
        (log.parent / "go").touch()
        async with asyncio.timeout(10):
            assert await asyncio.gather(*tasks[1:]) == ["went"] * 2

    asyncio.run(main())
    assert log.read_text() == "begin\nend\n"


def test_many_at_a_time(kit: serve.DeploymentHandle) -> None:
    responses = [kit.add.remote(n, b=1000) for n in range(500)]
    assert [r.result(timeout_s=30) for r in responses] == [n + 1000 for n in range(500)]

    async def main() -> list[int]:
        return list(await asyncio.gather(*(kit.remote(n) for n in range(500))))

    assert asyncio.run(main()) == [n + 1 for n in range(500)]


def test_threads(kit: serve.DeploymentHandle) -> None:
    def call(number: int) -> Any:
        return kit.add.remote(number, b=1).result(timeout_s=30)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, range(200))) == [n + 1 for n in range(200)]


def test_timeout(kit: serve.DeploymentHandle, log: Path) -> None:
    response = kit.wait.remote(log)
    wait_for(log, "begin")
    begin = time.monotonic()
    with pytest.raises(RequestTimeoutError, match=r"0\.2 s") as caught:
        response.result(timeout_s=0.2)
    assert time.monotonic() - begin < 2
    assert isinstance(caught.value, TimeoutError)
    assert not response.done()
    assert "pending" in repr(response)
    with pytest.raises(TimeoutError):
        response.result(timeout_s=0)
    (log.parent / "go").touch()
    assert response.result(timeout_s=10) == "went"
    assert log.read_text() == "begin\nend\n"


def test_cancel(kit: serve.DeploymentHandle, log: Path) -> None:
    response = kit.wait.remote(log)
    wait_for(log, "begin")
    assert response.cancel()
    assert response.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        response.result(timeout_s=5)
    wait_for(log, "cancelled")
    assert kit.remote(1).result(timeout_s=10) == 2


def test_cancelled_task(kit: serve.DeploymentHandle, log: Path) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5) as limit:

                async def hurry() -> None:
                    await asyncio.to_thread(wait_for, log, "begin")
                    limit.reschedule(0)

                hurrying = asyncio.ensure_future(hurry())
                await kit.wait.remote(log)
        await hurrying

    asyncio.run(main())
    wait_for(log, "cancelled")


# Handles as values.


def test_handles_are_values(kit: serve.DeploymentHandle) -> None:
    assert kit == Kit.get_handle() == serve.get_deployment("Kit").get_handle()
    assert hash(kit) == hash(Kit.get_handle())
    assert kit.add == kit.options(method_name="add")
    assert kit.add != kit
    assert kit != "Kit"
    assert kit != Kit.options(name="Other").get_handle()
    assert len({kit, Kit.get_handle(), kit.add, kit.add}) == 2
    assert kit.deployment_name == "Kit"
    assert "Kit" in repr(kit)
    for dump in (pickle, cloudpickle):
        for handle in (kit, kit.add):
            copy = pickle.loads(dump.dumps(handle))
            assert copy == handle
            assert hash(copy) == hash(handle)
    assert pickle.loads(pickle.dumps(kit.add)).remote(1, 2).result(timeout_s=10) == 3


def test_options_do_not_leak(kit: serve.DeploymentHandle) -> None:
    add = kit.options(method_name="add")
    nothing = add.options(method_name="nothing")
    assert add.remote(1, 2).result(timeout_s=10) == 3
    assert nothing.remote().result(timeout_s=10) == "nothing"
    assert add.nothing.remote().result(timeout_s=10) == "nothing"
    assert kit.add.options().remote(1, 2).result(timeout_s=10) == 3
    assert kit.remote(1).result(timeout_s=10) == 2
    assert add.remote(1, 2).result(timeout_s=10) == 3
    with pytest.raises(TypeError, match="method_name"):
        kit.options(method_name=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        kit.options(no_such=3)  # type: ignore[call-arg]


def test_other_process(cluster: ProcessCluster, kit: serve.DeploymentHandle) -> None:
    script = f"""
        import pickle
        from dask.distributed import Client
        import daskserve as serve

        handle = pickle.loads({pickle.dumps(kit.add)!r})
        with Client({cluster.address!r}):
            assert handle.remote(1, 2).result(timeout_s=10) == 3
            found = serve.get_deployment("Kit").get_handle()
            assert found.remote(4).result(timeout_s=10) == 5
        """
    run_script(textwrap.dedent(script))


def test_valid_across_redeploys(kit: serve.DeploymentHandle) -> None:
    @serve.deployment
    class Renewed:
        def __init__(self, number: int) -> None:
            self.number = number

        def __call__(self) -> int:
            return self.number

    Renewed.deploy(0)
    handle = Renewed.get_handle()
    stop = threading.Event()
    seen: list[int] = []

    def call() -> None:
        while not stop.is_set():
            seen.append(handle.remote().result(timeout_s=10))

    with ThreadPoolExecutor(1) as pool:
        calling = pool.submit(call)
        try:
            for number in range(1, 8):
                Renewed.deploy(number)
                # It knows when deploy() returns.
                assert handle.remote().result(timeout_s=10) == number
        finally:
            stop.set()
        calling.result(10)
    assert seen == sorted(seen)
    Renewed.delete()
    with pytest.raises(DeploymentUnavailableError):
        handle.remote().result(timeout_s=10)
    Renewed.deploy(100)
    assert handle.remote().result(timeout_s=10) == 100


def test_deleted_and_unknown(kit: serve.DeploymentHandle) -> None:
    @serve.deployment
    def going() -> str:
        return "here"

    going.deploy()
    handle = going.get_handle()
    assert handle.remote().result(timeout_s=10) == "here"
    going.delete()
    unknown = going.options(name="never-was").get_handle()
    begin = time.monotonic()
    for gone, name in [(handle, "going"), (unknown, "never-was")]:
        response = gone.remote()  # it fails in the result
        with pytest.raises(DeploymentUnavailableError, match=name):
            response.result(timeout_s=10)
    assert time.monotonic() - begin < 1


# What goes wrong.


def test_unknown_method(kit: serve.DeploymentHandle) -> None:
    response = kit.no_such.remote(1)
    with pytest.raises(AttributeError) as caught:
        response.result(timeout_s=10)
    text = str(caught.value)
    for name in ["'Kit'", "'no_such'", "'add'", "'echo'", "'__call__'"]:
        assert name in text
    assert "_private" not in text
    with pytest.raises(AttributeError, match="'limit'"):
        kit.limit.remote().result(timeout_s=10)

    async def main() -> None:
        with pytest.raises(AttributeError, match="no_such"):
            await kit.no_such.remote()

    asyncio.run(main())


@pytest.mark.parametrize("method", ["fail", "fail_async"])
def test_exceptions_arrive_as_themselves(
    kit: serve.DeploymentHandle, method: str
) -> None:
    call = kit.options(method_name=method)
    for _ in range(2):
        with pytest.raises(ValueError, match="7 is too much") as caught:
            call.remote("builtin").result(timeout_s=10)
        assert caught.value.args == ("7 is too much",)
        text = "".join(traceback.format_exception(caught.value))
        assert text.count("Traceback") == 1
        assert text.count(f"in {method}") == 1
        assert text.count('raise ValueError("7 is too much")') == 1
        assert "daskserve/replica" not in text
    with pytest.raises(RefusedError) as refused:
        call.remote("own").result(timeout_s=10)
    assert (refused.value.args, refused.value.code) == (("not today", 7), 7)
    with pytest.raises(RefusedError) as refused:
        call.remote("from unpicklable").result(timeout_s=10)
    assert (refused.value.args, refused.value.code) == (("not today", 7), 7)
    [note] = refused.value.__notes__  # what it was raised from cannot travel
    assert "direct cause" in note and "ValueError: has a generator" in note
    with pytest.raises(OddError, match=r"it is odd \(7\)"):
        call.remote("odd").result(timeout_s=10)

    async def main() -> None:
        response = call.remote("own")
        for _ in range(2):
            with pytest.raises(RefusedError):
                await response

    asyncio.run(main())


@pytest.mark.parametrize(
    ("kind", "type_name", "text"),
    [
        ("unpicklable", "ValueError", "has a generator"),
        ("exit", "SystemExit", "3"),
    ],
)
def test_exceptions_that_cannot_travel(
    kit: serve.DeploymentHandle, kind: str, type_name: str, text: str
) -> None:
    for call in (kit.fail, kit.fail_async):
        with pytest.raises(DeploymentError) as caught:
            call.remote(kind).result(timeout_s=10)
        assert caught.value.type_name == type_name
        assert caught.value.text == text
        assert "Traceback" in caught.value.traceback
        assert text in str(caught.value)
        copy = pickle.loads(pickle.dumps(caught.value))
        assert str(copy) == str(caught.value)
    assert kit.remote(1).result(timeout_s=10) == 2


def test_stop_iteration(kit: serve.DeploymentHandle) -> None:
    for call in (kit.fail, kit.fail_async):
        with pytest.raises(RuntimeError, match="StopIteration"):
            call.remote("stop").result(timeout_s=10)


def test_result_that_cannot_travel(kit: serve.DeploymentHandle) -> None:
    with pytest.raises(Exception, match=r"result of Kit\.unpicklable.*generator"):
        kit.unpicklable.remote().result(timeout_s=10)


def test_argument_that_cannot_travel(kit: serve.DeploymentHandle) -> None:
    with pytest.raises(PicklingError, match=r"argument of Kit\.echo.*generator"):
        kit.echo.remote(1, {"it": (n for n in range(3))})


def test_wrong_arguments(kit: serve.DeploymentHandle) -> None:
    with pytest.raises(TypeError, match="add"):
        kit.add.remote(1, 2, 3).result(timeout_s=10)
    with pytest.raises(TypeError, match="nope"):
        kit.add.remote(1, nope=3).result(timeout_s=10)


# From where handles work.


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_in_constructors_and_requests(
    kit: serve.DeploymentHandle, url: str, kind: str
) -> None:
    class Sync:
        def __init__(self, handle: serve.DeploymentHandle) -> None:
            self.handle = handle
            self.base = handle.remote(9).result(timeout_s=10)

        def __call__(self, request: Request) -> list[int]:
            number = int(request.query_params["n"])
            return [self.base, self.handle.remote(number).result(timeout_s=10)]

        def same(self) -> bool:
            return bool(self.handle == serve.get_deployment("Kit").get_handle())

    class Async:
        async def __init__(self, handle: serve.DeploymentHandle) -> None:
            self.handle = handle
            self.base = await handle.remote(9)

        async def __call__(self, request: Request) -> list[int]:
            number = int(request.query_params["n"])
            return [self.base, await self.handle.remote(number)]

        async def same(self) -> bool:
            return bool(self.handle == serve.get_deployment("Kit").get_handle())

    front = serve.deployment(name="front", num_replicas=2)(
        Sync if kind == "sync" else Async
    )
    front.deploy(kit)
    with httpx.Client(timeout=20) as http:
        for number in range(20):
            reply = http.get(f"{url}/front", params={"n": number})
            assert (reply.status_code, reply.json()) == (200, [10, number + 1])
    assert front.get_handle().same.remote().result(timeout_s=10) is True


def test_blocking_in_async_user_code(kit: serve.DeploymentHandle) -> None:
    @serve.deployment
    class Blocks:
        async def __init__(self) -> None:
            self.base = kit_handle().remote(1).result(timeout_s=10)

        async def __call__(self) -> Any:
            return self.base, kit_handle().remote(2).result(timeout_s=10)

    def kit_handle() -> serve.DeploymentHandle:
        return serve.get_deployment("Kit").get_handle()

    Blocks.deploy()
    assert Blocks.get_handle().remote().result(timeout_s=10) == (2, 3)


def test_calling_itself(kit: serve.DeploymentHandle) -> None:
    @serve.deployment
    class Factorial:
        async def __call__(self, number: int) -> int:
            if number == 0:
                return 1
            handle = serve.get_deployment("Factorial").get_handle()
            return number * await handle.remote(number - 1)

    Factorial.deploy()
    assert Factorial.get_handle().remote(6).result(timeout_s=10) == 720


class Narcissus:
    def look(self, method: str = "see") -> Any:
        handle = serve.get_deployment("Narcissus").get_handle()
        return handle.options(method_name=method).remote().result()

    def send_only(self) -> str:
        serve.get_deployment("Narcissus").get_handle().see.remote()
        return "sent"

    def see(self) -> str:
        return "himself"


class AsyncNarcissus(Narcissus):
    async def see_async(self) -> str:
        return "nobody"


@pytest.mark.parametrize("cls", [Narcissus, AsyncNarcissus])
def test_waiting_for_oneself(kit: serve.DeploymentHandle, cls: type) -> None:
    deployed = serve.deployment(cls, name="Narcissus", route_prefix=None)
    deployed.deploy()
    handle = deployed.get_handle()
    assert handle.send_only.remote().result(timeout_s=10) == "sent"
    with pytest.raises(RuntimeError, match=r"one thread, which .* have to run see\(\)"):
        handle.look.remote().result(timeout_s=10)
    with pytest.raises(AttributeError, match="no method 'hear'"):
        handle.look.remote("hear").result(timeout_s=10)
    if cls is AsyncNarcissus:
        answer = handle.look.remote("see_async").result(timeout_s=10)
        assert answer == "nobody"  # it runs on the loop meanwhile
    deployed.delete()


def test_waiting_for_another_replica(kit: serve.DeploymentHandle) -> None:
    deployed = serve.deployment(Narcissus, route_prefix=None, num_replicas=2)
    deployed.deploy()
    response = deployed.get_handle().look.remote()
    assert response.result(timeout_s=10) == "himself"
    deployed.delete()


def test_pending_calls_of_a_client_that_closes(
    kit: serve.DeploymentHandle, cluster: ProcessCluster, log: Path
) -> None:
    with cluster.client() as other, other.as_current():
        response = Kit.get_handle().wait.remote(log)
        wait_for(log, "begin")
    with pytest.raises(ReplicaDiedError, match="client that the call was made by"):
        response.result(timeout_s=10)
    wait_for(log, "cancelled")


def say_what_happens(function: Callable[[], Any]) -> str:
    """Call a function in a forked child, and return its result or error as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = repr(function())
        except BaseException as err:
            text = f"{type(err).__name__}: {err}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_in_a_forked_child(kit: serve.DeploymentHandle, log: Path) -> None:
    pending = kit.wait.remote(log)
    wait_for(log, "begin")
    said = "ServeNotRunningError: this process is a forked child"
    for attempt in (
        lambda: kit.remote(1).result(timeout_s=5),
        lambda: pending.result(timeout_s=5),
        serve.list_deployments,
    ):
        assert say_what_happens(attempt).startswith(said)
    (log.parent / "go").touch()
    assert pending.result(timeout_s=10) == "went"  # here all is as it was


def test_in_tasks(kit: serve.DeploymentHandle, client: Client) -> None:
    def sync_task(handle: serve.DeploymentHandle, number: int) -> Any:
        return handle.remote(number).result(timeout_s=10)

    async def async_task(handle: serve.DeploymentHandle, number: int) -> Any:
        return await handle.remote(number)

    def own_task(number: int) -> Any:
        handle = serve.get_deployment("Kit").get_handle()
        return handle.remote(number).result(timeout_s=10)

    for task, args in [(sync_task, [kit] * 20), (async_task, [kit] * 20)]:
        futures = client.map(task, args, range(20), pure=False)
        assert client.gather(futures) == [*range(1, 21)]
    futures = client.map(own_task, range(10), pure=False)
    assert client.gather(futures) == [*range(1, 11)]


def test_in_another_thread_of_a_replica(kit: serve.DeploymentHandle) -> None:
    @serve.deployment
    def threaded() -> Any:
        found: list[Any] = []

        def work() -> None:
            found.append(serve.get_deployment("Kit").get_handle().remote(1).result(10))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(10)
        return found

    threaded.deploy()
    assert threaded.get_handle().remote().result(timeout_s=15) == [2]


# What arguments turn into.


def test_dask_futures(kit: serve.DeploymentHandle, client: Client) -> None:
    def slowly(number: int) -> int:
        time.sleep(0.2)
        return number

    future = client.submit(slowly, 41, pure=False)
    assert kit.remote(future).result(timeout_s=10) == 42
    for number in range(10):  # which the scheduler may not even have heard of yet
        fresh = client.submit(lambda n: n, number, pure=False)
        assert kit.remote(fresh).result(timeout_s=10) == number + 1
    args, kwargs = kit.echo.remote(
        future, [{"deep": (future, 1)}], key={"a": future}
    ).result(timeout_s=10)
    assert args == (41, [{"deep": (41, 1)}])
    assert kwargs == {"key": {"a": 41}}

    array = client.submit(np.arange, 500_000)
    [[got], _] = kit.echo.remote(array).result(timeout_s=10)
    assert (got == np.arange(500_000)).all()

    # The only one who holds it is the call.
    assert kit.remote(client.submit(slowly, 1, pure=False)).result(timeout_s=10) == 2

    async def main() -> Any:
        return await kit.add.remote(client.submit(slowly, 1, pure=False), b=future)

    assert asyncio.run(main()) == 42


def test_dask_futures_that_failed(kit: serve.DeploymentHandle, client: Client) -> None:
    def divide(number: int) -> float:
        return number / 0

    failed = client.submit(divide, 1, pure=False)
    with pytest.raises(ZeroDivisionError):
        kit.remote(failed).result(timeout_s=10)
    with pytest.raises(ZeroDivisionError):
        kit.echo.remote([{"deep": failed}]).result(timeout_s=10)
    cancelled = client.submit(divide, 2, pure=False)
    cancelled.cancel()
    begin = time.monotonic()
    with pytest.raises((concurrent.futures.CancelledError, Exception)) as caught:
        kit.remote(cancelled).result(timeout_s=20)
    assert not isinstance(caught.value, TimeoutError)
    assert time.monotonic() - begin < 15
    assert kit.remote(1).result(timeout_s=10) == 2


def test_dask_future_in_a_replica(kit: serve.DeploymentHandle, client: Client) -> None:
    @serve.deployment
    class Forward:
        async def __init__(self, handle: serve.DeploymentHandle) -> None:
            self.handle = handle

        async def __call__(self, number: int) -> Any:
            from distributed import get_client

            future = get_client().submit(lambda n: n * 2, number, pure=False)
            return await self.handle.remote(future)

    Forward.deploy(kit)
    assert Forward.get_handle().remote(20).result(timeout_s=15) == 41


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_request_passed_on(kit: serve.DeploymentHandle, url: str, kind: str) -> None:
    @serve.deployment(name="front")
    def sync_front(request: Request) -> Any:
        return Kit.get_handle().read.remote(request).result(timeout_s=10)

    @serve.deployment(name="front")
    async def async_front(request: Request) -> Any:
        if "read" in request.query_params:
            await request.body()
        return await Kit.get_handle().read.remote(request)

    (sync_front if kind == "sync" else async_front).deploy()
    for body in ["", "small", "x" * 3_000_000]:
        reply = httpx.post(
            f"{url}/front/sub?q=1", content=body, headers={"x-mine": "yes"}
        )
        assert reply.status_code == 200, reply.text
        expected = ["Request", "POST", "/front/sub", "1", "yes", body]
        assert reply.json() == expected
    if kind == "async":
        reply = httpx.post(
            f"{url}/front?read", content="read before", headers={"x-mine": "yes"}
        )
        assert reply.json()[-1] == "read before"


def test_arguments_that_are_not_taken(kit: serve.DeploymentHandle) -> None:
    @serve.deployment
    def empty() -> str:
        return "empty"

    @serve.deployment
    async def empty_async() -> str:
        return "empty"

    empty.deploy()
    empty_async.deploy()
    for handle in (empty.get_handle(), empty_async.get_handle()):
        assert handle.remote().result(timeout_s=10) == "empty"
        assert httpx.get(
            f"{serve.get_deployment(handle.deployment_name).url}"
        ).text == (
            "empty"  # only HTTP's request may be left out
        )
        with pytest.raises(TypeError, match="takes 0 positional arguments but 1 was"):
            handle.remote("given").result(timeout_s=10)
    for handle in (kit.nothing, kit.nothing_async):
        assert handle.remote().result(timeout_s=10) == "nothing"
        with pytest.raises(TypeError, match="positional argument"):
            handle.remote("given").result(timeout_s=10)
        with pytest.raises(TypeError, match="'threshold'"):
            handle.remote(threshold=0.5).result(timeout_s=10)


# What runs in the replica.


def test_sync_methods_run_one_at_a_time(kit: serve.DeploymentHandle) -> None:
    responses = [kit.alone.remote() for _ in range(100)]
    assert {response.result(timeout_s=20) for response in responses} == {1}


def test_async_methods_run_together(kit: serve.DeploymentHandle, log: Path) -> None:
    responses = [kit.wait.remote(log) for _ in range(50)]
    poll(lambda: log.read_text().count("begin") == 50)
    # Sync ones run beside them.
    assert kit.remote(1).result(timeout_s=10) == 2
    (log.parent / "go").touch()
    assert {response.result(timeout_s=10) for response in responses} == {"went"}


def test_replica_context(kit: serve.DeploymentHandle) -> None:
    replicas = serve.status().deployments["Kit"].replicas
    tags = {replica.replica_tag for replica in replicas}
    for call in (kit.where, kit.where_sync):
        found: set[str] = set()
        deadline = time.monotonic() + 20
        # One that is slow for a moment gets nothing of so little work.
        while found != tags:
            assert time.monotonic() < deadline, found
            for response in [call.remote() for _ in range(40)]:
                deployment, tag, _, is_self = response.result(timeout_s=10)
                assert (deployment, is_self) == ("Kit", True)
                found.add(tag)


def test_replica_context_in_an_app(kit: serve.DeploymentHandle, url: str) -> None:
    replicas = serve.status().deployments["Kit"].replicas
    tags = {replica.replica_tag for replica in replicas}
    app = FastAPI()

    @serve.deployment(num_replicas=2, route_prefix="/ctx")
    @serve.ingress(app)
    class Context:
        def __init__(self, kit: serve.DeploymentHandle) -> None:
            self.kit = kit
            self.first = serve.get_replica_context()

        def where(self) -> list[Any]:
            context = serve.get_replica_context()
            assert context.servable_object is self
            assert self.first.replica_tag == context.replica_tag
            assert self.first.deployment == "Context"
            return [context.deployment, context.replica_tag, context.request_id]

        @app.get("/async")
        async def in_loop(self) -> list[Any]:
            return self.where()

        @app.get("/sync")
        def in_pool(self) -> list[Any]:
            return self.where()

        @app.get("/called/async")
        async def called(self) -> list[Any]:
            return list(await self.kit.where.remote())

        @app.get("/called/sync")
        def called_sync(self) -> list[Any]:
            return list(self.kit.where_sync.remote().result(timeout_s=10))

    Context.deploy(kit)
    replicas = serve.status().deployments["Context"].replicas
    own = {replica.replica_tag for replica in replicas}
    with httpx.Client(timeout=20) as http:

        def ask(path: str, number: int) -> list[Any]:
            headers = {"x-request-id": f"mine-{number}"}
            reply = http.get(f"{url}/ctx{path}", headers=headers)
            assert reply.status_code == 200, reply.text
            return list(reply.json())

        with ThreadPoolExecutor(4) as pool:
            for path in ["/async", "/sync"]:
                for number, answer in enumerate(
                    pool.map(ask, [path] * 40, range(40)),
                ):
                    assert answer[0] == "Context"
                    assert answer[1] in own
                    assert answer[2] == f"mine-{number}"
            # The id goes along with what a request calls.
            for path in ["/called/async", "/called/sync"]:
                for number, answer in enumerate(
                    pool.map(ask, [path] * 10, range(10)),
                ):
                    assert answer[0] == "Kit"
                    assert answer[1] in tags
                    assert answer[2] == f"mine-{number}"


def test_no_replica_context() -> None:
    with pytest.raises(serve.ServeError, match="outside of a replica"):
        serve.get_replica_context()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_client_that_goes_cancels_what_was_called(
    kit: serve.DeploymentHandle, url: str, log: Path, kind: str
) -> None:
    @serve.deployment(name="front")
    async def async_front(request: Request) -> Any:
        return await Kit.get_handle().wait.remote(log)

    @serve.deployment(name="front")
    def sync_front(request: Request) -> Any:
        return Kit.get_handle().wait.remote(log).result()

    (sync_front if kind == "sync" else async_front).deploy()
    with httpx.Client(timeout=httpx.Timeout(20, read=0.5)) as http:
        with pytest.raises(httpx.ReadTimeout):
            http.get(f"{url}/front")
    assert "begin" in log.read_text()
    wait_for(log, "cancelled")
