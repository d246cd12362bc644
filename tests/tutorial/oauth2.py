from __future__ import annotations

import base64
import hmac
import json
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Security
from fastapi.security import (
    OAuth2PasswordBearer,
    OAuth2PasswordRequestForm,
    SecurityScopes,
)
from pydantic import BaseModel

app = FastAPI()

KEY = b"not so secret"
SCOPES = {"read": "Read letters", "write": "Write letters"}
USERS = {"eva": {"name": "eva", "password": "pear"}}

scheme = OAuth2PasswordBearer(tokenUrl="token", scopes=SCOPES)


class User(BaseModel):
    name: str
    scopes: list[str]


def sign(claims: dict) -> str:
    text = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode()
    return f"{text}.{hmac.new(KEY, text.encode(), 'sha256').hexdigest()}"


def verify(token: str) -> dict:
    text, _, _ = token.partition(".")
    claims = json.loads(base64.urlsafe_b64decode(text)) if "." in token else {}
    return claims if hmac.compare_digest(sign(claims), token) else {}


async def current_user(
    needed: SecurityScopes, token: Annotated[str, Depends(scheme)]
) -> User:
    claims = verify(token)
    challenge = {"WWW-Authenticate": f'Bearer scope="{needed.scope_str}"'}
    if claims.get("sub") not in USERS:
        raise HTTPException(401, "Who are you?", challenge)
    if missing := set(needed.scopes) - set(claims["scopes"]):
        raise HTTPException(403, f"needs {sorted(missing)}", challenge)
    return User(name=claims["sub"], scopes=claims["scopes"])


@app.post("/token")
def token(form: Annotated[OAuth2PasswordRequestForm, Depends()]):
    user = USERS.get(form.username)
    if user is None or user["password"] != form.password:
        raise HTTPException(400, "Wrong name or password")
    claims = {"sub": user["name"], "scopes": form.scopes}
    return {"access_token": sign(claims), "token_type": "bearer"}


@app.get("/me")
async def me(user: Annotated[User, Depends(current_user)]) -> User:
    return user


@app.get("/letters")
def letters(user: Annotated[User, Security(current_user, scopes=["read"])]):
    return f"letters of {user.name}"


@app.post("/letters")
def write(user: Annotated[User, Security(current_user, scopes=["read", "write"])]):
    return f"letter by {user.name}"


REQUESTS = [
    ("GET", "/me"),
    ("GET", "/me", {"headers": {"Authorization": "Basic eDp5"}}),
    ("POST", "/token", {"data": {"username": "eva", "password": "plum"}}),
    ("POST", "/token", {"data": {"username": "eva"}}),
    (
        "POST",
        "/token",
        {"data": {"username": "eva", "password": "pear", "scope": "read"}},
    ),
    *(
        (method, path, {"headers": {"Authorization": f"Bearer {token}"}})
        for token in [
            "eyJzdWIiOiAiZXZhIiwgInNjb3BlcyI6IFsicmVhZCJdfQ==."
            "cd10a206d6f5bfd457a3a6a6afe2673b3ebf3563931e32ef96bc20e712502a71",
            "eyJzdWIiOiAiZXZlIn0=.cd10a206d6f5bfd457a3a6a6afe2673b3ebf3563931e32",
        ]
        for method, path in [("GET", "/me"), ("GET", "/letters"), ("POST", "/letters")]
    ),
]
