"""An app cannot tell daskserve from plain uvicorn, nor can its clients.

The apps and the requests are in `tests.differential`; so are the differences that are
allowed, each with its reason.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

import daskserve as serve
from tests.differential.apps import APPS
from tests.differential.differences import DIFFERENCES, reconcile
from tests.differential.observe import Talk, Target
from tests.differential.run import CASES, Results, broken, run
from tests.test_http import LOGGED, Site, open_site
from tests.utils import ROOT, Process, ProcessCluster, poll

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

#: How many deployments are made at the same time.
AT_ONCE = 6


class Reference:
    """Plain uvicorn, and what it does under each prefix."""

    def __init__(self, process: Process) -> None:
        ports = poll(lambda: _first_line(process), 30)
        self._ports: dict[str, int] = json.loads(ports)
        self._results: dict[str, Results] = {}

    def results(self, kind: str) -> Results:
        """Return what it does at ``/`` (kind is empty) or ``/{kind}/{app}``."""
        if kind not in self._results:
            self._results[kind] = run(
                (case, Target(self._ports[case.app], prefix_of(kind, case.app)))
                for case in CASES
            )
        return self._results[kind]


def _first_line(process: Process) -> str:
    text = process.log.read_text()
    assert process.poll() is None, text
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return lines[0] if lines else ""


def prefix_of(kind: str, app: str) -> str:
    """Return where an app is served; see `Reference.results`."""
    return f"/{kind}/{app}" if kind else ""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    log: Path = tmp_path_factory.mktemp("reference") / "log"
    command = [sys.executable, "-m", "tests.differential.reference"]
    process = Process("reference", command, log, {}, ROOT)
    try:
        yield Reference(process)
    finally:
        process.end_group()


class Served:
    """All apps on one cluster, and what they do there.

    Parameters
    ----------
    site
        The cluster, with an instance.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        proxies = site.instance.status().proxies
        #: Where the replicas' own worker has a proxy, and where another has.
        self._ports = [int(proxy.url.rpartition(":")[2]) for proxy in proxies]
        self._every_node = len(self._ports) > 1
        assert len({*self._ports}) == len(self._ports)
        self._deployments = self._deploy()
        self._results: dict[tuple[str, bool], Results] = {}

    def results(self, where: str, prefixed: bool) -> Results:
        """Return what happens with replicas near the proxy or far from it."""
        key = (where, prefixed)
        if key not in self._results:
            make = self._run_prefixed if prefixed else self._run_at_root
            self._results[key] = make(where)
        return self._results[key]

    def kind(self, where: str) -> str:
        """Return the first segment of the prefixes that `results` used."""
        return "near" if self._every_node else where

    def distances(self) -> set[tuple[str, bool]]:
        """Return where replicas are: asked for, and whether by the first proxy."""
        status = self._site.instance.status()
        proxy = status.proxies[0].worker
        return {
            (name.partition("-")[0], replica.worker == proxy)
            for name, deployment in status.deployments.items()
            for replica in deployment.replicas
        }

    def _deploy(self) -> dict[tuple[str, str], serve.Deployment]:
        kinds = ["near"] if self._every_node else ["near", "far"]
        wanted = [(kind, name) for name in APPS for kind in kinds]

        def deploy(key: tuple[str, str]) -> serve.Deployment:
            kind, name = key
            return self._site.deploy(
                APPS[name].ingress_class(),
                name=f"{kind}-{name}",
                route_prefix=prefix_of(kind, name),
                version="1",
                where=kind,
            )

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return dict(zip(wanted, pool.map(deploy, wanted), strict=True))

    def _port(self, where: str) -> int:
        return self._ports[1 if self._every_node and where == "far" else 0]

    def _run_prefixed(self, where: str) -> Results:
        kind, port = self.kind(where), self._port(where)
        return run((c, Target(port, prefix_of(kind, c.app))) for c in CASES)

    def _run_at_root(self, where: str) -> Results:
        """Move one app after the other to ``/``: nothing restarts."""
        found: Results = {}
        for name in APPS:
            deployment = self._deployments[self.kind(where), name]
            deployment.options(route_prefix="/").deploy()
            target = Target(self._port(where), "")
            try:
                found |= run((case, target) for case in CASES if case.app == name)
            finally:  # else all that comes after finds "/" taken
                deployment.deploy()
        return found


@pytest.fixture(
    scope="module",
    params=[("HeadOnly", "tcp"), ("EveryNode", "tcp"), ("HeadOnly", "tls")],
    ids=lambda param: "-".join(param),
)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    location, protocol = request.param
    with (
        ProcessCluster(2, nanny=False, env=LOGGED, protocol=protocol) as cluster,
        open_site(cluster=cluster, location=location) as site,
    ):
        yield Served(site)


near_and_far = pytest.mark.parametrize("where", ["near", "far"])
everywhere = pytest.mark.parametrize("prefixed", [True, False], ids=["prefix", "root"])


def pairs(
    served: Served, reference: Reference, where: str, prefixed: bool
) -> Iterator[tuple[Any, ...]]:
    """Give each case with what plain uvicorn did and what daskserve did."""
    kind = served.kind(where) if prefixed else ""
    expected, found = reference.results(kind), served.results(where, prefixed)
    for case in CASES:
        yield case, expected[case.id], found[case.id]


@everywhere
@near_and_far
def test_agrees(
    served: Served, reference: Reference, where: str, prefixed: bool
) -> None:
    wrong = []
    for case, expected, found in pairs(served, reference, where, prefixed):
        forgiven, _ = reconcile(case, expected, found)
        if forgiven != expected or broken(expected) or broken(found):
            wrong.append(_report(case.id, expected, forgiven))
    assert not wrong, f"{len(wrong)} cases differ\n" + "\n".join(wrong)


def _report(name: str, expected: list[Any], found: list[Any]) -> str:
    lines = [f"--- {name}"]
    for theirs, ours in zip_longest(expected, found):
        lines += _unlike(theirs, ours)
    return "\n".join(line[:1000] for line in lines)


def _unlike(theirs: Any, ours: Any) -> list[str]:
    if theirs == ours:
        return []
    if type(theirs) is not type(ours):
        return [f"  uvicorn   {theirs}", f"  daskserve {ours}"]
    lines = [f"  {type(ours).__name__}"]
    for field in fields(ours):
        values = [getattr(seen, field.name) for seen in (theirs, ours)]
        if values[0] != values[1]:
            lines.append(f"    {field.name}: uvicorn   {values[0]}")
            lines.append(f"    {field.name}: daskserve {values[1]}")
    return lines


def test_replicas_are_where_they_are_asked_from(served: Served) -> None:
    near, far = ("near", True), ("far", False)
    every_node = served.kind("far") == "near"
    assert served.distances() == ({near} if every_node else {near, far})


def test_every_difference_is_used(served: Served, reference: Reference) -> None:
    used = set()
    for where in ("near", "far"):
        for prefixed in (True, False):
            for case, expected, found in pairs(served, reference, where, prefixed):
                used |= reconcile(case, expected, found)[1]
    wanted = {(d.name, case) for d in DIFFERENCES for case in d.cases}
    assert wanted - used == set()


@pytest.mark.timeout(20)
def test_a_connection_that_the_server_ended_can_be_aborted() -> None:
    """What is still to be written when it ends makes asyncio forget that it has."""

    async def main() -> list[Any]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            talk = Talk(Target(server.getsockname()[1], ""))
            connection = await talk.connect()
            theirs, _ = server.accept()
            with theirs:
                connection.send(bytes(2**23))
                theirs.shutdown(socket.SHUT_WR)
                while not connection._wire.transport.is_closing():
                    await asyncio.sleep(0.01)
                left = 2**23
                while left:
                    left -= len(await asyncio.to_thread(theirs.recv, left))
                while not connection._wire.ended:
                    await asyncio.sleep(0.01)
                connection.abort()
                talk.close()
        return talk.seen

    assert asyncio.run(main()) == []


def test_cases_are_named_once() -> None:
    names = [case.id for case in CASES]
    assert len(set(names)) == len(names)
    assert {case.app for case in CASES} == set(APPS)
