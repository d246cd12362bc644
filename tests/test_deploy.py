"""What deploy() and delete() mean, and how an instance begins and ends; end to end."""

from __future__ import annotations

import asyncio
import pickle
import socket
import sys
import textwrap
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import httpx
import pytest
from distributed import Client
from fastapi import FastAPI

import daskserve as serve
from daskserve.exceptions import (
    DeploymentFailedError,
    DeploymentUnavailableError,
    PicklingError,
    ProxyStartError,
    ReplicaDiedError,
    ServeConfigError,
    ServeNotRunningError,
)
from tests.utils import (
    Process,
    ProcessCluster,
    free_port,
    leftover_threads,
    poll,
    run_script,
    scheduler_workers,
)

pytestmark = pytest.mark.slow

HTTP = {"location": "EveryNode", "port": 0}


@pytest.fixture(scope="module")
def cluster() -> Iterator[ProcessCluster]:
    with ProcessCluster(
        3,
        nanny=[True, False, False],
        nthreads=2,
        worker_args=["--resources", "chip=2"],
    ) as cluster:
        yield cluster
    assert leftover_threads() == []


@pytest.fixture(scope="module")
def client(cluster: ProcessCluster) -> Iterator[Client]:
    with cluster.client() as client:
        yield client


@pytest.fixture(scope="module")
def started(client: Client) -> Iterator[serve.ServeInstance]:
    with serve.start(client, http_options=HTTP) as instance:
        yield instance


@pytest.fixture
def instance(started: serve.ServeInstance) -> Iterator[serve.ServeInstance]:
    """Give an instance with nothing in it, and see that nothing stays."""
    yield started
    for deployment in serve.list_deployments().values():
        deployment.delete()
    assert serve.status().deployments == {}


@pytest.fixture
def url(instance: serve.ServeInstance) -> str:
    return instance.http_urls[0]


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "log")


class Log:
    """A file in which code in any process notes what it did."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def __call__(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{line}\n")

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()

    def wait(self, line: str, timeout: float = 10) -> None:
        poll(lambda: line in self.lines(), timeout)


def running(name: str) -> list[Any]:
    replicas = serve.status().deployments[name].replicas
    return [replica for replica in replicas if replica.state == "RUNNING"]


def tags(name: str) -> set[str]:
    return {replica.replica_tag for replica in running(name)}


def fetch(url: str) -> httpx.Response:
    # To load certificates for each plain request takes longer than all the rest.
    return httpx.get(url, timeout=20, verify=False)


def get(url: str) -> tuple[int, str]:
    reply = fetch(url)
    return reply.status_code, reply.text


@contextmanager
def asked_all_along(url: str) -> Iterator[list[tuple[int, str]]]:
    """Ask one after another in a thread; give the list to which answers are added."""
    answers: list[tuple[int, str]] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=20) as http:
            while not stop.is_set():
                reply = http.get(url)
                answers.append((reply.status_code, reply.text))

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(ask)
        try:
            poll(lambda: answers or future.done())
            yield answers
            seen = len(answers)
            poll(lambda: len(answers) > seen + 1 or future.done())
        finally:
            stop.set()
        future.result(30)


@contextmanager
def in_thread(function: Callable[[], Any]) -> Iterator[Any]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(function)


# When deploy() and delete() return.


def test_routes_are_exact(instance: serve.ServeInstance) -> None:
    assert len(instance.http_urls) == 3

    @serve.deployment(route_prefix="/one")
    def one() -> str:
        return "1"

    @serve.deployment(route_prefix="/two")
    def two() -> str:
        return "2"

    with httpx.Client(timeout=20) as http:

        def expect(**names: str) -> None:
            for url in instance.http_urls:
                routes = http.get(f"{url}/-/routes").json()
                assert routes == {f"/{name}": name for name in names}
                for name, text in {"one": None, "two": None, **names}.items():
                    reply = http.get(f"{url}/{name}")
                    assert reply.status_code == (404 if text is None else 200)
                    assert text is None or reply.text == text

        expect()
        two.deploy()
        for _ in range(15):
            one.deploy()
            expect(one="1", two="2")
            one.delete()
            expect(two="2")
        two.delete()
        expect()


def test_routes_are_exact_for_threads(instance: serve.ServeInstance) -> None:
    def deploy_and_ask(number: int) -> None:
        name = f"thread{number}"
        deployment = serve.deployment(name=name)(lambda: number)
        for _ in range(4):
            deployment.deploy()
            for url in instance.http_urls:
                assert fetch(f"{url}/-/routes").json()[f"/{name}"] == name
                assert get(f"{url}/{name}") == (200, str(number))
            deployment.delete()
            for url in instance.http_urls:
                assert f"/{name}" not in fetch(f"{url}/-/routes").json()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(deploy_and_ask, range(4)))


def test_blocks_until_healthy(instance: serve.ServeInstance) -> None:
    @serve.deployment(num_replicas=4)
    class Late:
        def __init__(self) -> None:
            time.sleep(0.5)

        def __call__(self) -> str:
            return serve.get_replica_context().replica_tag

    begin = time.monotonic()
    assert Late.deploy() is None
    took = time.monotonic() - begin
    # Constructors run in parallel, also those of one worker.
    assert 0.5 <= took < 1.6
    status = serve.status().deployments["Late"]
    assert (status.state, status.running_replicas) == ("HEALTHY", 4)
    assert (status.target_replicas, status.reason) == (4, "")
    assert len({replica.worker for replica in status.replicas}) == 3
    for url in instance.http_urls:
        assert get(f"{url}/Late")[1] in tags("Late")


def test_async_constructor(url: str, log: Log) -> None:
    @serve.deployment(num_replicas=2)
    class Async:
        async def __init__(self, text: str, *, end: str) -> None:
            await asyncio.sleep(0.05)
            self.text = text + end

        def __call__(self) -> str:
            return self.text

    Async.deploy("hel", end="lo")
    assert get(f"{url}/Async") == (200, "hello")


# What a deploy() of something that is there does.


def test_without_a_version_it_is_replaced(url: str) -> None:
    @serve.deployment(num_replicas=2)
    class Fresh:
        def __init__(self, text: str) -> None:
            self.text = text

        def __call__(self) -> str:
            return self.text

    Fresh.deploy("a")
    before = tags("Fresh")
    assert len(before) == 2
    with asked_all_along(f"{url}/Fresh") as answers:
        Fresh.deploy("b")
        assert get(f"{url}/Fresh") == (200, "b")
    assert not before & tags("Fresh")
    assert set(answers) == {(200, "a"), (200, "b")}
    Fresh.deploy("b")
    assert serve.status().deployments["Fresh"].version is None


def test_same_version_and_options_do_nothing(url: str, log: Log) -> None:
    @serve.deployment(version="1", num_replicas=2)
    class Same:
        def __init__(self, number: int) -> None:
            log("init")
            self.number = number

        def __call__(self) -> str:
            return f"{self.number}"

    Same.deploy(1)
    before = tags("Same")
    for _ in range(3):
        Same.deploy(1)
    serve.get_deployment("Same").deploy()
    assert tags("Same") == before
    assert log.lines() == ["init"] * 2
    # Another version is another thing, and so are other arguments.
    with asked_all_along(f"{url}/Same") as answers:
        Same.options(version="2").deploy(1)
    assert set(answers) == {(200, "1")}
    second = tags("Same")
    assert not second & before
    assert serve.status().deployments["Same"].version == "2"
    Same.options(version="2").deploy(3)
    assert not tags("Same") & second
    assert get(f"{url}/Same") == (200, "3")


def test_same_version_from_another_process(cluster: ProcessCluster, url: str) -> None:
    script = textwrap.dedent(f"""
        from dask.distributed import Client
        import daskserve as serve

        Client({cluster.address!r})

        @serve.deployment(version="1")
        class Scripted:
            def __call__(self):
                return "scripted"

        Scripted.deploy()
        print(serve.status().deployments["Scripted"].replicas[0].replica_tag)
        """)
    first = run_script(script).stdout
    assert run_script(script).stdout == first
    # A process that only deployed leaves it to the instance.
    assert get(f"{url}/Scripted") == (200, "scripted")
    assert tags("Scripted") == {first.strip()}


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_user_config_alone_reconfigures(kind: str, url: str, log: Log) -> None:
    @serve.deployment(name="Configured", version="1", num_replicas=2)
    class Sync:
        def __init__(self) -> None:
            log("init")

        def reconfigure(self, config: dict[str, str]) -> None:
            self.text = config["text"]

        def __call__(self) -> str:
            return self.text

    @serve.deployment(name="Configured", version="1", num_replicas=2)
    class Async:
        def __init__(self) -> None:
            log("init")

        async def reconfigure(self, config: dict[str, str]) -> None:
            await asyncio.sleep(0.01)
            self.text = config["text"]

        def __call__(self) -> str:
            return self.text

    deployment = Sync if kind == "sync" else Async
    deployment.options(user_config={"text": "a"}).deploy()
    before = tags("Configured")
    with asked_all_along(f"{url}/Configured") as answers:
        for text in "bcdef":
            deployment.options(user_config={"text": text}).deploy()
            for _ in range(6):  # both replicas have it
                assert get(f"{url}/Configured") == (200, text)
    assert tags("Configured") == before
    assert log.lines() == ["init"] * 2
    assert {status for status, _ in answers} == {200}


def test_user_config_needs_reconfigure(url: str, log: Log) -> None:
    @serve.deployment(version="1")
    class Plain:
        def __init__(self) -> None:
            log("init")

        def __call__(self) -> str:
            return "plain"

    configured = Plain.options(user_config=1)
    with pytest.raises(DeploymentFailedError, match=r"no method reconfigure"):
        configured.deploy()
    Plain.deploy()
    before = tags("Plain")
    log.path.write_text("")
    with asked_all_along(f"{url}/Plain") as answers:
        with pytest.raises(DeploymentFailedError, match=r"no method reconfigure"):
            configured.deploy()
    assert set(answers) == {(200, "plain")}
    # It runs as it did: there was nothing in it to put back.
    assert tags("Plain") == before
    assert log.lines() == []


def test_user_config_taken_away(url: str) -> None:
    @serve.deployment(version="1")
    class Untaken:
        config: object = "none"

        def reconfigure(self, config: object) -> None:
            self.config = config

        def __call__(self) -> object:
            return self.config

    Untaken.options(user_config="some").deploy()
    assert get(f"{url}/Untaken") == (200, "some")
    Untaken.deploy()
    # In place or by new replicas, but it is gone.
    assert get(f"{url}/Untaken")[1] in ("none", "")
    assert serve.status().deployments["Untaken"].state == "HEALTHY"


def test_failing_reconfigure_puts_the_former_back(url: str, log: Log) -> None:
    @serve.deployment(version="1", num_replicas=2)
    class Picky:
        def reconfigure(self, config: str) -> None:
            log(config)
            self.config = config
            if config == "bad":
                raise LookupError("there is no bad")

        def __call__(self) -> str:
            return self.config

    Picky.options(user_config="good").deploy()
    before = tags("Picky")
    with pytest.raises(DeploymentFailedError) as caught:
        Picky.options(user_config="bad").deploy()
    assert "LookupError: there is no bad" in str(caught.value)
    assert "Traceback" in str(caught.value)
    assert serve.status().deployments["Picky"].state == "DEPLOY_FAILED"
    poll(lambda: log.lines()[-2:].count("bad") == 0)
    for _ in range(6):
        assert get(f"{url}/Picky") == (200, "good")
    assert tags("Picky") == before
    assert serve.get_deployment("Picky").user_config == "good"
    Picky.options(user_config="better").deploy()
    assert get(f"{url}/Picky") == (200, "better")
    assert tags("Picky") == before
    assert serve.status().deployments["Picky"].state == "HEALTHY"


def test_only_num_replicas_scales(url: str, log: Log) -> None:
    @serve.deployment(version="1", num_replicas=2)
    class Scaled:
        def __init__(self) -> None:
            log("init")

        def __call__(self) -> str:
            return "ok"

    Scaled.deploy()
    two = tags("Scaled")
    with asked_all_along(f"{url}/Scaled") as answers:
        Scaled.options(num_replicas=5).deploy()
        five = tags("Scaled")
        assert len(five) == 5
        assert five > two
        serve.get_deployment("Scaled").options(num_replicas=1).deploy()
        one = tags("Scaled")
    assert len(one) == 1
    assert one < five
    assert log.lines() == ["init"] * 5
    assert set(answers) == {(200, "ok")}
    assert serve.get_deployment("Scaled").num_replicas == 1


def test_only_route_prefix_moves(instance: serve.ServeInstance) -> None:
    @serve.deployment(version="1", route_prefix="/old")
    def moving() -> str:
        return "here"

    moving.deploy()
    before = tags("moving")
    for prefix, other in [("/new", "/old"), ("/old", "/new")] * 3:
        moving.options(route_prefix=prefix).deploy()
        for url in instance.http_urls:
            assert get(f"{url}{prefix}") == (200, "here")
            assert get(f"{url}{other}")[0] == 404
            assert fetch(f"{url}/-/routes").json() == {prefix: "moving"}
    moving.options(route_prefix=None).deploy()
    for url in instance.http_urls:
        assert fetch(f"{url}/-/routes").json() == {}
    assert tags("moving") == before
    assert serve.get_deployment("moving").route_prefix is None
    assert serve.get_deployment("moving").url is None


def test_prev_version(url: str) -> None:
    @serve.deployment(version="1")
    def compared() -> str:
        return "ok"

    with pytest.raises(ValueError, match=r"'0'.*no deployment 'compared'"):
        compared.options(prev_version="0").deploy()
    assert "compared" not in serve.list_deployments()
    compared.deploy()
    before = tags("compared")
    with pytest.raises(ValueError, match=r"'0'.*'compared'.*'1'"):
        compared.options(version="2", prev_version="0").deploy()
    assert tags("compared") == before
    compared.options(version="2", prev_version="1").deploy()
    assert serve.status().deployments["compared"].version == "2"
    with pytest.raises(ValueError, match="prev_version"):
        compared.options(version="2", prev_version="1").deploy()


def test_prefix_taken(url: str) -> None:
    @serve.deployment(route_prefix="/taken")
    def holder() -> str:
        return "holder"

    @serve.deployment(route_prefix="/taken")
    def other() -> str:
        return "other"

    holder.deploy()
    before = tags("holder")
    with pytest.raises(ValueError, match=r"'/taken'.*'holder'"):
        other.deploy()
    assert get(f"{url}/taken") == (200, "holder")
    assert set(serve.list_deployments()) == {"holder"}
    other.options(route_prefix="/free").deploy()
    with pytest.raises(ValueError, match=r"'/taken'.*'holder'"):
        other.deploy()
    assert get(f"{url}/free") == (200, "other")
    assert get(f"{url}/taken") == (200, "holder")
    assert tags("holder") == before
    holder.delete()
    other.deploy()
    assert get(f"{url}/taken") == (200, "other")


def test_arguments_of_the_call_come_first(url: str) -> None:
    @serve.deployment(init_args=(1,), init_kwargs={"b": 2})
    class Args:
        def __init__(self, a: int = 8, b: int = 9) -> None:
            self.args = [a, b]

        def __call__(self) -> list[int]:
            return self.args

    Args.deploy()
    assert get(f"{url}/Args") == (200, "[1,2]")
    Args.deploy(3)
    assert get(f"{url}/Args") == (200, "[3,9]")
    # They count for that call; what is there now is what was asked for then.
    assert serve.get_deployment("Args").init_args == (3,)
    assert serve.get_deployment("Args").init_kwargs == {}
    Args.deploy(b=4)
    assert get(f"{url}/Args") == (200, "[8,4]")
    Args.deploy()
    assert get(f"{url}/Args") == (200, "[1,2]")
    with pytest.raises(TypeError, match="Args"):
        Args.deploy(1, 2, 3)
    assert get(f"{url}/Args") == (200, "[1,2]")


# What goes wrong.


def test_failing_constructor(url: str, log: Log) -> None:
    @serve.deployment
    class Broken:
        def __init__(self, fail: bool) -> None:
            log("init")
            if fail:
                raise LookupError("no such table")

        def __call__(self) -> str:
            return "ok"

    def fails(deployment: serve.Deployment) -> None:
        log.path.write_text("")
        with pytest.raises(DeploymentFailedError) as caught:
            deployment.deploy(True)
        assert isinstance(caught.value, RuntimeError)
        printed = "".join(traceback.format_exception(caught.value))
        for text in ["Traceback", "__init__", "LookupError: no such table", "Broken"]:
            assert text in printed
        assert printed.count('raise LookupError("no such table")') == 1
        assert repr(caught.value.__cause__) == "LookupError('no such table')"
        assert log.lines() == ["init"] * 3
        status = serve.status().deployments["Broken"]
        assert status.state == "DEPLOY_FAILED"
        assert "LookupError: no such table" in status.reason
        assert "LookupError: no such table" in str(serve.status())

    fails(Broken.options(version="1"))
    begin = time.monotonic()
    assert get(f"{url}/Broken")[0] == 503
    with pytest.raises(DeploymentUnavailableError, match="Broken"):
        Broken.get_handle().remote().result(timeout_s=5)
    assert time.monotonic() - begin < 2

    Broken.options(version="1").deploy(False)
    before = tags("Broken")
    with asked_all_along(f"{url}/Broken") as answers:
        fails(Broken.options(version="2"))
    assert set(answers) == {(200, "ok")}
    assert tags("Broken") == before
    assert serve.status().deployments["Broken"].running_replicas == 1
    # It stays so: the old one is not replaced a little later.
    assert get(f"{url}/Broken") == (200, "ok")
    Broken.options(version="3").deploy(False)
    assert serve.status().deployments["Broken"].state == "HEALTHY"


def test_the_cause_of_a_failed_deploy(url: str) -> None:
    class OutOfWeights(Exception):
        pass

    @serve.deployment
    class Broken:
        def __init__(self, value: str) -> None:
            try:
                raise KeyError("weights")
            except KeyError as err:
                raise OutOfWeights(eval(value)) from err

    def cause(value: str) -> BaseException | None:
        with pytest.raises(DeploymentFailedError, match="OutOfWeights") as caught:
            Broken.deploy(value)
        return caught.value.__cause__

    error = cause("42")
    assert isinstance(error, OutOfWeights)
    assert error.args == (42,)
    assert repr(error.__cause__) == "KeyError('weights')"
    assert cause("'x' * 100_000") is None
    assert cause("(n for n in ())") is None


def test_a_cause_that_is_known_to_workers_only(url: str) -> None:
    @serve.deployment
    class Broken:
        def __init__(self) -> None:
            module = sys.modules["only_there"] = ModuleType("only_there")
            module.Odd = type("Odd", (Exception,), {"__module__": "only_there"})
            raise module.Odd("not here")

    with pytest.raises(DeploymentFailedError) as caught:
        Broken.deploy()
    assert caught.value.__cause__ is None
    assert 'raise module.Odd("not here")' in str(caught.value)


def test_constructor_that_fails_once(url: str, log: Log) -> None:
    @serve.deployment
    class Flaky:
        def __init__(self) -> None:
            log("init")
            if len(log.lines()) == 1:
                raise OSError("not yet")

        def __call__(self) -> str:
            return "ok"

    Flaky.deploy()
    assert log.lines() == ["init"] * 2
    assert get(f"{url}/Flaky") == (200, "ok")
    [death] = serve.status().deployments["Flaky"].deaths
    assert "OSError: not yet" in death.reason


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_constructor_that_never_returns(kind: str, url: str) -> None:
    class Sync:
        def __init__(self, wait: bool) -> None:
            if wait:
                threading.Event().wait()

        def __call__(self) -> str:
            return "ok"

    class Async(Sync):
        async def __init__(self, wait: bool) -> None:
            if wait:
                await asyncio.Event().wait()

    stuck = serve.deployment(
        name="stuck", deploy_timeout_s=1, graceful_shutdown_timeout_s=0.1
    )(Sync if kind == "sync" else Async)
    stuck.deploy(False)
    before = tags("stuck")
    begin = time.monotonic()
    with pytest.raises(DeploymentFailedError, match="constructor still running"):
        stuck.deploy(True)
    assert 1 <= time.monotonic() - begin < 3
    status = serve.status().deployments["stuck"]
    assert status.state == "DEPLOY_FAILED"
    assert "constructor still running" in status.reason
    assert get(f"{url}/stuck") == (200, "ok")
    assert tags("stuck") == before


def test_resources_nobody_has(instance: serve.ServeInstance) -> None:
    @serve.deployment(resources={"tpu": 1}, deploy_timeout_s=1.5)
    def greedy() -> str:
        return "ok"

    begin = time.monotonic()
    with in_thread(greedy.deploy) as deploying:

        def said() -> bool:
            status = serve.status().deployments.get("greedy")
            return status is not None and "tpu" in str(status)

        poll(said, timeout=1, period=0.01)
        assert not deploying.done()
        with pytest.raises(DeploymentFailedError, match="tpu"):
            deploying.result(10)
        assert 1.5 <= time.monotonic() - begin < 4
    assert serve.status().deployments["greedy"].state == "DEPLOY_FAILED"
    assert "tpu" in serve.status().deployments["greedy"].reason


def test_resources_are_respected(instance: serve.ServeInstance) -> None:
    @serve.deployment(
        version="1", num_replicas=6, resources={"chip": 1}, deploy_timeout_s=1
    )
    def full() -> str:
        return "ok"

    full.deploy()
    workers = Counter(replica.worker for replica in running("full"))
    assert sorted(workers.values()) == [2, 2, 2]
    with pytest.raises(DeploymentFailedError, match="chip"):
        full.options(num_replicas=7).deploy()
    assert len(running("full")) == 6

    @serve.deployment(resources={"chip": 1}, deploy_timeout_s=1)
    def late() -> str:
        return "ok"

    with pytest.raises(DeploymentFailedError, match=r"chip"):
        late.deploy()
    full.options(num_replicas=5).deploy()
    late.deploy()
    assert len(running("late")) == 1


@pytest.mark.parametrize(
    "options",
    [{"resources": {"chip": 2}}, {"max_surge": 0}, {"max_surge": 1}],
    ids=["no room", "no surge", "surge"],
)
def test_an_update_takes_places_one_by_one(
    instance: serve.ServeInstance, url: str, options: dict[str, Any]
) -> None:
    """All resources are its own, or so it is to be: some serve at any time."""

    @serve.deployment(num_replicas=3, route_prefix="/chips", **options)
    class Chips:
        def __init__(self, version: str) -> None:
            self.version = version

        def __call__(self) -> str:
            time.sleep(0.002)
            return self.version

    Chips.options(version="1").deploy("one")
    answers: list[tuple[int, str]] = []
    over = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=20) as client:
            while not over.is_set():
                answer = client.get(f"{url}/chips")
                answers.append((answer.status_code, answer.text))

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask) for _ in range(8)]
        try:
            poll(lambda: len(answers) > 100)
            Chips.options(version="2").deploy("two")
            after = len(answers)
            poll(lambda: len(answers) > after + 100)
        finally:
            over.set()
        for each in asking:
            each.result()
    assert {status for status, _ in answers} == {200}
    assert {text for _, text in answers[after + 8 :]} == {"two"}
    assert len(running("Chips")) == 3
    # The other way, by rollback(), just so.
    serve.get_deployment("Chips").rollback()
    assert get(f"{url}/chips") == (200, "one")


def test_workers_are_respected(instance: serve.ServeInstance, client: Client) -> None:
    there = scheduler_workers(client)
    address, other, _ = there

    @serve.deployment(num_replicas=3, workers=address, deploy_timeout_s=1)
    def pinned() -> str:
        return "ok"

    pinned.deploy()
    assert {replica.worker for replica in running("pinned")} == {address}
    pinned.options(workers=[there[other]["name"]]).deploy()
    assert {replica.worker for replica in running("pinned")} == {other}
    pinned.options(workers=[address, other]).deploy()
    assert {replica.worker for replica in running("pinned")} == {address, other}
    with pytest.raises(DeploymentFailedError, match="nobody-knows-me"):
        pinned.options(workers=["nobody-knows-me"]).deploy()
    assert len(running("pinned")) == 3


def test_missing_module(
    instance: serve.ServeInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here_now.py").write_text("class There:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        import only_here_now  # type: ignore[import-not-found]

        deployment = serve.deployment(only_here_now.There)
        with pytest.raises(DeploymentFailedError, match="only_here_now") as caught:
            deployment.deploy()
        assert "install" in str(caught.value)
    finally:
        sys.modules.pop("only_here_now", None)


def test_what_cannot_travel(instance: serve.ServeInstance) -> None:
    generator = (number for number in range(3))

    @serve.deployment
    class Args:
        def __init__(self, numbers: object) -> None:
            self.numbers = numbers

    @serve.deployment
    def closure() -> object:
        return generator

    with pytest.raises(PicklingError, match=r"init_args of 'Args'.*generator"):
        Args.deploy({"numbers": generator})
    with pytest.raises(PicklingError, match=r"'closure'.*generator"):
        closure.deploy()
    with pytest.raises(PicklingError, match=r"user_config.*generator"):
        Args.options(user_config=generator).deploy(1)
    assert serve.list_deployments() == {}


# From where it can be called.


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_deploy_inside_of_a_request(kind: str, url: str) -> None:
    @serve.deployment
    class Inner:
        def __init__(self, text: str) -> None:
            self.text = text

        def __call__(self) -> str:
            return self.text

    @serve.deployment
    def sync_outer() -> str:
        Inner.deploy("inner")
        return f"{Inner.get_handle().remote().result(timeout_s=10)} {Inner.url}"

    @serve.deployment
    async def async_outer() -> str:
        Inner.deploy("inner")
        assert "Inner" in serve.list_deployments()
        return f"{await Inner.get_handle().remote()} {Inner.url}"

    outer = sync_outer if kind == "sync" else async_outer
    outer.deploy()
    assert get(f"{url}/{outer.name}") == (200, f"inner {url}/Inner")
    assert get(f"{url}/Inner") == (200, "inner")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_deploy_inside_of_a_task(kind: str, url: str, client: Client) -> None:
    @serve.deployment
    class Tasked:
        def __call__(self) -> str:
            return "tasked"

    def sync_task() -> str:
        Tasked.deploy()
        result = Tasked.get_handle().remote().result(timeout_s=10)
        assert serve.status().deployments["Tasked"].state == "HEALTHY"
        return f"{result} {serve.get_deployment('Tasked').name}"

    async def async_task() -> str:
        await Tasked.deploy()  # type: ignore[misc]
        result = await Tasked.get_handle().remote()
        status: Any = await serve.status()  # type: ignore[misc]
        assert status.deployments["Tasked"].state == "HEALTHY"
        found: Any = await serve.get_deployment("Tasked")  # type: ignore[misc]
        return f"{result} {found.name}"

    task = sync_task if kind == "sync" else async_task
    result = client.submit(task, pure=False).result(timeout=20)
    assert result == "tasked Tasked"
    assert get(f"{url}/Tasked") == (200, "tasked")


# delete().


def test_delete_drains(url: str, log: Log) -> None:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        log("startup")
        yield
        log("shutdown")

    app = FastAPI(lifespan=lifespan)

    @serve.deployment(route_prefix="/drained", graceful_shutdown_timeout_s=10)
    @serve.ingress(app)
    class Drained:
        @app.get("/slow")
        async def slow(self) -> str:
            log("begin")
            await asyncio.sleep(0.5)
            log("end")
            return "done"

        async def call(self) -> str:
            log("begin call")
            await asyncio.sleep(0.5)
            log("end call")
            return "called"

        def __del__(self) -> None:
            log("del")

    Drained.deploy()
    with in_thread(lambda: get(f"{url}/drained/slow")) as asked:
        response = Drained.get_handle().call.remote()
        log.wait("begin")
        log.wait("begin call")
        begin = time.monotonic()
        Drained.delete()
        assert time.monotonic() - begin < 5
        assert asked.result(10) == (200, '"done"')
        assert response.result(timeout_s=10) == "called"
    assert log.lines()[0] == "startup"
    assert set(log.lines()[1:5]) == {"begin", "end", "begin call", "end call"}
    assert log.lines()[5:] == ["shutdown", "del"]
    assert get(f"{url}/drained/slow")[0] == 404


def test_del_runs_once(instance: serve.ServeInstance, log: Log, client: Client) -> None:
    @serve.deployment(num_replicas=2, version="1")
    class Mortal:
        def __init__(self) -> None:
            log("init")

        def __call__(self) -> str:
            return "ok"

        def __del__(self) -> None:
            log("del")

    def collect() -> None:
        import gc

        gc.collect()

    Mortal.deploy()
    Mortal.get_handle().remote().result(timeout_s=10)
    Mortal.options(num_replicas=1).deploy()
    poll(lambda: log.lines().count("del") == 1)
    Mortal.delete()
    client.run(collect)
    assert log.lines() == ["init", "init", "del", "del"]


def test_delete_gives_up_after_the_grace_period(url: str, log: Log) -> None:
    @serve.deployment(graceful_shutdown_timeout_s=0.3)
    class Endless:
        async def __call__(self) -> None:
            log("begin")
            try:
                await asyncio.sleep(60)
            finally:
                log("cancelled")

        def __del__(self) -> None:
            log("del")

    Endless.deploy()
    with in_thread(lambda: get(f"{url}/Endless")) as asked:
        response = Endless.get_handle().remote()
        poll(lambda: log.lines() == ["begin"] * 2)
        begin = time.monotonic()
        Endless.delete()
        assert 0.3 <= time.monotonic() - begin < 3
        with pytest.raises(ReplicaDiedError, match="Endless"):
            response.result(timeout_s=5)
        assert asked.result(5)[0] == 502
    assert log.lines() == ["begin", "begin", "cancelled", "cancelled", "del"]


def test_what_an_update_stops_goes_to_the_new_version(url: str, log: Log) -> None:
    """If it may be sent again; others learn that it was cut off."""

    @serve.deployment(graceful_shutdown_timeout_s=0.3, num_replicas=2)
    class Slow:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        async def __call__(self) -> float:
            log("begin")
            await asyncio.sleep(self.seconds)
            return self.seconds

    Slow.options(version="1").deploy(30)
    with ThreadPoolExecutor() as pool:
        asked = [
            pool.submit(httpx.request, method, f"{url}/Slow", timeout=20)
            for method in ("GET", "PUT", "POST", "PATCH")
        ]
        poll(lambda: log.lines() == ["begin"] * 4)
        Slow.options(version="2").deploy(0)
        answers = [future.result(20) for future in asked]
    assert [answer.status_code for answer in answers] == [200, 200, 502, 502]
    assert {answer.text for answer in answers[:2]} == {"0"}


def test_delete_of_one_that_blocks(url: str, log: Log) -> None:
    @serve.deployment(graceful_shutdown_timeout_s=0.2)
    def blocking() -> None:
        log("begin")
        time.sleep(8)

    blocking.deploy()
    response = blocking.get_handle().remote()
    log.wait("begin")
    blocking.delete()
    with pytest.raises(ReplicaDiedError, match="blocking"):
        response.result(timeout_s=5)
    assert get(f"{url}/blocking")[0] == 404


def test_unknown_names(instance: serve.ServeInstance) -> None:
    @serve.deployment
    def known() -> str:
        return "ok"

    with pytest.raises(KeyError, match="known"):
        serve.get_deployment("known")
    with pytest.raises(KeyError, match="known"):
        known.delete()
    known.deploy()
    assert serve.get_deployment("known").name == "known"
    assert set(serve.list_deployments()) == {"known"}
    assert isinstance(serve.list_deployments()["known"], serve.Deployment)
    with pytest.raises(KeyError, match=r"unknown.*known"):
        serve.get_deployment("unknown")
    known.delete()
    with pytest.raises(KeyError):
        serve.get_deployment("known")
    with pytest.raises(KeyError):
        known.delete()
    assert serve.list_deployments() == {}


def test_found_deployment(url: str) -> None:
    @serve.deployment(num_replicas=2, version="7", user_config={"a": [1]})
    class Found:
        def reconfigure(self, config: object) -> None:
            self.config = config

        def __call__(self) -> object:
            return self.config

    Found.deploy()
    found = serve.get_deployment("Found")
    assert found == Found
    assert hash(found) == hash(Found)
    assert (found.name, found.num_replicas, found.version) == ("Found", 2, "7")
    assert found.user_config == {"a": [1]}
    assert found.route_prefix is None
    assert found.url == Found.url == f"{url}/Found"
    assert found.get_handle() == Found.get_handle()
    found.options(user_config={"a": [2]}).deploy()
    assert get(f"{url}/Found") == (200, '{"a":[2]}')


# Deployments as values; no cluster is needed for it.


@serve.deployment(num_replicas=3, version="v", user_config={"k": 1})
class Module:
    def __call__(self) -> str:
        return "module"


def test_attributes_read_back() -> None:
    assert (Module.name, Module.version, Module.num_replicas) == ("Module", "v", 3)
    assert Module.user_config == {"k": 1}
    assert Module.route_prefix is None
    assert Module.prev_version is None
    assert (Module.init_args, Module.init_kwargs) == ((), {})
    assert Module.func_or_class.__name__ == "Module"
    other = Module.options(
        name="Other",
        route_prefix="/other",
        max_concurrent_queries=7,
        graceful_shutdown_timeout_s="500ms",
        resources={"GPU": 1},
        init_args=[1, 2],
    )
    assert (other.name, other.route_prefix) == ("Other", "/other")
    assert other.max_ongoing_requests == 7
    assert other.graceful_shutdown_timeout_s == 0.5
    assert other.resources == {"GPU": 1}
    assert other.init_args == (1, 2)
    assert other.version == "v"
    assert Module.name == "Module"
    with pytest.raises(AttributeError, match="no_such"):
        Module.no_such  # noqa: B018


def test_deployments_are_values() -> None:
    with pytest.raises(AttributeError, match=r"\.options\(num_replicas"):
        Module.num_replicas = 5  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del Module.num_replicas
    assert Module.num_replicas == 3
    assert Module == Module.options()
    assert hash(Module) == hash(Module.options())
    assert Module != Module.options(num_replicas=4)
    assert Module != "Module"
    assert len({Module, Module.options(), Module.options(version="w")}) == 2
    with pytest.raises(RuntimeError, match=r"deploy\(\)"):
        Module()


@pytest.mark.parametrize("dump", [pickle, cloudpickle])
def test_deployments_can_be_pickled(dump: Any) -> None:
    def local() -> str:
        return "local"

    for deployment in [Module, serve.deployment(local)]:
        copy = pickle.loads(dump.dumps(deployment))
        assert copy == deployment
        assert hash(copy) == hash(deployment)
        assert copy.name == deployment.name


def test_ways_to_give_a_name_and_options() -> None:
    def plain() -> None: ...

    assert serve.deployment("first", num_replicas=2)(plain).name == "first"
    assert serve.deployment("first")(plain).route_prefix is None
    called = serve.deployment(plain, name="called", max_concurrent_queries=3)
    assert (called.name, called.max_ongoing_requests) == ("called", 3)
    assert called.max_concurrent_queries == 3
    assert serve.deployment(plain).name == "plain"
    with pytest.raises(TypeError, match="two names: 'a' and name='b'"):
        serve.deployment("a", name="b")
    with pytest.raises(ValueError, match="num_replica"):
        serve.deployment("a", num_replica=2)
    with pytest.raises(ValueError, match="name"):
        serve.deployment("")


@pytest.mark.parametrize("target", [42, "text", None, object(), Module])
def test_undeployable_targets(target: object) -> None:
    with pytest.raises(TypeError, match="class or a function"):
        serve.deployment(num_replicas=2)(target)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"name": ""},
        {"name": "a/b"},
        {"route_prefix": "no-slash"},
        {"route_prefix": "/trailing/"},
        {"route_prefix": "/{braces}"},
        {"num_replicas": 0},
        {"num_replicas": -1},
        {"num_replicas": "two"},
        {"replicas": 2},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        serve.deployment(**options)
    with pytest.raises(ValueError, match=next(iter(options))):
        Module.options(**options)


@pytest.mark.parametrize(
    "options", [{"version": 1}, {"init_args": 1}, {"init_kwargs": [1]}]
)
def test_wrong_types(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        serve.deployment(**options)


# The instance.


def test_start_again(instance: serve.ServeInstance, url: str) -> None:
    @serve.deployment
    def kept() -> str:
        return "kept"

    kept.deploy()
    before = tags("kept")
    for again in [
        serve.start(),
        serve.start(http_options=HTTP),
        serve.start(http_options={}),
        serve.connect(),
    ]:
        assert again.http_urls == instance.http_urls
        assert "kept" in again.status().deployments
    with pytest.raises(ServeConfigError, match=r"port.*0.*4711") as caught:
        serve.start(http_options={"port": 4711, "location": "EveryNode"})
    assert "location" not in str(caught.value)
    with pytest.raises(ServeConfigError, match=r"location.*'EveryNode'.*'HeadOnly'"):
        serve.start(http_options={"location": "HeadOnly"})
    with pytest.raises(ServeConfigError, match="detached"):
        serve.start(detached=True)
    with pytest.raises(ValueError, match="prot"):
        serve.start(http_options={"prot": 8000})
    with pytest.raises(TypeError, match="Client"):
        serve.start("tcp://127.0.0.1:8786")  # type: ignore[arg-type]
    assert tags("kept") == before
    assert get(f"{url}/kept") == (200, "kept")


def test_status_reads_well(instance: serve.ServeInstance) -> None:
    @serve.deployment(num_replicas=2, version="3")
    def shown() -> str:
        return "ok"

    shown.deploy()
    status = serve.status()
    assert status.instance.location == "EveryNode"
    assert status.instance.http_urls == instance.http_urls
    assert {proxy.url for proxy in status.proxies} == set(instance.http_urls)
    assert {proxy.state for proxy in status.proxies} == {"HEALTHY"}
    for text in ["shown", "HEALTHY", "2/2", "/shown", *instance.http_urls]:
        assert text in str(status)
        assert text in status._repr_html_()
    for url in instance.http_urls:
        assert url in instance._repr_html_()
        assert url in repr(instance)
    replica = status.deployments["shown"].replicas[0]
    assert replica.replica_tag.startswith("shown#")
    assert replica.host == "127.0.0.1"


@pytest.fixture(scope="module")
def bare() -> Iterator[ProcessCluster]:
    """Give a cluster without an instance."""
    with ProcessCluster(2, nanny=[True, False], nthreads=2) as cluster:
        yield cluster


@pytest.fixture
def own(bare: ProcessCluster) -> Iterator[Client]:
    """Give a client of that cluster, and leave it without an instance."""
    with bare.client() as client:
        yield client
        serve.shutdown()


@serve.deployment
def hello() -> str:
    return "hello"


def gone() -> bool:
    try:
        serve.connect()
    except ServeNotRunningError:
        return True
    return False


@pytest.mark.parametrize(
    "call",
    [
        serve.connect,
        serve.status,
        serve.list_deployments,
        lambda: serve.get_deployment("hello"),
        hello.deploy,
        hello.delete,
    ],
)
def test_no_instance(own: Client, call: Callable[[], object]) -> None:
    with pytest.raises(ServeNotRunningError, match=r"serve\.start\(\)"):
        call()


def test_no_instance_is_no_error_of_dask() -> None:
    """A forgotten `start()` leaves no traceback in the scheduler's log."""
    with ProcessCluster(1) as cluster, cluster.client():
        for _ in range(2):
            with pytest.raises(ServeNotRunningError):
                serve.status()
        assert "Traceback" not in cluster.logs()
        serve.start(http_options={"location": None})
        assert serve.status().deployments == {}
        serve.shutdown()
        with pytest.raises(ServeNotRunningError):
            serve.status()
        assert "Traceback" not in cluster.logs()


def test_no_client() -> None:
    run_script(
        textwrap.dedent("""
        import daskserve as serve
        from daskserve.exceptions import ServeNotRunningError

        for call in [serve.connect, serve.status, serve.shutdown]:
            try:
                call()
            except ServeNotRunningError as err:
                assert "Client" in str(err), err
            else:
                raise AssertionError(call)
        """)
    )


def test_no_cluster_makes_one() -> None:
    run_script(
        textwrap.dedent("""
        import httpx
        import daskserve as serve

        def local():
            return "local"

        if __name__ == "__main__":
            with serve.start(http_options={"port": 0}) as instance:
                serve.deployment(local).deploy()
                print(httpx.get(instance.http_urls[0] + "/local").text)
        """)
    )


def test_shutdown_and_start_again(own: Client) -> None:
    class Mine:
        def add(self, number: int) -> int:
            return number + 1

    actor: Any = own.submit(Mine, actor=True).result(timeout=10)
    instance = serve.start(http_options={"port": 0})
    hello.deploy()
    url = instance.http_urls[0]
    assert get(f"{url}/hello") == (200, "hello")
    handle = hello.get_handle()
    assert handle.remote().result(timeout_s=10) == "hello"
    serve.shutdown()
    assert gone()
    with pytest.raises(httpx.ConnectError):
        get(f"{url}/hello")
    serve.shutdown()
    instance.shutdown()
    assert actor.add(1).result(timeout=10) == 2
    # Nothing of the one before is in the next one, but handles are valid again.
    with serve.start(http_options={"port": 0}) as instance:
        assert serve.list_deployments() == {}
        hello.deploy()
        assert get(f"{instance.http_urls[0]}/hello") == (200, "hello")
        assert handle.remote().result(timeout_s=10) == "hello"
    assert gone()
    assert actor.add(2).result(timeout=10) == 3


@contextmanager
def deploying_process(
    bare: ProcessCluster, directory: Path, detached: bool
) -> Iterator[tuple[Process, str]]:
    """Run a script that deploys and waits; give the process and the URL."""
    script = directory / "deploys.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        from dask.distributed import Client
        import daskserve as serve

        client = Client({bare.address!r})
        instance = serve.start(detached={detached}, http_options={{"port": 0}})

        @serve.deployment
        def left():
            return "left"

        left.deploy()
        print("url", instance.http_urls[0])
        while not {str(directory / "end")!r} in map(str, __import__("pathlib").Path(
                {str(directory)!r}).iterdir()):
            time.sleep(0.02)
        """)
    )
    command = [sys.executable, str(script)]
    process = Process("deploys", command, directory / "log", {}, directory)
    try:

        def read_url() -> str:
            text = process.log.read_text()
            assert process.poll() is None, text
            return text.rpartition("url ")[2].strip() if "url " in text else ""

        yield process, poll(read_url, 20)
    finally:
        process.end_group()


@pytest.mark.parametrize("way", ["end", "kill"])
@pytest.mark.parametrize("detached", [False, True])
def test_process_that_deployed_goes(
    bare: ProcessCluster, own: Client, tmp_path: Path, way: str, detached: bool
) -> None:
    with deploying_process(bare, tmp_path, detached) as (process, url):
        assert get(f"{url}/left") == (200, "left")
        assert not gone()
        if way == "kill":
            process.kill()
        else:
            (tmp_path / "end").touch()
        process.wait(20)
    if detached:
        # Whatever follows the client's end has happened once its id is gone.
        mine = own.id

        def clients(dask_scheduler: Any) -> list[str]:
            return [c for c in dask_scheduler.clients if "controller" not in c]

        poll(lambda: set(own.run_on_scheduler(clients)) - {"fire-and-forget"} == {mine})
        assert not gone()
        assert get(f"{url}/left") == (200, "left")
        serve.get_deployment("left").delete()
    else:
        poll(gone, 20)
        with pytest.raises(httpx.ConnectError):
            get(f"{url}/left")


def test_client_that_started_closes(bare: ProcessCluster, own: Client) -> None:
    with bare.client() as starter:
        serve.start(starter, http_options={"port": 0})
        hello.deploy()
        with bare.client():
            pass  # somebody else's end means nothing
        assert not gone()
    poll(gone, 20)


@pytest.mark.parametrize("location", ["HeadOnly", "EveryNode"])
def test_port_in_use(own: Client, location: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = {"location": location, "port": port}
        with pytest.raises(ProxyStartError) as caught:
            serve.start(http_options=options)
        text = str(caught.value)
        assert f"127.0.0.1:{port}" in text or (
            "127.0.0.1" in text and str(port) in text
        )
        workers = scheduler_workers(own)
        assert any(worker in text for worker in workers)
        assert gone()
        assert not any(own.run(lambda dask_worker: _has_plugin(dask_worker)).values())
        with serve.start(http_options={"location": location, "port": 0}) as instance:
            hello.deploy()
            assert get(f"{instance.http_urls[0]}/hello") == (200, "hello")
    # As soon as it is free, it is good.
    with serve.start(http_options=options) as instance:
        assert instance.http_urls == [f"http://127.0.0.1:{port}"]


def _has_plugin(dask_worker: Any) -> bool:
    return "daskserve" in dask_worker.plugins


@pytest.mark.parametrize("shared", [True, False])
def test_new_worker_gets_a_proxy(
    bare: ProcessCluster, own: Client, shared: bool
) -> None:
    port = free_port() if shared else 0
    serve.start(http_options={"location": "EveryNode", "port": port})
    hello.options(num_replicas=2).deploy()
    assert len(serve.status().proxies) == 2
    known = set(scheduler_workers(own))
    worker = bare.add_worker()
    try:
        poll(lambda: len(serve.status().proxies) == 3, 20)

        def url_of_new() -> str | None:
            [proxy] = [p for p in serve.status().proxies if p.worker not in known]
            return proxy.url

        url = poll(url_of_new)
        assert len(serve.connect().http_urls) == (1 if shared else 3)
        for _ in range(5):
            assert get(f"{url}/hello") == (200, "hello")
        assert fetch(f"{url}/-/routes").json() == {"/hello": "hello"}
        hello.delete()
        assert fetch(f"{url}/-/routes").json() == {}
    finally:
        bare.terminate(worker)
    poll(lambda: {p.worker for p in serve.status().proxies} == known, 20)


def test_asynchronous_client(bare: ProcessCluster) -> None:
    async def main() -> None:
        async with bare.client(asynchronous=True) as client:
            instance: Any = await serve.start(client, http_options={"port": 0})  # type: ignore[misc]
            await hello.options(num_replicas=2).deploy()
            async with httpx.AsyncClient() as http:
                reply = await http.get(f"{instance.http_urls[0]}/hello")
            assert reply.text == "hello"
            handle = hello.get_handle()
            assert await handle.remote() == "hello"
            assert await asyncio.gather(*(handle.remote() for _ in range(20)))
            status: Any = await serve.status()  # type: ignore[misc]
            assert status.deployments["hello"].running_replicas == 2
            assert (await instance.status()).deployments.keys() == {"hello"}
            found: Any = await serve.get_deployment("hello")  # type: ignore[misc]
            assert found.num_replicas == 2
            assert await found.url == f"{instance.http_urls[0]}/hello"
            assert set(await serve.list_deployments()) == {"hello"}  # type: ignore[misc]
            with pytest.raises(KeyError):
                await serve.get_deployment("nobody")  # type: ignore[misc]
            await hello.delete()
            again: Any = await serve.connect()  # type: ignore[misc]
            assert again.http_urls == instance.http_urls
            await serve.shutdown()
            await serve.shutdown()
            with pytest.raises(ServeNotRunningError):
                await serve.connect()  # type: ignore[misc]
            async with await serve.start(http_options={"port": 0}):  # type: ignore[misc]
                await hello.deploy()
                assert await hello.get_handle().remote() == "hello"
            with pytest.raises(ServeNotRunningError):
                await serve.status()  # type: ignore[misc]

    for _ in range(2):  # on one loop after another
        asyncio.run(asyncio.wait_for(main(), 30))
