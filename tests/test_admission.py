"""Which requests a replica takes, and who gets the next free slot."""

from __future__ import annotations

import random
from collections import Counter

from daskserve.replica.admission import Admission, slots_of_threads


def test_slots_are_taken_up_to_the_limit() -> None:
    slots: Admission[str] = Admission(2)
    assert slots.take("a") and slots.take("b")
    assert not slots.take("a")
    assert slots.wanted
    slots.give_back("b")
    assert slots.take("b")  # nobody was offered it
    assert (slots.others("a"), slots.others("b"), slots.others("c")) == (1, 1, 2)


def test_a_slot_is_kept_for_who_was_refused_first() -> None:
    slots: Admission[str] = Admission(1)
    assert slots.take("x")
    assert not slots.take("first")
    assert not slots.take("second")
    assert not slots.take("first")  # once is enough
    assert slots.offer() is None  # nothing is free
    slots.give_back("x")
    assert slots.offer() == "first"
    assert slots.offer() is None and slots.kept  # and now it is kept
    assert not slots.take("quick")
    assert slots.take("first") and not slots.kept
    slots.give_back("first")
    assert slots.offer() == "second"
    slots.withdraw("second")  # it has no use for it
    assert slots.offer() == "quick"
    slots.withdraw_kept()  # it says nothing
    assert slots.take("other")
    assert not slots.wanted


def test_callers_take_turns_however_many_slots_they_want() -> None:
    slots: Admission[str] = Admission(4)
    for _ in range(4):
        assert slots.take("x")
    slots.want("a", 3)
    slots.want("b", 2)
    for _ in range(4):
        slots.give_back("x")
    assert [slots.offer() for _ in range(5)] == ["a", "b", "a", "b", None]
    assert all(slots.take(name) for name in "abab")
    slots.give_back("b")
    assert slots.offer() == "a"


def test_abandoned_calls_keep_their_slots() -> None:
    slots: Admission[str] = Admission(2)
    assert slots.take("a")
    slots.give_back("a")
    slots.abandoned = 1
    assert slots.others("a") == 1
    assert slots.take("a") and not slots.take("a")


def test_callers_that_have_gone_are_forgotten() -> None:
    slots: Admission[str] = Admission(1)
    assert slots.take("gone")
    slots.forget("gone")
    assert slots.others("other") == 1  # what it began runs on
    slots.give_back("gone")
    assert not slots.callers
    assert slots.take("x")
    assert not slots.take("gone")
    slots.give_back("x")
    assert slots.offer() == "gone"
    slots.forget("gone")
    assert slots.take("other")


def test_all_callers_get_their_share() -> None:
    # "near" sees a slot become free at once; the others only by being told.
    rng = random.Random(1)
    slots: Admission[str] = Admission(5)
    callers = ["near", "far", "farther"]
    inside: list[str] = []
    served: Counter[str] = Counter()
    for caller in callers * 2:
        if slots.take(caller):
            inside.append(caller)
    for _ in range(3000):
        leaving = rng.choice(inside)
        inside.remove(leaving)
        slots.give_back(leaving)
        told = slots.offer()
        for caller in ["near", *([told] if told else [])]:
            if slots.take(caller):
                inside.append(caller)
                served[caller] += 1
        assert len(inside) == 5, "a slot was left empty"
        for caller in callers:  # all of them have more waiting
            slots.want(caller, 3)
    assert min(served.values()) > 0.9 * max(served.values())


def test_threads_have_always_one_to_run() -> None:
    assert slots_of_threads(8, 0.05, 100) == 8
    assert slots_of_threads(8, 0.002, 100) == 12
    assert slots_of_threads(1, 0.0, 100) == 1  # nothing is known yet
    assert slots_of_threads(8, 0.05, 3) == 3
