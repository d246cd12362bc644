import secrets
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Security
from fastapi.security import (
    APIKeyCookie,
    APIKeyHeader,
    APIKeyQuery,
    HTTPBasic,
    HTTPBasicCredentials,
    HTTPBearer,
)

app = FastAPI()

basic = HTTPBasic(realm="cellar")
key_header = APIKeyHeader(name="X-Key", auto_error=False)
key_query = APIKeyQuery(name="key", auto_error=False)
key_cookie = APIKeyCookie(name="key")


class State:
    def __init__(self):
        self.opened = 0


state = State()


def keeper(given: Annotated[HTTPBasicCredentials, Depends(basic)]) -> str:
    right = secrets.compare_digest(given.password.encode(), "schlüssel".encode())
    if not right:
        raise HTTPException(401, "no", {"WWW-Authenticate": "Basic"})
    return given.username


def any_key(
    header: Annotated[str | None, Security(key_header)],
    query: Annotated[str | None, Security(key_query)],
) -> str:
    if header or query:
        return f"{header} {query}"
    raise HTTPException(403, "no key")


@app.get("/cellar")
def cellar(name: Annotated[str, Depends(keeper)]):
    state.opened += 1
    return {"name": name, "opened": state.opened}


@app.get("/attic")
async def attic(key: Annotated[str, Depends(any_key)]):
    return key


@app.get("/shed")
async def shed(key: Annotated[str, Security(key_cookie)]):
    return key


@app.get("/roof")
def roof(given: Annotated[object, Depends(HTTPBearer(bearerFormat="x"))]):
    return given


REQUESTS = [
    ("GET", "/cellar"),
    ("GET", "/cellar", {"auth": ("bo", "schlüssel")}),
    ("GET", "/cellar", {"auth": ("bo", "wrong")}),
    ("GET", "/cellar", {"headers": {"Authorization": "Basic !"}}),
    ("GET", "/cellar", {"auth": ("cy", "schlüssel")}),
    ("GET", "/attic"),
    ("GET", "/attic?key=q", {"headers": {"X-Key": "h"}}),
    ("GET", "/shed"),
    ("GET", "/shed", {"headers": {"Cookie": "key=c"}}),
    ("GET", "/roof"),
    ("GET", "/roof", {"headers": {"Authorization": "Bearer b"}}),
]
