from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException, Query


def need_client(x_client: Annotated[str | None, Header()] = None):
    if x_client == "blocked":
        raise HTTPException(403, "go away")


app = FastAPI(dependencies=[Depends(need_client)])

calls = 0


async def window(skip: int = 0, limit: Annotated[int, Query(le=50)] = 10):
    return range(skip, skip + limit)


Window = Annotated[range, Depends(window)]


class Sorting:
    def __init__(self, by: str = "name", down: bool = False):
        self.by = by
        self.down = down


class Contains:
    def __init__(self, word: str):
        self.word = word

    def __call__(self, q: str = "") -> bool:
        return self.word in q


def counted() -> int:
    global calls
    calls += 1
    return calls


def twice(number: Annotated[int, Depends(counted)]) -> int:
    return 2 * number


@app.get("/window")
async def in_window(window: Window):
    return [*window]


@app.get("/sorted")
def in_order(sorting: Annotated[Sorting, Depends()], window: Window):
    return {"by": sorting.by, "down": sorting.down, "last": window[-1]}


@app.get("/contains")
def contains(found: Annotated[bool, Depends(Contains("bar"))]):
    return found


@app.get("/cached")
def cached(a: Annotated[int, Depends(counted)], b: Annotated[int, Depends(twice)]):
    return [a, b]


@app.get("/fresh")
def fresh(
    a: Annotated[int, Depends(counted)],
    b: Annotated[int, Depends(counted, use_cache=False)],
):
    return [a, b, calls]


@app.get("/unused", dependencies=[Depends(counted), Depends(Contains("x"))])
async def unused(number: int = Depends(lambda n=7: n)):
    return [calls, number]


REQUESTS = [
    ("GET", "/window?skip=2&limit=3"),
    ("GET", "/window?limit=99"),
    ("GET", "/sorted?by=age&down=true"),
    ("GET", "/contains?q=foobar"),
    ("GET", "/contains"),
    ("GET", "/cached"),
    ("GET", "/cached"),
    ("GET", "/fresh"),
    ("GET", "/unused"),
    ("GET", "/unused?n=8"),
    ("GET", "/window", {"headers": {"X-Client": "blocked"}}),
]
