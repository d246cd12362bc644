from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException, WebSocket
from fastapi.testclient import TestClient

app = FastAPI()


class State:
    def __init__(self):
        self.asked = 0


state = State()


def clock() -> str:
    return "12:00"


@app.get("/time")
def time(now: Annotated[str, Depends(clock)], x_zone: Annotated[str, Header()]):
    if x_zone != "UTC":
        raise HTTPException(400, "only UTC")
    state.asked += 1
    return {"now": now, "asked": state.asked}


@app.websocket("/ticks")
async def ticks(websocket: WebSocket):
    await websocket.accept()
    await websocket.send_json({"tick": 1})
    await websocket.close()


@app.middleware("http")
async def mark(request, call_next):
    response = await call_next(request)
    response.headers["x-marked"] = "1"
    return response


def test_bad_zone():
    with TestClient(app) as client:
        response = client.get("/nowhere", headers={"x-zone": "CET"})
        assert response.status_code == 404
        assert response.headers["x-marked"] == "1"
        assert set(client.get("/openapi.json").json()["paths"]) == {"/time"}


def test_ticks():
    with TestClient(app).websocket_connect("/ticks") as socket:
        assert socket.receive_json() == {"tick": 1}


app.dependency_overrides[clock] = lambda: "12:34"

if __name__ == "__main__":
    test_bad_zone()

REQUESTS = [
    ("GET", "/time", {"headers": {"X-Zone": "UTC"}}),
    ("GET", "/time", {"headers": {"X-Zone": "UTC"}}),
    ("GET", "/time", {"headers": {"X-Zone": "CET"}}),
    ("GET", "/time"),
    ("WS", "/ticks", {"send": []}),
]
