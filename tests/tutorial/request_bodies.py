from __future__ import annotations

from typing import Annotated

from fastapi import Body, FastAPI
from pydantic import BaseModel, Field, computed_field, field_validator

app = FastAPI()


class Room(BaseModel):
    name: str = Field(min_length=2, examples=["kitchen"])
    width: float
    depth: float = 3
    floor: int | None = None

    @field_validator("name")
    @classmethod
    def tidy(cls, value: str) -> str:
        return value.strip().lower()

    @computed_field
    @property
    def area(self) -> float:
        return self.width * self.depth


class Guest(BaseModel):
    nick: str


class State:
    def __init__(self):
        self.rooms: dict[str, Room] = {}


state = State()


@app.post("/rooms")
def build(room: Room) -> Room:
    state.rooms[room.name] = room
    return room


@app.get("/rooms")
def rooms():
    return state.rooms


@app.put("/rooms/{name}")
async def book(
    name: str, room: Room, guest: Guest, nights: Annotated[int, Body(gt=0)], q: int = 0
):
    return {"name": name, **room.model_dump(), **guest.model_dump(), "n": nights + q}


@app.post("/guests")
def register(guest: Annotated[Guest, Body(embed=True)]):
    return guest.nick


@app.post("/raw")
def raw(anything: Annotated[dict | list, Body()]):
    return anything


REQUESTS = [
    ("POST", "/rooms", {"json": {"name": " Kitchen ", "width": 2}}),
    ("POST", "/rooms", {"json": {"name": "k", "width": "wide"}}),
    ("POST", "/rooms", {"content": b"{no json", "headers": {"content-type": "text/x"}}),
    ("POST", "/rooms", {"content": b"{", "headers": {"content-type": "text/json"}}),
    ("POST", "/rooms"),
    ("GET", "/rooms"),
    (
        "PUT",
        "/rooms/a?q=4",
        {
            "json": {
                "room": {"name": "Hall", "width": 3},
                "guest": {"nick": "Bo"},
                "nights": 2,
            }
        },
    ),
    ("PUT", "/rooms/a", {"json": {"room": {}, "nights": 0}}),
    ("POST", "/guests", {"json": {"guest": {"nick": "Al"}}}),
    ("POST", "/guests", {"json": {"nick": "Al"}}),
    ("POST", "/raw", {"json": [1, {"a": None}]}),
]
