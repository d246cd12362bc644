from typing import Annotated

from fastapi import (
    Cookie,
    Depends,
    FastAPI,
    Query,
    WebSocket,
    WebSocketDisconnect,
    WebSocketException,
)

app = FastAPI()


class State:
    def __init__(self):
        self.rooms: dict[str, list[WebSocket]] = {}
        self.gone: list[int] = []


state = State()


async def need_token(
    token: Annotated[str | None, Query()] = None,
    session: Annotated[str | None, Cookie()] = None,
) -> str:
    if token is None and session is None:
        raise WebSocketException(1008, "a token, please")
    return token or f"of {session}"


@app.websocket("/echo")
async def echo(websocket: WebSocket):
    await websocket.accept(headers=[(b"x-room", b"echo")])
    async for text in websocket.iter_text():
        await websocket.send_text(f"you said {text}")


@app.websocket("/rooms/{room}")
async def chat(websocket: WebSocket, room: str, token: str = Depends(need_token)):
    await websocket.accept(subprotocol="chat")
    members = state.rooms.setdefault(room, [])
    members.append(websocket)
    try:
        while True:
            message = await websocket.receive_json()
            if message == "leave":
                await websocket.close(4000, reason="bye bye")
                break
            await websocket.send_json([token, room, len(members), message])
    except WebSocketDisconnect as gone:
        state.gone.append(gone.code)
    members.remove(websocket)


@app.websocket("/bytes")
async def sizes(websocket: WebSocket, factor: int = 1):
    await websocket.accept()
    while data := await websocket.receive_bytes():
        await websocket.send_bytes(data[::-1] * factor)
    raise WebSocketException(1003, "nothing in it")


@app.websocket("/refused")
async def refused(websocket: WebSocket):
    await websocket.close()


@app.get("/gone")
def gone():
    return [state.gone, {name: len(room) for name, room in state.rooms.items()}]


REQUESTS = [
    ("WS", "/echo", {"send": ["a", "ü" * 70000], "receive": 2}),
    ("WS", "/rooms/a?token=t", {"send": ["[1]", '"leave"'], "subprotocols": ["chat"]}),
    (
        "WS",
        "/rooms/b",
        {
            "send": ['{"a": null}', '"leave"'],
            "subprotocols": ["talk", "chat"],
            "additional_headers": {"Cookie": "session=s1"},
        },
    ),
    ("WS", "/rooms/b", {"send": []}),
    ("WS", "/bytes?factor=2", {"send": [b"\x00\x01", bytes(200000), b""]}),
    ("WS", "/bytes?factor=two", {"send": []}),
    ("WS", "/refused", {"send": []}),
    ("WS", "/nowhere", {"send": []}),
    ("GET", "/echo"),
    ("GET", "/gone"),
]
