"""Attacks by many clients at once: others are answered in time, memory comes back.

``python -m tests.fuzz.siege [--only NAME ...] [--seconds S] [--uvicorn]``

The server of a real cluster is attacked by another process, and ``/-/healthz`` is asked
by this one, on a new connection every 50 ms. With ``--uvicorn`` plain uvicorn is
attacked instead, to compare. It ends with 1 if an answer took too long, or if memory or
files were not given back.
"""

from __future__ import annotations

import argparse
import asyncio
import ssl
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.benchmarks.queueing import quantile
from tests.fuzz.attacks import ATTACKS
from tests.fuzz.target import nanny_environment, open_target
from tests.utils import Process, free_port, need_program, poll, write_certificate

#: Attacks by slowhttptest, as its options.
SLOW = {
    "slow-headers": ["-H", "-i", "2"],
    "slow-body": ["-B", "-i", "2", "-s", "500000"],
    "slow-read": "-X -w 512 -y 1024 -n 2 -z 32 -k 3".split(),
}
NAMES = [*SLOW, *ATTACKS]
P99_S = 0.25
PERIOD_S = 0.05
#: No answer for so long counts as one that took as long.
LONGEST_S = 10.0
#: What memory may have grown by, once allocators and connections had so much time.
GROWTH, SETTLED_S = 1.1, 10.0
FEW_FILES = 5


@dataclass
class Siege:
    """One attack on one server, and what others see of it."""

    name: str
    port: int
    process: psutil.Process
    context: ssl.SSLContext | None
    times_s: list[float] = field(default_factory=list)
    highest: float = 0

    def memory(self) -> float:
        """Return it in MiB."""
        return float(self.process.memory_info().rss) / 2**20

    async def attack(self, seconds: float) -> None:
        """Attack for so long, and look on."""
        command = [sys.executable, "-m", "tests.fuzz.attacks", self.name]
        command += [str(self.port), str(seconds)]
        if self.name in SLOW:
            command = [need_program("slowhttptest"), *SLOW[self.name], "-c", "1000"]
            command += ["-r", "500", "-p", "3", "-l", str(max(1, int(seconds)))]
            command += ["-u", f"http://127.0.0.1:{self.port}/echo/large"]
        attacker = await asyncio.create_subprocess_exec(
            *command, stdin=DEVNULL, stdout=DEVNULL
        )
        over = asyncio.create_task(attacker.wait())
        asking = []
        try:
            while not over.done():
                asking.append(asyncio.create_task(self._ask()))
                self.highest = max(self.highest, self.memory())
                await asyncio.sleep(PERIOD_S)
        finally:
            if not over.done():
                attacker.kill()
            await over
        assert not attacker.returncode, f"{command} ended with {attacker.returncode}"
        await asyncio.gather(*asking)

    async def _ask(self) -> None:
        began = time.monotonic()
        answer = b""
        try:
            async with asyncio.timeout(LONGEST_S):
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", self.port, ssl=self.context
                )
                writer.write(
                    b"GET /-/healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                )
                answer = await reader.read()
                writer.close()
        except OSError:
            pass
        well = answer.startswith(b"HTTP/1.1 200 ")
        self.times_s.append(time.monotonic() - began if well else LONGEST_S)

    async def run(self, seconds: float, p99_s: float) -> bool:
        """Attack twice; print what the second time did, and return whether it is well.

        The first time is to fill what is kept for later: pools, caches, free lists.
        """
        await self.attack(seconds)
        await asyncio.sleep(SETTLED_S / 2)
        self.times_s, self.highest = [], 0
        before, files = self.memory(), self.process.num_fds()
        await self.attack(seconds)
        until = time.monotonic() + SETTLED_S
        while not (
            (after := self.memory()) <= before * GROWTH
            and (files_after := self.process.num_fds()) <= files + FEW_FILES
        ):
            if time.monotonic() > until:
                break
            await asyncio.sleep(0.1)
        files_after = self.process.num_fds()
        p99 = quantile(self.times_s, 0.99)
        print(
            f"{self.name:12} healthz p99 {p99 * 1e3:5.0f} max "
            f"{max(self.times_s) * 1e3:5.0f} ms of {len(self.times_s)}; "
            f"{before:.0f} -> {self.highest:.0f} -> {after:.0f} MiB; "
            f"files {files} -> {files_after}",
            flush=True,
        )
        return (
            p99 < p99_s
            and after <= before * GROWTH
            and files_after <= files + FEW_FILES
        )


@contextmanager
def _server(
    plain: bool, certificate: Path | None, directory: Path
) -> Iterator[tuple[int, psutil.Process]]:
    """Start our server or plain uvicorn; yield its port and process."""
    if not plain:
        files = dict.fromkeys(("ssl_certfile", "ssl_keyfile"), str(certificate))
        options = {} if certificate is None else files
        with open_target(**options) as target:
            yield target.port, target.process
        return
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "--factory",
        "tests.fuzz.target:make_echo",
    ]
    command += ["--port", str(port), "--no-access-log", "--log-level", "critical"]
    if certificate is not None:
        command += ["--ssl-certfile", str(certificate)]
    process = Process(
        "uvicorn", command, directory / "log", nanny_environment(), directory
    )
    try:
        of = psutil.Process(process.pid)
        poll(lambda: [c for c in of.net_connections() if c.status == "LISTEN"])
        yield port, of
    finally:
        process.end_group()


def main(arguments: list[str] | None = None, p99_s: float = P99_S) -> int:
    """Run the command; return what it exits with."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.siege")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--uvicorn", action="store_true")
    options = parser.parse_args(arguments)
    failed = []
    for name in options.only:
        with tempfile.TemporaryDirectory() as directory:
            certificate = context = None
            if name.endswith("tls"):
                certificate = write_certificate(Path(directory))
                context = ssl.create_default_context(cafile=certificate)
                context.check_hostname = False
            with _server(options.uvicorn, certificate, Path(directory)) as server:
                siege = Siege(name, *server, context)
                if not asyncio.run(siege.run(options.seconds, p99_s)):
                    failed.append(name)
    if failed:
        print("not well:", *failed)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
