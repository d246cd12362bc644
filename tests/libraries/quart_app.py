from typing import Any

from tests.libraries import Ask

REQUESTS = [
    Ask("GET", "/count", 200, "1"),
    Ask("GET", "/count", 200, "2"),
    Ask("POST", "/form", 200, "abc", {"data": {"a": "abc"}}),
    Ask("POST", "/json", 200, '"b":[1]', {"json": {"b": [1]}}),
    Ask("GET", "/where", 200, "/count"),
    Ask("GET", "/away", 302, "/count"),
    Ask("GET", "/page", 200, "<b>started</b>"),
    Ask("GET", "/none", 404, "Not Found"),
]


def make_app() -> Any:
    from quart import Quart, redirect, render_template_string, request, session, url_for

    app = Quart("quart_app")
    app.secret_key = "key"

    @app.before_serving
    async def start() -> None:
        app.config["WORD"] = "started"

    @app.get("/count")
    async def count() -> str:
        session["n"] = session.get("n", 0) + 1
        return str(session["n"])

    @app.post("/form")
    async def form() -> str:
        return str((await request.form)["a"])

    @app.post("/json")
    async def json() -> Any:
        return await request.get_json()

    @app.get("/where")
    async def where() -> str:
        return f"{url_for('count')} {url_for('count', _external=True)}"

    @app.get("/away")
    async def away() -> Any:
        return redirect(url_for("count"))

    @app.get("/page")
    async def page() -> str:
        return await render_template_string("<b>{{ config.WORD }}</b>")

    return app
