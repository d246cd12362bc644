from __future__ import annotations

import gzip
import json
from collections.abc import Callable

import yaml
from fastapi import APIRouter, Body, FastAPI, HTTPException, Request, Response
from fastapi.routing import APIRoute


class GzipRequest(Request):
    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._body = gzip.decompress(await super().body())
        return self._body


class GzipRoute(APIRoute):
    def get_route_handler(self) -> Callable:
        handle = super().get_route_handler()

        async def unzip(request: Request) -> Response:
            if request.headers.get("content-encoding") == "gzip":
                request = GzipRequest(request.scope, request.receive)
            response = await handle(request)
            response.headers["X-Route"] = self.name
            return response

        return unzip


app = FastAPI()
zipped = APIRouter(route_class=GzipRoute, prefix="/zipped")


@app.get("/about/{what}")
def about(request: Request, what: str):
    return {
        "url": str(request.url),
        "base": str(request.base_url),
        "params": [request.path_params, str(request.query_params)],
        "client": request.client.host,
        "scope": [request.scope[key] for key in ("type", "http_version", "scheme")],
        "paths": [request.scope["path"], request.scope["raw_path"].decode()],
        "route": request.scope["route"].path,
        "root_path": request.scope["root_path"],
    }


@app.post("/size")
async def size(request: Request):
    sizes = [len(chunk) async for chunk in request.stream()]
    return {"size": sum(sizes), "last": sizes[-1]}


@app.post("/yaml", openapi_extra={"requestBody": {"content": {"text/yaml": {}}}})
async def from_yaml(request: Request):
    try:
        return yaml.safe_load(await request.body())
    except yaml.YAMLError as error:
        raise HTTPException(422, "not YAML") from error


@zipped.post("/sum")
async def add(numbers: list[int] = Body()):  # noqa: B008
    return sum(numbers)


@zipped.post("/json")
async def from_json(request: Request):
    return [json.loads(await request.body()), await request.json()]


app.include_router(zipped)

REQUESTS = [
    ("GET", "/about/a%20b?q=1&q=%C3%A4"),
    ("POST", "/size", {"content": b"x" * 300000}),
    ("POST", "/yaml", {"content": "a: [1, ü]"}),
    ("POST", "/yaml", {"content": "a: ["}),
    ("POST", "/zipped/sum", {"json": [1, 2, 3]}),
    *(
        (
            "POST",
            path,
            {"content": bytes.fromhex(body), "headers": {"Content-Encoding": "gzip"}},
        )
        for path in ["/zipped/sum", "/zipped/json"]
        for body in [
            "1f8b08000000000002038b36d451308a0500ffe7c96106000000",
            "1f8b08000000000002038b36d451504a548a05009dd9932308000000",
        ]
    ),
]
