import os
from functools import lru_cache
from typing import Annotated

from fastapi import Depends, FastAPI
from pydantic import BaseModel, SecretStr

app = FastAPI()


class Settings(BaseModel):
    name: str = "nobody's"
    admin: str
    limit: int = 50
    key: SecretStr = SecretStr("hidden")

    @classmethod
    def from_environment(cls) -> "Settings":
        given = {name: os.environ.get(f"TUTORIAL_{name}") for name in cls.model_fields}
        return cls(**{name: value for name, value in given.items() if value})


reads = 0


@lru_cache
def get_settings() -> Settings:
    global reads
    reads += 1
    return Settings.from_environment()


@lru_cache(maxsize=2)
def square(number: int) -> int:
    return number * number


@app.get("/info")
async def info(settings: Annotated[Settings, Depends(get_settings)]):
    return {"name": settings.name, "limit": settings.limit, "reads": reads}


@app.get("/settings")
def all_settings(settings: Annotated[Settings, Depends(get_settings)]):
    return [settings, get_settings() is settings, get_settings.cache_info()]


@app.get("/squares/{number}")
def squared(number: int):
    return [square(number), *square.cache_info()]


REQUESTS = [
    ("GET", "/info"),
    ("GET", "/info"),
    ("GET", "/settings"),
    ("GET", "/squares/3"),
    ("GET", "/squares/3"),
    ("GET", "/squares/4"),
]
