import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from daskserve.controller.placement import (
    Occupancy,
    Search,
    Unplaceable,
    WorkerView,
    fits,
    matches,
)


def view(
    number: int,
    *,
    host: str = "",
    free_threads: int = 1,
    resources: Mapping[str, float] | None = None,
    accepting: bool = True,
) -> WorkerView:
    host = host or f"10.0.0.{number}"
    return WorkerView(
        address=f"tcp://{host}:400{number}",
        host=host,
        name=f"w{number}",
        nthreads=1,
        free_threads=free_threads,
        resources=resources or {},
        accepting=accepting,
    )


def choose(
    *views: WorkerView,
    resources: Mapping[str, float] | None = None,
    workers: tuple[str, ...] = (),
    occupancy: Occupancy | None = None,
    own: Mapping[str, int] | None = None,
    failures: Mapping[str, int] | None = None,
) -> str | Unplaceable:
    return search(
        *views,
        resources=resources or {},
        workers=workers,
        occupancy=occupancy or Occupancy(),
        own=own or {},
        failures=failures or {},
    ).next()


def search(*views: WorkerView, own: Mapping[str, int], **details: Any) -> Search:
    own_hosts: Counter[str] = Counter()
    for v in views:
        own_hosts[v.host] += own.get(v.address, 0)
    by_address = {v.address: v for v in views}
    return Search(views=by_address, own=own, own_hosts=own_hosts, **details)


def reason(found: str | Unplaceable) -> str:
    assert isinstance(found, Unplaceable)
    return found.reason


def used(*takes: tuple[WorkerView, str, Mapping[str, float]]) -> Occupancy:
    occupancy = Occupancy()
    for v, name, resources in takes:
        occupancy.add(v.address, name, resources)
    return occupancy


def test_no_worker() -> None:
    assert reason(choose()) == "no worker on the cluster"


def test_lowest_address_decides_in_the_end() -> None:
    assert choose(view(2), view(1), view(3)) == view(1).address


def test_free_thread_goes_before_spreading() -> None:
    busy = view(1, free_threads=0)
    free = view(2)
    assert choose(busy, free, own={free.address: 3}) == free.address


def test_replicas_just_sent_take_a_thread_each() -> None:
    a, b = view(1, free_threads=1), view(2, free_threads=2)
    occupancy = Occupancy()
    own: dict[str, int] = {}
    chosen = []
    for _ in range(4):
        found = choose(a, b, occupancy=occupancy, own=own)
        assert isinstance(found, str)
        occupancy.send({a.address: a, b.address: b}[found], "f", {})
        own[found] = own.get(found, 0) + 1
        chosen.append(found)
    # The third finds a thread at b only, the fourth none, so that spreading counts.
    assert chosen == [a.address, b.address, b.address, a.address]


def test_failed_constructor_prefers_another_worker() -> None:
    a, b = view(1), view(2)
    assert choose(a, b, failures={a.address: 1}, own={b.address: 1}) == b.address
    # But not one that cannot begin.
    busy = view(2, free_threads=0)
    assert choose(a, busy, failures={a.address: 1}) == a.address


def test_hosts_before_workers() -> None:
    a1, a2, b = view(1, host="a"), view(2, host="a"), view(3, host="b")
    own = {a1.address: 1, b.address: 1}
    # On equal hosts the empty worker; on unequal ones the emptier host.
    assert choose(a1, a2, b, own=own) == a2.address
    assert choose(a1, a2, b, own={**own, a2.address: 1}) == b.address


def test_total_load_breaks_ties() -> None:
    a, b = view(1), view(2)
    assert choose(a, b, occupancy=used((a, "other", {}))) == b.address


@pytest.mark.parametrize(
    "entry", ["tcp://10.0.0.2:4002", "10.0.0.2:4002", "10.0.0.2", "w2"]
)
def test_restrictions(entry: str) -> None:
    assert choose(view(1), view(2), workers=(entry,)) == view(2).address
    assert matches(view(2), (entry, "elsewhere"))
    assert not matches(view(1), (entry,))
    assert matches(view(1), ())


def test_no_worker_matches() -> None:
    text = reason(choose(*(view(n) for n in range(1, 8)), workers=("tcp://x:1",)))
    assert text.startswith(
        "no worker matches workers=('tcp://x:1',); "
        "there are tcp://10.0.0.1:4001 (w1), tcp://10.0.0.2:4002 (w2), "
    )
    assert text.endswith(" and 2 more")


def test_nobody_offers_the_resource() -> None:
    views = view(1), view(2), view(3)
    text = reason(choose(*views, resources={"GPU": 1}))
    assert text == (
        "no worker offers GPU=1 (0 of 3 workers have GPU); "
        "start one with `dask worker --resources 'GPU=1'`"
    )


def test_nobody_offers_enough() -> None:
    views = view(1, resources={"GPU": 1}), view(2, resources={"MEM": 4})
    text = reason(choose(*views, resources={"GPU": 1, "MEM": 2.5}, workers=("w1",)))
    assert text.startswith(
        "no worker among workers=('w1',) offers GPU=1, MEM=2.5 "
        "(1 of 1 workers have GPU, at most 1; 0 of 1 workers have MEM); "
    )
    assert text.endswith("'GPU=1 MEM=2.5'`")


def test_paused_workers() -> None:
    text = reason(choose(view(1, accepting=False), view(2, accepting=False)))
    assert "paused, closing or silent: tcp://10.0.0.1:4001, tcp://10.0.0.2:4002" in text
    assert choose(view(1, accepting=False), view(2)) == view(2).address


def test_all_of_a_resource_in_use() -> None:
    a, b, c = view(1, resources={"GPU": 1}), view(2, resources={"GPU": 1}), view(3)
    occupancy = used((a, "f", {"GPU": 1}), (b, "g", {"GPU": 1}), (c, "h", {}))
    found = choose(a, b, c, resources={"GPU": 1}, occupancy=occupancy)
    assert found == Unplaceable(
        "all GPU in use: 2 of 2 held by replicas of f, g", ("f", "g")
    )


def test_too_little_of_a_resource_on_one_worker() -> None:
    a, b = view(1, resources={"GPU": 2}), view(2, resources={"GPU": 2})
    occupancy = used((a, "f", {"GPU": 1}), (b, "f", {"GPU": 1}))
    assert reason(choose(a, b, resources={"GPU": 2}, occupancy=occupancy)) == (
        "too little GPU free on one worker (asked for 2, at most 1 free): "
        "2 of 4 held by replicas of f"
    )


def test_each_resource_is_free_but_not_on_one_worker() -> None:
    both = {"GPU": 1.0, "MEM": 1.0, "X": 1.0}
    a, b = view(1, resources=both), view(2, resources=both)
    occupancy = used((a, "f", {"GPU": 1}), (b, "g", {"MEM": 1}))
    found = choose(a, b, resources=both, occupancy=occupancy)
    assert isinstance(found, Unplaceable)
    assert found.holders == ("f", "g")
    assert "GPU free" in found.reason and "MEM free" in found.reason
    # Nobody holds that one.
    assert "X free" not in found.reason


def test_fractions_add_up() -> None:
    a = view(1, resources={"GPU": 0.3})
    occupancy = used(*[(a, "f", {"GPU": 0.1})] * 2)
    assert choose(a, resources={"GPU": 0.1}, occupancy=occupancy) == a.address
    occupancy.add(a.address, "f", {"GPU": 0.1})
    assert "all GPU in use" in reason(
        choose(a, resources={"GPU": 0.1}, occupancy=occupancy)
    )


def test_fits_once_something_is_given_back() -> None:
    a = view(1, resources={"GPU": 1})
    occupancy = used((a, "f", {"GPU": 1}))
    assert not fits(a, {"GPU": 1}, occupancy, {})
    assert fits(a, {"GPU": 1}, occupancy, {"GPU": 1})


@pytest.mark.parametrize("seed", range(50))
def test_search_finds_what_a_look_at_all_workers_would(seed: int) -> None:
    chance = random.Random(seed)

    def random_view(number: int) -> WorkerView:
        return view(
            number,
            host=chance.choice(["a", "b", f"c{number}"]),
            free_threads=chance.randrange(4),
            resources=chance.choice([{}, {"GPU": 2.0}]),
            accepting=chance.random() < 0.9,
        )

    views = {v.address: v for v in map(random_view, range(12))}
    occupancy = Occupancy()
    for _ in range(10):
        occupancy.add(chance.choice(list(views)), "other", {})
    for name in ("f", "g"):  # the second finds the first one's replicas there
        resources = chance.choice([{}, {"GPU": 1.0}])
        own, own_hosts = Counter[str](), Counter[str]()
        failures = {chance.choice(list(views)): 1}
        looking = Search(
            resources=resources,
            workers=(),
            views=views,
            occupancy=occupancy,
            own=own,
            own_hosts=own_hosts,
            failures=failures,
        )
        for _ in range(20):
            ranks = [
                (
                    v.free_threads <= occupancy.sent[address],
                    failures.get(address, 0),
                    own_hosts[v.host],
                    own[address],
                    occupancy.load[address],
                    address,
                )
                for address, v in views.items()
                if v.accepting and fits(v, resources, occupancy, {})
            ]
            found = looking.next()
            if isinstance(found, Unplaceable):
                assert ranks == []
                break
            assert found == min(ranks)[-1]
            occupancy.send(views[found], name, resources)
            own[found] += 1
            own_hosts[views[found].host] += 1
