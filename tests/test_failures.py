"""Workers that die or stop, user code that misbehaves; what clients see meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import distributed
import fastapi
import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import StreamingResponse

import daskserve as serve
from daskserve.exceptions import DeploymentFailedError
from tests.test_http import (
    LOGGED,
    Gate,
    Notes,
    Site,
    near_and_far,
    open_site,
    send_request,
)
from tests.utils import Process, ProcessCluster, poll, scheduler_workers


class Sites:
    """One site after the other: a new one when a test has spoiled the last."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._site: Site | None = None

    def get(self) -> Site:
        if self._site is None:
            self._site = self._stack.enter_context(open_site())
        return self._site

    def close(self) -> None:
        self._site = None
        self._stack.close()


@pytest.fixture(scope="module")
def sites() -> Iterator[Sites]:
    sites = Sites()
    yield sites
    sites.close()


@pytest.fixture
def site(sites: Sites) -> Iterator[Site]:
    """Give an instance whose workers are to survive the test."""
    site = sites.get()
    pids = site.client.run(os.getpid)
    yield site
    try:
        site.clean()
        assert site.client.run(os.getpid) == pids
    except BaseException:
        sites.close()
        raise


@pytest.fixture
def notes(tmp_path: Any) -> Notes:
    return Notes(tmp_path / "notes")


@pytest.fixture
def gate(tmp_path: Any) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


def processes(site: Site) -> dict[str, Process]:
    """Return the processes of the workers, which have no nanny, by address."""
    pids = site.client.run(os.getpid)
    by_pid = {process.pid: process for process in site.cluster.workers}
    return {address: by_pid[pid] for address, pid in pids.items()}


def workers_of(deployment: serve.Deployment) -> set[str]:
    """Return the addresses where replicas run."""
    status = serve.status().deployments[deployment.name]
    return {
        replica.worker
        for replica in status.replicas
        if replica.state == "RUNNING" and replica.worker is not None
    }


class Storm:
    """Requests one after the other, in some threads, until the end of a with block."""

    def __init__(self, url: str, n_threads: int = 4) -> None:
        self.statuses: list[int] = []
        self.errors: list[Exception] = []
        self._url = url
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(n_threads)]

    def _run(self) -> None:
        with httpx.Client(timeout=30) as client:
            while not self._end.is_set():
                try:
                    self.statuses.append(client.get(self._url).status_code)
                except httpx.HTTPError as err:
                    self.errors.append(err)

    def __enter__(self) -> Storm:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(40)
            assert not thread.is_alive()

    def wait(self, more: int) -> None:
        """Wait for so many more answers."""
        count = len(self.statuses) + more
        poll(lambda: len(self.statuses) >= count, 20)


class Short:
    """Takes a moment for each request."""

    async def __call__(self) -> str:
        await asyncio.sleep(0.01)
        return "ok"


# Workers that die.


@pytest.mark.long
def test_killed_worker_and_requests_that_can_be_repeated() -> None:
    with open_site(4) as site:
        others = sorted(set(processes(site)) - {site.near})
        deployment = site.make(Short, num_replicas=2, workers=others)
        deployment.deploy()
        before = workers_of(deployment)
        assert len(before) == 2
        victim = min(before)
        with Storm(site.at(deployment)) as storm:
            storm.wait(50)
            began = time.monotonic()
            site.cluster.kill(processes(site)[victim])
            storm.wait(50)
            poll(lambda: len(workers_of(deployment) - {victim}) == 2, 10)
            assert time.monotonic() - began < 10
            storm.wait(50)
        assert storm.errors == []
        assert set(storm.statuses) == {200}
        assert workers_of(deployment) == set(others) - {victim}
        deaths = serve.status().deployments[deployment.name].deaths
        assert [death.worker for death in deaths] == [victim]


def test_killed_worker_with_requests_in_it(gate: Gate, notes: Notes) -> None:
    class Held:
        async def __call__(self, request: Request) -> str:
            notes.add(f"{request.method} {os.getpid()}")
            await gate.wait()
            return "held"

    with open_site(3) as site, ThreadPoolExecutor(24) as pool:
        others = sorted(set(processes(site)) - {site.near})
        deployment = site.make(Held, num_replicas=2, workers=others)
        deployment.deploy()

        def ask(method: str) -> int:
            url = site.at(deployment)
            return httpx.request(method, url, timeout=30).status_code

        posts = [pool.submit(ask, "POST") for _ in range(12)]
        gets = [pool.submit(ask, "GET") for _ in range(12)]
        poll(lambda: len(notes.read()) == 24)
        victim = processes(site)[others[0]]
        lost = [line.split()[0] for line in notes.read() if str(victim.pid) in line]
        assert lost.count("POST") > 0
        assert lost.count("GET") > 0
        site.cluster.kill(victim)

        def ended(jobs: list[Future[int]]) -> list[int]:
            return [job.result() for job in jobs if job.done()]

        # The others still wait, for the gate is closed.
        poll(lambda: ended(posts) == [502] * lost.count("POST"))
        # What can be repeated went to the replica that is left.
        poll(lambda: len(notes.read()) == 24 + lost.count("GET"))
        assert ended(gets) == []
        gate.open()
        answers = [job.result() for job in posts]
        assert answers.count(502) == lost.count("POST")
        assert answers.count(200) == 12 - lost.count("POST")
        assert [job.result() for job in gets] == [200] * 12


def test_killed_worker_in_mid_response(notes: Notes) -> None:
    async def endless() -> Any:
        while True:
            yield "x"
            await asyncio.sleep(0.01)

    with open_site(3) as site:
        deployment = site.deploy(endless, where="far")
        with pytest.raises(httpx.RemoteProtocolError):
            with httpx.stream("GET", site.at(deployment), timeout=10) as response:
                for number, _ in enumerate(response.iter_raw()):
                    if number == 3:
                        site.cluster.kill(processes(site)[site.far])


def test_killed_worker_with_the_proxy() -> None:
    with open_site(3) as site:
        far = site.deploy(Short, num_replicas=2)
        url = site.url

        def answers() -> bool:
            try:
                return httpx.get(site_url, timeout=5).status_code == 200
            except httpx.HTTPError:
                return False

        site_url = url + f"/{far.name}"
        assert answers()
        killed = site.near
        site.cluster.kill(processes(site)[killed])
        poll(answers, 15)
        (proxy,) = poll(lambda: [p for p in serve.status().proxies if p.url], 10)
        assert proxy.worker != killed
        assert proxy.url == url
        assert httpx.get(url + "/-/routes").json() == {f"/{far.name}": far.name}


def count_actors(dask_scheduler: distributed.Scheduler) -> int:
    return sum(task.actor for task in dask_scheduler.tasks.values())


@pytest.mark.long
def test_client_restart() -> None:
    class Tag:
        def __call__(self) -> str:
            return serve.get_replica_context().replica_tag

    with ProcessCluster(2, nanny=True, env=LOGGED) as cluster:
        with open_site(cluster=cluster) as site:
            deployments = [site.deploy(Tag, num_replicas=n) for n in (1, 2)]
            url = site.url

            def tag(deployment: serve.Deployment) -> str | None:
                try:
                    answer = httpx.get(f"{url}/{deployment.name}", timeout=10)
                except httpx.HTTPError:
                    return None
                return answer.text if answer.status_code == 200 else None

            before = [tag(deployment) for deployment in deployments]
            assert None not in before
            site.client.restart()
            after = [poll(lambda d=d: tag(d), 20) for d in deployments]
            assert set(before).isdisjoint(after)

            def healthy() -> bool:
                found = serve.status().deployments.values()
                return [d.running_replicas for d in found] == [1, 2] and all(
                    d.state == "HEALTHY" for d in found
                )

            poll(healthy, 20)
            # It is nobody's fault, though replicas may have been on their way.
            assert "cannot submit" not in cluster.logs()
            assert site.client.run_on_scheduler(count_actors) == 3
            # Who leaves after it waits as ever for others to take over.
            with Storm(site.at(site.deploy(Short, num_replicas=2))) as storm:
                storm.wait(20)
                cluster.terminate(cluster.workers[0])
                storm.wait(20)
            assert storm.errors == []
            assert set(storm.statuses) == {200}


@pytest.mark.long
def test_worker_gone_for_good() -> None:
    with open_site(1) as site:
        magic = ("--resources", "MAGIC=1")
        only = site.cluster.add_worker(*magic)
        site.cluster.wait_for_workers(2)
        deployment = site.deploy(
            Short, resources={"MAGIC": 1}, request_timeout_s=20, num_replicas=1
        )
        url = site.at(deployment)
        assert httpx.get(url).text == "ok"
        site.cluster.kill(only)

        def status() -> Any:
            return serve.status().deployments[deployment.name]

        reason = poll(lambda: status().state == "UNHEALTHY" and status().reason, 10)
        text = reason + str([replica.reason for replica in status().replicas])
        assert "MAGIC" in text
        assert status().running_replicas == 0
        # Requests wait for the time that they are given, and no longer.
        headers = {"x-request-timeout-seconds": "0.5"}
        answer = httpx.get(url, headers=headers)
        assert answer.status_code == 503 and "MAGIC" in answer.text
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(httpx.get, url, timeout=30)
            site.cluster.add_worker(*magic)
            assert waiting.result().text == "ok"
        poll(lambda: status().state == "HEALTHY", 10)


@pytest.mark.long
def test_stopped_worker() -> None:
    """A worker that is there and does not answer: SIGSTOP, then SIGCONT."""
    with open_site(3) as site:
        others = sorted(set(processes(site)) - {site.near})
        deployment = site.make(
            Short,
            num_replicas=2,
            workers=others,
            max_ongoing_requests=3,
            request_timeout_s=1,
        )
        deployment.deploy()
        victim = processes(site)[others[0]]
        victim.send_signal(signal.SIGSTOP)
        try:
            with Storm(site.at(deployment), 6) as storm:
                storm.wait(60)
            assert storm.errors == []
            assert set(storm.statuses) <= {200, 504}
            assert storm.statuses.count(200) > storm.statuses.count(504)
        finally:
            victim.send_signal(signal.SIGCONT)

        def all_well() -> bool:
            statuses = [httpx.get(site.at(deployment)).status_code for _ in range(20)]
            return set(statuses) == {200}

        poll(all_well, 20)
        assert workers_of(deployment)


def test_exit_in_a_handler() -> None:
    def leave(request: Request) -> int:
        if request.method == "POST":
            os._exit(1)
        return os.getpid()

    with open_site(3) as site:
        others = sorted(set(processes(site)) - {site.near})
        deployment = site.make(leave, workers=others)
        deployment.deploy()
        url = site.at(deployment)
        before = httpx.get(url).json()
        gone = [p for p in site.cluster.workers if p.pid == before]
        response = httpx.post(url, timeout=20)
        assert response.status_code == 502
        assert deployment.name in response.text or "worker" in response.text
        gone[0].wait(10)
        site.cluster.workers.remove(gone[0])
        assert httpx.get(url, timeout=20).json() != before


# User code that blocks.


@near_and_far
@pytest.mark.parametrize("kind", ["async", "sync"])
@pytest.mark.long
def test_blocking_handler_stalls_no_neighbour(
    site: Site, where: str, kind: str, notes: Notes
) -> None:
    seconds = 4

    async def block() -> str:
        notes.add("began")
        time.sleep(seconds)  # noqa: ASYNC251
        return "blocked"

    def block_sync() -> str:
        notes.add("began")
        time.sleep(seconds)
        return "blocked"

    target = block if kind == "async" else block_sync
    blocked = site.deploy(target, where=where)
    beside = site.deploy(Short, where=where)
    worker = getattr(site, where)

    def last_seen() -> float:
        info = scheduler_workers(site.client)[worker]
        return float(info["last_seen"])

    with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=5) as client:
        waiting = pool.submit(httpx.get, site.at(blocked), timeout=30)
        notes.wait("began")
        began = time.monotonic()
        seen = last_seen()
        slowest, count = 0.0, 0
        while time.monotonic() - began < seconds - 1:
            for url in (site.at(beside), site.url + "/-/healthz"):
                asked = time.monotonic()
                assert client.get(url).status_code == 200
                slowest = max(slowest, time.monotonic() - asked)
                count += 1
        assert slowest < 1
        assert count > 20
        assert not waiting.done()
        assert last_seen() > seen
        assert waiting.result().text == "blocked"


# User code that raises what is no Exception, or answers nonsense.


class Own(BaseException):
    """Derives from what "except Exception" does not catch."""


ERRORS = [SystemExit, KeyboardInterrupt, StopIteration, asyncio.CancelledError, Own]


def _raisers(error: type[BaseException]) -> dict[str, Any]:
    """Return what raises `error` on POST, and answers "ok" else."""

    def fail(request: Request) -> str:
        if request.method == "POST":
            raise error("on purpose")
        return "ok"

    def function(request: Request) -> str:
        return fail(request)

    async def async_function(request: Request) -> str:
        return fail(request)

    def stream(request: Request) -> Iterator[str]:
        yield fail(request)

    async def async_stream(request: Request) -> Any:
        yield fail(request)

    async def task(request: Request) -> str:
        async def inside() -> str:
            return fail(request)

        return await asyncio.create_task(inside())

    def make_app() -> FastAPI:
        app = FastAPI()

        def sync_route(request) -> str:  # type: ignore[no-untyped-def]
            return fail(request)

        async def async_route(request) -> str:  # type: ignore[no-untyped-def]
            return fail(request)

        sync_route.__annotations__["request"] = Request
        async_route.__annotations__["request"] = Request
        app.api_route("/sync", methods=["GET", "POST"])(sync_route)
        app.api_route("/async", methods=["GET", "POST"])(async_route)
        return app

    @serve.ingress(make_app)
    class SyncRoute: ...

    @serve.ingress(make_app)
    class AsyncRoute: ...

    del make_app
    return {k: v for k, v in locals().items() if k not in ("error", "fail")}


@pytest.mark.parametrize("kind", _raisers(SystemExit))
@pytest.mark.parametrize("error", ERRORS)
def test_raising_what_is_no_exception(
    site: Site, kind: str, error: type[BaseException]
) -> None:
    deployment = site.deploy(_raisers(error)[kind], where="far", request_timeout_s=5)
    path = {"SyncRoute": "/sync", "AsyncRoute": "/async"}.get(kind, "")
    url = site.at(deployment, path)
    for _ in range(2):
        try:
            assert httpx.post(url, timeout=8).status_code == 500
        except httpx.RemoteProtocolError:
            assert "stream" in kind  # the head was sent already
        response = httpx.get(url, timeout=8)
        assert (response.status_code, response.text.strip('"')) == (200, "ok")


@pytest.mark.parametrize("error", ERRORS)
def test_raising_it_in_a_call_through_a_handle(
    site: Site, error: type[BaseException]
) -> None:
    class Raises:
        def sync(self) -> None:
            raise error("on purpose")

        async def not_sync(self) -> None:
            raise error("on purpose")

        def fine(self) -> str:
            return "ok"

    handle = site.deploy(Raises).get_handle()
    for method in ("sync", "not_sync"):
        response = handle.options(method_name=method).remote()
        with pytest.raises(Exception, match="on purpose|StopIteration"):
            response.result(timeout_s=5)
        assert handle.fine.remote().result(timeout_s=5) == "ok"


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
def test_raising_it_in_the_constructor(
    site: Site, error: type[BaseException], is_async: bool
) -> None:
    class Sync:
        def __init__(self) -> None:
            raise error("on purpose")

    class Async:
        async def __init__(self) -> None:  # type: ignore[misc]
            raise error("on purpose")

    deployment = site.make(Async if is_async else Sync, deploy_timeout_s=10)
    with pytest.raises(DeploymentFailedError, match=error.__name__):
        deployment.deploy()


def test_exit_in_a_background_task(site: Site, notes: Notes) -> None:
    def later(error: type[BaseException]) -> None:
        notes.add(error.__name__)
        raise error

    async def later_async(error: type[BaseException]) -> None:
        later(error)

    app = FastAPI()

    @serve.ingress(app)
    class Api:
        @app.post("/{n}/{kind}")
        def post(self, n: int, kind: str, tasks: fastapi.BackgroundTasks) -> str:
            tasks.add_task(later if kind == "sync" else later_async, ERRORS[n])
            return "ok"

        @app.get("/")
        def get(self) -> str:
            return "still here"

    deployment = site.deploy(Api, request_timeout_s=5)
    for number in range(len(ERRORS)):
        for kind in ("sync", "async"):
            url = site.at(deployment, f"/{number}/{kind}")
            assert httpx.post(url, timeout=20).json() == "ok"
            response = httpx.get(site.at(deployment, "/"), timeout=20)
            assert response.json() == "still here"
    poll(lambda: len(notes.read()) == 2 * len(ERRORS))


def test_exit_in_a_task_that_nobody_awaits(site: Site) -> None:
    """The replica's loop may end of it; the deployment does not."""

    async def leave(request: Request) -> str:
        async def inside() -> None:
            raise SystemExit(1)

        if request.method == "POST":
            asyncio.get_running_loop().create_task(inside())
            await asyncio.sleep(30)
        return "ok"

    deployment = site.deploy(leave, request_timeout_s=2)
    url = site.at(deployment)
    assert httpx.get(url).text == "ok"
    assert httpx.post(url, timeout=20).status_code in (500, 502, 504)
    poll(lambda: httpx.get(url, timeout=20).status_code == 200, 15)


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise LookupError("no text")

    __repr__ = __str__


class _Unprintables:
    def __repr__(self) -> str:
        raise LookupError("no text")


def _nonsense() -> dict[str, Any]:
    start = {"type": "http.response.start", "status": 200, "headers": []}
    body = {"type": "http.response.body", "body": b"x"}

    def sends(*events: Any) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                if scope["method"] == "GET":
                    await send(start)
                    await send(body)
                    return
                for event in events:
                    await send(event)

        @serve.ingress(app)
        class Sends: ...

        return Sends

    def returns(make: Any) -> Any:
        def nonsense(request: Request) -> Any:
            return "ok" if request.method == "GET" else make()

        return nonsense

    def unprintable() -> None:
        raise _Unprintable

    def recursive() -> Any:
        found: list[Any] = []
        found.append(found)
        return found

    def endless() -> Any:
        return endless()

    return {
        "nothing": sends(),
        "body first": sends(body),
        "unknown": sends({"type": "nonsense"}),
        "not an event": sends("nonsense"),
        "text for a body": sends(start, {"type": "http.response.body", "body": "x"}),
        "status as text": sends({**start, "status": "200"}, body),
        "headers as text": sends({**start, "headers": [("a", "b")]}, body),
        "header that breaks the line": sends(
            {**start, "headers": [(b"a", b"b\r\nc: d")]}, body
        ),
        "status of no meaning": sends({**start, "status": 99999}, body),
        "class": returns(lambda: Request),
        "unprintable": returns(_Unprintables),
        "unprintable error": returns(unprintable),
        "recursive": returns(recursive),
        "endless": returns(endless),
        "surrogate": returns(lambda: "\ud800"),
        "response with nothing": returns(lambda: StreamingResponse(None)),  # type: ignore[arg-type]
    }


@near_and_far
@pytest.mark.parametrize("kind", _nonsense())
def test_nonsense(site: Site, where: str, kind: str) -> None:
    deployment = site.deploy(_nonsense()[kind], where=where, request_timeout_s=5)
    url = site.at(deployment)
    for _ in range(2):
        try:
            response = httpx.post(url, timeout=20)
        except httpx.RemoteProtocolError:
            assert kind in ("text for a body", "response with nothing")
        else:
            assert response.status_code == 500
            assert response.text == "Internal Server Error"
        assert httpx.get(url, timeout=20).status_code == 200


# Actors.


def test_actor_that_somebody_cancels(site: Site) -> None:
    def actor_keys(dask_scheduler: Any) -> list[Any]:
        return [key for key, task in dask_scheduler.tasks.items() if task.actor]

    class Tag:
        def __call__(self) -> str:
            return serve.get_replica_context().replica_tag

    deployment = site.deploy(Tag)
    url = site.at(deployment)
    before = httpx.get(url).text
    (key,) = site.client.run_on_scheduler(actor_keys)
    future = distributed.Future(key, client=site.client)
    site.client.cancel([future], force=True)
    poll(lambda: httpx.get(url, timeout=20).text != before, 10)
    poll(lambda: serve.status().deployments[deployment.name].state == "HEALTHY", 10)
    assert httpx.get(url).status_code == 200
    assert len(site.client.run_on_scheduler(actor_keys)) == 1


# Nothing is lost count of.


@near_and_far
@pytest.mark.long
def test_all_places_come_back_after_a_storm(site: Site, where: str) -> None:
    class Two:
        def __init__(self) -> None:
            self.inside = 0
            self.most = 0

        async def __call__(self, request: Request) -> Any:
            self.inside += 1
            self.most = max(self.most, self.inside)
            try:
                path = request.url.path
                if path.endswith("/both"):
                    while self.inside < 2:
                        await asyncio.sleep(0.005)
                    await asyncio.sleep(0.05)
                    return self.most
                size = 0
                async for part in request.stream():
                    size += len(part)
                await asyncio.sleep(float(request.query_params.get("s", "0")))
                if path.endswith("/stream"):
                    return StreamingResponse(self._stream())
                return size
            finally:
                self.inside -= 1

        async def _stream(self) -> Any:
            for _ in range(50):
                yield b"x" * 10_000
                await asyncio.sleep(0.001)

    deployment = site.deploy(
        Two, where=where, max_ongoing_requests=2, max_queued_requests=50
    )
    url = site.at(deployment)
    rng = random.Random(where)

    def one(number: int) -> None:
        kind = rng.choice(["abort", "timeout", "stream", "upload", "fine", "broken"])
        try:
            if kind == "abort":
                with send_request(url) as sock:
                    time.sleep(rng.random() * 0.05)
                    assert sock
            elif kind == "timeout":
                headers = {"x-request-timeout-seconds": str(rng.random() * 0.05)}
                httpx.get(f"{url}?s=0.03", headers=headers, timeout=20)
            elif kind == "stream":
                with send_request(url + "/stream") as sock:
                    sock.settimeout(rng.random() * 0.1)
                    sock.recv(1000)
            elif kind == "upload":
                length = "Content-Length: 1000000\r\n"
                data = b"x" * rng.randrange(500_000)
                with send_request(url, "POST", length, data):
                    time.sleep(rng.random() * 0.02)
            elif kind == "broken":
                httpx.get(f"{url}?s=nonsense", timeout=20)
            else:
                httpx.get(f"{url}?s=0.005", timeout=20)
        except (TimeoutError, OSError):
            pass

    with ThreadPoolExecutor(12) as pool:
        for job in [pool.submit(one, number) for number in range(400)]:
            job.result()

    def both() -> bool:
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(httpx.get, f"{url}/both", timeout=20) for _ in range(2)]
            return [job.result().text for job in jobs] == ["2", "2"]

    for _ in range(3):
        assert both()


@near_and_far
def test_all_places_come_back_after_handle_calls(site: Site, where: str) -> None:
    class Two:
        def __init__(self) -> None:
            self.inside = 0

        async def wait(self, seconds: float) -> None:
            await asyncio.sleep(seconds)

        async def both(self) -> str:
            self.inside += 1
            try:
                while self.inside < 2:
                    await asyncio.sleep(0.005)
                await asyncio.sleep(0.05)
            finally:
                self.inside -= 1
            return "both"

    deployment = site.deploy(Two, where=where, max_ongoing_requests=2)
    handle = deployment.get_handle()
    rng = random.Random(where)
    for _ in range(20):
        calls = [handle.wait.remote(rng.random() * 0.02) for _ in range(10)]
        for call in calls:
            if rng.random() < 0.7:
                call.cancel()
        for call in calls:
            if not call.cancelled():
                call.result(timeout_s=10)
    calls = [handle.both.remote() for _ in range(2)]
    assert [call.result(timeout_s=10) for call in calls] == ["both", "both"]


@near_and_far
@pytest.mark.parametrize("by", ["http", "handle"])
@pytest.mark.long
def test_requests_that_end_before_they_begin_hold_no_place(
    site: Site, where: str, by: str, notes: Notes
) -> None:
    """While user code blocks, others arrive in the replica and are cancelled again."""

    class Blocks:
        async def __call__(self) -> str:
            return "ok"

        async def block(self) -> None:
            notes.add("blocking")
            time.sleep(1.5)  # noqa: ASYNC251

    deployment = site.deploy(
        Blocks, where=where, max_ongoing_requests=2, graceful_shutdown_timeout_s=0
    )
    url = site.at(deployment)
    handle = deployment.get_handle()
    for number in range(1, 4):
        blocked = handle.block.remote()
        poll(lambda n=number: len(notes.read()) == n)
        if by == "http":
            headers = {"x-request-timeout-seconds": "0.2"}
            assert httpx.get(url, headers=headers).status_code == 504
        else:
            call = handle.remote()
            with pytest.raises(TimeoutError):
                call.result(timeout_s=0.2)
            call.cancel()
        blocked.result(timeout_s=10)
    headers = {"x-request-timeout-seconds": "3"}
    assert httpx.get(url, headers=headers).status_code == 200
    assert handle.remote().result(timeout_s=3) == "ok"
