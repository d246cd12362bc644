"""``dask serve`` as a user types it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import daskserve as serve
from daskserve.cli import serve as command
from tests.utils import Process, ProcessCluster, free_port, poll

pytestmark = pytest.mark.slow


def invoke(*args: str) -> Result:
    """Run a command in this process; what it raises by mistake fails the test."""
    return CliRunner().invoke(command, args, catch_exceptions=False)


@contextmanager
def run_demo(directory: Path, *args: str) -> Iterator[Process]:
    """Start a demo; kill what is left of it at the end."""
    arguments = [sys.executable, "-m", "dask", "serve", "demo", *args]
    log = directory / "demo.log"
    # Python buffers what goes to a file, as it does with a pipe.
    process = Process("demo", arguments, log, {"PYTHONUNBUFFERED": ""}, directory)
    try:
        yield process
    finally:
        process.end_group()
        print(log.read_text(errors="replace"))  # pytest shows it for tests that fail


def wait_for(process: Process, text: str) -> str:
    """Wait until a process has printed something; return all that it has printed."""

    def look() -> str | None:
        printed = process.log.read_text()
        if text in printed:
            return printed
        assert process.poll() is None, f"exit {process.returncode}:\n{printed}"
        return None

    return poll(look, 30)


def check_ended(process: Process) -> None:
    """Wait for a clean end, and for that of all that the process started."""
    assert process.wait(20) == 0
    poll(lambda: not process.group())
    printed = process.log.read_text()
    assert printed.endswith("Stopped.\n")
    # A worker on a busy machine may not end in the time that Dask gives it.
    printed = re.sub(r".*Worker process still alive after .*, killing\n", "", printed)
    for word in ("Traceback", "Error", "WARNING", "Warning", "Exception"):
        assert word not in printed


def curl(line: str) -> str:
    arguments = shlex.split(line)
    assert arguments[0] == "curl"
    return subprocess.run(
        arguments, check=True, stdout=subprocess.PIPE, text=True, timeout=20
    ).stdout


def test_demo_to_ctrl_c(tmp_path: Path) -> None:
    with run_demo(tmp_path, "--port", "0") as process:
        lines = wait_for(process, "End with Ctrl-C.").splitlines()
        base = next(line for line in lines if line.startswith("Serving at ")).split()[2]
        # The line that is to be copied, and what is to come of it.
        at = next(i for i, line in enumerate(lines) if line.startswith("Try this"))
        digit = int(lines[at].rstrip(":").split()[-1])
        assert json.loads(curl(lines[at + 2]))["digit"] == digit == 3

        curl(f"curl -s -o {tmp_path}/3.png {base}/digits/example.png")
        upload = f"-H 'Content-Type: image/png' --data-binary @{tmp_path}/3.png"
        assert json.loads(curl(f"curl -s {base}/digits/predict {upload}"))["digit"] == 3
        short = "-H 'Content-Type: application/json' -d '{\"pixels\": [1]}'"
        status = f"-o /dev/null -w '%{{http_code}}' {base}/digits/predict"
        assert curl(f"curl -s {status} {short}") == "422"
        page = curl(f"curl -s {base}/digits/")
        assert f"curl -s {base}/digits/predict" in page
        assert f"{base}/digits/docs" not in page and "/digits/docs" in page
        assert "/digits/openapi.json" in curl(f"curl -s {base}/digits/docs")

        routes = json.loads(curl(f"curl -s {base}/-/routes"))
        assert routes == {
            "/": "root",
            "/api1": "api1",
            "/api2": "api2",
            "/counter": "counter",
            "/digits": "digits",
            "/hello": "hello",
        }
        for prefix in [*routes, "/-/routes"]:
            assert any(line.split()[:1] == [base + prefix] for line in lines), prefix
        for path, text in {
            "/hello/": "Hello, world!",
            "/": "Hello from the root!",
            "/api1/": "Hello from the root!",
            "/api2/": "Hello from the root!",
            "/api1/subpath": "Hello 1!",
            "/api2/subpath": "Hello 2!",
        }.items():
            assert json.loads(curl(f"curl -s {base}{path}")) == text
        greeting = json.loads(curl(f"curl -s -X POST {base}/hello/x"))
        assert greeting == "Hello from x!"
        counts = [json.loads(curl(f"curl -s {base}/counter"))["count"] for _ in "ab"]
        assert counts == [1, 2]

        process.signal_group(signal.SIGINT)  # as a terminal does
        check_ended(process)


@pytest.mark.long
def test_demo_to_sigterm(tmp_path: Path) -> None:
    port = free_port()
    with run_demo(tmp_path, "--port", str(port), "--workers", "1") as process:
        wait_for(process, "End with Ctrl-C.")
        base = f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(f"{base}/-/healthz", timeout=10) as response:
            assert response.read() == b"success"
        os.kill(process.pid, signal.SIGTERM)
        check_ended(process)


def test_ctrl_c_while_the_demo_starts(tmp_path: Path) -> None:
    with run_demo(tmp_path, "--port", "0") as process:
        wait_for(process, "Starting")
        poll(lambda: len(process.group()) > 2)  # workers
        process.signal_group(signal.SIGINT)
        check_ended(process)


def test_demo_with_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        args = ["--port", str(port), "--workers", "1"]
        with run_demo(tmp_path, *args) as process:
            assert process.wait(30) == 1
            poll(lambda: not process.group())
            lines = process.log.read_text().splitlines()
    assert len(lines) == 2  # the first says what is being done
    assert lines[1].startswith("Error: ")
    assert f"127.0.0.1:{port}" in lines[1]


def test_demo_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as if it were not installed
    result = invoke("demo")
    assert result.exit_code == 1
    assert result.output == (
        "Error: the demo needs scikit-learn: run pip install 'daskserve[demo]'\n"
    )


@pytest.mark.parametrize(
    "args", [["--port", "65536"], ["--workers", "0"], ["--port", "x"]]
)
def test_demo_options_are_checked(args: list[str]) -> None:
    result = invoke("demo", *args)
    assert result.exit_code == 2
    assert "Invalid value for" in result.output


def test_status_and_shutdown() -> None:
    @serve.deployment(version="7")
    def hello() -> str:
        return "Hello!"

    with ProcessCluster(1, nanny=False) as cluster:
        scheduler = ["--scheduler", cluster.address]
        result = invoke("status", *scheduler)
        assert result.exit_code == 1
        assert result.output.startswith("Error: no daskserve instance runs on ")
        assert len(result.output.splitlines()) == 1
        result = invoke("shutdown", *scheduler)
        assert result.exit_code == 0
        assert (
            result.output == f"There is no daskserve instance on {cluster.address}.\n"
        )

        with cluster.client() as client:
            instance = serve.start(client, http_options={"port": 0}, detached=True)
            hello.deploy()
        url = instance.http_urls[0]

        result = invoke("status", *scheduler)
        assert result.exit_code == 0
        for word in (cluster.address, url, "hello  HEALTHY  1/1 replicas  /hello"):
            assert word in result.stdout
        file = cluster.directory / "scheduler.json"
        file.write_text(json.dumps({"address": cluster.address, "id": "Scheduler-1"}))
        found_by_file = invoke("status", "--scheduler-file", f"{file}")
        assert (found_by_file.exit_code, "hello  HEALTHY" in found_by_file.stdout) == (
            0,
            True,
        )
        result = invoke("status", "--json", *scheduler)
        found = json.loads(result.stdout)
        assert found["instance"]["detached"] is True
        assert found["proxies"][0]["url"] == url
        assert found["deployments"]["hello"]["version"] == "7"
        assert found["deployments"]["hello"]["replicas"][0]["pid"] == (
            cluster.workers[0].pid
        )

        assert curl(f"curl -s {url}/hello") == "Hello!"
        # As typed: the entry point is there, and the address can be in the environment.
        typed = subprocess.run(
            [sys.executable, "-m", "dask", "serve", "shutdown"],
            env={**os.environ, "DASK_SCHEDULER_ADDRESS": cluster.address},
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert (typed.returncode, typed.stderr) == (0, "")
        assert typed.stdout == f"Shut down daskserve on {cluster.address}.\n"
        assert invoke("status", *scheduler).exit_code == 1
        with pytest.raises(OSError):
            urllib.request.urlopen(f"{url}/hello", timeout=5)


def test_status_of_a_tls_cluster() -> None:
    with ProcessCluster(1, nanny=False, protocol="tls") as cluster:
        scheduler = ["--scheduler", cluster.address, "--timeout", "5"]
        certificate, key = cluster.directory / "cert.pem", cluster.directory / "key.pem"
        tls = ["--tls-ca-file", f"{certificate}", "--tls-cert", f"{certificate}"]
        result = invoke("status", *scheduler, *tls, "--tls-key", f"{key}")
        assert result.exit_code == 1
        assert "no daskserve instance runs on" in result.output
        result = invoke("status", *scheduler)  # without a certificate
        assert result.exit_code == 1
        assert result.output.startswith("Error: cannot connect to a scheduler at tls:")
        assert len(result.output.splitlines()) == 1
        result = invoke("status", *scheduler, "--tls-ca-file", "/nowhere.pem")
        assert result.exit_code == 1
        assert result.output.startswith("Error: cannot connect to a scheduler at tls:")


@pytest.mark.parametrize("name", ["status", "shutdown"])
@pytest.mark.parametrize("address", ["tcp://127.0.0.1:{port}", "nonsense://x"])
def test_no_scheduler(name: str, address: str) -> None:
    address = address.format(port=free_port())
    result = invoke(name, "--scheduler", address, "--timeout", "1")
    assert result.exit_code == 1
    assert result.output.startswith(
        f"Error: cannot connect to a scheduler at {address}"
    )
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "does not exist"),
        ("", "names no scheduler"),
        ("[1]", "names no scheduler"),
        ('{"address": 7}', "names no scheduler"),
        ("\xff", "names no scheduler"),
        ('{"address": "tcp://127.0.0.1:1"}', "are two: give one"),
    ],
)
def test_scheduler_files_that_are_none(
    tmp_path: Path, text: str | None, why: str
) -> None:
    file = tmp_path / "scheduler.json"
    if text is not None:
        file.write_text(text, encoding="latin-1")
    both = ["--scheduler", "tcp://127.0.0.1:2"] if "two" in why else []
    result = invoke("status", "--scheduler-file", f"{file}", *both)
    assert (result.exit_code, f"{file}" in result.output) == (2, True)
    assert why in result.output


def test_the_address_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    result = invoke("status")
    assert result.exit_code == 2
    assert "DASK_SCHEDULER_ADDRESS" in result.output
