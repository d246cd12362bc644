from typing import Any

from tests.libraries import Ask

ADD = {"query": "query($x: Int!) { add(x: $x, y: 2) }", "variables": {"x": 1}}
REQUESTS = [
    Ask("POST", "/", 200, '{"data":{"add":3}}', {"json": ADD}),
    Ask("GET", "/?query={words}", 200, '["a","b"]'),
    Ask("POST", "/", 200, "Cannot query field", {"json": {"query": "{ nothing }"}}),
    Ask("POST", "/", 400, "", {"content": b"{"}),
    Ask("GET", "/", 200, "GraphiQL", {"headers": {"accept": "text/html"}}),
]


def make_app() -> Any:
    import strawberry
    from strawberry.asgi import GraphQL

    @strawberry.type
    class Query:
        @strawberry.field
        def add(self, x: int, y: int) -> int:
            return x + y

        @strawberry.field
        async def words(self) -> list[str]:
            return ["a", "b"]

    return GraphQL(strawberry.Schema(Query))
