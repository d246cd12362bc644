from __future__ import annotations

from fastapi import FastAPI, HTTPException
from fastapi.middleware.cors import CORSMiddleware

app = FastAPI()

app.add_middleware(
    CORSMiddleware,
    allow_origins=["https://front.test", "http://localhost:8080"],
    allow_origin_regex=r"https://.*\.preview\.test",
    allow_credentials=True,
    allow_methods=["GET", "PUT"],
    allow_headers=["X-Token"],
    expose_headers=["X-Total"],
    max_age=99,
)


@app.get("/data")
async def data():
    return {"data": [1, 2, 3]}


@app.put("/data")
def put(data: list[int]):
    raise HTTPException(409, data)


REQUESTS = [
    ("GET", "/data"),
    ("GET", "/data", {"headers": {"Origin": "https://front.test"}}),
    ("GET", "/data", {"headers": {"Origin": "https://front.test", "Cookie": "a=b"}}),
    ("GET", "/data", {"headers": {"Origin": "https://x.preview.test"}}),
    ("GET", "/data", {"headers": {"Origin": "https://other.test"}}),
    ("PUT", "/data", {"headers": {"Origin": "https://front.test"}, "json": [1]}),
    ("PUT", "/data", {"headers": {"Origin": "https://front.test"}, "json": ["x"]}),
    (
        "OPTIONS",
        "/data",
        {
            "headers": {
                "Origin": "http://localhost:8080",
                "Access-Control-Request-Method": "PUT",
                "Access-Control-Request-Headers": "X-Token",
            }
        },
    ),
    (
        "OPTIONS",
        "/data",
        {
            "headers": {
                "Origin": "http://localhost:8081",
                "Access-Control-Request-Method": "DELETE",
                "Access-Control-Request-Headers": "X-Other",
            }
        },
    ),
]
