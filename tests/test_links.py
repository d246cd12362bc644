"""Where links of notebooks lead: `daskserve.links`."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from urllib.parse import urlsplit

import dask
import httpx
import pytest

import daskserve as serve
from daskserve.links import URL
from tests.fronts import run_jupyter
from tests.test_http import open_site


def href(html: str) -> str:
    """Return where the one link in HTML leads."""
    [url] = re.findall(r'<a href="([^"]*)"', html)
    return str(url)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUPYTERHUB_SERVICE_PREFIX", raising=False)


@pytest.mark.parametrize(
    ("url", "hub", "expected"),
    [
        ("http://127.0.0.1:8000/a", None, "http://127.0.0.1:8000/a"),
        ("http://127.0.0.1:8000/a", "/user/me/", "/user/me/proxy/8000/a"),
        ("http://localhost:8000", "/user/me/", "/user/me/proxy/8000/"),
        ("http://[::1]:8000/a?b=1", "/user/me/", "/user/me/proxy/8000/a?b=1"),
        # Others directly: the proxy wants to be told of each.
        ("http://10.0.0.7:8000/a", "/user/me/", "http://10.0.0.7:8000/a"),
        ("https://127.0.0.1:8443/a", "/user/me/", "https://127.0.0.1:8443/a"),
        ("http://h/<a>\"'", None, "http://h/&lt;a&gt;&quot;&#x27;"),
    ],
)
def test_where_links_lead(
    monkeypatch: pytest.MonkeyPatch, url: str, hub: str | None, expected: str
) -> None:
    if hub is not None:
        monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", hub)
    assert href(URL(url)._repr_html_()) == expected


def test_a_template_says_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/me/")
    monkeypatch.setenv("WHO", "ann")
    template = "/hub/{WHO}/{scheme}/{host}:{port}/"
    with dask.config.set({"daskserve.link": template}):
        html = URL("https://10.0.0.7:8443/a")._repr_html_()
    assert href(html) == "/hub/ann/https/10.0.0.7:8443/a"
    with dask.config.set({"daskserve.link": "http://{host}:{port}"}):
        assert href(URL("http://[::1]:80/")._repr_html_()) == "http://[::1]:80/"


@pytest.mark.parametrize(
    "template", ["/{NOBODY_SET_THIS}", "/{}", "/{port", "/{0}", "/{host[a]}"]
)
def test_templates_that_cannot_be_filled_in(template: str) -> None:
    with dask.config.set({"daskserve.link": template}):
        with pytest.raises(ValueError, match="daskserve.link: .*may have"):
            URL("http://127.0.0.1:8000/a")._repr_html_()


def test_urls_are_strings() -> None:
    url = URL("http://127.0.0.1:8000/a")
    assert url == "http://127.0.0.1:8000/a"
    assert pickle.loads(pickle.dumps(url)) == url
    assert URL("unix:/run/x.sock")._repr_html_() == "unix:/run/x.sock"


@pytest.mark.slow
def test_links_work_behind_jupyter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of an instance, a deployment and a tunnel, as the user's browser follows them."""
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/me/")

    def hello() -> str:
        return "Hello!"

    with open_site(1) as site, run_jupyter(tmp_path, "/user/me/") as jupyter:
        base = f"http://{urlsplit(jupyter).netloc}"
        deployed = site.deploy(hello, name="hello")
        routes = {"/hello": "hello"}
        assert isinstance(deployed.url, URL)
        assert httpx.get(base + href(deployed.url._repr_html_())).text == "Hello!"
        shown = href(site.instance._repr_html_())
        assert httpx.get(base + shown).json() == routes
        with serve.tunnel(port=0) as tunnel:
            assert httpx.get(base + href(tunnel._repr_html_())).json() == routes
            assert href(tunnel.url._repr_html_()).startswith("/user/me/proxy/")
