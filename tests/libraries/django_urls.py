from collections.abc import AsyncIterator

from django.http import (
    HttpRequest,
    HttpResponse,
    HttpResponseRedirect,
    StreamingHttpResponse,
)
from django.urls import path, reverse


def hello(request: HttpRequest, name: str) -> HttpResponse:
    return HttpResponse(f"hello {name}")


async def aio(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"aio {request.path} {request.path_info}")


def form(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.POST["a"])


def where(request: HttpRequest) -> HttpResponse:
    link = reverse("hello", args=["x"])
    return HttpResponse(f"{link} {request.build_absolute_uri(link)}")


def away(request: HttpRequest) -> HttpResponse:
    return HttpResponseRedirect(reverse("hello", args=["x"]))


def fails(request: HttpRequest) -> HttpResponse:
    raise RuntimeError("a view fails")


async def stream(request: HttpRequest) -> StreamingHttpResponse:
    async def numbers() -> AsyncIterator[str]:
        for i in range(3):
            yield str(i)

    return StreamingHttpResponse(numbers())


urlpatterns = [
    path("hello/<str:name>", hello, name="hello"),
    path("aio", aio),
    path("form", form),
    path("where", where),
    path("away", away),
    path("fails", fails),
    path("stream", stream),
]
