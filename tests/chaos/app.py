"""What clients ask: answers say who served, and files who has begun it. In replicas."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response


class Diary:
    """What a process has begun and finished; a file survives that it is killed.

    Parameters
    ----------
    directory
        Holds a file for each process, by its id.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / str(os.getpid())
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._file = os.open(path, flags)

    def note(self, what: str, request_id: str) -> None:
        os.write(self._file, f"{what} {request_id}\n".encode())

    def close(self) -> None:
        os.close(self._file)


class Echo:
    """Takes as long as it is asked to; says who it is, and what it was sent."""

    def __init__(self, directory: str, version: int = 0) -> None:
        self._diary = Diary(Path(directory))
        self._version = version
        self._config: Any = None

    async def __call__(self, request: Request) -> Response:
        request_id = request.headers.get("x-request-id", "-")
        self._diary.note("begun", request_id)
        body = await request.body()
        await asyncio.sleep(float(request.query_params["sleep"]))
        self._diary.note("done", request_id)
        answer = {
            "id": request_id,
            "pid": os.getpid(),
            "version": self._version,
            "bytes": len(body),
            "config": self._config,
        }
        return JSONResponse(answer)

    def __del__(self) -> None:
        self._diary.close()


class ConfiguredEcho(Echo):
    """Says what it was configured with, too."""

    def reconfigure(self, config: Any) -> None:
        self._config = config


class Broken:
    """Never starts."""

    def __init__(self, *args: object) -> None:
        time.sleep(0.05)
        raise OSError("broken on purpose")

    async def __call__(self) -> str:
        return ""


def read_diaries(directory: Path) -> dict[str, list[int]]:
    """Return the processes that have begun each request, in no particular order."""
    begun: dict[str, list[int]] = {}
    for path in directory.iterdir():
        for line in path.read_text().splitlines():
            what, request_id = line.split()
            if what == "begun":
                begun.setdefault(request_id, []).append(int(path.name))
    return begun
