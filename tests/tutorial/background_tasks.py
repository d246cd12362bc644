import asyncio
from typing import Annotated

from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.responses import JSONResponse
from starlette.background import BackgroundTask

app = FastAPI()


class State:
    def __init__(self):
        self.sent: list[str] = []


state = State()
log: list[str] = []


def write(line: str, times: int = 1) -> None:
    log.extend([line] * times)


async def write_later(line: str) -> None:
    await asyncio.sleep(0.01)
    log.append(line)


def note_query(tasks: BackgroundTasks, q: str | None = None) -> str | None:
    if q:
        tasks.add_task(write, f"query {q}")
    return q


@app.post("/mails/{to}", status_code=202)
async def mail(
    to: str, tasks: BackgroundTasks, q: Annotated[str | None, Depends(note_query)]
):
    tasks.add_task(write, f"to {to}", times=2)
    tasks.add_task(write_later, f"later to {to}")
    state.sent.append(to)
    return {"log": len(log), "q": q}


@app.post("/single")
def single():
    return JSONResponse({"ok": 1}, background=BackgroundTask(write, "single"))


@app.get("/log/{count}")
async def read_log(count: int):
    while len(log) < count:
        await asyncio.sleep(0.01)
    return [log, state.sent]


REQUESTS = [
    ("POST", "/mails/ann?q=x"),
    ("GET", "/log/4"),
    ("POST", "/mails/bob"),
    ("GET", "/log/7"),
    ("POST", "/single"),
    ("GET", "/log/8"),
]
