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
from daskserve.controller.placement import Leaving, WorkerView
from tests.test_state import SPEC, Rig, address, released, started, stopped, told, view
from tests.utils import ProcessCluster, poll

AFTER_S = 30.0
LEAVING = Leaving(reason="leaves", since=0.0, deadline=9e9)


def know(rig: Rig) -> None:
    """Let all callers know where requests go."""
    rig.state.routing()
    if rig.state.spreader or any(view.leaving for view in rig.views.values()):
        rig.state.routing_known()  # as the instance does


def wait(rig: Rig, seconds: float) -> list[Any]:
    """Let time pass, and all know of what there is."""
    actions = rig.wait(seconds)
    know(rig)
    return actions + rig.reconcile()


def piled_up(number: int = 4, **changes: Any) -> Rig:
    """Return a rig with some replicas, all on one worker, and all known."""
    rig = Rig(1, spread_after_s=AFTER_S)
    rig.healthy(replace(SPEC, num_replicas=number), **changes)
    know(rig)
    wait(rig, AFTER_S)
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
    assert wait(rig, AFTER_S - 1) == []
    assert started(wait(rig, 1)) == [5]
    move(rig, old=4, new=5, to=2)
    actions = rig.stop(4)
    assert (released(actions), started(actions)) == ([4], [6])
    move(rig, old=3, new=6, to=3)
    assert released(rig.stop(3)) == [3]
    assert wait(rig, 10 * AFTER_S) == []
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
    assert wait(rig, AFTER_S) == []
    assert wait(rig, AFTER_S) == []
    assert rig.routed() == list(range(1, number + 1))


def test_hosts_count_before_workers() -> None:
    rig = piled_up(2)
    beside = replace(view(2), host=view(1).host)
    rig.join(beside)
    rig.reconcile()
    assert started(wait(rig, AFTER_S)) == [3]  # another worker, if no other host
    move(rig, old=2, new=3, to=2)
    rig.stop(2)
    rig.join(view(3))
    rig.reconcile()
    assert started(wait(rig, AFTER_S)) == [4]
    assert rig.replica(4)["worker"] == address(3)


def test_what_fails_to_start_there_is_given_up() -> None:
    rig = piled_up(2)
    rig.join(view(2))
    rig.reconcile()
    assert started(wait(rig, AFTER_S)) == [3]
    assert released(rig.fail(3)) == [3]
    for _ in range(5):
        assert wait(rig, AFTER_S) == []
    assert rig.routed() == [1, 2]
    assert rig.replica(2)["reason"] == ""
    assert rig.status()["state"] == "HEALTHY"


def test_a_worker_that_is_lost_meanwhile() -> None:
    rig = piled_up(2)
    rig.join(view(2))
    rig.reconcile()
    assert started(wait(rig, AFTER_S)) == [3]
    again = started(rig.leave(2))
    # Whatever becomes of it, as many serve as are to.
    assert {1, 2} <= set(rig.routed())
    for new in again:
        rig.start(new)
        know(rig)
    rig.reconcile()
    wait(rig, AFTER_S)
    assert len(rig.routed()) == 2


def test_an_update_goes_before() -> None:
    rig = piled_up(2)
    rig.join(view(2))
    rig.reconcile()
    assert started(wait(rig, AFTER_S)) == [3]
    rig.deploy(replace(SPEC, num_replicas=2), version="2")
    new = started(rig.reconcile())
    assert len(new) == 2
    rig.start(*new)
    know(rig)
    rig.reconcile()
    assert sorted(rig.routed()) == sorted(new)
    assert started(wait(rig, AFTER_S)) == []


@pytest.mark.parametrize("how", ["stays", "deleted", "leaves"])
def test_one_that_drains_has_time_until_it_is_to_hurry(how: str) -> None:
    rig = piled_up(2)
    rig.join(view(2))
    rig.reconcile()
    wait(rig, AFTER_S)
    move(rig, old=2, new=3, to=2)
    assert released(wait(rig, 500)) == []
    if how == "deleted":
        rig.state.delete("f")
    if how == "leaves":
        leaving = replace(LEAVING, since=rig.now, deadline=rig.now + 300)
        rig.views[address(1)] = replace(view(1), leaving=leaving)
    rig.reconcile()
    assert 2 in rig.states()
    assert (2 in released(wait(rig, 30))) == (how != "stays")


# What comes between. Whatever starts runs, and whatever is to stop does.


def ticks(rig: Rig, seconds: int) -> None:
    for _ in range(seconds):
        know(rig)
        rig.now += 1
        actions = rig.state.reconcile(rig.now, rig.views)
        for action in told(actions):
            rig.answer_only(action)
        for new in started(actions):
            rig.state.replica_initializing(new, pid=1, now=rig.now)
            rig.state.replica_started(new, now=rig.now)
        for old in stopped(actions):
            rig.state.replica_stopped(old)


def moving(gpus: float = 0, to: WorkerView | None = None, **changes: Any) -> Rig:
    """Return a rig where 3 starts on the second worker, for 2 on the first."""
    rig = Rig(1, gpus=gpus, spread_after_s=AFTER_S)
    rig.healthy(replace(SPEC, **changes))
    ticks(rig, 40)
    rig.join(view(2) if to is None else to)
    rig.reconcile()
    ticks(rig, 29)
    know(rig)
    assert started(wait(rig, 1)) == [3]
    return rig


def places(rig: Rig, name: str = "f") -> list[int]:
    """Return how many are on each worker, once the deployment is at rest."""
    d = rig.state._live[name]
    assert d.at_rest, rig.status(name)
    assert not any(r.outgoing or r.spreads for r in d.replicas.values())
    return sorted(Counter(r.worker for r in d.replicas.values()).values())


@pytest.mark.parametrize(
    ("changes", "after"),
    [
        ({"num_replicas": 3}, [1, 2]),
        ({"num_replicas": 1}, [1]),
        ({"user_config": b"c"}, [1, 1]),
        ({"version": "2"}, [1, 1]),
    ],
    ids="more fewer config version".split(),
)
def test_a_deploy_comes_in_between(changes: dict[str, Any], after: list[int]) -> None:
    rig = moving()
    rig.deploy(replace(SPEC, **changes))
    gone = stopped(rig.reconcile())
    rig.stop(*gone)
    if 3 not in gone:
        rig.start(3)
    ticks(rig, 500)
    assert places(rig) == after


def test_a_deploy_in_between_takes_too_long() -> None:
    rig = moving()
    rig.start(3)
    rig.deploy(replace(SPEC, version="2"))
    rig.reconcile()
    rig.wait(301)
    assert rig.status()["state"] == "DEPLOY_FAILED"
    ticks(rig, 500)
    assert sum(places(rig)) == 2


def test_an_update_without_room_comes_in_between() -> None:
    gpu = {"GPU": 1.0}
    rig = moving(2, view(2, gpus=1), resources=gpu)
    rig.deploy(replace(SPEC, version="2", resources=gpu))
    rig.reconcile()
    rig.start(3) if 3 in rig.states() else None
    ticks(rig, 310)
    assert rig.status()["state"] == "HEALTHY"
    assert rig.status()["version"] == "2"
    assert places(rig) == [1, 1]


def test_the_worker_that_came_is_lost_with_the_only_room() -> None:
    gpu = {"GPU": 1.0}
    rig = moving(2, view(2, gpus=2), resources=gpu)
    rig.now += 6
    rig.leave(2)
    ticks(rig, 50)
    assert places(rig) == [2]
    assert rig.state.missing_workers(rig.now, rig.views) == 0


def test_a_worker_comes_while_constructors_run() -> None:
    rig = Rig(1, spread_after_s=AFTER_S)
    rig.deploy(replace(SPEC, num_replicas=4))
    ids = started(rig.reconcile())
    rig.wait(40)
    rig.join(view(2))
    rig.reconcile()
    ticks(rig, 60)
    rig.start(*ids)
    ticks(rig, 500)
    assert places(rig) == [2, 2]


def test_all_of_many_deployments_spread() -> None:
    rig = Rig(1, spread_after_s=AFTER_S)
    names = [f"d{number}" for number in range(10)]
    for name in names:
        rig.healthy(replace(SPEC, name=name, route_prefix=None))
    ticks(rig, 40)
    rig.join(view(2))
    rig.reconcile()
    ticks(rig, 300)
    assert [places(rig, name) for name in names] == [[1, 1]] * 10


def test_a_worker_that_takes_nothing_at_first() -> None:
    rig = Rig(1, spread_after_s=AFTER_S)
    rig.healthy(SPEC)
    ticks(rig, 29)
    rig.join(view(2, accepting=False))
    ticks(rig, 3)
    rig.join(view(2))
    ticks(rig, 300)
    assert places(rig) == [1, 1]


def test_within_a_host_too_if_another_is_no_better() -> None:
    rig = Rig(0, spread_after_s=AFTER_S)
    rig.join(view(9))
    rig.healthy(replace(SPEC, num_replicas=2))
    rig.join(view(5))
    ticks(rig, 40)  # one has moved
    rig.deploy(replace(SPEC, num_replicas=3))
    ticks(rig, 5)
    assert places(rig) == [1, 2]
    for number, beside in ((4, 5), (8, 9)):
        rig.join(replace(view(number), host=view(beside).host))
    ticks(rig, 300)
    assert places(rig) == [1, 1, 1]


def test_never_is_possible() -> None:
    rig = Rig(1, spread_after_s=None)
    rig.healthy()
    know(rig)
    rig.join(view(2))
    rig.reconcile()
    assert wait(rig, 1000) == []


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
