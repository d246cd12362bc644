"""Who gets the next free place in a replica."""

from __future__ import annotations

import random
from collections import Counter

from daskserve.replica.places import Places


def test_places_are_taken_up_to_the_limit() -> None:
    places: Places[str] = Places(2)
    assert places.take("a", 0)
    assert places.take("b", 1)
    assert not places.take("a", 2)
    assert places.wanted
    assert places.take("b", 1)  # nobody was offered it


def test_a_place_is_kept_for_who_was_refused_first() -> None:
    places: Places[str] = Places(1)
    assert not places.take("first", 1)
    assert not places.take("second", 1)
    assert not places.take("first", 1)  # once is enough
    assert places.offer(1) is None  # nothing is free
    assert places.offer(0) == "first"
    assert places.offer(0) is None  # and now it is kept
    assert not places.take("quick", 0)
    assert places.take("first", 0)
    assert not places.take("first", 1)
    assert [places.offer(0), places.offer(0)] == ["second", None]
    places.withdraw("second")  # it does not come
    assert [places.offer(0), places.offer(0)] == ["quick", None]
    places.withdraw("quick")
    assert places.offer(0) == "first"  # it had more, for all that was known
    places.withdraw("first")
    assert not places.wanted


def test_callers_that_have_gone_are_forgotten() -> None:
    places: Places[str] = Places(1)
    assert not places.take("gone", 1)
    places.forget("gone")
    assert not places.wanted
    assert not places.take("gone", 1)
    assert places.offer(0) == "gone"
    places.forget("gone")
    assert places.take("other", 0)


def test_all_callers_get_their_share() -> None:
    # "near" sees a place become free at once; the others only by being told.
    rng = random.Random(1)
    places: Places[str] = Places(5)
    callers = ["near", "far", "farther"]
    inside: list[str] = []
    served: Counter[str] = Counter()
    for caller in callers * 2:
        if places.take(caller, len(inside)):
            inside.append(caller)
    for _ in range(3000):
        inside.remove(rng.choice(inside))
        told = places.offer(len(inside))
        for caller in ["near", *([told] if told else [])]:
            if places.take(caller, len(inside)):
                inside.append(caller)
                served[caller] += 1
        assert len(inside) == 5, "a place was left empty"
        for caller in callers:  # all of them have more waiting
            places.take(caller, 5)
        assert len(inside) <= 5
    assert min(served.values()) > 0.8 * max(served.values())
