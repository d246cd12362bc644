from __future__ import annotations

from typing import Annotated

from fastapi import Cookie, FastAPI, Header, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

app = FastAPI()


class Trace(BaseModel):
    x_trace: str
    x_span: list[int] = []
    save_data: bool = False


class Visit(BaseModel):
    model_config = {"extra": "forbid"}

    visitor: str
    theme: str = "light"


@app.get("/headers")
def headers(
    user_agent: Annotated[str | None, Header()] = None,
    x_lucky: Annotated[list[int] | None, Header()] = None,
    odd_name: Annotated[str | None, Header(convert_underscores=False)] = None,
):
    return {"agent": user_agent, "lucky": x_lucky, "odd": odd_name}


@app.get("/trace")
async def trace(trace: Annotated[Trace, Header()], response: Response):
    response.headers["X-Trace"] = trace.x_trace
    response.headers.append("Vary", "X-Trace")
    return trace


@app.post("/login/{name}")
def login(name: str, response: Response):
    response.set_cookie("visitor", name, max_age=600, httponly=True, samesite="strict")
    response.set_cookie("theme", "dark blue", path="/", secure=False)
    return {"hello": name}


@app.get("/me")
def me(visit: Annotated[Visit, Cookie()]):
    return visit


@app.get("/theme")
def theme(theme: Annotated[str | None, Cookie()] = None):
    return theme


@app.post("/logout")
async def logout():
    response = JSONResponse({"bye": True}, headers={"Cache-Control": "no-store"})
    response.delete_cookie("visitor")
    return response


REQUESTS = [
    ("GET", "/headers", {"headers": [("x-lucky", "3"), ("X-Lucky", "7")]}),
    ("GET", "/headers", {"headers": {"odd_name": "a", "User-agent": b"Caf\xe9/1"}}),
    ("GET", "/headers", {"headers": {"x-lucky": "seven"}}),
    ("GET", "/trace", {"headers": {"x-trace": "t1", "x-span": "4", "save-data": "on"}}),
    ("GET", "/trace"),
    ("GET", "/me"),
    ("POST", "/login/eve"),
    ("GET", "/me"),
    ("GET", "/theme"),
    ("POST", "/logout"),
    ("GET", "/theme"),
    ("GET", "/me", {"headers": {"cookie": "visitor=x; spam=1"}}),
]
