"""NiceGUI has one app for each process; see `tests.test_libraries`."""

from typing import Any

AFFINITY = {"cookie": "replica"}


def make_app() -> Any:
    from fastapi import FastAPI
    from nicegui import ui

    app = FastAPI()

    @ui.page("/")
    def page() -> None:
        label = ui.label("not pushed")
        ui.button("push", on_click=lambda: label.set_text("pushed"))

    ui.run_with(app)
    return app


def talk(url: str) -> list[Any]:
    """Push the button, as the page's script does; return what comes of it."""
    import re
    from urllib.parse import urlsplit

    import httpx
    import socketio

    with httpx.Client(timeout=20, follow_redirects=True) as browser:
        page = browser.get(f"{url}/")
        headers = {"cookie": "; ".join(f"{k}={v}" for k, v in browser.cookies.items())}
    client_id = re.search(r"'client_id': '([^']+)'", page.text)
    button = re.search(r'"(\d+)":{"tag":"q-btn".*?"listener_id":"([^"]+)"', page.text)
    assert client_id and button, page.text
    said = {"client_id": client_id[1], "tab_id": "t", "document_id": "d"}
    clicked = {"id": int(button[1]), "listener_id": button[2], "args": []}
    with socketio.SimpleClient(reconnection=False) as client:
        path = f"{urlsplit(url).path}/_nicegui_ws/socket.io"
        client.connect(
            f"{url}?client_id={client_id[1]}",
            headers=headers,
            socketio_path=path,
            transports=["websocket"],
        )
        found = [client.call("handshake", {**said, "next_message_id": 0}, timeout=5)]
        client.emit("event", {**clicked, "client_id": client_id[1]})
        while "pushed" not in str(found[-1]):
            found.append(client.receive(timeout=5))
    return [found[0], re.search("not pushed|pushed", str(found[-1]))[0]]
