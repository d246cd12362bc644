"""Requests made up from a schema: daskserve fails only where plain uvicorn does."""

from __future__ import annotations

import base64
import http.client
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import pytest
import yaml
from fastapi import FastAPI, HTTPException, Query
from pydantic import BaseModel

import daskserve as serve
from daskserve.demo.app import DEPLOYMENTS
from daskserve.ingress import find_ingress
from tests.test_http import Site, open_site
from tests.utils import run_uvicorn

pytestmark = [pytest.mark.long, pytest.mark.timeout(120)]

SEED = "20260801"
MAX_EXAMPLES = "60"
#: What has a schema; api2 is as api1, and root as a part of it.
DEMO = [d for d in DEPLOYMENTS if d.name in ("digits", "hello", "api1")]


class Note(BaseModel):
    text: str
    tags: list[str] = []


def make_notebook() -> FastAPI:
    """Make an app with state, links between operations, and a fault."""
    app = FastAPI()
    notes: dict[int, Note] = {}
    by_id = {"operationId": "read", "parameters": {"number": "$response.body#/number"}}
    links = {"links": {"read": by_id, "drop": {**by_id, "operationId": "drop"}}}

    @app.post("/notes", status_code=201, responses={201: links})
    def write(note: Note) -> dict[str, int]:
        number = len(notes) + 1
        notes[number] = note
        return {"number": number}

    @app.get("/notes/{number}", operation_id="read")
    def read(number: int) -> Note:
        if number not in notes:
            raise HTTPException(404)
        return notes[number]

    @app.delete("/notes/{number}", operation_id="drop", status_code=204)
    def drop(number: int) -> None:
        if number not in notes:
            raise HTTPException(404)
        del notes[number]

    @app.get("/share")
    def share(of: int, among: Annotated[int, Query(ge=-3, le=3)]) -> float:
        return of / among

    return app


@serve.ingress(make_notebook)
class Notebook: ...


class Exchange(NamedTuple):
    """A request that was made up, and the status that it got; 0 for no response."""

    phase: str
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    status: int


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with open_site() as site:
        for deployment in DEMO:
            deployment.options(num_replicas=1).deploy()
        site.deploy(Notebook, route_prefix="/notebook", where="far")
        yield site


def make_up(url: str, report: Path) -> list[Exchange]:
    """Run schemathesis; return what it sent, in that order."""
    program = Path(sys.executable).with_name("schemathesis")
    command = [str(program), "run", f"{url}/openapi.json", "--url", url]
    command += ["--seed", SEED, "--max-examples", MAX_EXAMPLES, "--mode", "all"]
    command += ["--phases", "examples,coverage,fuzzing,stateful"]
    command += ["--checks", "not_a_server_error", "--continue-on-failure"]
    command += ["--generation-database", "none", "--output-sanitize", "false"]
    command += ["--report", "vcr", "--report-vcr-path", str(report), "--no-color"]
    command += ["--report-preserve-bytes", "--no-shrink"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=report.parent)
    print(result.stdout, result.stderr)
    assert result.returncode in (0, 1), result.returncode  # 1: it found failures
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    recorded = yaml.load(report.read_bytes(), loader)["http_interactions"]
    return [_read(entry) for entry in recorded]


def _read(entry: dict[str, Any]) -> Exchange:
    request, response = entry["request"], entry.get("response")
    parts = urlsplit(request["uri"])
    body = (request.get("body") or {}).get("base64_string", "")
    return Exchange(
        entry["phase"]["name"],
        request["method"],
        parts.path + (f"?{parts.query}" if parts.query else ""),
        [(n, v) for n, values in request["headers"].items() for v in values],
        base64.b64decode(body),
        int(response["status"]["code"]) if response else 0,
    )


def replay(exchange: Exchange, url: str, root: str) -> int:
    """Send a request again, without the prefix `root`; return its status."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    target = exchange.target.removeprefix(root) or "/"
    connection.putrequest(exchange.method, target, skip_accept_encoding=True)
    for name, value in exchange.headers:
        if name.lower() != "host":
            connection.putheader(name, value.encode("latin-1"))
    connection.endheaders(exchange.body)
    try:
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("root", "cls"),
    [
        *((deployment.route_prefix, deployment.func_or_class) for deployment in DEMO),
        ("/notebook", Notebook),
    ],
)
def test_no_failure_but_the_apps_own(
    site: Site, tmp_path: Path, root: str, cls: Any
) -> None:
    exchanges = make_up(site.url + root, tmp_path / "report.yaml")
    phases = Counter(exchange.phase for exchange in exchanges)
    print(root, phases, Counter(exchange.status for exchange in exchanges))
    assert {"coverage", "fuzzing"} <= set(phases)
    ingress = find_ingress(cls)
    assert ingress is not None
    with run_uvicorn(ingress.build(cls()), root_path=root) as url:
        # One after the other: the notebook has the same notes then.
        others = [
            (exchange, status)
            for exchange in exchanges
            if (status := replay(exchange, url, root)) != exchange.status
        ]
    assert not others, others[:5]
    if root == "/notebook":
        assert phases["stateful"]
        assert any(exchange.status == 500 for exchange in exchanges)
    else:
        assert not any(exchange.status >= 500 for exchange in exchanges)
