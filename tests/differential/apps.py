"""All apps by name, and how each travels to a replica."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from starlette.types import ASGIApp

import daskserve as serve
from tests.differential import (
    apps_fastapi,
    apps_http,
    apps_misbehaving,
    apps_starlette,
    apps_websocket,
)


@dataclass(frozen=True)
class App:
    """One app.

    Parameters
    ----------
    make
        Makes it, on plain uvicorn.
    travels
        How it is given to ``@ingress``: as an object, as the function that makes it,
        as an import string of that function, or as a class with routes of its own.
    """

    make: Callable[[], ASGIApp]
    travels: Literal["object", "factory", "import"] | type = "object"

    def ingress_class(self) -> type:
        """Return what is deployed."""
        if isinstance(self.travels, type):
            return self.travels
        served: Any = self.make
        if self.travels == "object":
            served = self.make()
        elif self.travels == "import":
            served = f"{self.make.__module__}:{self.make.__name__}"
        return serve.ingress(served)(type("Served", (), {}))


APPS = {
    "echo": App(apps_http.echo, "factory"),
    "responses": App(apps_http.responses, "import"),
    "bodies": App(apps_http.bodies, "factory"),
    "streams": App(apps_http.streams, "import"),
    "stateful": App(apps_http.stateful),
    "no-lifespan": App(apps_http.no_lifespan),
    "contexts": App(apps_http.contexts, "factory"),
    "misbehaving": App(apps_misbehaving.misbehaving, "factory"),
    "routing": App(apps_starlette.routing),
    "files": App(apps_starlette.files),
    "streaming": App(apps_starlette.streaming),
    "errors": App(apps_starlette.errors),
    "last-errors": App(apps_starlette.last_errors),
    "middleware": App(apps_starlette.middleware),
    "trusted-hosts": App(apps_starlette.trusted_hosts),
    "sessions": App(apps_starlette.sessions),
    "forms": App(apps_starlette.forms, "factory"),
    "lifespan": App(apps_starlette.lifespan),
    "websockets": App(apps_starlette.websockets),
    "items": App(apps_fastapi.items),
    "dependencies": App(apps_fastapi.dependencies),
    "routers": App(apps_fastapi.routers),
    "docs": App(apps_fastapi.docs),
    "rooted": App(apps_fastapi.rooted),
    "security": App(apps_fastapi.security),
    "tasks": App(apps_fastapi.tasks),
    "uploads": App(apps_fastapi.uploads, "import"),
    "handlers": App(apps_fastapi.handlers),
    "websocket-api": App(apps_fastapi.websocket_api),
    "by-class": App(apps_fastapi.plain_functions, apps_fastapi.ByClass),
    "sockets": App(apps_websocket.sockets, "factory"),
}
