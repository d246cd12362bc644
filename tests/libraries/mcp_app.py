import asyncio
from typing import Any

AFFINITY = {"header": "mcp-session-id"}


def make_app() -> Any:
    from mcp.server.mcpserver import Context, MCPServer

    server = MCPServer("counters")
    counts: dict[str, int] = {}

    @server.tool()
    async def step(ctx: Context, by: int = 1) -> str:
        key = ctx.request_context.request.headers["mcp-session-id"]
        counts[key] = counts.get(key, 0) + by
        return str(counts[key])

    return server.streamable_http_app(streamable_http_path="/")


def talk(url: str) -> list[Any]:
    import mcp

    async def main() -> list[Any]:
        # Later versions of the protocol have no sessions.
        async with mcp.Client(f"{url}/", mode="legacy") as client:
            found: list[Any] = [
                [tool.name for tool in (await client.list_tools()).tools]
            ]
            for by in (1, 2, "no"):
                result = await client.call_tool("step", {"by": by})
                found.append((result.is_error, result.content[0].text))
        assert found[2] == (False, "3"), found
        return found

    return asyncio.run(asyncio.wait_for(main(), 20))
