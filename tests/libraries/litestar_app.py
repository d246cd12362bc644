from typing import Any

from tests.libraries import Ask

REQUESTS = [
    Ask("GET", "/hello/you?times=2", 200, '["you","you"]'),
    Ask("GET", "/hello/you?times=no", 400, "times"),
    Ask("POST", "/items", 201, '"price":2.5', {"json": {"name": "a", "price": 2.5}}),
    Ask("POST", "/items", 400, "price", {"json": {"name": "a"}}),
    Ask("GET", "/where", 200, "/hello/x"),
    Ask("GET", "/state", 200, "started"),
    Ask("GET", "/stream", 200, "012"),
    Ask("GET", "/schema/openapi.json", 200, "/hello/{who}"),
    Ask("GET", "/none", 404, "Not Found"),
]


def make_app() -> Any:
    from collections.abc import AsyncIterator
    from contextlib import asynccontextmanager
    from dataclasses import dataclass

    from litestar import Litestar, Request, get, post
    from litestar.response import Stream

    @dataclass
    class Item:
        name: str
        price: float

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncIterator[None]:
        app.state.word = "started"
        yield

    @get("/hello/{who:str}", name="hello")
    async def hello(who: str, times: int = 1) -> list[str]:
        return [who] * times

    @post("/items")
    async def add(data: Item) -> Item:
        return data

    @get("/where")
    async def where(request: Request) -> list[str]:
        return [request.url_for("hello", who="x"), str(request.base_url)]

    @get("/state", sync_to_thread=True)
    def state(request: Request) -> str:
        return str(request.app.state.word)

    @get("/stream")
    async def stream() -> Stream:
        async def numbers() -> AsyncIterator[str]:
            for i in range(3):
                yield str(i)

        return Stream(numbers())

    # Its annotations are evaluated in this function's names.
    names = {"Item": Item, "Request": Request, "Stream": Stream}
    handlers = [hello, add, where, state, stream]
    return Litestar(handlers, lifespan=[lifespan], signature_namespace=names)
