"""Counting who waits, over all processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from daskserve.controller.queues import REPEAT_S, QueueBoard
from daskserve.exceptions import QueueFullError
from daskserve.transport import queue_reports
from daskserve.transport.queue_reports import QueueReports
from tests.test_http import Gate, Notes, Site, gate, notes, open_site

__all__ = ["gate", "notes"]  # fixtures


def test_board_adds_up_and_speaks_when_there_is_news() -> None:
    board = QueueBoard()
    assert board.due(0.0) is None  # nothing waits, nobody thinks otherwise
    board.report("a", {"D": 2, "E": 1})
    board.report("b", {"D": 3})
    assert board.due(1.0) == {"D": 5, "E": 1}
    assert board.elsewhere("a") == {"D": 3}
    assert board.elsewhere("b") == {"D": 2, "E": 1}
    assert board.elsewhere("c") == {"D": 5, "E": 1}
    assert board.due(1.1) is None
    board.report("a", {"D": 2})
    assert board.due(1.2) == {"D": 5}
    board.report("b", {})
    board.forget("a")
    assert board.due(1.3) == {}
    assert board.due(99.0) is None


def test_board_repeats_what_stays() -> None:
    board = QueueBoard()
    board.report("a", {"D": 2})
    assert board.due(1.0) == {"D": 2}
    assert board.due(1.0 + REPEAT_S / 2) is None
    assert board.due(1.0 + REPEAT_S) == {"D": 2}
    assert board.due(1.1 + REPEAT_S) is None


class Process:
    """A process with a queue; what it reports is kept."""

    def __init__(self) -> None:
        self.waiting: dict[str, int] = {}
        self.sent: list[dict[str, int]] = []
        loop = asyncio.get_running_loop()
        self.reports = QueueReports(loop, lambda: dict(self.waiting))
        self.reports.send = self.sent.append

    async def wait_for_reports(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.sent) < count:
                await asyncio.sleep(0.001)


def test_process_reports_while_anything_waits() -> None:
    async def check() -> None:
        process = Process()
        process.waiting = {"D": 1}
        process.reports.changed()
        process.reports.changed()
        await process.wait_for_reports(1)
        process.waiting = {"D": 5}  # and nobody says so
        await process.wait_for_reports(2)
        process.waiting = {}
        await process.wait_for_reports(3)
        assert process.sent == [{"D": 1}, {"D": 5}, {}]
        await asyncio.sleep(3 * queue_reports.REPORT_S)
        assert len(process.sent) == 3
        process.waiting = {"D": 1}
        process.reports.changed()
        await process.wait_for_reports(4)

    asyncio.run(check())


def test_process_knows_of_the_others() -> None:
    async def check() -> None:
        process = Process()
        process.waiting = {"D": 2}
        process.reports.changed()
        await process.wait_for_reports(1)
        process.reports.take_elsewhere({"D": 5, "E": 1})
        assert process.reports.elsewhere("D") == 5
        assert process.reports.elsewhere("E") == 1
        assert process.reports.elsewhere("F") == 0
        process.waiting = {"D": 9}  # whatever waits here by now
        await process.wait_for_reports(2)
        assert process.reports.elsewhere("D") == 5
        process.reports.take_elsewhere({})
        assert process.reports.elsewhere("D") == 0

    asyncio.run(check())


def test_process_forgets_what_it_does_not_hear_any_more() -> None:
    async def check() -> None:
        process = Process()
        process.reports.take_elsewhere({"D": 7})
        assert process.reports.elsewhere("D") == 7
        valid = process.reports._valid_until
        process.reports._loop = FakeClock(valid + 0.1)  # type: ignore[assignment]
        assert process.reports.elsewhere("D") == 0

    asyncio.run(check())


class FakeClock:
    def __init__(self, now: float) -> None:
        self.now = now

    def time(self) -> float:
        return self.now


# Over several proxies, for real.


@pytest.fixture(scope="module")
def three_proxies() -> Iterator[Site]:
    with open_site(3, location="EveryNode", port=0) as site:
        yield site


async def _get(client: httpx.AsyncClient, url: str) -> int:
    return (await client.get(url, timeout=30)).status_code


def test_limit_counts_over_all_proxies(
    three_proxies: Site, gate: Gate, notes: Notes
) -> None:
    async def wait() -> str:
        notes.add("began")
        await gate.wait()
        return "done"

    deployment = three_proxies.deploy(
        wait, max_ongoing_requests=1, max_queued_requests=9
    )
    urls = [f"{url}/{deployment.name}" for url in three_proxies.instance.http_urls]
    assert len(urls) == 3
    handle = deployment.get_handle()

    async def check() -> list[Any]:
        async with httpx.AsyncClient() as client, asyncio.TaskGroup() as group:
            first = handle.remote()
            while not notes.read():
                await asyncio.sleep(0.01)
            tasks = []
            for i in range(30):  # 10 at each proxy, and no more than 9 in all
                tasks.append(group.create_task(_get(client, urls[i % 3])))
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            assert {task.result() for task in tasks if task.done()} == {503}
            calls = [handle.remote() for _ in range(10)]  # handles count as well
            await asyncio.sleep(0.5)
            gate.open()
        results = await asyncio.gather(first, *calls, return_exceptions=True)
        return [*(task.result() for task in tasks), *results]

    results = asyncio.run(check())
    served = results.count(200) + results.count("done")
    # A report takes up to 0.2 s, in which some more may be let in, and what a replica
    # refuses does not wait for a moment.
    assert 1 + 9 <= served <= 1 + 9 + 6
    refused = [r for r in results if isinstance(r, QueueFullError)]
    assert len(refused) >= 4
    assert "max_queued_requests=9" in str(refused[0])
    # When all is over the limit is as it was.
    assert [httpx.get(url).status_code for url in urls * 3] == [200] * 9


@pytest.mark.slow
@pytest.mark.long
def test_proxies_get_their_share_of_a_replica(three_proxies: Site) -> None:
    async def work() -> str:
        await asyncio.sleep(0.005)
        return "done"

    deployment = three_proxies.deploy(work, where="near", max_ongoing_requests=2)
    urls = [f"{url}/{deployment.name}" for url in three_proxies.instance.http_urls]
    near = three_proxies.at(deployment)  # the proxy that has the replica in its process
    served = dict.fromkeys(urls, 0)
    slowest = 0.0

    async def ask(client: httpx.AsyncClient, url: str, end: float) -> None:
        nonlocal slowest
        while (began := time.monotonic()) < end:
            assert await _get(client, url) == 200
            slowest = max(slowest, time.monotonic() - began)
            served[url] += 1

    async def check() -> None:
        async with httpx.AsyncClient() as client, asyncio.TaskGroup() as group:
            end = time.monotonic() + 4
            for url in urls * 8:
                group.create_task(ask(client, url, end))

    asyncio.run(check())
    print(served, f"slowest: {slowest:.2f} s")
    others = [count for url, count in served.items() if url != near]
    assert min(others) > 0.3 * served[near]
    assert slowest < 3
