from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import StreamingResponse

app = FastAPI()

log: list[str] = []


class Session:
    def __init__(self):
        self.open = True


@contextmanager
def logged(name: str) -> Iterator[None]:
    log.append(f"{name} starts")
    try:
        yield
    finally:
        log.append(f"{name} ends")


async def session() -> AsyncIterator[Session]:
    with logged("session"):
        made = Session()
        try:
            yield made
        except KeyError as error:
            log.append(f"rolled back: {error!r}")
            raise HTTPException(404, f"there is no {error}") from error
        finally:
            made.open = False


def cursor(session: Annotated[Session, Depends(session)]) -> Iterator[str]:
    with logged("cursor"):
        yield f"cursor of {'open' if session.open else 'closed'}"


def early() -> Iterator[str]:
    with logged("early"):
        yield "early"


@app.get("/rows")
def rows(cursor: Annotated[str, Depends(cursor)]):
    log.append("rows")
    return cursor


@app.get("/rows/{key}")
async def row(key: str, session: Annotated[Session, Depends(session)]):
    return {"a": 1}[key]


@app.get("/stream")
async def stream(
    session: Annotated[Session, Depends(session)],
    word: Annotated[str, Depends(early, scope="function")],
):
    def lines() -> Iterator[str]:
        log.append("streams")
        yield f"{word} {session.open}"

    return StreamingResponse(lines(), media_type="text/plain")


@app.get("/log/{count}")
async def read_log(count: int):
    while len(log) < count:  # a session ends after its response
        await asyncio.sleep(0.01)
    return log


REQUESTS = [
    ("GET", "/rows"),
    ("GET", "/log/5"),
    ("GET", "/rows/a"),
    ("GET", "/log/7"),
    ("GET", "/rows/b"),
    ("GET", "/log/10"),
    ("GET", "/stream"),
    ("GET", "/log/15"),
]
