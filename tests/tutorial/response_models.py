from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, RedirectResponse
from pydantic import BaseModel, Field

app = FastAPI()


class Member(BaseModel):
    name: str
    nickname: str | None = None
    points: int = Field(0, serialization_alias="score")


class NewMember(Member):
    password: str


class Bot(BaseModel):
    name: str
    version: float


MEMBERS = {
    "ann": {"name": "Ann"},
    "bob": {"name": "Bob", "nickname": None, "points": 3, "password": "hush"},
}


@app.post("/members", response_model=Member)
def join(member: NewMember) -> Any:
    return member


@app.post("/base-members")
async def join_base(member: NewMember) -> Member:
    return member


@app.get("/members/{key}", response_model=Member, response_model_exclude_unset=True)
def member(key: str):
    return MEMBERS[key]


@app.get("/short/{key}", response_model=NewMember, response_model_include={"name"})
def short(key: str):
    return {**MEMBERS[key], "password": "x"}


@app.get("/anyone/{key}")
def anyone(key: str) -> Member | Bot:
    return Bot(name="R2", version=2) if key == "bot" else Member(**MEMBERS[key])


@app.get("/all", response_model=list[Member], response_model_by_alias=False)
def everyone():
    return MEMBERS.values()


@app.get("/portal")
def portal(teleport: bool = False) -> Response:
    if teleport:
        return RedirectResponse(app.url_path_for("everyone"))
    return JSONResponse({"teleport": teleport}, headers={"x-portal": "closed"})


@app.get("/maybe", response_model=None)
def maybe() -> Response | dict:
    return {"maybe": None}


REQUESTS = [
    ("POST", "/members", {"json": {"name": "Cy", "password": "p", "points": 4}}),
    ("POST", "/base-members", {"json": {"name": "Cy", "password": "p"}}),
    ("GET", "/members/ann"),
    ("GET", "/members/bob"),
    ("GET", "/members/zoe"),
    ("GET", "/short/bob"),
    ("GET", "/anyone/bot"),
    ("GET", "/anyone/bob"),
    ("GET", "/all"),
    ("GET", "/portal"),
    ("GET", "/portal?teleport=1"),
    ("GET", "/maybe"),
]
