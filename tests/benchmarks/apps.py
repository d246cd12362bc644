"""The apps that are served both ways."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


async def _noop(request: Request) -> JSONResponse:
    return JSONResponse({"ok": True})


async def function(request: Request) -> dict[str, bool]:
    return {"ok": True}


starlette = Starlette(routes=[Route("/", _noop)])
fastapi_async = FastAPI()
fastapi_sync = FastAPI()


@fastapi_async.get("/")
async def get_async() -> dict[str, bool]:
    return {"ok": True}


@fastapi_sync.get("/")
def get_sync() -> dict[str, bool]:
    return {"ok": True}


#: Apps that plain uvicorn serves, by the name of the row.
PLAIN = {
    "starlette": "starlette",
    "fastapi-async": "fastapi_async",
    "fastapi-sync": "fastapi_sync",
    "function": "starlette",
}
