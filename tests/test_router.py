"""Which replica gets a request: no loop, no clock."""

from __future__ import annotations

import random
import timeit
from collections import Counter

import pytest

from daskserve.transport.router import HOP_S, MAX_RANKED, VALID_S, Router, Slot


def slot(replica_id: int, *, local: bool = False, limit: int | None = None) -> Slot:
    return Slot(replica_id, f"D#{replica_id}", f"tcp://w{replica_id}:1", local, limit)


def router(*slots: Slot, max_ongoing: int = 2) -> Router:
    made = Router(random.Random(0))
    made.update(slots, max_ongoing)
    return made


def say(
    chooser: Router,
    about: Slot,
    *,
    others: int = 0,
    limit: int = 100,
    call_s: float = 0.01,
    typical_s: float | None = None,
    stuck: bool = False,
    now: float = 0.0,
) -> None:
    typical_s = call_s if typical_s is None else typical_s
    chooser.report(about, others, limit, call_s, typical_s, stuck, now)


def test_without_replicas_there_is_no_choice() -> None:
    assert router().choose(0) is None


def test_the_less_loaded_is_chosen() -> None:
    busy, idle = slot(1), slot(2)
    chooser = router(busy, idle)
    chooser.begin(busy)
    assert {chooser.choose(0) for _ in range(20)} == {idle}


def test_others_requests_count_for_a_while() -> None:
    busy, idle = slot(1), slot(2)
    chooser = router(busy, idle, max_ongoing=100)
    say(chooser, busy, others=5)
    say(chooser, idle)
    for _ in range(4):
        chooser.begin(idle)
    assert {chooser.choose(0) for _ in range(20)} == {idle}
    assert {chooser.choose(VALID_S + 0.1) for _ in range(20)} == {busy}


def test_being_in_the_same_process_is_worth_a_hop_and_no_more() -> None:
    near, far = slot(1, local=True), slot(2)
    chooser = router(near, far, max_ongoing=100)
    assert {chooser.choose(0) for _ in range(20)} == {near}
    say(chooser, near, call_s=0.01)  # then a request that waits there costs more
    chooser.begin(near)
    assert {chooser.choose(0) for _ in range(20)} == {far}
    chooser.begin(far)
    assert {chooser.choose(0) for _ in range(20)} == {near}


def test_calls_that_take_less_than_a_hop_stay_while_there_is_room() -> None:
    near, far = slot(1, local=True), slot(2)
    chooser = router(near, far, max_ongoing=50)
    say(chooser, near, call_s=HOP_S / 4)
    for _ in range(50):
        assert chooser.choose(0) is near
        chooser.begin(near)
    assert chooser.choose(0) is far


def test_calls_of_microseconds_are_shared_by_those_that_are_as_far() -> None:
    near, *far = slot(1, local=True), slot(2), slot(3)
    chooser = router(near, *far, max_ongoing=100)
    for each, call_s in zip((near, *far), (2e-5, 2e-5, 6e-5), strict=True):
        say(chooser, each, call_s=call_s)
    for _ in range(100):
        chooser.begin(near)
    for _ in range(40):  # which of them is a little quicker does not matter
        chosen = chooser.choose(0)
        assert chosen is not None
        chooser.begin(chosen)
    assert [s.in_flight for s in far] == [20, 20]


def test_the_two_ways_to_a_wait_agree() -> None:
    rng = random.Random(5)
    for _ in range(500):
        slots = [slot(i, local=rng.random() < 0.3) for i in range(3)]
        chooser = router(*slots, max_ongoing=50)
        for each in slots:
            say(
                chooser,
                each,
                others=rng.randrange(5),
                call_s=10 ** rng.uniform(-6, 0),
                stuck=rng.random() < 0.1,
            )
            for _ in range(rng.randrange(10)):
                chooser.begin(each)
        chosen = chooser.choose(0)
        assert chosen is not None
        waits = [chooser._wait(each, 0) for each in slots]
        assert chooser._wait(chosen, 0) == pytest.approx(min(waits))


def test_a_slow_replica_gets_less() -> None:
    slow, quick = slot(1), slot(2)
    chooser = router(slow, quick, max_ongoing=100)
    say(chooser, quick, call_s=0.02)
    say(chooser, slow, call_s=0.08)
    for _ in range(100):
        chosen = chooser.choose(0)
        assert chosen is not None
        chooser.begin(chosen)
    assert 17 <= slow.in_flight <= 23


def test_times_that_differ_by_noise_only_are_equal() -> None:
    slots = [slot(i) for i in range(3)]
    chooser = router(*slots, max_ongoing=100)
    for each, call_s in zip(slots, (0.010, 0.011, 0.012), strict=True):
        say(chooser, each, call_s=call_s)
    for _ in range(60):
        chosen = chooser.choose(0)
        assert chosen is not None
        chooser.begin(chosen)
    assert [s.in_flight for s in slots] == [20, 20, 20]


def test_one_call_that_took_long_makes_no_slow_replica() -> None:
    slots = [slot(1), slot(2)]
    chooser = router(*slots, max_ongoing=100)
    say(chooser, slots[0], call_s=0.002)
    say(chooser, slots[1], call_s=0.1, typical_s=0.0025)  # it had one of a second
    for _ in range(40):
        chosen = chooser.choose(0)
        assert chosen is not None
        chooser.begin(chosen)
    assert [s.in_flight for s in slots] == [20, 20]


def test_a_replica_that_took_long_and_died_starves_none_that_comes_after() -> None:
    ill, well, fresh = slot(1), slot(2), slot(3)
    chooser = router(ill, well, max_ongoing=100)
    for _ in range(50):
        say(chooser, ill, call_s=2e-4)
        say(chooser, well, call_s=2e-4)
    say(chooser, ill, call_s=2.5)  # its loop was blocked
    chooser.update([well, fresh], 100)
    for _ in range(20):
        say(chooser, well, call_s=2e-4)
        chosen = chooser.choose(0)
        assert chosen is not None
        chooser.begin(chosen)
    assert abs(well.in_flight - fresh.in_flight) <= 1


def test_full_replicas_are_not_chosen() -> None:
    slots = [slot(i) for i in range(5)]
    chooser = router(*slots)
    for full in slots[:4]:
        chooser.begin(full)
        chooser.begin(full)
    assert {chooser.choose(0) for _ in range(50)} == {slots[4]}
    say(chooser, slots[4], others=2, limit=2)  # and this one is, with what others sent
    assert chooser.choose(0) is None
    assert chooser.to_ask(8) == [slots[4]]
    chooser.end(slots[0])
    assert chooser.choose(0) is slots[0]


def test_a_replica_is_sent_what_it_takes() -> None:
    threaded = slot(1, limit=1)
    chooser = router(threaded, max_ongoing=100)
    chooser.begin(threaded)
    assert chooser.choose(0) is None
    say(chooser, threaded, limit=3)
    assert chooser.choose(0) is threaded
    say(chooser, threaded, limit=1000)
    assert threaded.limit == 100  # whatever it says


def test_a_closed_replica_is_left_alone_until_it_offers_a_slot_or_time_has_passed() -> (
    None
):
    refused, asked = slot(1), slot(2)
    chooser = router(refused, asked)
    chooser.close(refused, 10.0)
    chooser.close(asked, 12.0, 5)
    assert chooser.choose(9.9) is None
    assert chooser.reopen(9.9) == 10.0
    assert chooser.reopen(10.0) == 12.0
    assert chooser.choose(10.0) is refused
    chooser.open(asked)
    assert asked.asked == 0
    assert {chooser.choose(10.0) for _ in range(20)} == {refused, asked}
    assert chooser.reopen(12.0) is None


def test_a_stuck_replica_attracts_nothing() -> None:
    stuck, other = slot(1), slot(2)
    chooser = router(stuck, other, max_ongoing=5)
    say(chooser, stuck, others=1, stuck=True)
    for _ in range(4):
        chooser.begin(other)
    assert {chooser.choose(1e6) for _ in range(20)} == {other}  # however long ago
    chooser.begin(other)
    assert chooser.choose(1e6) is stuck  # better than nothing
    say(chooser, stuck)
    assert chooser.choose(0) is stuck


def test_avoided_only_if_there_is_another() -> None:
    first, second = slot(1), slot(2)
    chooser = router(first, second)
    assert {chooser.choose(0, avoid=first) for _ in range(20)} == {second}
    chooser.begin(second)
    chooser.begin(second)
    assert chooser.choose(0, avoid=first) is first
    chooser.begin(first)
    chooser.begin(first)
    assert chooser.choose(0, avoid=first) is None


def test_update_keeps_counts_and_marks_what_is_gone() -> None:
    kept, gone = slot(1), slot(2)
    chooser = router(kept, gone)
    chooser.begin(kept)
    chooser.begin(gone)
    chooser.update([slot(1), slot(3)], 5)
    assert chooser.slots[1] is kept and kept.in_flight == 1
    assert not gone.routable and chooser.slots[3].routable
    assert chooser.max_ongoing == kept.limit == 5
    assert chooser.in_flight == 2
    chooser.end(gone)
    assert {chooser.choose(0) for _ in range(20)} == {chooser.slots[3]}


def test_load_spreads_evenly() -> None:
    slots = [slot(i) for i in range(20)]
    chooser = router(*slots, max_ongoing=1000)
    for _ in range(2000):
        chosen = chooser.choose(0)
        assert chosen is not None
        chooser.begin(chosen)
    counts = [s.in_flight for s in slots]
    # A few choices keep the fullest near the mean, where one choice would not.
    assert sum(counts) == 2000 and max(counts) - min(counts) <= 6


def test_equal_load_is_a_coin_toss() -> None:
    slots = [slot(1), slot(2), slot(3)]
    chooser = router(*slots)
    counts = Counter(chooser.choose(0) for _ in range(600))
    assert min(counts.values()) > 150


def test_those_with_room_are_listed_whatever_happens() -> None:
    rng = random.Random(7)
    slots = [slot(i) for i in range(10)]
    chooser = router(*slots, max_ongoing=3)
    for step in range(5000):
        one = rng.choice(slots)
        what = rng.randrange(6)
        if what == 0 and one.in_flight < 3:
            chooser.begin(one)
        elif what == 1 and one.in_flight:
            chooser.end(one)
        elif what == 2:
            one.reachable = not one.reachable
            chooser.note(one)
        elif what == 3:
            chooser.close(one, step + 20.0)
        elif what == 4:
            chooser.open(one)
        else:
            chooser.reopen(step)
        has_room = {
            s for s in slots if s.reachable and s.in_flight < 3 and not s.closed_until
        }
        assert set(chooser._open) == has_room and len(chooser._open) == len(has_room)
        assert all(chooser._open[s.index] is s for s in has_room)


def test_bytes_count_against_waiting() -> None:
    def at(replica_id: int, worker: str) -> Slot:
        return Slot(replica_id, f"D#{replica_id}", worker)

    slots = [at(1, "tcp://a:1"), at(2, "tcp://a:2"), at(3, "tcp://b:1")]
    chooser = router(*slots, max_ongoing=100)
    there = {"tcp://a:1": 10**8}
    assert chooser.choose_near(there, 10**8, 0) is slots[0]
    for _ in range(20):
        chooser.begin(slots[0])
    say(chooser, slots[0], call_s=0.01)  # 0.2 s of waiting, and 0.1 s to its neighbour
    assert chooser.choose_near(there, 10**8, 0) is slots[1]
    for _ in range(60):
        chooser.begin(slots[1])
    say(chooser, slots[0], call_s=0.01, others=40)
    assert chooser.choose_near(there, 10**8, 0) is slots[2]  # 0.4 s on the way
    for each in slots:
        chooser.close(each, 1.0)
    assert chooser.choose_near(there, 10**8, 0) is None


def test_websockets_go_where_the_fewest_are() -> None:
    slots = [slot(1), slot(2)]
    chooser = router(*slots)
    for _ in range(6):
        chosen = chooser.choose_for_websocket(3, 0.0)
        assert chosen is not None
        chosen.websockets += 1
    assert [s.websockets for s in slots] == [3, 3]
    assert chooser.choose_for_websocket(3, 0.0) is None
    slots[0].websockets = 0
    slots[0].no_websockets_until = 1.0  # others have the rest
    assert chooser.choose_for_websocket(3, 0.0) is None
    assert chooser.choose_for_websocket(3, 1.0) is slots[0]


def test_orders_of_few_keys_are_kept() -> None:
    chooser = router(slot(1), slot(2))
    for n in range(2 * MAX_RANKED):
        chooser.ranked(f"{n}\udcff")
    assert len(chooser._ranked) == MAX_RANKED


def test_a_choice_takes_microseconds() -> None:
    for number in (1, 3, 1000):
        slots = [slot(i, local=i == 0) for i in range(number)]
        chooser = router(*slots, max_ongoing=10**6)

        def choose(chooser: Router = chooser) -> None:
            chosen = chooser.choose(0)
            assert chosen is not None
            chooser.begin(chosen)

        best = min(timeit.repeat(choose, number=2000, repeat=5)) / 2000
        print(f"{number} replicas: {best * 1e6:.2f} us")
        assert best < 50e-6  # on a busy machine; else some 2
