from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypedDict

from fastapi import APIRouter, FastAPI, Request

models: dict[str, object] = {}


class Loaded(TypedDict):
    answer: int
    log: list[str]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[Loaded]:
    models["double"] = lambda number: number * 2
    app.state.title = f"{app.title} started"
    log = ["started"]
    yield {"answer": 42, "log": log}
    models.clear()


@asynccontextmanager
async def part_lifespan(app: FastAPI) -> AsyncIterator[None]:
    models["part"] = "loaded"
    yield


part = APIRouter(lifespan=part_lifespan)
app = FastAPI(title="Models", lifespan=lifespan)


@app.get("/double/{number}")
async def double(number: int):
    return models["double"](number)


@app.get("/answer")
def answer(request: Request):
    request.state.log.append("asked")
    return [request.state.answer, request.state.log, request.app.state.title]


@part.get("/part")
def read_part():
    return [sorted(models), app.state.title]


app.include_router(part)

REQUESTS = [
    ("GET", "/double/4"),
    ("GET", "/answer"),
    ("GET", "/answer"),
    ("GET", "/part"),
]
