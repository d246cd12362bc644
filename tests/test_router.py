"""Which replica gets a request: no loop, no clock."""

from __future__ import annotations

import random
from collections import Counter

from daskserve.transport.router import Router, Slot


def slot(replica_id: int, *, local: bool = False) -> Slot:
    return Slot(replica_id, f"D#{replica_id}", f"tcp://w{replica_id}", local)


def router(*slots: Slot, max_ongoing: int = 2) -> Router:
    made = Router(random.Random(0))
    made.update(slots, max_ongoing)
    return made


def test_without_replicas_there_is_no_choice() -> None:
    assert router().choose(0) is None


def test_local_comes_first_while_it_has_room() -> None:
    near, far = slot(1, local=True), slot(2)
    chooser = router(near, far)
    assert chooser.choose(0) is near
    near.in_flight = 2
    assert chooser.choose(0) is far


def test_less_loaded_of_two() -> None:
    busy, idle = slot(1), slot(2)
    busy.in_flight = 1
    chooser = router(busy, idle)
    assert {chooser.choose(0) for _ in range(20)} == {idle}


def test_full_replicas_are_not_chosen() -> None:
    slots = [slot(i) for i in range(5)]
    for full in slots[:4]:
        full.in_flight = 2
    chooser = router(*slots)
    assert {chooser.choose(0) for _ in range(50)} == {slots[4]}
    slots[4].in_flight = 2
    assert chooser.choose(0) is None


def test_a_replica_that_refused_is_left_alone_for_a_while() -> None:
    refused = slot(1)
    chooser = router(refused)
    refused.full_until = 10.0
    assert chooser.choose(9.9) is None
    assert chooser.choose(10.0) is refused


def test_avoided_only_if_there_is_another() -> None:
    first, second = slot(1), slot(2)
    chooser = router(first, second)
    assert {chooser.choose(0, avoid=first) for _ in range(20)} == {second}
    second.in_flight = 2
    assert chooser.choose(0, avoid=first) is first
    first.in_flight = 2
    assert chooser.choose(0, avoid=first) is None


def test_update_keeps_counts_and_marks_what_is_gone() -> None:
    kept, gone = slot(1), slot(2)
    chooser = router(kept, gone)
    kept.in_flight = 1
    chooser.update([slot(1), slot(3)], 5)
    assert chooser.slots[1] is kept and kept.in_flight == 1
    assert not gone.routable and chooser.slots[3].routable
    assert chooser.max_ongoing == 5
    assert chooser.in_flight == 1


def test_load_spreads_evenly() -> None:
    slots = [slot(i) for i in range(10)]
    chooser = router(*slots, max_ongoing=1000)
    for _ in range(1000):
        chosen = chooser.choose(0)
        assert chosen is not None
        chosen.in_flight += 1
    counts = [s.in_flight for s in slots]
    # Two choices keep the fullest within a few of the mean, where one choice would not.
    assert sum(counts) == 1000 and max(counts) - min(counts) <= 6


def test_equal_load_is_a_coin_toss() -> None:
    slots = [slot(1), slot(2)]
    chooser = router(*slots)
    counts = Counter(chooser.choose(0) for _ in range(400))
    assert min(counts.values()) > 120


def test_near_some_workers() -> None:
    def at(replica_id: int, worker: str) -> Slot:
        return Slot(replica_id, f"D#{replica_id}", worker)

    here, beside = at(1, "tcp://a:1"), at(2, "tcp://a:2")
    far, farther = at(3, "tcp://b:1"), at(4, "tcp://c:1")
    chooser = router(here, beside, far, farther)
    assert chooser.choose_near(["tcp://a:1", "tcp://b:1"], 0) is here
    assert chooser.choose_near(["tcp://d:1", "tcp://b:1"], 0) is far
    here.in_flight = 2  # a worker that has less comes before a host that has most
    assert chooser.choose_near(["tcp://a:1", "tcp://b:1"], 0) is far
    assert chooser.choose_near(["tcp://a:1"], 0) is beside
    assert chooser.choose_near(["tcp://d:1"], 0) is None
    far.full_until = 1
    assert chooser.choose_near(["tcp://b:1"], 0) is None
