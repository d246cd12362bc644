"""Small apps of other libraries, and what is asked of each.

A module has `make_app`, and `REQUESTS` or, for a protocol of its own, `talk(url)`,
which returns what a client has seen. It imports its library where that is used: a
function in a script does so, too, and what asks need not have it.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from typing import Any

import httpx

#: The names of the modules here, and of the packages that they serve.
LIBRARIES = {
    "datasette_app": "datasette",
    "django_app": "django",
    "litestar_app": "litestar",
    "mcp_app": "mcp",
    "quart_app": "quart",
    "socketio_app": "socketio",
    "sqladmin_app": "sqladmin",
    "strawberry_app": "strawberry",
}
#: In links it shows which host an app believes to be; the ports are not the same.
HOST = "example.org"
#: What the server adds, or what says when and which.
_NOT_COMPARED = {"date", "server", "x-request-id", "last-modified", "etag"}


@dataclass(frozen=True)
class Ask:
    """A request, and what has to be in its answer."""

    method: str
    path: str
    status: int
    contains: str
    send: dict[str, Any] = field(default_factory=dict)


def load(name: str) -> Any:
    """Return the module of a library."""
    return importlib.import_module(f"tests.libraries.{name}")


def talk(name: str, url: str) -> list[Any]:
    """Talk with an app at a URL as its library's clients do; return what they see."""
    module = load(name)
    if not hasattr(module, "REQUESTS"):
        found: list[Any] = module.talk(url)
        return found
    volatile = getattr(module, "VOLATILE", "(?!)")
    with httpx.Client(headers={"host": HOST}, timeout=20) as client:
        return [_ask(client, url, ask, volatile) for ask in module.REQUESTS]


def _ask(client: httpx.Client, url: str, ask: Ask, volatile: str) -> tuple[Any, ...]:
    response = client.request(ask.method, url + ask.path, **ask.send)
    text = response.text
    assert response.status_code == ask.status, (ask, response, text)
    assert ask.contains in text + str(response.headers), (ask, response.headers, text)
    headers = [
        # A cookie is signed with its time.
        (name, re.sub("=[^;]*", "=", value, count=1) if name == "set-cookie" else value)
        for name, value in response.headers.multi_items()
        if name not in _NOT_COMPARED
    ]
    seen = [*(f"{name}: {value}" for name, value in sorted(headers)), text]
    return ask.method, ask.path, [re.sub(volatile, "", line) for line in seen]
