import contextvars

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="none")


class Tenants:
    def __init__(self, app, header: bytes):
        self.app = app
        self.header = header

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            name = dict(scope["headers"]).get(self.header, b"nobody")
            tenant.set(name.decode())
        await self.app(scope, receive, send)


class Upper(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        response = await call_next(request)
        response.headers["x-upper"] = request.url.path.upper()
        return response


app = FastAPI(middleware=[Middleware(Tenants, header=b"x-tenant")])
app.add_middleware(GZipMiddleware, minimum_size=500, compresslevel=5)
app.add_middleware(Upper)
app.add_middleware(TrustedHostMiddleware, allowed_hosts=["*.example.org"])
app.add_middleware(SessionMiddleware, secret_key="k", max_age=None)


@app.middleware("http")
async def count(request: Request, call_next):
    if "x-stop" in request.headers:
        return JSONResponse({"stopped": True}, status_code=403)
    request.state.steps = ["outer"]
    response = await call_next(request)
    response.headers["X-Steps"] = str(len(request.state.steps))
    return response


@app.get("/short")
async def short(request: Request):
    request.state.steps.append("inner")
    return [tenant.get(), *request.state.steps]


@app.get("/long")
def long():
    return {"text": "long " * 1000, "tenant": tenant.get()}


REQUESTS = [
    ("GET", "/short"),
    ("GET", "/short", {"headers": {"X-Tenant": "acme"}}),
    ("GET", "/long"),
    ("GET", "/long", {"headers": {"Accept-Encoding": "identity"}}),
    ("GET", "/short", {"headers": {"X-Stop": "1"}}),
    ("GET", "/short", {"headers": {"Host": "evil.test"}}),
    ("GET", "/nowhere"),
]
