"""Many WebSockets and event streams from one process, each checked message by message.

Run as a script, with nothing but the standard library, so that it starts at once and
the load of its imports is not measured: ``crowd.py URL SOCKETS STREAMS INTERVAL_S``.
It prints "ready" when all are open, ends when its input does, and then prints how many
messages came in. Anything missing, doubled or out of order fails it.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from urllib.parse import urlsplit

UPGRADE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)


class Crowd:
    """All connections; they end when `ending` is set."""

    def __init__(self, url: str, interval_s: float) -> None:
        self.parts = urlsplit(url)
        self.interval_s = interval_s
        self.ending = asyncio.Event()
        self.messages = {"socket": 0, "stream": 0}
        self.open = 0

    async def request(
        self, path: str, headers: str = ""
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request; return when its head has been answered."""
        host, port = self.parts.hostname, self.parts.port
        reader, writer = await asyncio.open_connection(host, port)
        head = f"GET {self.parts.path}{path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n"
        writer.write(head.encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.split()[1] in (b"101", b"200"), answer
        self.open += 1
        return reader, writer

    async def socket(self, name: int) -> None:
        """Send numbers, at a steady pace, and expect each back, in order."""
        reader, writer = await self.request("/socket", UPGRADE)
        sent = asyncio.Queue[str | None]()

        async def send() -> None:
            await self.pause(random.random() * self.interval_s)
            number = 0
            while not self.ending.is_set():
                text = f"{name}:{number}"
                sent.put_nowait(text)
                header = bytes([0x81, 0x80 | len(text), 0, 0, 0, 0])
                writer.write(header + text.encode())
                number += 1
                await self.pause(self.interval_s)
            sent.put_nowait(None)

        sending = asyncio.ensure_future(send())
        while (text := await sent.get()) is not None:
            opcode, length = await reader.readexactly(2)
            assert opcode == 0x81, opcode
            got = (await reader.readexactly(length)).decode()
            assert got == text, (got, text)
            self.messages["socket"] += 1
        await sending
        writer.close()

    async def stream(self, name: int) -> None:
        """Expect events with numbers that go up one by one."""
        reader, writer = await self.request(f"/events?name={name}")
        number = 0
        while not self.ending.is_set():
            size = int(await reader.readline(), 16)
            data = (await reader.readexactly(size + 2))[:-2]
            for event in data.decode().removesuffix("\n\n").split("\n\n"):
                assert event == f"data: {name}:{number}", (event, name, number)
                number += 1
            self.messages["stream"] += 1
        writer.close()

    async def pause(self, seconds: float) -> None:
        """Wait, but not beyond the end."""
        try:
            await asyncio.wait_for(self.ending.wait(), seconds)
        except TimeoutError:
            pass

    async def run(self, sockets: int, streams: int) -> None:
        """Open all, tell that they are open, and go on until the input ends."""
        total = sockets + streams
        async with asyncio.TaskGroup() as group:
            for name in range(sockets):
                group.create_task(self.socket(name))
            for name in range(streams):
                group.create_task(self.stream(name))
            while self.open < total:
                await asyncio.sleep(0.01)
            print("ready", flush=True)
            await asyncio.to_thread(sys.stdin.read)
            self.ending.set()
        print(json.dumps(self.messages), flush=True)


if __name__ == "__main__":
    url, sockets, streams, interval_s = sys.argv[1:]
    asyncio.run(Crowd(url, float(interval_s)).run(int(sockets), int(streams)))
