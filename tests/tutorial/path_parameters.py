from __future__ import annotations

from enum import Enum
from typing import Annotated
from uuid import UUID

from fastapi import FastAPI, Path

app = FastAPI(title="Planets")


class Kind(str, Enum):  # noqa: UP042 - as most write it
    rock = "rock"
    gas = "gas"


@app.get("/planets/nearest")
def nearest():
    return {"planet": "Mercury"}


@app.get("/planets/{number}")
async def planet(number: Annotated[int, Path(ge=1, le=8, title="From the sun")]):
    return {"number": number}


@app.get("/kinds/{kind}")
def kind_of(kind: Kind):
    return {"kind": kind, "is_rock": kind is Kind.rock}


@app.get("/maps/{name:path}")
def map_of(name: str, scale: float = 1):
    return [name, scale]


@app.get("/probes/{probe}/{orbit}")
async def probe_of(orbit: float, probe: UUID):
    return {"probe": probe, "orbit": orbit}


REQUESTS = [
    ("GET", "/planets/nearest"),
    ("GET", "/planets/3"),
    ("GET", "/planets/9"),
    ("GET", "/planets/earth"),
    ("GET", "/planets/"),
    ("GET", "/kinds/gas"),
    ("GET", "/kinds/ice"),
    ("GET", "/maps/mars/olympus%20mons.png?scale=2.5"),
    ("GET", "/maps/%C3%A4/b%2Fc"),
    ("GET", "/probes/5a5c9a1c-4a51-4e0e-8b0a-9b8d3f3c2d11/2.5"),
    ("GET", "/probes/voyager/x"),
    ("POST", "/planets/3"),
    ("GET", "/stars"),
]
