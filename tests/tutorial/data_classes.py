from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import NamedTuple

import pydantic.dataclasses
from fastapi import FastAPI
from typing_extensions import TypedDict  # pydantic wants it before Python 3.12

app = FastAPI()


@dataclass
class Note:
    text: str
    stars: float = 0
    tags: list[str] = field(default_factory=list)


@pydantic.dataclasses.dataclass
class Author:
    name: str
    notes: list[Note] = dataclasses.field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    by: str
    number: int


class Point(NamedTuple):
    x: int
    y: int = 0


class Sizes(TypedDict, total=False):
    width: int
    height: int


@app.post("/notes", response_model=Note)
async def add(note: Note):
    return dataclasses.replace(note, stars=note.stars + 1)


@app.post("/authors/{name}")
def author(name: str, notes: list[Note]) -> Author:
    return Author(name=name, notes=notes)


@app.get("/authors", response_model=list[Author])
def authors():
    note = {"text": "hi", "more": "is left out"}
    return [{"name": "Bea", "notes": [note]}, Author("Cid")]


@app.get("/stamps/{number}")
def stamp(number: int) -> Stamp:
    return Stamp(by="me", number=number)


@app.post("/shapes")
def shape(points: list[Point], sizes: Sizes) -> tuple[Point, Sizes]:
    return Point(*map(sum, zip(*points, strict=True))), sizes


REQUESTS = [
    ("POST", "/notes", {"json": {"text": "a", "stars": 2}}),
    ("POST", "/notes", {"json": {"stars": "many"}}),
    ("POST", "/authors/Al", {"json": [{"text": "x", "tags": ["t"]}, {"text": "y"}]}),
    ("GET", "/authors"),
    ("GET", "/stamps/3"),
    ("GET", "/stamps/x"),
    ("POST", "/shapes", {"json": {"points": [[1, 2], [3, 4]], "sizes": {"width": 1}}}),
    ("POST", "/shapes", {"json": {"points": [["a"]], "sizes": {"depth": 1}}}),
]
