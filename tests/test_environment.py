"""daskserve or Python missing, or of another version, somewhere on the cluster."""

from __future__ import annotations

import contextlib
import os
import pickle
import pickletools
import signal
import subprocess
import sys
import time
from pathlib import Path

import dask
import httpx
import pytest

import daskserve as serve
from daskserve import environment
from daskserve.controller.records import PYTHON
from daskserve.exceptions import EnvironmentMismatchError, WorkersUnreachableError
from daskserve.worker import ServeWorkerPlugin
from tests.hosts import HostCluster, open_hosts
from tests.utils import (
    ROOT,
    ProcessCluster,
    poll,
    run_script,
    scheduler_workers,
    write_certificate,
)

#: A process that reads this at its start cannot import daskserve ...
MISSING = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "daskserve":
            raise ModuleNotFoundError("No module named 'daskserve'")

sys.meta_path.insert(0, Missing())
"""
#: ... and one that reads this sees another version of it.
OTHER_VERSION = """
import importlib.metadata as metadata

there = metadata.version
metadata.version = lambda name: "0.0.1" if name == "daskserve" else there(name)
"""


#: The Python of another minor version, with daskserve, which `.ci/run` names.
OTHER_PYTHON = os.environ.get("OTHER_PYTHON", "")

needs_other_python = pytest.mark.skipif(
    not OTHER_PYTHON, reason="OTHER_PYTHON names none"
)
#: What Dask says of it.
ignore_mismatch = pytest.mark.filterwarnings(
    "ignore::distributed.versions.VersionMismatchWarning"
)


def start_with(directory: Path, text: str) -> dict[str, str]:
    """Return an environment in which Python runs `text` at its start."""
    (directory / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(directory), str(ROOT)])}


def names_and_addresses(cluster: ProcessCluster) -> dict[str, str]:
    with cluster.client(set_as_default=False) as client:
        workers = scheduler_workers(client)
        return {worker["name"]: address for address, worker in workers.items()}


def test_one_error_lists_where_it_is_missing(tmp_path: Path) -> None:
    with ProcessCluster(1, nanny=False) as cluster:
        cluster.env = start_with(tmp_path, MISSING)
        cluster.add_worker()
        cluster.wait_for_workers(2)
        cluster.env = start_with(tmp_path, OTHER_VERSION)
        cluster.add_worker()
        cluster.wait_for_workers(3)
        addresses = names_and_addresses(cluster)
        with cluster.client(), pytest.raises(EnvironmentMismatchError) as info:
            serve.start(http_options={"port": 0})
        text = str(info.value)
        assert f"{addresses['w1']}: Python {PYTHON}, daskserve missing" in text
        assert f"{addresses['w2']}: Python {PYTHON}, daskserve 0.0.1" in text
        assert addresses["w0"] not in text


@pytest.mark.parametrize("how", ["stopped", "firewall"])
def test_workers_out_of_reach_are_named_as_such(how: str) -> None:
    """One that stands still, and one that only others' connections do not get to."""
    cluster: ProcessCluster
    with contextlib.ExitStack() as stack:
        env = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "2s"}
        if how == "firewall":
            hosts = stack.enter_context(open_hosts(3))
            cluster = HostCluster(hosts[0], hosts[1:], env=env)
        else:
            cluster = ProcessCluster(2, nanny=False, env=env)
        stack.enter_context(cluster)
        stack.enter_context(
            dask.config.set({"distributed.comm.timeouts.connect": "2s"})
        )
        stack.enter_context(cluster.client())
        reached, address = (names_and_addresses(cluster)[w] for w in ("w0", "w1"))
        with contextlib.ExitStack() as out_of_reach:
            if how == "firewall":
                out_of_reach.enter_context(hosts[2].firewall())
            else:
                cluster.workers[1].send_signal(signal.SIGSTOP)
                out_of_reach.callback(cluster.workers[1].send_signal, signal.SIGCONT)
            with pytest.raises(WorkersUnreachableError) as info:
                serve.start(http_options={"port": 0})
        text = str(info.value)
        assert address in text and reached not in text
        assert "missing" not in text
        # As soon as it can be reached, all is well.
        serve.start(http_options={"port": 0})


def test_missing_on_the_scheduler(tmp_path: Path) -> None:
    env = start_with(tmp_path, MISSING)
    with ProcessCluster(1, nanny=False, env=env) as cluster, cluster.client():
        with pytest.raises(EnvironmentMismatchError, match="the scheduler: .* missing"):
            serve.start(http_options={"port": 0})


def test_a_worker_without_it_may_join_later(tmp_path: Path) -> None:
    with ProcessCluster(1, nanny=False) as cluster, cluster.client():
        with serve.start(http_options={"port": 0, "location": "EveryNode"}) as instance:

            @serve.deployment
            def hello() -> str:
                return "hello"

            hello.deploy()
            cluster.env = start_with(tmp_path, MISSING)
            cluster.add_worker()
            cluster.wait_for_workers(2)
            poll(lambda: "cannot be used here" in cluster.logs())
            hello.options(num_replicas=2).deploy()
            status = serve.status()
            address = names_and_addresses(cluster)["w0"]
            replicas = status.deployments["hello"].replicas
            assert {replica.worker for replica in replicas if replica.worker} == {
                address
            }
            assert [proxy.worker for proxy in status.proxies] == [address]
            assert httpx.get(f"{instance.http_urls[0]}/hello").text == "hello"


def test_guarded_plugins_load_as_themselves() -> None:
    loaded = pickle.loads(environment.guarded(ServeWorkerPlugin()))
    assert isinstance(loaded, ServeWorkerPlugin)


def test_guarded_plugins_load_where_daskserve_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "plugin.pickle"
    path.write_bytes(environment.guarded(ServeWorkerPlugin()))
    code = f"""
import pickle
plugin = pickle.load(open({str(path)!r}, "rb"))
print(type(plugin).__name__)
"""
    env = {**os.environ, **start_with(tmp_path, MISSING)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        check=True,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.stdout.strip() == "WorkerPlugin"
    assert "this worker serves nothing" in done.stderr


def test_what_comes_before_the_check_is_no_bytecode() -> None:
    guarded = environment.guarded(ServeWorkerPlugin())
    names = [arg for _, arg, _ in pickletools.genops(guarded) if isinstance(arg, str)]
    assert names[:2] == ["builtins", "eval"]
    assert "CodeType" not in guarded.decode(errors="replace")
    code, namespace = environment._by_source(environment._probe)
    assert eval(code, namespace)[0] == PYTHON
    assert isinstance(namespace["source"], str)


def test_plugins_of_another_python_load_as_idle_ones(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loaded = environment._load(b"\x80garbage", "3.99")
    assert type(loaded).__name__ == "WorkerPlugin"
    assert f"Python {PYTHON} runs here, on the scheduler 3.99" in caplog.text


@pytest.fixture
def other_version() -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.check_output([OTHER_PYTHON, "-c", code], text=True).strip()


@needs_other_python
@ignore_mismatch
@pytest.mark.long
def test_a_worker_of_another_python(other_version: str) -> None:
    with ProcessCluster(1, nanny=False) as cluster, cluster.client():
        worker = cluster.add_worker(python=OTHER_PYTHON)
        cluster.wait_for_workers(2)
        address = names_and_addresses(cluster)["w1"]
        with pytest.raises(EnvironmentMismatchError) as info:
            serve.start(http_options={"port": 0})
        assert f"{address}: Python {other_version}, daskserve" in str(info.value)
        assert names_and_addresses(cluster)["w0"] not in str(info.value)
        time.sleep(0.5)
        assert worker.poll() is None


@needs_other_python
@ignore_mismatch
@pytest.mark.long
def test_a_worker_of_another_python_may_join_later(other_version: str) -> None:
    with ProcessCluster(1, nanny=False) as cluster, cluster.client():
        with serve.start(http_options={"port": 0, "location": "EveryNode"}):
            cluster.add_worker(python=OTHER_PYTHON)
            cluster.wait_for_workers(2)
            poll(lambda: f"Python {other_version} runs here" in cluster.logs())

            @serve.deployment(num_replicas=2, route_prefix=None)
            def where() -> str:
                return "here"

            where.deploy()
            replicas = serve.status().deployments["where"].replicas
            address = names_and_addresses(cluster)["w0"]
            assert [replica.worker for replica in replicas] == [address] * 2
            assert where.get_handle().remote().result(timeout_s=10) == "here"


CLIENT = """
import sys
from distributed import Client
import daskserve as serve

@serve.deployment
def hello():
    return "hello"

with Client(sys.argv[1]):
    for attempt in (serve.start, serve.connect, hello.deploy, lambda: serve.run(hello.bind())):
        try:
            attempt()
        except serve.ServeError as error:
            print(type(error).__name__, error)
        else:
            print("fine")
"""  # noqa: E501


@needs_other_python
@pytest.mark.long
def test_a_client_of_another_python(other_version: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CLIENT)
    with ProcessCluster(1, nanny=False) as cluster, cluster.client():
        with serve.start(http_options={"port": 0}):
            done = subprocess.run(
                [OTHER_PYTHON, "-W", "ignore", str(script), cluster.address],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                check=True,
                capture_output=True,
                text=True,
                timeout=50,
            )
            start, connect, *deploys = done.stdout.splitlines()
            assert connect == "fine"
            assert f"Python {other_version} and daskserve" in start
            assert start.count(f": Python {PYTHON}, daskserve") == 2
            assert len(deploys) == 2
            for line in deploys:
                name, _, text = line.partition(" ")
                assert name == "EnvironmentMismatchError"
                assert f"comes from Python {other_version}" in text
                assert f"the scheduler has {PYTHON}" in text
            assert serve.list_deployments() == {}
            assert cluster.workers[0].poll() is None


#: In a process that reads this, daskserve misses what only Linux has, or only Unix.
ONLY_LINUX = """
import builtins, os, select, signal, socket, types

HIDDEN = {
    os: "O_CLOEXEC O_NOFOLLOW O_NONBLOCK fork register_at_fork",
    select: "epoll",
    signal: "pthread_sigmask",
    socket: "AF_UNIX SO_REUSEPORT TCP_INFO TCP_KEEPCNT TCP_KEEPIDLE TCP_KEEPINTVL",
}

class Without(types.ModuleType):
    def __init__(self, module, names):
        super().__init__(module.__name__)
        self._module, self._names = module, names.split()

    def __getattr__(self, name):
        if name in self._names:
            raise AttributeError(f"no {name} here")
        return getattr(self._module, name)

    def stat(self, path, *args, **kwargs):
        if str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        return self._module.stat(path, *args, **kwargs)

without = {module.__name__: Without(module, names) for module, names in HIDDEN.items()}
there = builtins.__import__

def found(name, names=None, *args, **kwargs):
    if str((names or {}).get("__name__")).startswith("daskserve"):
        if name in ("fcntl", "resource", "uvloop"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        if name in without:
            return without[name]
    return there(name, names, *args, **kwargs)

builtins.__import__ = found
"""

ON_A_LAPTOP = """
import httpx
import websockets.sync.client
from distributed import Client, LocalCluster
from fastapi import FastAPI, WebSocket

import daskserve as serve

app = FastAPI()

@serve.deployment(num_replicas=2)
@serve.ingress(app)
class Model:
    @app.get("/double")
    def double(self, x: int) -> int:
        return 2 * x

    @app.websocket("/echo")
    async def echo(self, ws: WebSocket) -> None:
        await ws.accept()
        await ws.send_text(await ws.receive_text())

    def times(self, x: int) -> int:
        return 3 * x

def main(processes, location, **options):
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=processes,
        dashboard_address="127.0.0.1:0",
    ) as cluster, Client(cluster):
        with serve.start(
            http_options={"port": 0, "location": location, **options}
        ) as instance:
            for version in "12":
                Model.options(version=version).deploy()
                url = serve.get_deployment("Model").url
                verify = not options
                with httpx.Client(verify=verify) as http:
                    assert http.get(f"{url}/double", params={"x": 4}).json() == 8
                handle = Model.get_handle()
                assert handle.times.remote(5).result(10) == 15
            if verify:
                ws_url = url.replace("http", "ws", 1) + "/echo"
                with websockets.sync.client.connect(ws_url) as ws:
                    ws.send("hello")
                    assert ws.recv(5) == "hello"
            Model.delete()

if __name__ == "__main__":
    main(True, "EveryNode")
    main(False, "HeadOnly")
    main(True, "HeadOnly", ssl_certfile=CERTIFICATE, ssl_keyfile=CERTIFICATE)
    try:
        main(False, "HeadOnly", uds="somewhere")
    except serve.ServeError as err:
        assert "no Unix sockets" in str(err), err
    else:
        raise AssertionError("no Unix sockets")
    print("all answered")
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(120)
def test_what_only_linux_has_is_missing(tmp_path: Path) -> None:
    done = run_script(
        ON_A_LAPTOP.replace("CERTIFICATE", repr(str(write_certificate(tmp_path)))),
        env=start_with(tmp_path, ONLY_LINUX),
        timeout=110,
    )
    assert done.stdout.endswith("all answered\n")
    assert "Traceback" not in done.stdout
