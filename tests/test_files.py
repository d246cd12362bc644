"""How many files processes may open, and who says that there are too few."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import httpx
import pytest

import daskserve as serve
from daskserve.transport import files
from daskserve.transport.files import FileWatch, missing_files, open_files
from tests.utils import ProcessCluster, poll

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such limit")


def test_what_is_open_is_counted() -> None:
    before = open_files()
    assert before is not None
    kept = files.reserve_files(10)
    assert open_files() == before + 10
    for file in kept:
        os.close(file)
    assert missing_files(5) == 0


def test_watch(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    number = 80
    monkeypatch.setattr(files, "open_files", lambda: number)
    monkeypatch.setattr(files, "max_files", lambda: 100)
    watch = FileWatch("worker w")
    assert watch.look(0.0) == ""
    number = 81
    assert watch.look(1.0) == ""  # not looked at
    assert "worker w has 81 of the 100 files open" in watch.look(10.0)
    number = 75
    assert "75 of the 100" in watch.look(20.0)  # one crossing, one warning
    assert len(caplog.records) == 1
    number = 70
    assert watch.look(30.0) == watch.reason == ""
    number = 90
    assert watch.look(40.0)
    assert len(caplog.records) == 2


class Limited(ProcessCluster):
    """Processes that may open so many files."""

    limits = "-n 220"

    def _place(self, name: str) -> tuple[list[str], list[str]]:
        before, options = super()._place(name)
        if name != "scheduler":
            script = f'ulimit {self.limits}; exec "$@"'
            before = [*before, "sh", "-c", script, "sh"]
        return before, options


class Raised(Limited):
    limits = "-Sn 256"


@pytest.mark.long
def test_a_worker_with_few_files() -> None:
    @serve.deployment(route_prefix="/f", health_check_period_s=0.5)
    class Opens:
        def __init__(self) -> None:
            self.files: list[int] = []

        def __call__(self, number: int) -> int:
            while number > (open_files() or 0):
                self.files.append(os.open(os.devnull, os.O_RDONLY))
            while len(self.files) and number < (open_files() or 0):
                os.close(self.files.pop())
            return open_files() or 0

    with Limited(1, nanny=False) as cluster, cluster.client() as client:
        with client.as_current():
            url = serve.start(client, http_options={"port": 0}).http_urls[0]
            Opens.deploy()
            handle = Opens.get_handle()
            assert serve.status().instance.reason == ""
            handle.remote(190).result(timeout_s=10)
            reason = poll(lambda: serve.status().instance.reason, 20)
            worker = serve.status().proxies[0].worker
            assert f"worker {worker} has 1" in reason and "of the 220 files" in reason
            assert reason in str(serve.status())
            assert "of the 220 files" in cluster.logs()
            # All of them: whether it lives can be asked all the same.
            handle.remote(218).result(timeout_s=10)
            poll(lambda: "Hardly any of the 220 files" in cluster.logs())
            assert httpx.get(f"{url}/-/healthz", timeout=5).text == "success"
            handle.remote(60).result(timeout_s=10)
            poll(lambda: not serve.status().instance.reason, 20)


@pytest.mark.slow
def test_workers_raise_their_limit() -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with Raised(1, nanny=False) as cluster, cluster.client() as client:
        assert [*client.run(files.max_files).values()] == [256]
        serve.start(client, http_options={"location": "NoServer"})
        assert [*client.run(files.max_files).values()] == [max(256, hard // 2)]


def test_raising_a_limit_that_cannot_be() -> None:
    script = "from daskserve.transport.files import raise_max_files as r; print(r())"
    command = f"ulimit -n 100; {sys.executable} -c '{script}'"
    output = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert output.stdout == "100\n"
