from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import FastAPI, File, Form, HTTPException, UploadFile

app = FastAPI()


class State:
    def __init__(self):
        self.sizes: dict[str, int] = {}


state = State()


@app.post("/bytes")
def take_bytes(file: Annotated[bytes, File(description="All of it")]):
    return {"size": len(file), "sha": hashlib.sha256(file).hexdigest()}


@app.post("/upload")
async def upload(file: UploadFile, note: Annotated[str, Form()] = "-"):
    start = await file.read(4)
    await file.seek(0)
    state.sizes[file.filename] = file.size
    return [file.filename, file.content_type, file.size, start.hex(), note]


@app.post("/many")
def many(files: list[UploadFile]):
    if len(files) > 2:
        raise HTTPException(413, "two files at most")
    return {file.filename: file.file.read().decode() for file in files}


@app.post("/perhaps")
async def perhaps(file: UploadFile | None = None, token: Annotated[str, Form()] = ""):
    return {"file": file and file.filename, "token": token}


@app.get("/sizes")
def sizes():
    return state.sizes


REQUESTS = [
    ("POST", "/bytes", {"files": {"file": ("a", b"\x00\xff" * 700000)}}),
    ("POST", "/upload", {"files": {"file": ("ä b.png", b"\x89PNG....", "image/png")}}),
    (
        "POST",
        "/upload",
        {"files": {"file": ("big", b"x" * 3_000_000)}, "data": {"note": "ü"}},
    ),
    ("POST", "/upload", {"data": {"note": "no file"}}),
    ("POST", "/many", {"files": [("files", ("a", b"1")), ("files", ("b", b"2"))]}),
    ("POST", "/many", {"files": [("files", (n, b"1")) for n in "abc"]}),
    ("POST", "/perhaps", {"data": {"token": "t"}}),
    ("POST", "/perhaps", {"files": {"file": ("f", b"")}}),
    ("GET", "/sizes"),
]
