import os
import subprocess
import sys
import threading

import httpx
import pytest
from distributed import Client
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from tests.utils import (
    ProcessCluster,
    child_processes,
    free_port,
    is_running,
    leftover_processes,
    leftover_threads,
    poll,
    run_script,
    run_uvicorn,
    scheduler_workers,
)


def double(x: int) -> int:
    return 2 * x


def worker_names(client: Client) -> set[str]:
    return {w["name"] for w in scheduler_workers(client).values()}


def test_poll_returns_the_first_true_result() -> None:
    results = iter([0, "", "yes", "no"])
    assert poll(lambda: next(results)) == "yes"


def test_poll_fails_with_the_last_result() -> None:
    with pytest.raises(AssertionError, match=r"still gives \[\] after 0.05 s"):
        poll(lambda: [], timeout=0.05)


def test_is_running() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE) as process:
        assert is_running(os.getpid())
        poll(lambda: not is_running(process.pid))  # ended, nobody has asked how
    assert not is_running(process.pid)


def test_free_port() -> None:
    assert 0 < free_port() < 65536


@pytest.mark.slow
def test_tcp_cluster(no_leftovers: None) -> None:
    with ProcessCluster(2, nanny=[True, False]) as cluster:
        assert cluster.address.startswith("tcp://127.0.0.1:")
        assert cluster.security is None
        directory = cluster.directory
        with cluster.client() as client:
            # By reference: the workers import tests.test_utils.
            assert client.submit(double, 4).result(timeout=10) == 8
            assert worker_names(client) == {"w0", "w1"}
            pids = set(client.run(os.getpid).values())
            nanny, bare = cluster.workers
            assert bare.pid in pids
            assert nanny.pid not in pids
            assert pids & set(nanny.group()) == pids - {bare.pid}

            cluster.kill(nanny)
            poll(lambda: worker_names(client) == {"w1"})
            assert not nanny.group()

            cluster.add_worker("--resources", "GPU=1", nthreads=3)
            poll(lambda: worker_names(client) == {"w1", "w2"}, timeout=30)
            workers = scheduler_workers(client).values()
            added = next(w for w in workers if w["name"] == "w2")
            assert (added["nthreads"], added["resources"]) == (3, {"GPU": 1.0})

            cluster.terminate(bare)
            assert bare.returncode == 0
            poll(lambda: worker_names(client) == {"w2"})
        assert "--- w0" in cluster.logs()
        assert "Scheduler at:" in cluster.logs()
    assert not directory.exists()


@pytest.mark.slow
def test_tls_cluster(no_leftovers: None) -> None:
    with ProcessCluster(2, nanny=False, protocol="tls") as cluster:
        assert cluster.address.startswith("tls://127.0.0.1:")
        with cluster.client() as client:
            assert client.submit(double, 4).result(timeout=10) == 8
            addresses = list(scheduler_workers(client))
            assert all(a.startswith("tls://") for a in addresses)
            cluster.kill(cluster.workers[0])
            poll(lambda: worker_names(client) == {"w1"})


@pytest.mark.slow
def test_process_cluster_fixture(process_cluster: ProcessCluster) -> None:
    process_cluster.wait_for_workers(2)
    assert len(process_cluster.workers) == 2


@pytest.mark.slow
def test_a_cluster_that_does_not_start_shows_why(no_leftovers: None) -> None:
    with pytest.raises(AssertionError, match="'many' is not a valid integer"):
        with ProcessCluster(1, worker_args=["--nthreads", "many"]):
            pytest.fail("it started")


def test_environment_reaches_processes() -> None:
    result = run_script("import os; print(os.environ['COLOUR'])", env={"COLOUR": "red"})
    assert result.stdout == "red\n"


def test_run_script_finds_the_package_and_the_tests() -> None:
    result = run_script("import daskserve.config, tests.utils; print('found')")
    assert result.stdout == "found\n"


def test_run_script_fails_with_the_output() -> None:
    with pytest.raises(AssertionError, match=r"exited with 1:(?s:.*)ZeroDivisionError"):
        run_script("1 / 0")
    assert run_script("1 / 0", check=False).returncode == 1


def test_run_script_ends_what_the_script_started(no_leftovers: None) -> None:
    result = run_script(
        "import subprocess, sys\n"
        "code = 'import time; time.sleep(60)'\n"
        "print(subprocess.Popen([sys.executable, '-c', code]).pid)"
    )
    assert not is_running(int(result.stdout))


def test_run_script_that_hangs(no_leftovers: None) -> None:
    with pytest.raises(AssertionError, match=r"still ran after 1 s:\nhere"):
        run_script("import time; print('here'); time.sleep(60)", timeout=1)


def test_run_uvicorn() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        await PlainTextResponse(await request.body())(scope, receive, send)

    with run_uvicorn(app) as url:
        assert httpx.post(url, content="hello").text == "hello"
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_leftover_threads() -> None:
    event = threading.Event()
    thread = threading.Thread(target=event.wait, name="daskserve-test")
    thread.start()
    assert leftover_threads(timeout=0.05) == ["daskserve-test"]
    event.set()
    assert leftover_threads() == []


def test_leftover_processes() -> None:
    known = child_processes()
    code = "import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        left = leftover_processes(known, timeout=0.05)
        process.kill()
    assert [pid for pid, _ in left] == [process.pid]
    assert code in left[0][1]
    assert leftover_processes(known) == []
