"""FastAPI's docs page in a real browser: "Try it out" runs an operation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import fastapi_offline
import pytest
from fastapi import Body, FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

import daskserve as serve
from tests.fronts import SAY, run_jupyter, run_nginx
from tests.test_http import Site, spare, start
from tests.utils import need_program, poll, run_uvicorn, write_certificate

__all__ = ["spare", "start"]  # fixtures

pytestmark = [pytest.mark.slow, pytest.mark.long]

#: Swagger UI's files, which FastAPI's page takes from a CDN.
STATIC = Path(fastapi_offline.__file__).with_name("static")
FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage
    --no-first-run --disable-background-networking --disable-component-update
    --disable-sync --ignore-certificate-errors --window-size=1000,1600
""".split()


def make_api() -> FastAPI:
    app = FastAPI(title="Sums")
    app.mount("/static", StaticFiles(directory=STATIC))

    @app.post("/add/{number}")
    def add(
        number: int, other: Annotated[int, Body(embed=True, examples=[40])]
    ) -> dict[str, int]:
        return {"sum": number + other}

    @app.get("/own-docs", include_in_schema=False)
    def docs(request: Request) -> Response:
        """Show the page without a CDN, as FastAPI's documentation says."""
        root = request.scope["root_path"]
        return get_swagger_ui_html(
            openapi_url=f"{root}{app.openapi_url}",
            title=app.title,
            swagger_js_url=f"{root}/static/swagger-ui-bundle.js",
            swagger_css_url=f"{root}/static/swagger-ui.css",
        )

    return app


@serve.ingress(make_api)
class Sums: ...


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Give a browser that finds this machine where the CDN would be."""
    directory = tmp_path_factory.mktemp("browser")
    certificate = write_certificate(directory)
    files = Mount("/npm/swagger-ui-dist@5", StaticFiles(directory=STATIC))
    cdn = Starlette(routes=[files])
    with run_uvicorn(cdn, ssl_certfile=certificate, ssl_keyfile=certificate) as url:
        with open_browser(directory, urlsplit(url).netloc) as browser:
            yield browser


@contextmanager
def open_browser(directory: Path, cdn: str) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = need_program("chromium")
    for flag in FLAGS:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={directory / 'profile'}")
    rules = f"MAP cdn.jsdelivr.net {cdn}, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    options.add_argument(f"--host-resolver-rules={rules}")
    service = ChromeService(need_program("chromedriver"))
    browser = Chrome(options=options, service=service)
    try:
        yield browser
    finally:
        browser.quit()


def try_it_out(browser: Chrome, url: str) -> tuple[str, str, str]:
    """Run the page's operation with 2; return request URL, status and body."""

    def find(selector: str) -> Any:
        found = poll(lambda: browser.find_elements(By.CSS_SELECTOR, selector), 20)
        return found[0]

    browser.get(url)
    find(".opblock-summary-control").click()
    find(".try-out__btn").click()
    find('tr[data-param-name="number"] input').send_keys("2")
    find(".btn.execute").click()
    done = ".live-responses-table .response"
    status = find(f"{done} .response-col_status").text
    body = find(f"{done} .response-col_description .highlight-code code").text
    return find(".request-url pre").text, status, body


def check_page(browser: Chrome, url: str) -> None:
    shown, status, body = try_it_out(browser, url)
    expected = re.sub(r"/[a-z-]+$", "/add/2", url)
    assert (shown.strip(), status.split()[0]) == (expected, "200")
    assert re.sub(r"\s", "", body) == '{"sum":42}'


@pytest.mark.parametrize("front", ["none", "nginx", "jupyter"])
@pytest.mark.parametrize("page", ["docs", "own-docs"])
def test_docs_page(
    browser: Chrome,
    start: Callable[..., Site],
    tmp_path: Path,
    front: str,
    page: str,
) -> None:
    site = start(root_path="/serve" if front == "nginx" else "")
    site.deploy(Sums, route_prefix="/sums")
    host = urlsplit(site.url).netloc
    if front == "none":
        check_page(browser, f"{site.url}/sums/{page}")
    elif front == "nginx":
        location = f"location /serve/ {{ proxy_pass http://daskserve/; {SAY} }}"
        with run_nginx(tmp_path, host, location) as url:
            check_page(browser, f"{url}/serve/sums/{page}")
    else:
        with run_jupyter(tmp_path, "/user/me/") as url:
            port = host.partition(":")[2]
            check_page(browser, f"{url}/proxy/{port}/sums/{page}")
