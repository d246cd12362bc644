from __future__ import annotations

from datetime import datetime, time, timedelta
from decimal import Decimal
from typing import Annotated
from uuid import UUID

from fastapi import Body, FastAPI, HTTPException
from fastapi.encoders import jsonable_encoder
from pydantic import BaseModel

app = FastAPI()


class Lesson(BaseModel):
    topic: str | None = None
    price: Decimal = Decimal("9.90")
    starts: datetime | None = None
    pupils: frozenset[int] = frozenset()


class State:
    def __init__(self):
        self.lessons = {"art": {"topic": "Art", "price": "5", "pupils": [1]}}


state = State()


@app.get("/lessons/{key}", response_model=Lesson)
async def read(key: str):
    return state.lessons[key]


@app.put("/lessons/{key}", response_model=Lesson)
def replace(key: str, lesson: Lesson):
    state.lessons[key] = jsonable_encoder(lesson)
    return state.lessons[key]


@app.patch("/lessons/{key}")
def update(key: str, lesson: Lesson) -> Lesson:
    if key not in state.lessons:
        raise HTTPException(404)
    stored = Lesson(**state.lessons[key])
    updated = stored.model_copy(update=lesson.model_dump(exclude_unset=True))
    state.lessons[key] = jsonable_encoder(updated, exclude_defaults=True)
    return updated


@app.post("/plans/{plan}")
def plan(
    plan: UUID,
    starts: Annotated[datetime, Body()],
    takes: Annotated[timedelta, Body()],
    again: Annotated[time | None, Body()] = None,
):
    return {"plan": plan, "ends": starts + takes, "takes": takes, "again": again}


@app.get("/stored")
def stored():
    return state.lessons


REQUESTS = [
    ("GET", "/lessons/art"),
    ("PATCH", "/lessons/art", {"json": {"price": 7.5}}),
    ("PATCH", "/lessons/art", {"json": {"starts": "2031-05-06T07:08:09Z"}}),
    ("PATCH", "/lessons/law", {"json": {}}),
    ("PUT", "/lessons/law", {"json": {"topic": "Law", "pupils": [3, 3, 4]}}),
    ("PUT", "/lessons/law", {"json": {"starts": "soon", "price": "x"}}),
    ("GET", "/lessons/law"),
    ("GET", "/stored"),
    (
        "POST",
        "/plans/00000000-0000-0000-0000-000000000001",
        {"json": {"starts": "2031-01-01T00:00:00", "takes": 90, "again": "14:23"}},
    ),
    ("POST", "/plans/1", {"json": {"takes": "P1D"}}),
]
