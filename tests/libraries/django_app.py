from typing import Any

from tests.libraries import Ask

REQUESTS = [
    Ask("GET", "/hello/you", 200, "hello you"),
    Ask("GET", "/aio", 200, "aio"),
    Ask("POST", "/form", 200, "abc", {"data": {"a": "abc"}}),
    Ask("GET", "/where", 200, "/hello/x"),
    Ask("GET", "/hello/you/", 404, "Not Found"),
    Ask("GET", "/away", 302, "/hello/x"),
    Ask("GET", "/fails", 500, "Server Error"),
    Ask("GET", "/stream", 200, "012"),
]


def make_app() -> Any:
    """Make the app as a project's ``asgi.py`` does, but for a module of settings."""
    from django.conf import settings
    from django.core.asgi import get_asgi_application

    if not settings.configured:  # they are the process's
        settings.configure(
            ALLOWED_HOSTS=["*"],
            ROOT_URLCONF="tests.libraries.django_urls",
            SECRET_KEY="key",
            MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
        )
    return get_asgi_application()
