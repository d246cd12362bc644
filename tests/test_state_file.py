"""A scheduler that is lost, and what the next one knows of it: real processes."""

from __future__ import annotations

import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import daskserve as serve
from daskserve.exceptions import ServeNotRunningError
from tests.utils import ProcessCluster, free_port, poll

TOKEN = "a-secret-of-some-length"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def answer(url: str, path: str) -> Any:
    """Return the JSON at a path, or None if there is none yet."""
    try:
        response = httpx.get(url + path, headers=HEADERS, timeout=10)
    except httpx.HTTPError:
        return None
    return response.json() if response.status_code == 200 else None


def make_says() -> Any:
    class Says:
        def __init__(self, number: int, word: str = "") -> None:
            self.number = number
            self.word = word

        def reconfigure(self, config: dict[str, str]) -> None:
            self.word = config["word"]

        def __call__(self) -> dict[str, Any]:
            return {"number": self.number, "word": self.word}

    return Says


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "serve.state"


def with_state(state: Path, **kwargs: Any) -> ProcessCluster:
    args = ["--preload", "daskserve", "--state", str(state)]
    return ProcessCluster(scheduler_args=args, **kwargs)


@pytest.mark.long
def test_all_of_20_deployments_answer_again(state: Path) -> None:
    port = free_port()
    with with_state(state, nanny=[False, True]) as cluster:
        with cluster.client():
            http = {"port": port, "token": TOKEN}
            url = serve.start(detached=True, http_options=http).http_urls[0]
            for number in range(20):
                serve.deployment(
                    name=f"d{number}",
                    route_prefix=f"/path/{number}",
                    version=str(number),
                    num_replicas=1 + number % 2,
                    user_config={"word": f"word{number}"},
                    max_ongoing_requests=10 + number,
                    request_timeout_s=20 + number,
                )(make_says()).deploy(number)
            serve.get_deployment("d1").options(version="new", num_replicas=1).deploy()
            before = serve.list_deployments()
            history = repr(serve.history("d1"))
            serve.get_deployment("d19").delete()
        assert stat.S_IMODE(state.stat().st_mode) == 0o600
        # Proxies serve for as long as Dask lets their workers live.
        groups = [worker.group for worker in cluster.workers]
        cluster.scheduler.kill()
        began = time.monotonic()
        answers = 0
        while answer(url, "/path/0") is not None:
            answers += 1
        print(f"{answers} answers in {time.monotonic() - began:.2f} s after the kill")
        cluster.kill_scheduler()
        poll(lambda: not any(group() for group in groups))  # nothing is left of them
        cluster.start_scheduler()
        cluster.add_worker()
        cluster.add_worker()
        began = time.monotonic()
        # No client has connected: HTTP is there first.
        for number in range(19):
            want = {"number": number, "word": f"word{number}"}
            path = f"/path/{number}"
            poll(lambda p=path, w=want: answer(url, p) == w, 20)
        print(f"20 deployments after {time.monotonic() - began:.2f} s")
        with cluster.client():
            assert serve.start(detached=True).http_urls == [url]
            after = serve.list_deployments()
            del before["d19"]
            assert after == before
            poll(
                lambda: (
                    {d.state for d in serve.status().deployments.values()}
                    == {"HEALTHY"}
                ),
                20,
            )
            assert repr(serve.history("d1")) == history
            serve.get_deployment("d1").rollback()
            assert serve.get_deployment("d1").version == "1"
            assert len(serve.status().deployments["d1"].replicas) == 2
            serve.shutdown()
        # What was shut down does not come back.
        cluster.kill_scheduler()
        cluster.start_scheduler()
        with cluster.client(), pytest.raises(ServeNotRunningError):
            serve.status()


def test_unreadable_state(state: Path) -> None:
    state.write_bytes(b"daskserve-state 1 abc\nnot what it was")
    with with_state(state, n_workers=1, nanny=False) as cluster, cluster.client():
        with pytest.raises(ServeNotRunningError, match="checksum"):
            serve.connect()
        serve.start(detached=True, http_options={"port": 0})
        reason = serve.status().instance.reason
        assert "checksum" in reason
        (aside,) = state.parent.glob("serve.state.unreadable-*")
        assert str(aside) in reason
        assert aside.read_bytes().endswith(b"not what it was")
        assert "checksum" in cluster.logs()
        # Later it cannot be written: all goes on, and says so.
        state.unlink()
        state.mkdir()
        deployment = serve.deployment(name="says")(make_says())
        deployment.deploy(1)
        reason = serve.status().instance.reason
        assert "cannot be written" in reason
        url = deployment.url
        assert url is not None
        assert answer(url, "") == {"number": 1, "word": ""}


def test_a_second_scheduler_says_so(state: Path) -> None:
    args = ["--preload", "daskserve", "--state", str(state)]
    with with_state(state, n_workers=1, nanny=False) as cluster:
        command = [sys.executable, "-m", "dask", "scheduler", "--port", "0"]
        run = subprocess.run(
            [*command, *args], capture_output=True, text=True, timeout=30
        )
        assert run.returncode == 2
        pid = cluster.scheduler.pid
        assert f"in use by another scheduler (process {pid} on " in run.stderr


@pytest.mark.parametrize("args", [("--state", "/nowhere/at/all"), ("--stat", "x")])
def test_a_command_line_that_cannot_work(args: tuple[str, str]) -> None:
    command = [sys.executable, "-m", "dask", "scheduler", "--port", "0"]
    command += ["--preload", "daskserve", *args]
    run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert run.returncode == 2
    assert args[0] in run.stderr
