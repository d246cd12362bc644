from typing import Annotated, Generic, Literal, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel, Field, HttpUrl, model_validator

app = FastAPI()

T = TypeVar("T")


class Photo(BaseModel):
    url: HttpUrl
    alt: str = ""


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: set[str] = set()


class Owner(BaseModel):
    name: str
    pets: list[Annotated[Cat | Dog, Field(discriminator="kind")]]
    photos: dict[int, Photo] = {}
    friends: list["Owner"] = []

    @model_validator(mode="after")
    def has_pets(self):
        if not self.pets:
            raise ValueError("somebody without pets is no owner")
        return self


class Box(BaseModel, Generic[T]):
    content: T
    count: int


@app.post("/owners")
def add(owner: Owner) -> Box[Owner]:
    return Box(content=owner, count=len(owner.friends))


@app.post("/photos")
async def add_photos(photos: list[Photo]) -> Box[list[str]]:
    return Box(content=[str(p.url) for p in photos], count=len(photos))


@app.post("/weights")
def weigh(weights: dict[int, float]):
    return {"sum": sum(weights.values()), "keys": [*weights]}


REQUESTS = [
    (
        "POST",
        "/owners",
        {
            "json": {
                "name": "Ida",
                "pets": [{"kind": "cat"}, {"kind": "dog", "tricks": ["sit", "sit"]}],
                "photos": {"3": {"url": "https://example.org/3.png"}},
                "friends": [{"name": "Per", "pets": [{"kind": "cat", "lives": 2}]}],
            }
        },
    ),
    ("POST", "/owners", {"json": {"name": "Ole", "pets": []}}),
    ("POST", "/owners", {"json": {"name": "Ole", "pets": [{"kind": "cow"}]}}),
    ("POST", "/photos", {"json": [{"url": "http://a.example"}, {"url": "nowhere"}]}),
    ("POST", "/photos", {"json": [{"url": "http://a.example/ä"}]}),
    ("POST", "/weights", {"json": {"1": 2.5, "7": 4}}),
    ("POST", "/weights", {"json": {"one": 2.5}}),
]
