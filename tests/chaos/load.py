"""Steady load from clients that keep to HTTP's rules, in a process of its own.

Run as a module it is the clients, with nothing but the standard library, so that it
starts at once and is light: it writes a line for every request's fate, and ends when
its input does. `Load` is how the harness starts it, and reads what it has written.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TextIO
from urllib.parse import urlsplit

#: Methods that a client may send again by itself (RFC 9110, 9.2.2).
IDEMPOTENT = frozenset({"GET", "PUT"})
METHODS = ["GET"] * 5 + ["POST"] * 4 + ["PUT"]
#: How many clients there are, each with a connection, unless it is said.
CONNECTIONS = 24
#: How long requests take in user code, in seconds: most a moment, some much longer.
SLEEPS = [0.002] * 16 + [0.05] * 3 + [0.3]
#: When a client takes it that no answer will ever come.
TIMEOUT_S = 30.0
#: How long after its input has ended the process may run.
END_S = TIMEOUT_S + 10


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What became of one request; times are those of `time.monotonic`."""

    id: str
    method: str
    began: float
    ended: float
    #: The status; or ``refused``, ``closed`` (before the answer), ``cut`` (within it),
    #: ``hung``, ``wrong`` (somebody else's answer), ``vanished`` (the client did).
    outcome: str
    #: How often it was sent: twice at most, and only if that is allowed.
    sent: int = 1
    pid: int = 0
    version: int = -1

    @property
    def idempotent(self) -> bool:
        return self.method in IDEMPOTENT


class Load:
    """Clients that ask a URL, from `with` until its end.

    Parameters
    ----------
    url
        What they ask.
    file
        Where they write what they got.
    connections
        How many clients there are; each has a connection, and keeps it.
    rate
        Requests a second, of all together.
    seed
        Of what they choose.
    vanishing
        Which share of requests is given up by clients, who close their connection.
    """

    def __init__(
        self,
        url: str,
        file: Path,
        *,
        connections: int = CONNECTIONS,
        rate: float = 400,
        seed: int = 0,
        vanishing: float = 0,
    ) -> None:
        options = [url, file, connections, rate, seed, vanishing]
        self._command = [sys.executable, "-m", "tests.chaos.load", *map(str, options)]
        self._path = file

    def __enter__(self) -> Self:
        self._path.touch()
        self._file = self._path.open()
        self._fates: list[Fate] = []
        self._rest = ""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        return self

    def __exit__(self, *args: object) -> None:
        try:
            self._process.communicate(timeout=END_S)
        finally:
            self._process.kill()
            self._process.wait()
            self.fates()
            self._file.close()
        assert self._process.returncode == 0, "the clients failed"

    def fates(self) -> list[Fate]:
        """Return what has come until now."""
        if not self._file.closed:
            *lines, self._rest = (self._rest + self._file.read()).split("\n")
            self._fates += [Fate(**json.loads(line)) for line in lines]
        return self._fates

    def wait(self, count: int, timeout_s: float) -> None:
        """Wait until so many requests have had their fate."""
        deadline = time.monotonic() + timeout_s
        while len(self.fates()) < count:
            assert self._process.poll() is None, "the clients have ended"
            assert time.monotonic() < deadline, f"only {len(self._fates)} requests"
            time.sleep(0.2)


class NoAnswerError(Exception):
    """There is no answer; the text is the outcome."""


class Connection:
    """One connection, and one request at a time on it."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._reader, self._writer = reader, writer
        self.used = False

    @classmethod
    async def open(cls, host: str, port: int) -> Self:
        try:
            return cls(*await asyncio.open_connection(host, port))
        except OSError:
            raise NoAnswerError("refused") from None

    @property
    def is_open(self) -> bool:
        """Whether it looks so, before a request is sent."""
        return not (
            self._writer.is_closing()
            or self._reader.at_eof()
            or self._reader.exception() is not None
        )

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a request; return the answer's status and body."""
        self._writer.write(request)
        try:
            head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        except asyncio.IncompleteReadError as err:
            raise NoAnswerError("cut" if err.partial else "closed") from None
        except OSError:
            raise NoAnswerError("closed") from None
        self.used = True
        status, *lines = head.decode().splitlines()
        headers = dict(line.split(": ", 1) for line in lines if line)
        try:
            body = await self._reader.readexactly(int(headers["content-length"]))
        except (asyncio.IncompleteReadError, OSError):
            raise NoAnswerError("cut") from None
        if headers.get("connection") == "close":
            self.close()
        return int(status.split()[1]), body

    def close(self) -> None:
        self._writer.close()


class Client:
    """One user: asks, gets an answer, waits, asks again."""

    def __init__(self, name: int, url: str, seed: int, vanishing: float) -> None:
        self._name = name
        self._parts = urlsplit(url)
        self._random = random.Random(f"{seed} {name}")
        self._vanishing = vanishing
        self._count = 0
        self._connection: Connection | None = None

    async def run(self, pause_s: float, ending: asyncio.Event, out: TextIO) -> None:
        """Ask every `pause_s`, on average, until the end."""
        await _pause(self._random.random() * pause_s, ending)
        while not ending.is_set():
            began = time.monotonic()
            fate = await self._request(began)
            out.write(json.dumps(dataclasses.asdict(fate)) + "\n")
            pause = pause_s * 2 * self._random.random()
            await _pause(began + pause - time.monotonic(), ending)
        self._drop()

    async def _request(self, began: float) -> Fate:
        self._count += 1
        request_id = f"{self._name}-{self._count}"
        method = self._random.choice(METHODS)
        body = b"" if method == "GET" else bytes(self._random.randrange(2000))
        sleep = self._random.choice(SLEEPS)
        request = self._encode(method, request_id, sleep, body)
        facts: dict[str, Any] = {"sent": 0}
        try:
            vanishes = self._random.random() < self._vanishing
            limit = sleep * self._random.random() if vanishes else TIMEOUT_S
            async with asyncio.timeout(limit):
                status, answer = await self._ask(request, method in IDEMPOTENT, facts)
            outcome = str(status)
            if status == 200:
                said = json.loads(answer)
                facts |= {"pid": said["pid"], "version": said["version"]}
                if (said["id"], said["bytes"]) != (request_id, len(body)):
                    outcome = "wrong"
        except TimeoutError:
            self._drop()
            outcome = "vanished" if vanishes else "hung"
        except NoAnswerError as err:
            self._drop()
            outcome = str(err)
        return Fate(
            id=request_id,
            method=method,
            began=began,
            ended=time.monotonic(),
            outcome=outcome,
            **facts,
        )

    async def _ask(
        self, request: bytes, idempotent: bool, facts: dict[str, Any]
    ) -> tuple[int, bytes]:
        """Ask once; or twice, as every client does when a kept connection has ended."""
        facts["sent"] += 1
        connection = await self._connect()
        used = connection.used
        try:
            return await connection.ask(request)
        except NoAnswerError as err:
            self._drop()
            if str(err) != "closed" or not used or not idempotent:
                raise
        facts["sent"] += 1
        return await (await self._connect()).ask(request)

    async def _connect(self) -> Connection:
        if self._connection is None or not self._connection.is_open:
            self._drop()
            host, port = self._parts.hostname or "", self._parts.port or 80
            self._connection = await Connection.open(host, port)
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _encode(self, method: str, request_id: str, sleep: float, body: bytes) -> bytes:
        lines = [
            f"{method} {self._parts.path}?sleep={sleep} HTTP/1.1",
            f"Host: {self._parts.netloc}",
            f"X-Request-Id: {request_id}",
        ]
        if method != "GET":
            lines.append(f"Content-Length: {len(body)}")
        return "\r\n".join([*lines, "", ""]).encode() + body


async def _pause(seconds: float, ending: asyncio.Event) -> None:
    """Wait, but not beyond the end."""
    with suppress(TimeoutError):
        async with asyncio.timeout(max(0, seconds)):
            await ending.wait()


async def _flush(out: TextIO, ending: asyncio.Event) -> None:
    while not ending.is_set():
        out.flush()
        await _pause(0.1, ending)


async def _main(
    url: str, file: str, connections: int, rate: float, seed: int, vanishing: float
) -> None:
    ending = asyncio.Event()
    with open(file, "a") as out:  # noqa: ASYNC230
        async with asyncio.TaskGroup() as group:
            for name in range(connections):
                client = Client(name, url, seed, vanishing)
                group.create_task(client.run(connections / rate, ending, out))
            group.create_task(_flush(out, ending))
            await asyncio.to_thread(sys.stdin.read)
            ending.set()


if __name__ == "__main__":
    _url, _file, *_numbers = sys.argv[1:]
    _connections, _rate, _seed, _vanishing = map(float, _numbers)
    asyncio.run(_main(_url, _file, int(_connections), _rate, int(_seed), _vanishing))
