from typing import Any
from urllib.parse import urlsplit

AFFINITY = {"cookie": "replica"}


def make_app() -> Any:
    import socketio

    server = socketio.AsyncServer(async_mode="asgi", cors_allowed_origins="*")
    counts: dict[str, int] = {}

    @server.event
    async def step(sid: str, by: int) -> int:
        counts[sid] = counts.get(sid, 0) + by
        await server.emit("stepped", {"by": by, "data": b"raw"}, to=sid)
        return counts[sid]

    return socketio.ASGIApp(server, socketio_path=None)


def talk(url: str) -> list[Any]:
    import socketio

    path = f"{urlsplit(url).path}/socket.io"
    found: list[Any] = []
    for transports in (["polling", "websocket"], ["websocket"]):
        with socketio.SimpleClient(reconnection=False) as client:
            client.connect(url, socketio_path=path, transports=transports)
            for by in (1, 2):
                found.append(client.call("step", by, timeout=10))
                found.append(client.receive(timeout=10))
    assert found[2] == found[6] == 3, found
    return found
