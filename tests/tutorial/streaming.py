from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterable, Iterable
from typing import Annotated

from fastapi import FastAPI, Header, Request
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel

app = FastAPI()


class Tick(BaseModel):
    number: int
    note: str | None = None


async def slow_lines():
    for number in range(3):
        yield f"line {number}\n"
        await asyncio.sleep(0.01)


@app.get("/lines")
async def lines():
    return StreamingResponse(slow_lines(), media_type="text/csv", headers={"x-n": "3"})


@app.get("/sync")
def sync():
    chunks = (bytes([number]) * 1000 for number in range(5))
    return StreamingResponse(chunks, status_code=203)


@app.get("/items")
async def items(count: int = 2) -> AsyncIterable[Tick]:
    for number in range(count):
        yield Tick(number=number)


@app.get("/sync-items")
def sync_items() -> Iterable[Tick]:
    yield Tick(number=1, note="ü")
    yield Tick(number=2)


@app.get("/events", response_class=EventSourceResponse)
async def events(
    last_event_id: Annotated[int | None, Header()] = None,
) -> AsyncIterable[Tick]:
    for number in range(last_event_id or 0, 4):
        yield Tick(number=number)


@app.post("/events", response_class=EventSourceResponse)
def sync_events(tick: Tick) -> Iterable[ServerSentEvent]:
    yield ServerSentEvent(data=tick, event="tick", id="1", retry=500)
    yield ServerSentEvent(raw_data="a\nb", comment="two lines")


@app.post("/back")
async def back(request: Request):
    # All of it first: Starlette itself reads what comes while a response streams.
    chunks = [chunk async for chunk in request.stream()]
    return StreamingResponse(chunk.upper() for chunk in chunks)


@app.get("/numbers")
def numbers():
    return StreamingResponse(str(n) for n in itertools.islice(itertools.count(), 300))


REQUESTS = [
    ("GET", "/lines"),
    ("GET", "/sync"),
    ("GET", "/items?count=3"),
    ("GET", "/items?count=x"),
    ("GET", "/sync-items"),
    ("GET", "/events"),
    ("GET", "/events", {"headers": {"Last-Event-ID": "2"}}),
    ("POST", "/events", {"json": {"number": 5}}),
    ("POST", "/events", {"json": {}}),
    ("POST", "/back", {"content": b"abc" * 100000}),
    ("GET", "/numbers"),
]
