from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates

HERE = Path(__file__).parent

app = FastAPI()
app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
templates = Jinja2Templates(directory=HERE / "templates")
templates.env.globals["site"] = "Garden"


def shout(text: str) -> str:
    return text.upper() + "!"


templates.env.filters["shout"] = shout


@app.get("/plants/{name}", response_class=HTMLResponse)
def plant(request: Request, name: str):
    context = {"name": name, "colours": ["red", "<green>"]}
    headers = {"X-Plant": "yes"}
    return templates.TemplateResponse(request, "plant.html", context, headers=headers)


@app.get("/missing", response_class=HTMLResponse, status_code=404)
async def missing(request: Request):
    return templates.TemplateResponse(request, "missing.html", status_code=404)


REQUESTS = [
    ("GET", "/plants/rose"),
    ("GET", "/plants/<b>%C3%B8</b>"),
    ("GET", "/missing"),
    ("GET", "/static/style.css"),
]
