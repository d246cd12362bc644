from datetime import date
from typing import Annotated, Literal

from fastapi import FastAPI, Query
from pydantic import AfterValidator, BaseModel, Field

app = FastAPI()

BOOKS = [{"title": f"Volume {number}"} for number in range(20)]


class Page(BaseModel):
    model_config = {"extra": "forbid"}

    size: int = Field(5, gt=0, le=10)
    order: Literal["title", "year"] = "title"
    tags: list[str] = []


def is_isbn(text: str) -> str:
    if not text.startswith("978"):
        raise ValueError("an ISBN starts with 978")
    return text


@app.get("/books")
def books(skip: int = 0, limit: int | None = 2, upper: bool = False):
    found = BOOKS[skip:][:limit]
    return [b["title"].upper() if upper else b["title"] for b in found]


@app.get("/search")
async def search(
    words: Annotated[list[str], Query(alias="w", min_length=1)],
    since: date = date(1900, 1, 1),
    author: Annotated[str, Query(pattern="^[a-z]+$", deprecated=True)] = "anon",
):
    return {"words": words, "since": since, "author": author}


@app.get("/pages")
def pages(page: Annotated[Page, Query()]):
    return page


@app.get("/isbn")
def isbn(code: Annotated[str, AfterValidator(is_isbn)], needed: int):
    return code, needed


REQUESTS = [
    ("GET", "/books"),
    ("GET", "/books?skip=3&limit=4&upper=yes"),
    ("GET", "/books?upper=maybe&skip=x"),
    ("GET", "/search?w=sea&w=whale&since=1851-10-18"),
    ("GET", "/search?author=N0"),
    ("GET", "/search?w=%F0%9F%90%8B&w=a+b&author=melville"),
    ("GET", "/pages?size=3&order=year&tags=a&tags=b"),
    ("GET", "/pages?size=99&colour=red"),
    ("GET", "/isbn?code=978-3&needed=2"),
    ("GET", "/isbn?code=123"),
]
