from fastapi import FastAPI, HTTPException, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

app = FastAPI()


class OutOfStock(Exception):
    def __init__(self, fruit: str, more: int = 0):
        self.fruit = fruit
        self.more = more


class SoldOut(OutOfStock):
    pass


@app.exception_handler(OutOfStock)
async def out_of_stock(request: Request, error: OutOfStock):
    text = f"{type(error).__name__}: no {error.fruit}, {error.more} will come"
    return JSONResponse({"sorry": text, "path": request.url.path}, status_code=418)


@app.exception_handler(RequestValidationError)
def invalid(request, error):
    places = [".".join(map(str, each["loc"])) for each in error.errors()]
    return PlainTextResponse(f"look at {places}; was {error.body!r}", 400)


@app.exception_handler(StarletteHTTPException)
async def logged(request, error):
    response = await http_exception_handler(request, error)
    response.headers["X-Seen"] = "yes"
    return response


@app.get("/fruits/{fruit}")
def fruit(fruit: str, count: int = 1):
    if fruit == "plum":
        raise OutOfStock(fruit, more=count)
    if fruit == "fig":
        raise SoldOut(fruit)
    if fruit == "coal":
        raise HTTPException(404, {"not": "a fruit"}, headers={"X-Hint": "peel"})
    return {fruit: count / (count - 5)}


@app.post("/fruits")
async def add(fruits: list[int]):
    return fruits


REQUESTS = [
    ("GET", "/fruits/apple"),
    ("GET", "/fruits/apple?count=some"),
    ("GET", "/fruits/plum?count=3"),
    ("GET", "/fruits/fig"),
    ("GET", "/fruits/coal"),
    ("GET", "/fruits/apple?count=5"),
    ("GET", "/vegetables"),
    ("PATCH", "/fruits"),
    ("POST", "/fruits", {"json": ["pear", 2]}),
    ("POST", "/fruits", {"json": [1, 2]}),
]
