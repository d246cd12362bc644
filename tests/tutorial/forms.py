from typing import Annotated

from fastapi import Depends, FastAPI, Form, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel

app = FastAPI()


class Order(BaseModel):
    model_config = {"extra": "forbid"}

    dish: str
    count: int = 1
    extras: list[str] = []


def coupon(code: Annotated[str, Form()] = "none") -> str:
    return code.upper()


@app.get("/", response_class=HTMLResponse)
def page():
    return "<form method=post action=/login><input name=user></form>"


@app.post("/login")
def login(user: Annotated[str, Form(min_length=2)], password: Annotated[str, Form()]):
    return {"user": user, "length": len(password)}


@app.post("/orders")
async def order(order: Annotated[Order, Form()]):
    return order


@app.post("/coupons")
def use(code: Annotated[str, Depends(coupon)], agree: Annotated[bool, Form()]):
    return [code, agree]


@app.post("/raw")
async def raw(request: Request):
    async with request.form() as form:
        return form.multi_items()


REQUESTS = [
    ("GET", "/"),
    ("POST", "/login", {"data": {"user": "kim", "password": "ä&= "}}),
    ("POST", "/login", {"data": {"user": "k"}}),
    ("POST", "/login", {"json": {"user": "kim", "password": "x"}}),
    ("POST", "/login", {"files": {"user": (None, "kim"), "password": (None, "x")}}),
    ("POST", "/orders", {"data": {"dish": "soup", "extras": ["bread", "salt"]}}),
    ("POST", "/orders", {"data": {"dish": "soup", "count": "two", "spoon": "1"}}),
    ("POST", "/coupons", {"data": {"code": "ten", "agree": "on"}}),
    ("POST", "/coupons", {"data": {"agree": ""}}),
    ("POST", "/raw", {"data": {"a": ["1", "2"], "b": ""}}),
]
