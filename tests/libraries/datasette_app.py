from typing import Any

from tests.libraries import Ask

SUM = "/_memory.json?sql=select+:a%2B1+as+b&a=2&_shape=array"
REQUESTS = [
    Ask("GET", "/_memory", 200, "_memory"),
    Ask("GET", SUM, 200, '[{"b": 3}]'),
    Ask("GET", "/_memory.csv?sql=select+1+as+one", 200, "one"),
    Ask("GET", "/_memory.json?sql=select+none_such", 400, "no such column"),
    Ask("GET", "/-/versions.json", 200, "sqlite"),
    Ask("GET", "/-/static/app.css", 200, "body"),
]

#: How long a query took.
VOLATILE = r"(?<=\"query_ms\": )[\d.]+|[\d.]+(?=ms)"


def make_app() -> Any:
    from datasette.app import Datasette

    # It knows no root path, only one prefix, without which it takes requests as well.
    return Datasette(memory=True, settings={"base_url": "/prefix/"}).app()
