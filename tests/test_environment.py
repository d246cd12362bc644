"""daskserve missing, or of another version, somewhere on the cluster."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import daskserve as serve
from daskserve import environment
from daskserve.exceptions import EnvironmentMismatchError
from daskserve.worker import ServeWorkerPlugin
from tests.utils import ROOT, ProcessCluster, poll

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


def start_with(directory: Path, text: str) -> dict[str, str]:
    """Return an environment in which Python runs `text` at its start."""
    (directory / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(directory), str(ROOT)])}


def names_and_addresses(cluster: ProcessCluster) -> dict[str, str]:
    with cluster.client(set_as_default=False) as client:
        workers = client.scheduler_info(n_workers=-1)["workers"]
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
        assert f"{addresses['w1']}: missing" in text
        assert f"{addresses['w2']}: 0.0.1" in text
        assert addresses["w0"] not in text


def test_missing_on_the_scheduler(tmp_path: Path) -> None:
    env = start_with(tmp_path, MISSING)
    with ProcessCluster(1, nanny=False, env=env) as cluster, cluster.client():
        with pytest.raises(EnvironmentMismatchError, match="the scheduler: missing"):
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
            poll(lambda: "cannot be imported here" in cluster.logs())
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
