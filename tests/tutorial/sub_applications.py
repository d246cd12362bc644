from __future__ import annotations

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import PlainTextResponse

app = FastAPI(title="Main")
shop = FastAPI(title="Shop", version="7")
admin = FastAPI(openapi_url=None)


class State:
    def __init__(self):
        self.sold = 0


state = State()


@app.get("/")
def root(request: Request):
    return {"root_path": request.scope["root_path"], "shop": str(request.base_url)}


@shop.get("/buy/{thing}", name="buy")
async def buy(thing: str, request: Request):
    state.sold += 1
    return {
        "sold": state.sold,
        "root_path": request.scope["root_path"],
        "again": str(request.url_for("buy", thing="more")),
        "app": request.app.title,
    }


@shop.exception_handler(HTTPException)
async def shop_error(request: Request, error: HTTPException):
    return PlainTextResponse(f"shop: {error.detail}", error.status_code)


@shop.get("/closed")
def closed():
    raise HTTPException(423, "closed")


@admin.get("/")
def administrate():
    return "admin"


shop.mount("/admin", admin)
app.mount("/shop", shop, name="shop")

REQUESTS = [
    ("GET", "/"),
    ("GET", "/shop/buy/tea"),
    ("GET", "/shop/buy/milk%20jug"),
    ("GET", "/shop/closed"),
    ("GET", "/shop/openapi.json"),
    ("GET", "/shop/docs"),
    ("GET", "/shop/admin/"),
    ("GET", "/shop/admin"),
    ("GET", "/shop/admin/docs"),
    ("GET", "/shop/nothing"),
    ("GET", "/shop"),
]
