"""Hosts for tests: network namespaces with addresses of their own, on one bridge.

Only root can make them; the machine that runs the tests is on the bridge too. For
processes "loopback" and "this host" mean their namespace, and a link can be cut.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.utils import Process, ProcessCluster, need_program

#: Where Linux takes ports from for those who ask for any.
ANY_PORT = "32768-60999"


class Host:
    """One network namespace; its interface is ``eth0``.

    Parameters
    ----------
    name
        Of the namespace.
    address
        Its own.
    link
        The bridge's end of its cable.
    """

    def __init__(self, name: str, address: str, link: str) -> None:
        self.name = name
        self.address = address
        self._link = link

    def command(self, *args: str) -> list[str]:
        """Return the command line that runs a program there."""
        return ["ip", "netns", "exec", self.name, *args]

    def run(self, *args: str) -> str:
        """Run a program there and return what it prints."""
        return _run(*self.command(*args))

    def processes(self) -> list[int]:
        """Return the ids of all that runs there."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self.name).split()]

    def cut(self) -> None:
        """Pull the cable: what is sent is lost, in both directions, and nobody told."""
        _run("ip", "link", "set", self._link, "down")

    def restore(self) -> None:
        """Put the cable in again; nothing happens if it is in."""
        _run("ip", "link", "set", self._link, "up")

    @contextmanager
    def firewall(self, ports: str = ANY_PORT) -> Iterator[None]:
        """Drop what comes from other hosts to `ports`, but for answers.

        To be exact it drops what goes back from there, which for both ends is the same.
        """
        rule = ["ipproto", "tcp", "sport", ports, "dport", ANY_PORT, "blackhole"]
        self.run("ip", "rule", "add", *rule)
        try:
            yield
        finally:
            self.run("ip", "rule", "del", *rule)


def need_hosts() -> None:
    """Skip a test where there can be no hosts."""
    need_program("ip")
    if os.geteuid() != 0:
        pytest.skip("only root can make network namespaces")


@contextmanager
def open_hosts(count: int) -> Iterator[list[Host]]:
    """Make hosts that reach one another and this machine; skip where that cannot be."""
    need_hosts()
    pid = os.getpid()
    bridge = f"ds{pid}"
    with ExitStack() as stack:
        try:
            _run("ip", "link", "add", bridge, "type", "bridge")
        except RuntimeError as err:
            assert not os.environ.get("CI"), err
            pytest.skip(f"there can be no bridge: {err}")
        stack.callback(_run, "ip", "link", "del", bridge)
        net = _free_network()
        _run("ip", "addr", "add", f"{net}.254/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        hosts = []
        for number in range(1, count + 1):
            name, link = f"ds{pid}-{number}", f"ds{pid}v{number}"
            host = Host(name, f"{net}.{number}", link)
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "del", name)
            _run("ip", "link", "add", link, "type", "veth",
                 "peer", "name", "eth0", "netns", name)  # fmt: skip
            # Not left to the namespace's end, which nobody waits for.
            stack.callback(_run, "ip", "link", "del", link)
            _run("ip", "link", "set", link, "master", bridge, "up")
            host.run("ip", "link", "set", "lo", "up")
            host.run("ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
            # Dask's schedulers take the address that leads to the world for their own.
            host.run("ip", "route", "add", "default", "via", f"{net}.254")
            hosts.append(host)
        yield hosts


class HostCluster(ProcessCluster):
    """A cluster whose processes run on hosts, started with no word on addresses.

    Parameters
    ----------
    head
        The scheduler's host.
    hosts
        Of each worker; those that are added later get them in turn.
    **options
        As of `ProcessCluster`; without nannies by default.
    """

    def __init__(self, head: Host, hosts: Sequence[Host], **options: Any) -> None:
        super().__init__(len(hosts), **{"nanny": False, **options})
        self._head = head
        self._hosts = list(hosts)

    def add_worker_on(self, host: Host, *args: str) -> Process:
        """Start one more worker, as `add_worker` does."""
        self._hosts.append(host)
        return self.add_worker(*args)

    def _place(self, name: str) -> tuple[list[str], list[str]]:
        if name == "scheduler":
            return self._head.command(), []
        return self._hosts[int(name[1:]) % len(self._hosts)].command(), []


def _free_network() -> str:
    taken = _run("ip", "-o", "-4", "addr")
    pid = os.getpid()
    networks = (f"10.89.{(pid + offset) % 256}" for offset in range(256))
    return next(network for network in networks if f"{network}." not in taken)


def _run(*args: str) -> str:
    done = subprocess.run(args, capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise RuntimeError(f"{' '.join(args)}: {done.stderr.strip()}")
    return done.stdout


def seconds_of(function: Any) -> tuple[float, Any]:
    """Return how long a call took, and its result."""
    began = time.monotonic()
    result = function()
    return time.monotonic() - began, result
