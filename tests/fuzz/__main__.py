"""The command; see the package."""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
import time
from collections.abc import Awaitable, Callable

import httpx

from tests.benchmarks.queueing import quantile
from tests.fuzz import direct, requests, state, websocket
from tests.fuzz.target import Target, longest, open_target

#: A kind tries one input; chance decides which, and a finding is a text.
TRIES: dict[str, Callable[[random.Random, Target], Awaitable[str | None]]] = {
    "requests": requests.try_one,
    "websocket": websocket.try_one,
    "direct": direct.try_one,
}
KINDS = [*TRIES, "state"]
#: Inputs that are tried at the same time, of each kind.
AT_ONCE = {"requests": 60, "websocket": 10, "direct": 20}
#: What memory may grow by between two looks: allocators keep some of what was used.
GROWTH, GROWTH_MIB = 1.1, 20
#: Until connections that have just ended are over, and how many files may be others'.
FORGOTTEN_S, FEW_FILES = 3, 5
#: What is printed by a process where something fell through.
FAULT = re.compile(
    r"Traceback|exception was never|Exception in|Fatal error|MemoryError|RuntimeWarning"
)
#: And what may be, of a caller that has the secret and talks nonsense.
ALLOWED = re.compile(r"a channel cannot be read\nTraceback.*\n( .*\n|\n)*.+\n")


class Findings:
    """What was found, and how often something was tried."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.texts: list[str] = []
        self.tried = dict.fromkeys(KINDS, 0)

    def rng(self, kind: str, case: int) -> random.Random:
        """Return the chance of one input."""
        return random.Random(f"{self.seed} {kind} {case}")

    def add(self, kind: str, case: int, text: str | None) -> None:
        """Count one input, and keep what was wrong with it."""
        self.tried[kind] += 1
        if text is not None:
            again = f"--seed {self.seed} --only {kind} --case {case}"
            self.texts.append(f"{again}: {text}")
            print(self.texts[-1][:2000], flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return what it exits with."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--case", type=int, help="only this one, of one kind")
    options = parser.parse_args(arguments)
    findings = Findings(options.seed)
    kinds = [kind for kind in options.only if kind != "state"]
    if "state" in options.only:
        _fuzz_state(findings, options.seconds / 20, options.case)
    if kinds:
        with open_target() as target:
            asyncio.run(_fuzz(findings, target, kinds, options))
            logs = ALLOWED.sub("", target.logs())
            if fault := FAULT.search(logs):
                around = logs[max(0, fault.start() - 500) : fault.start() + 3000]
                findings.texts.append(f"it was logged: {around}")
                print(findings.texts[-1])
    print(f"seed {options.seed}: tried {findings.tried}, found {len(findings.texts)}")
    return bool(findings.texts)


def _fuzz_state(findings: Findings, seconds: float, case: int | None) -> None:
    number, end = case or 0, time.monotonic() + seconds
    while case == number or (case is None and time.monotonic() < end):
        findings.add("state", number, state.try_one(findings.rng("state", number)))
        number += 1


async def _fuzz(
    findings: Findings, target: Target, kinds: list[str], options: argparse.Namespace
) -> None:
    if options.case is not None:
        for kind in kinds:
            rng = findings.rng(kind, options.case)
            findings.add(kind, options.case, await TRIES[kind](rng, target))
        return
    began = time.monotonic()
    stop, warm = began + options.seconds, began + options.seconds / 3

    async def work(kind: str, first: int) -> None:
        case = first
        while time.monotonic() < stop:
            try:
                text = await TRIES[kind](findings.rng(kind, case), target)
            except Exception as err:
                text = f"broke off: {err!r}"
            findings.add(kind, case, text)
            case += AT_ONCE[kind]

    _, files = target.open()
    health = Health(target.port)
    watching = asyncio.create_task(health.watch())
    workers = [
        asyncio.create_task(work(kind, n))
        for kind in kinds
        for n in range(AT_ONCE[kind])
    ]
    await asyncio.sleep(max(0.0, warm - time.monotonic()))
    before, _ = target.open()
    await asyncio.gather(*workers)
    watching.cancel()
    await asyncio.sleep(FORGOTTEN_S)
    after, files_after = target.open()
    p99_ms = quantile(health.times_s, 0.99) * 1e3
    print(
        f"memory {before:.0f} -> {after:.0f} MiB, files {files} -> {files_after}, the "
        f"longest connection {longest[0]:.1f} s, healthz p99 {p99_ms:.0f} ms of "
        f"{len(health.times_s)}"
    )
    if after > before * GROWTH + GROWTH_MIB:
        findings.texts.append(f"memory has grown from {before:.0f} to {after:.0f} MiB")
    if files_after > files + FEW_FILES:
        findings.texts.append(f"{files_after - files} more files are open than before")
    findings.texts += health.failures[:1]


class Health:
    """Asks for ``/-/healthz`` again and again, on a new connection each time."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/-/healthz"
        self.times_s: list[float] = []
        self.failures: list[str] = []

    async def watch(self) -> None:
        """Ask until this is cancelled."""
        while True:
            began = time.monotonic()
            try:
                async with httpx.AsyncClient(timeout=10) as client:
                    response = await client.get(self._url)
                if response.status_code != 200:
                    self.failures.append(f"healthz answered {response.status_code}")
            except httpx.HTTPError as err:
                self.failures.append(f"healthz did not answer: {err!r}")
            self.times_s.append(time.monotonic() - began)
            await asyncio.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
