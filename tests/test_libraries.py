"""Apps of other libraries, deployed twice in two replicas, answer as on plain uvicorn.

The apps are in `tests.libraries`. Most of the libraries are in the extra ``libraries``;
CI installs it before it runs this.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

import daskserve as serve
from daskserve.exceptions import DeploymentFailedError, PicklingError
from tests.libraries import LIBRARIES, load, talk
from tests.test_http import Site, open_site
from tests.utils import ROOT, Process, poll, scheduler_workers

# Libraries are imported in three processes at first.
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(120)]

#: Clients that talk at the same time, so that both replicas are asked.
CLIENTS = 4
#: It has one app for each process.
NICEGUI = "nicegui_app"


def need_library(name: str) -> None:
    """Skip a test whose library is not installed; in CI it has to be."""
    if importlib.util.find_spec(name) is None:
        assert not os.environ.get("CI"), f"CI has to install {name}"
        pytest.skip(f"{name} is not installed")


class Reference:
    """Plain uvicorn in a process of its own, for each app whose library is there."""

    def __init__(self, log: Path) -> None:
        needed = {**LIBRARIES, NICEGUI: "nicegui"}
        names = [n for n in needed if importlib.util.find_spec(needed[n])]
        command = [sys.executable, "-m", "tests.libraries", *names]
        self.process = Process("uvicorn", command, log, {}, ROOT)

    def url(self, name: str) -> str:
        """Return where an app is, once all have started."""
        return f"http://127.0.0.1:{poll(self._ports, 50)[name]}"

    def _ports(self) -> dict[str, int]:
        text = self.process.log.read_text()
        assert self.process.poll() is None, text
        lines = [line for line in text.splitlines() if line.startswith("{")]
        return json.loads(lines[0]) if lines else {}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    made = Reference(tmp_path_factory.mktemp("uvicorn") / "log")
    try:
        yield made
    finally:
        made.process.end_group()


@pytest.fixture(scope="module")
def site(reference: Reference) -> Iterator[Site]:
    with open_site(3) as made:  # while the other imports all libraries
        yield made


def source(name: str, how: str) -> Any:
    """Return what is given to `serve.ingress` for the app of a library."""
    if how == "string":
        return f"tests.libraries.{name}:make_app"
    # As a script has it, so that it travels by value.
    return runpy.run_path(load(name).__file__, run_name="__main__")["make_app"]


def talk_to_all(name: str, url: str) -> list[list[Any]]:
    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(lambda _: talk(name, url), range(CLIENTS)))


def others(site: Site) -> list[str]:
    """Return workers equally far from the server: it asks all replicas on them."""
    workers = scheduler_workers(site.client)
    return sorted(set(workers) - {site.near})


def running(deployment: serve.Deployment, version: str) -> set[str]:
    """Return which replicas run; those of the version before may be ending."""
    status = serve.status().deployments[deployment.name]
    assert status.version == version
    return {r.replica_tag for r in status.replicas if r.state == "RUNNING"}


@pytest.mark.parametrize("prefix", ["/", "/prefix"])
@pytest.mark.parametrize("how", ["factory", "string"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library(
    site: Site, reference: Reference, name: str, how: str, prefix: str
) -> None:
    need_library(LIBRARIES[name])
    path = prefix.rstrip("/")
    expected = talk(name, reference.url(name) + path)
    cls = serve.ingress(source(name, how))(type("App", (), {}))
    deployment = site.make(
        cls,
        name=f"{name}-{how}",
        num_replicas=2,
        route_prefix=prefix,
        session_affinity=getattr(load(name), "AFFINITY", None),
        workers=[site.near] if prefix == "/" else others(site),
    )
    former: set[str] = set()
    try:
        for version in ("1", "2"):
            deployment.options(version=version).deploy()
            tags = running(deployment, version)
            assert len(tags) == 2 and not tags & former
            former = tags
            for found in talk_to_all(name, site.url + path):
                assert found == expected
    finally:
        site.clean()


def test_a_django_app_itself_does_not_travel() -> None:
    need_library("django")
    app = load("django_app").make_app()
    for given in (app, Starlette(routes=[Mount("/", app)])):
        with pytest.raises(PicklingError, match="DJANGO_SETTINGS_MODULE.*a function"):
            serve.ingress(given)(type("App", (), {}))


def test_nicegui_starts_once_in_a_worker(site: Site, reference: Reference) -> None:
    need_library("nicegui")
    expected = talk(NICEGUI, reference.url(NICEGUI) + "/prefix")
    make_app = source(NICEGUI, "factory")
    deployment = site.make(
        serve.ingress(make_app)(type("App", (), {})),
        route_prefix="/prefix",
        session_affinity=load(NICEGUI).AFFINITY,
    )
    url = f"{site.url}/prefix"
    try:
        deployment.options(version="1", **site.place("far")).deploy()
        assert talk(NICEGUI, url) == expected
        with pytest.raises(DeploymentFailedError, match="NiceGUI.*worker of its own"):
            deployment.options(version="2", **site.place("far")).deploy()
        assert talk(NICEGUI, url) == expected
        deployment.options(version="3", **site.place("near")).deploy()
        assert talk(NICEGUI, url) == expected
    finally:
        site.clean()
