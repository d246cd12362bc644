"""Replicas that piled up spread again: `daskserve.controller.spreading`."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest

import daskserve as serve
from daskserve.controller.placement import Leaving
from tests.test_state import SPEC, Rig, address, released, started, stopped, view
from tests.utils import ProcessCluster, poll

AFTER_S = 30.0
LEAVING = Leaving(reason="leaves", since=0.0, deadline=9e9)


def know(rig: Rig) -> None:
    """Let all callers know where requests go."""
    rig.state.routing()
    rig.state.routing_known()


def piled_up(number: int = 4, **changes: Any) -> Rig:
    """Return a rig with some replicas, all on one worker, and all known."""
    rig = Rig(1, spread_after_s=AFTER_S)
    rig.healthy(replace(SPEC, num_replicas=number), **changes)
    know(rig)
    rig.wait(AFTER_S)
    return rig


def move(rig: Rig, old: int, new: int, to: int) -> None:
    """Let one replica take another's place."""
    assert rig.replica(new)["worker"] == address(to)
    assert old in rig.routed()
    assert "fewer" in rig.replica(old)["reason"]
    assert rig.status()["state"] == "HEALTHY"
    assert stopped(rig.start(new)) == []  # not before all know of it
    assert {old, new} <= set(rig.routed())
    know(rig)
    assert stopped(rig.reconcile()) == [old]
    assert old not in rig.routed()


def test_one_after_the_other_until_it_is_even() -> None:
    rig = piled_up()
    rig.join(view(2))
    rig.join(view(3))
    rig.reconcile()
    assert rig.wait(AFTER_S - 1) == []
    assert started(rig.wait(1)) == [5]
    move(rig, old=4, new=5, to=2)
    actions = rig.stop(4)
    assert (released(actions), started(actions)) == ([4], [6])
    move(rig, old=3, new=6, to=3)
    assert released(rig.stop(3)) == [3]
    assert rig.wait(10 * AFTER_S) == []
    assert sorted(rig.routed()) == [1, 2, 5, 6]


@pytest.mark.parametrize(
    ("number", "changes", "joins"),
    [
        (1, {}, [view(2)]),
        (2, {"session_affinity": {"cookie": "any"}}, [view(2)]),
        (2, {"workers": ("w1",)}, [view(2)]),
        (2, {}, [view(2, accepting=False)]),
        (2, {}, [view(2, free=0)]),
        (2, {}, [replace(view(2), leaving=LEAVING)]),
        (2, {}, [replace(view(2), lasts=-1)]),
    ],
    ids="one sessions elsewhere paused busy leaves ends".split(),
)
def test_what_stays(number: int, changes: dict[str, Any], joins: list[Any]) -> None:
    rig = piled_up(number, **changes)
    for each in joins:
        rig.join(each)
    rig.reconcile()
    assert rig.wait(AFTER_S) == []
    assert rig.wait(AFTER_S) == []
    assert rig.routed() == list(range(1, number + 1))


def test_hosts_count_before_workers() -> None:
    rig = piled_up(2)
    beside = replace(view(2), host=view(1).host)
    rig.join(beside)
    rig.reconcile()
    assert started(rig.wait(AFTER_S)) == [3]  # another worker, if no other host
    move(rig, old=2, new=3, to=2)
    rig.stop(2)
    rig.join(view(3))
    rig.reconcile()
    assert started(rig.wait(AFTER_S)) == [4]
    assert rig.replica(4)["worker"] == address(3)


def test_what_fails_to_start_there_is_given_up() -> None:
    rig = piled_up(2)
    rig.join(view(2))
    rig.reconcile()
    assert started(rig.wait(AFTER_S)) == [3]
    assert released(rig.fail(3)) == [3]
    for _ in range(5):
        assert rig.wait(AFTER_S) == []
    assert rig.routed() == [1, 2]
    assert rig.replica(2)["reason"] == ""
    assert rig.status()["state"] == "HEALTHY"


def test_a_worker_that_is_lost_meanwhile() -> None:
    rig = piled_up(2)
    rig.join(view(2))
    rig.reconcile()
    assert started(rig.wait(AFTER_S)) == [3]
    again = started(rig.leave(2))
    # Whatever becomes of it, as many serve as are to.
    assert {1, 2} <= set(rig.routed())
    for new in again:
        rig.start(new)
        know(rig)
    rig.reconcile()
    rig.wait(AFTER_S)
    assert len(rig.routed()) == 2


def test_an_update_goes_before() -> None:
    rig = piled_up(2)
    rig.join(view(2))
    rig.reconcile()
    assert started(rig.wait(AFTER_S)) == [3]
    rig.deploy(replace(SPEC, num_replicas=2), version="2")
    new = started(rig.reconcile())
    assert len(new) == 2
    rig.start(*new)
    know(rig)
    rig.reconcile()
    assert sorted(rig.routed()) == sorted(new)
    assert started(rig.wait(AFTER_S)) == []


@pytest.mark.parametrize("how", ["stays", "deleted", "leaves"])
def test_one_that_drains_has_time_until_it_is_to_hurry(how: str) -> None:
    rig = piled_up(2)
    rig.join(view(2))
    rig.reconcile()
    rig.wait(AFTER_S)
    move(rig, old=2, new=3, to=2)
    assert released(rig.wait(500)) == []
    if how == "deleted":
        rig.state.delete("f")
    if how == "leaves":
        leaving = replace(LEAVING, since=rig.now, deadline=rig.now + 300)
        rig.views[address(1)] = replace(view(1), leaving=leaving)
    rig.reconcile()
    assert 2 in rig.states()
    assert (2 in released(rig.wait(30))) == (how != "stays")


def test_never_is_possible() -> None:
    rig = Rig(1, spread_after_s=None)
    rig.healthy()
    know(rig)
    rig.join(view(2))
    rig.reconcile()
    assert rig.wait(1000) == []


@pytest.mark.slow
def test_four_replicas_spread_over_three_workers_under_load() -> None:
    """None of the requests is lost, nor one that takes longer than a replica has."""
    env = {"DASK_DASKSERVE__CONTROLLER__SPREAD_AFTER": "1s"}
    with ProcessCluster(1, nanny=False, env=env) as cluster, cluster.client():
        instance = serve.start(http_options={"port": 0})
        options = {"num_replicas": 4, "graceful_shutdown_timeout_s": 0.2}

        @serve.deployment(route_prefix="/nap", **options)  # type: ignore[arg-type]
        def nap(request: Any) -> str:
            time.sleep(float(request.query_params["s"]))
            return "slept"

        nap.deploy()
        url = f"{instance.http_urls[0]}/nap"
        statuses: Counter[int] = Counter()
        over = threading.Event()

        def ask(seconds: float) -> None:
            with httpx.Client(timeout=30) as client:
                while not over.is_set():
                    answer = client.get(url, params={"s": seconds})
                    statuses[answer.status_code] += 1

        def places() -> list[int]:
            replicas = serve.status().deployments["nap"].replicas
            if {r.state for r in replicas} != {"RUNNING"}:
                return []
            return sorted(Counter(r.worker for r in replicas).values())

        with ThreadPoolExecutor(6) as pool:
            asking = [pool.submit(ask, s) for s in (0.005, 0.005, 0.005, 1.5, 1.5, 1.5)]
            try:
                assert places() == [4]
                cluster.add_worker()
                cluster.add_worker()
                poll(lambda: places() == [1, 1, 2], 60, 0.2)
                time.sleep(2)
            finally:
                over.set()
            for each in asking:
                each.result()
        assert set(statuses) == {200}
        assert places() == [1, 1, 2]
