from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request

app = FastAPI(openapi_tags=[{"name": "birds", "description": "They fly"}])


class State:
    def __init__(self):
        self.seen: list[str] = []


state = State()


async def need_guide(x_guide: Annotated[str, Header()]):
    if x_guide != "ok":
        raise HTTPException(400, "no such guide")


birds = APIRouter(prefix="/birds", tags=["birds"], responses={404: {"model": str}})
nests = APIRouter(prefix="/{bird}/nests")
admin = APIRouter(dependencies=[Depends(need_guide)], deprecated=True)


@birds.get("")
def all_birds():
    return state.seen


@birds.get("/{bird}")
async def bird(bird: str, request: Request):
    if bird == "dodo":
        raise HTTPException(404, "extinct")
    state.seen.append(bird)
    return str(request.url_for("nest", bird=bird, number=1))


@nests.get("/{number}")
def nest(bird: str, number: int):
    return f"nest {number} of {bird}"


@admin.api_route("/reset", methods=["POST", "DELETE"], include_in_schema=False)
def reset():
    state.seen.clear()


@admin.get("/report", operation_id="yearly", summary="All of it", tags=["reports"])
def report():
    """Tell what was seen.

    - **birds**: in this order
    """
    return {"birds": state.seen}


birds.include_router(nests)
app.include_router(birds)
app.include_router(admin, prefix="/admin", tags=["admin"])
app.include_router(birds, prefix="/v2", include_in_schema=False)

REQUESTS = [
    ("GET", "/birds/owl"),
    ("GET", "/v2/birds/jay"),
    ("GET", "/birds"),
    ("GET", "/birds/"),
    ("GET", "/birds/dodo"),
    ("GET", "/birds/owl/nests/2"),
    ("GET", "/v2/birds/owl/nests/two"),
    ("GET", "/admin/report"),
    ("GET", "/admin/report", {"headers": {"X-Guide": "ok"}}),
    ("GET", "/admin/report", {"headers": {"X-Guide": "ko"}}),
    ("DELETE", "/admin/reset", {"headers": {"X-Guide": "ok"}}),
    ("GET", "/v2/birds"),
]
