"""Small deployments of each kind, side by side; they run in replicas."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request

from daskserve.deployment import deployment
from daskserve.ingress import ingress

hello_app = FastAPI(title="Hello")
existing_app = FastAPI(title="An app that was there before")


@existing_app.get("/")
def root() -> str:
    """Greet from a route of the app itself."""
    return "Hello from the root!"


@deployment(name="counter", route_prefix="/counter")
class Counter:
    """Count requests."""

    def __init__(self, start: int = 0) -> None:
        self.count = start

    def __call__(self, request: Request) -> dict[str, int]:
        """Count one request."""
        self.count += 1
        return {"count": self.count}


@deployment(name="hello", route_prefix="/hello")
@ingress(hello_app)
class Hello:
    """Greet: GET /hello/ and POST /hello/{name}."""

    @hello_app.get("/")
    def root(self) -> str:
        """Greet everyone."""
        return "Hello, world!"

    @hello_app.post("/{subpath}")
    def greet(self, subpath: str) -> str:
        """Greet someone."""
        return f"Hello from {subpath}!"


@deployment(name="root", route_prefix="/")
@ingress(existing_app)
class Root:
    """Serve an existing FastAPI app as it is."""


@deployment(name="api1", route_prefix="/api1")
@ingress(existing_app)
class Api1:
    """Serve the same app, and /api1/subpath."""

    @existing_app.get("/subpath")
    def method(self) -> str:
        """Greet from a route of this class."""
        return "Hello 1!"


@deployment(name="api2", route_prefix="/api2")
@ingress(existing_app)
class Api2:
    """Serve the same app, and /api2/subpath."""

    @existing_app.get("/subpath")
    def method(self) -> str:
        """Greet from a route of this class."""
        return "Hello 2!"
