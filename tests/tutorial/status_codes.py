from __future__ import annotations

from typing import Annotated

from fastapi import Body, FastAPI, Response, status
from fastapi.responses import JSONResponse

app = FastAPI()


class State:
    def __init__(self):
        self.jobs: dict[str, str] = {"old": "done"}


state = State()


@app.post("/jobs", status_code=201)
def create(name: Annotated[str, Body(embed=True)], response: Response):
    response.headers["Location"] = app.url_path_for("read", name=name)
    state.jobs[name] = "new"
    return {"name": name}


@app.put("/jobs/{name}", responses={201: {"description": "It was not there"}})
async def put(name: str, response: Response):
    """Start a job, or start it again."""
    if name not in state.jobs:
        response.status_code = status.HTTP_201_CREATED
    return state.jobs.setdefault(name, "put")


@app.get("/jobs/{name}")
def read(name: str):
    if name not in state.jobs:
        return JSONResponse({"missing": name}, status_code=status.HTTP_410_GONE)
    return state.jobs[name]


@app.delete("/jobs/{name}", status_code=status.HTTP_204_NO_CONTENT)
def delete(name: str) -> None:
    del state.jobs[name]


@app.head("/jobs")
def count(response: Response):
    response.headers["X-Jobs"] = str(len(state.jobs))


@app.get("/unchanged")
def unchanged():
    return Response(status_code=304, headers={"etag": '"1"'})


REQUESTS = [
    ("POST", "/jobs", {"json": {"name": "a"}}),
    ("PUT", "/jobs/a"),
    ("PUT", "/jobs/b"),
    ("GET", "/jobs/b"),
    ("HEAD", "/jobs"),
    ("DELETE", "/jobs/b"),
    ("DELETE", "/jobs/b"),
    ("GET", "/jobs/b"),
    ("GET", "/jobs"),
    ("OPTIONS", "/jobs/a"),
    ("GET", "/unchanged"),
]
