from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

STATIC = Path(__file__).parent / "static"


class Uncached(StaticFiles):
    def file_response(self, *args, **kwargs):
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


app = FastAPI()
app.mount("/plain", StaticFiles(directory=STATIC), name="plain")
app.mount("/uncached", Uncached(directory=STATIC))


@app.get("/download")
async def download():
    return FileResponse(STATIC / "style.css", filename="größe.css", media_type="text/x")


@app.get("/api")
def api():
    return app.url_path_for("plain", path="/style.css")


app.mount("/", StaticFiles(directory=STATIC, html=True))

REQUESTS = [
    ("GET", "/plain/style.css"),
    ("HEAD", "/plain/style.css"),
    ("GET", "/plain/style.css", {"headers": {"Range": "bytes=2-8"}}),
    ("GET", "/plain/style.css", {"headers": {"Range": "bytes=900-"}}),
    (
        "GET",
        "/plain/style.css",
        {"headers": {"If-Modified-Since": "Fri, 01 Jan 2100 00:00:00 GMT"}},
    ),
    ("GET", "/plain/nothing.css"),
    ("GET", "/plain/../middleware.py"),
    ("GET", "/plain/%2e%2e/middleware.py"),
    ("POST", "/plain/style.css"),
    ("GET", "/uncached/style.css"),
    ("GET", "/download"),
    ("GET", "/download", {"headers": {"Range": "bytes=-3"}}),
    ("GET", "/api"),
    ("GET", "/"),
    ("GET", "/lost"),
]
