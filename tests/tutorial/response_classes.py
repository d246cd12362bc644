import json
from typing import Any

from fastapi import FastAPI
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
)
from pydantic import BaseModel


class Pretty(JSONResponse):
    media_type = "application/vnd.pretty+json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, indent=2, sort_keys=True).encode()


class Fault(BaseModel):
    fault: str


app = FastAPI(default_response_class=Pretty)


@app.get("/pretty")
def pretty():
    return {"b": [1], "a": None}


@app.get("/html", response_class=HTMLResponse)
async def html():
    return "<h1>\N{SNOWMAN}</h1>"


@app.get("/text", response_class=PlainTextResponse)
def text(word: str = "plain"):
    return word


@app.get("/away", response_class=RedirectResponse, status_code=302)
def away():
    return "https://example.org/?q=ä b"


@app.post("/moved")
def moved():
    return RedirectResponse(app.url_path_for("pretty"), status_code=303)


@app.get("/xml")
def xml():
    return Response("<a>\n</a>", media_type="application/xml", headers={"x-a": "1"})


@app.get(
    "/image",
    responses={200: {"content": {"image/png": {}}}, 404: {"model": Fault}},
    response_class=Response,
)
async def image(there: bool = True):
    if not there:
        return JSONResponse({"fault": "gone"}, status_code=404)
    return Response(b"\x89PNG", media_type="image/png")


@app.get("/empty")
def empty():
    return Response()


REQUESTS = [
    ("GET", "/pretty"),
    ("GET", "/html"),
    ("GET", "/text?word=%C3%A5"),
    ("GET", "/away"),
    ("POST", "/moved"),
    ("GET", "/xml"),
    ("GET", "/image"),
    ("GET", "/image?there=false"),
    ("GET", "/image?there=perhaps"),
    ("GET", "/empty"),
]
