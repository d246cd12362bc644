"""Real clusters, servers and scripts for end-to-end tests; all of it synchronous."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import psutil
import pytest
import uvicorn
from distributed import Client, Security

ROOT = Path(__file__).parents[1]

T = TypeVar("T")


def poll(fn: Callable[[], T | None], timeout: float = 10, period: float = 0.02) -> T:
    """Return the first true result of `fn`; fail when there is none in time."""
    deadline = time.monotonic() + timeout
    while True:
        result = fn()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"{fn} still gives {result!r} after {timeout} s")
        time.sleep(period)


def scheduler_workers(client: Client) -> dict[str, dict[str, Any]]:
    """Return what the scheduler knows of its workers, by address.

    Not by `Client.scheduler_info`: the client renews that beside us, without workers.
    """
    scheduler: Any = client.scheduler
    workers: dict[str, Any] = client.sync(scheduler.identity, n_workers=-1)["workers"]
    return workers


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on right now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Process(subprocess.Popen[bytes]):
    """A process in a group of its own, with the name by which `logs` shows it."""

    def __init__(
        self,
        name: str,
        args: Sequence[str],
        log: Path,
        env: Mapping[str, str],
        cwd: Path,
    ) -> None:
        self.name = name
        self.log = log
        self._ended = False
        with log.open("wb") as file:
            super().__init__(
                args,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(env, cwd),
                cwd=cwd,
                start_new_session=True,
            )

    def signal_group(self, signum: int) -> None:
        """Send a signal to the process, if it lives, and to all that it started."""
        if self._ended:  # the number may be somebody else's by now
            return
        try:
            os.killpg(self.pid, signum)
        except ProcessLookupError:
            pass

    def group(self) -> list[int]:
        """Return the ids of the processes of the group that still run."""
        return [
            process.pid
            for process in psutil.process_iter()
            if is_running(process.pid) and _group_of(process.pid) == self.pid
        ]

    def end_group(self) -> None:
        """Kill the process and all that it started; wait until none is left."""
        self.signal_group(signal.SIGKILL)
        self.wait(10)
        poll(lambda: not self.group())
        self._ended = True


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it is more than an entry in a table."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class ProcessCluster:
    """A scheduler and workers, each a process started as from a command line.

    Parameters
    ----------
    n_workers
        Workers to start with; named w0, w1, ...
    nanny
        Whether workers have one: one answer for all, or a list with one for each.
    nthreads
        Of each worker.
    protocol
        "tls" makes a certificate that is good for all roles and `security`.
    worker_args, scheduler_args
        More arguments of the command line.
    env
        More environment variables for all.
    timeout
        Seconds for all workers to arrive.
    """

    def __init__(
        self,
        n_workers: int = 2,
        *,
        nanny: bool | Sequence[bool] = True,
        nthreads: int = 1,
        protocol: Literal["tcp", "tls", "ws"] = "tcp",
        worker_args: Sequence[str] = (),
        scheduler_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        timeout: float = 40,
    ) -> None:
        nannies = [nanny] * n_workers if isinstance(nanny, bool) else list(nanny)
        if len(nannies) != n_workers:
            raise ValueError(f"{nanny=} must have {n_workers} elements")
        self.nthreads = nthreads
        self.protocol = protocol
        self.worker_args = list(worker_args)
        self.scheduler_args = list(scheduler_args)
        self.env = dict(env or {})
        self.timeout = timeout
        #: Workers that were started and not killed by `kill` or `terminate`.
        self.workers: list[Process] = []
        self.security: Security | None = None
        self.address = ""
        self.scheduler: Process
        self._nannies = nannies
        self._processes: list[Process] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.directory = Path(stack.enter_context(_temporary_directory()))
            stack.callback(self._end)
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def client(self, **kwargs: Any) -> Client:
        """Return a new client; close it, or use it in a with block."""
        kwargs.setdefault("security", self.security)
        return Client(self.address, **kwargs)

    def add_worker(
        self,
        *args: str,
        nanny: bool = False,
        nthreads: int | None = None,
        python: str = sys.executable,
    ) -> Process:
        """Start one more worker; do not wait for it to arrive.

        Parameters
        ----------
        *args
            More arguments of the command line, after those of all workers.
        """
        number = sum(not p.name.startswith("scheduler") for p in self._processes)
        worker = self._run(
            f"w{number}",
            "worker",
            "--scheduler-file",
            str(self.directory / "scheduler.json"),
            "--name",
            f"w{number}",
            "--nthreads",
            str(nthreads or self.nthreads),
            "--local-directory",
            str(self.directory),
            "--memory-limit",
            "0",
            "--nanny" if nanny else "--no-nanny",
            *self.worker_args,
            *args,
            python=python,
        )
        self.workers.append(worker)
        return worker

    def wait_for_workers(self, count: int, timeout: float | None = None) -> None:
        """Wait until the scheduler knows exactly `count` workers, all set up."""
        with self.client(set_as_default=False) as client:
            wanted = ["running"] * count
            poll(lambda: self._running() and _states(client) == wanted, timeout or 30)

    def kill(self, worker: Process) -> None:
        """Kill a worker, and its nanny, as a machine that loses power would."""
        self.workers.remove(worker)
        worker.end_group()

    def kill_scheduler(self) -> None:
        """Kill the scheduler, and wait for the workers, which end with it."""
        self.scheduler.end_group()
        while self.workers:
            self.workers.pop().wait(20)

    def start_scheduler(self) -> None:
        """Start another scheduler at the address of the one that was killed."""
        number = sum(p.name.startswith("scheduler") for p in self._processes)
        port = self.address.rpartition(":")[2]
        self.scheduler = self._run_scheduler(f"scheduler{number}", port)

    def terminate(self, worker: Process, timeout: float = 30) -> None:
        """Ask a worker to leave, as Slurm and ^C do, and wait until it has."""
        self.workers.remove(worker)
        worker.terminate()
        worker.wait(timeout)

    def logs(self) -> str:
        """Return what all processes have printed until now."""
        return "\n".join(
            f"--- {process.name} (pid {process.pid}, exit {process.poll()})\n"
            + process.log.read_text(errors="replace")
            for process in self._processes
        )

    def _start(self) -> None:
        if self.protocol == "tls":
            self.security = _write_certificates(self.directory)
        self.scheduler = self._run_scheduler("scheduler", "0")
        # Workers wait for the file, so that all of them start at the same time.
        for nanny in self._nannies:
            self.add_worker(nanny=nanny)
        self.address = poll(self._read_address, self.timeout)
        if self._nannies:
            self.wait_for_workers(len(self._nannies), self.timeout)

    def _run_scheduler(self, name: str, port: str) -> Process:
        file = str(self.directory / "scheduler.json")
        return self._run(
            name,
            "scheduler",
            "--port",
            port,
            "--scheduler-file",
            file,
            *self.scheduler_args,
        )

    def _run(self, name: str, *args: str, python: str = sys.executable) -> Process:
        before, options = self._place(name)
        command = [*before, python, "-m", "dask", *args, *options]
        command += ["--protocol", self.protocol, "--dashboard-address", "127.0.0.1:0"]
        if self.protocol == "tls":
            certificate, key = self.directory / "cert.pem", self.directory / "key.pem"
            command += ["--tls-ca-file", str(certificate)]
            command += ["--tls-cert", str(certificate), "--tls-key", str(key)]
        log = self.directory / f"{name}.log"
        process = Process(name, command, log, self.env, self.directory)
        self._processes.append(process)
        return process

    def _place(self, name: str) -> tuple[list[str], list[str]]:
        """Return what stands before a process's command, and options for its host."""
        return [], ["--host", "127.0.0.1"]

    def _read_address(self) -> str | None:
        self._running()
        try:
            text = (self.directory / "scheduler.json").read_text()
            return str(json.loads(text)["address"])
        except (FileNotFoundError, json.JSONDecodeError):  # not there, not complete
            return None

    def _running(self) -> bool:
        for process in [self.scheduler, *self.workers]:
            if process.poll() is not None:
                raise AssertionError(f"{process.name} has ended\n{self.logs()}")
        return True

    def _end(self) -> None:
        """End the processes that were started here, all of them, and no others."""
        for process in self._processes:
            process.signal_group(signal.SIGKILL)
        for process in self._processes:
            process.end_group()
        print(self.logs())  # pytest shows it for tests that fail


def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="daskserve-test-")


def _states(client: Client) -> list[str]:
    workers = scheduler_workers(client).values()
    return [worker["status"] for worker in workers]


def _environment(env: Mapping[str, str], directory: Path) -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "DASK_TEMPORARY_DIRECTORY": str(directory),
        **env,
    }


def _write_certificates(directory: Path) -> Security:
    """Write a certificate, which is its own CA, and a key; return what clients need."""
    temporary = Security.temporary()
    (directory / "cert.pem").write_text(temporary.tls_client_cert)
    (directory / "key.pem").write_text(temporary.tls_client_key)
    return Security(
        require_encryption=True,
        tls_ca_file=str(directory / "cert.pem"),
        tls_client_cert=str(directory / "cert.pem"),
        tls_client_key=str(directory / "key.pem"),
    )


def write_certificate(directory: Path) -> Path:
    """Write a certificate, which is its own CA, and its key to one file; return it."""
    temporary = Security.temporary()
    path = directory / "both.pem"
    path.write_text(temporary.tls_client_cert + temporary.tls_client_key)
    return path


def run_script(
    text: str,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 50,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a Python script in a process of its own, and end all that it started.

    Parameters
    ----------
    text
        The script; it is run from a file in a directory of its own.
    env
        More environment variables.
    timeout
        Seconds; a script that takes longer fails the test.
    check
        Whether a script that exits with an error fails the test.
    """
    with _temporary_directory() as name:
        directory = Path(name)
        script = directory / "script.py"
        script.write_text(text)
        command = [sys.executable, str(script)]
        log = directory / "script.log"
        process = Process("script", command, log, env or {}, directory)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.end_group()
        output = process.log.read_text(errors="replace")
    assert code is not None, f"the script still ran after {timeout} s:\n{output}"
    assert code == 0 or not check, f"the script exited with {code}:\n{output}"
    return subprocess.CompletedProcess(command, code, output)


@contextmanager
def run_uvicorn(app: Any, **config: Any) -> Iterator[str]:
    """Serve an ASGI app by plain uvicorn in a thread; yield its URL."""
    options = {"host": "127.0.0.1", "port": 0, "log_level": "warning", **config}
    server = uvicorn.Server(uvicorn.Config(app, **options))
    thread = threading.Thread(target=server.run, name="test-uvicorn")
    thread.start()
    try:
        poll(lambda: server.started or not thread.is_alive())
        assert server.started, "uvicorn did not start"
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "uvicorn does not end"


def leftover_threads(prefix: str = "daskserve", timeout: float = 5) -> list[str]:
    """Return the names of our threads that still run after `timeout` seconds."""

    def names() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith(prefix)]

    return _settle(names, timeout)


def leftover_processes(
    known: Collection[int] = (), timeout: float = 5
) -> list[tuple[int, str]]:
    """Return our child processes that still run after `timeout` seconds.

    Parameters
    ----------
    known
        Ids of processes that may stay, such as `child_processes` gave before.

    Returns
    -------
    list of (int, str)
        Process ids and command lines.
    """

    def left() -> list[tuple[int, str]]:
        return [(p, text) for p, text in child_processes().items() if p not in known]

    return _settle(left, timeout)


def child_processes() -> dict[int, str]:
    """Return ids and command lines of all processes that come from this one."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        # It is started once by multiprocessing, and stays as long as this process.
        if "multiprocessing.resource_tracker" not in command:
            found[process.pid] = command
    return {pid: command for pid, command in found.items() if is_running(pid)}


def _settle(look: Callable[[], list[T]], timeout: float) -> list[T]:
    try:
        poll(lambda: not look(), timeout)
    except AssertionError:
        return look()
    return []


def need_program(name: str) -> str:
    """Return the path of a program of the system's; skip the test if it is missing.

    CI installs all of them, so there a missing one is a failure.
    """
    path = shutil.which(name)
    if path is None:
        assert not os.environ.get("CI"), f"CI has to install {name}"
        pytest.skip(f"{name} is not installed")
    return path
