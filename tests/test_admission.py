"""Which requests a replica takes, and who gets the next free slot."""

from __future__ import annotations

import random
from collections import Counter

from daskserve.replica.admission import Admission, Caller, slots_of_threads


def callers(number: int) -> list[Caller]:
    return [Caller() for _ in range(number)]


def test_slots_are_taken_up_to_the_limit() -> None:
    slots, (a, b) = Admission(2), callers(2)
    assert slots.take(a) and slots.take(b)
    assert not slots.take(a)
    assert slots.wanted
    slots.give_back(b)
    assert slots.take(b)  # nobody was offered it
    assert (slots.taken, a.held, b.held) == (2, 1, 1)


def test_a_slot_is_kept_for_who_was_refused_first() -> None:
    slots, (x, first, second, quick, other) = Admission(1), callers(5)
    assert slots.take(x)
    assert not slots.take(first)
    assert not slots.take(second)
    assert not slots.take(first)  # once is enough
    assert slots.offer() is None  # nothing is free
    slots.give_back(x)
    assert slots.offer() is first
    assert slots.offer() is None and slots.kept  # and now it is kept
    assert not slots.take(quick)
    assert slots.take(first) and not slots.kept
    slots.give_back(first)
    assert slots.offer() is second
    slots.withdraw(second)  # it has no use for it, or says nothing
    assert slots.offer() is quick
    slots.withdraw(quick)
    assert slots.take(other)
    assert not slots.wanted


def test_only_who_uses_nothing_of_what_is_kept_loses_it() -> None:
    slots, (x, busy, silent) = Admission(2), callers(3)
    assert slots.take(x) and slots.take(x)
    slots.want(busy, 64)
    slots.want(silent, 64)
    slots.give_back(x)
    slots.give_back(x)
    assert [slots.offer(), slots.offer()] == [busy, silent]
    for _ in range(3):  # looks at what is kept; in between the busy one goes on
        slots.withdraw_late(busy)
        slots.withdraw_late(silent)
        assert slots.take(busy)
        slots.give_back(busy)
        slots.offer()
    assert busy.wanted and busy.kept
    assert (silent.wanted, silent.kept) == (0, 0)
    slots.want(silent, 1)
    slots.withdraw(busy)
    assert slots.offer() is silent
    slots.withdraw_late(silent)  # it has had no time yet
    assert silent.kept


def test_callers_take_turns_however_many_slots_they_want() -> None:
    slots, (x, a, b) = Admission(4), callers(3)
    for _ in range(4):
        assert slots.take(x)
    slots.want(a, 3)
    slots.want(b, 2)
    for _ in range(4):
        slots.give_back(x)
    assert [slots.offer() for _ in range(5)] == [a, b, a, b, None]
    assert all(slots.take(each) for each in (a, b, a, b))
    slots.give_back(b)
    assert slots.offer() is a
    slots.want(a, 2)  # as it says now, whatever it said before
    slots.want(a, 1)
    slots.give_back(b)
    assert [slots.offer(), slots.offer()] == [a, None]


def test_abandoned_calls_keep_their_slots() -> None:
    slots, (a,) = Admission(2), callers(1)
    assert slots.take(a)
    slots.give_back(a)
    slots.abandoned = 1
    assert slots.take(a) and not slots.take(a)
    slots.abandoned = 0
    assert slots.take(a)


def test_a_limit_that_sinks_and_rises() -> None:
    slots, (a,) = Admission(3), callers(1)
    assert all(slots.take(a) for _ in range(3))
    slots.limit = 1
    for _ in range(2):
        slots.give_back(a)
        assert not slots.take(a)
    slots.give_back(a)
    assert slots.offer() is a and slots.take(a) and not slots.take(a)
    slots.limit = 2
    assert slots.take(a)


def test_all_callers_get_their_share() -> None:
    # "near" sees a slot become free at once; the others only by being told.
    rng = random.Random(1)
    slots, all_ = Admission(5), callers(3)
    near = all_[0]
    inside: list[Caller] = []
    served: Counter[Caller] = Counter()
    for caller in all_ * 2:
        if slots.take(caller):
            inside.append(caller)
    for _ in range(3000):
        leaving = rng.choice(inside)
        inside.remove(leaving)
        slots.give_back(leaving)
        told = slots.offer()
        for caller in [near, *([told] if told else [])]:
            if slots.take(caller):
                inside.append(caller)
                served[caller] += 1
        assert len(inside) == 5, "a slot was left empty"
        for caller in all_:  # all of them have more waiting
            slots.want(caller, 3)
    assert min(served.values()) > 0.9 * max(served.values())


def test_counts_stay_true_whatever_happens() -> None:
    rng = random.Random(2)
    slots, all_ = Admission(4), callers(4)
    for _ in range(20_000):
        caller = rng.choice(all_)
        what = rng.randrange(6)
        if what == 0:
            slots.take(caller)
        elif what == 1 and caller.held:
            slots.give_back(caller)
        elif what == 2:
            slots.want(caller, rng.randrange(1, 4))
        elif what == 3:
            slots.withdraw(caller)
        elif what == 4:
            slots.limit = rng.randrange(1, 7)
        else:
            slots.offer()
        assert slots.taken == sum(c.held for c in all_)
        assert slots.kept == sum(c.kept for c in all_)
        assert slots._free == slots.limit - slots.taken - slots.kept
        assert set(slots._queue) == {c for c in all_ if c.wanted}


def test_threads_have_always_one_to_run() -> None:
    assert slots_of_threads(8, 0.05, 100) == 8
    assert slots_of_threads(8, 0.002, 100) == 12
    assert slots_of_threads(1, 0.0, 100) == 1  # nothing is known yet
    assert slots_of_threads(1, 0.02, 100, steady=True) == 2
    assert slots_of_threads(1, 0.1, 100, steady=True) == 1
    assert slots_of_threads(8, 0.05, 3) == 3
