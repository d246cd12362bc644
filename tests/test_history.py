"""Versions to go back to, and two who deploy one name: the brain with a fake clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from daskserve.controller.actions import Settle
from daskserve.controller.history import MAX_VERSIONS, History
from tests.test_state import SPEC, Rig, failure, started, stopped


def numbers(rig: Rig) -> list[tuple[int, str, bool]]:
    report = rig.state.history("f", now=rig.now)
    return [(v["number"], v["version"], v["current"]) for v in report]


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_what_was_reached_is_a_version(rig: Rig) -> None:
    rig.deploy()
    assert numbers(rig) == []
    rig.start(*started(rig.reconcile()))
    rig.now += 5
    rig.healthy(version="2", code=b"other")
    rig.deploy(version="3")
    rig.reconcile()
    assert numbers(rig) == [(1, "1", False), (2, "2", True)]
    assert rig.state.history("f", now=rig.now)[0] == {
        "number": 1,
        "version": "1",
        "ago_s": 5.0,
        "num_replicas": 2,
        "route_prefix": "/f",
        "options": b"options",
        "current": False,
    }


def test_the_same_again_is_no_version(rig: Rig) -> None:
    rig.healthy()
    assert Settle(rig.deploy(code=b"pickled again")) in rig.reconcile()
    assert numbers(rig) == [(1, "1", True)]
    # Other options are; so is code without a version that is other code.
    assert Settle(rig.deploy(max_ongoing_requests=3)) in rig.reconcile()
    rig.healthy(version=None)
    rig.healthy(version=None)
    rig.healthy(version=None, code=b"other")
    assert [n for n, *_ in numbers(rig)] == [1, 2, 3, 4]


def test_rollback(rig: Rig) -> None:
    old = rig.healthy(code=b"one")
    new = rig.healthy(code=b"two", version="2", num_replicas=1)
    rig.stop(*old)
    ticket = rig.state.rollback("f", None, now=rig.now)
    actions = rig.reconcile()
    ids = started(actions)
    assert len(ids) == 2 and stopped(actions) == []
    assert rig.state.spec("f").code == b"one"
    done = rig.start(*ids)
    assert Settle(ticket) in done
    assert stopped(done) == new
    assert numbers(rig) == [(1, "1", False), (2, "2", False), (3, "1", True)]
    # Once more: what was before that.
    rig.state.rollback("f", None, now=rig.now)
    assert rig.state.spec("f").version == "2"


def test_rollback_of_what_fails(rig: Rig) -> None:
    running = rig.healthy()
    rig.deploy(version="2", num_replicas=1)
    for _ in range(3):
        rig.fail(*started(rig.wait(10)))
    assert rig.status()["state"] == "DEPLOY_FAILED"
    ticket = rig.state.rollback("f", None, now=rig.now)
    assert rig.reconcile() == [Settle(ticket)]
    assert rig.routed() == running
    assert rig.status()["state"] == "HEALTHY"
    assert numbers(rig) == [(1, "1", True)]


def test_rollback_to_a_number(rig: Rig) -> None:
    for version in ("1", "2", "3"):
        rig.healthy(version=version)
    rig.state.rollback("f", 1, now=rig.now)
    assert rig.state.spec("f").version == "1"
    with pytest.raises(ValueError, match="no version number 9; there are: 1, 2, 3"):
        rig.state.rollback("f", 9, now=rig.now)


def test_nothing_to_go_back_to(rig: Rig) -> None:
    with pytest.raises(KeyError, match="no deployment"):
        rig.state.rollback("f", None, now=rig.now)
    rig.healthy()
    with pytest.raises(ValueError, match="no former version"):
        rig.state.rollback("f", None, now=rig.now)
    with pytest.raises(KeyError, match="no deployment"):
        rig.state.history("g", now=rig.now)


def test_a_bad_former_version(rig: Rig) -> None:
    rig.healthy()
    running = rig.healthy(version="2")
    ticket = rig.state.rollback("f", None, now=rig.now)
    actions = rig.reconcile()
    for _ in range(6):
        actions = rig.fail(*started(actions)[:1]) or rig.wait(10)
        if rig.status()["state"] == "DEPLOY_FAILED":
            break
        actions = actions if started(actions) else rig.wait(10)
    assert rig.status()["state"] == "DEPLOY_FAILED"
    assert ticket
    assert rig.routed() == running


def test_only_the_last_ones_are_kept_and_equal_bytes_once() -> None:
    history = History()
    large = bytes(1000)
    for number in range(3 * MAX_VERSIONS):
        spec = replace(SPEC, version=str(number), code=bytes(1000), init=large)
        history.add(spec, float(number))
    versions = history.versions
    assert [v.number for v in versions] == list(range(21, 31))
    assert len({id(v.spec.code) for v in versions}) == 1


# Two who deploy one name at once


def test_two_who_want_the_same_are_both_told(rig: Rig) -> None:
    first = rig.deploy()
    ids = started(rig.reconcile())
    second = rig.deploy(code=b"pickled elsewhere", options=b"as well")
    assert rig.reconcile() == []
    assert set(rig.start(*ids)) == {Settle(first), Settle(second)}


def test_two_who_want_the_same_without_a_version(rig: Rig) -> None:
    first = rig.deploy(version=None)
    ids = started(rig.reconcile())
    # It always replaces; then the wish of the first holds, too.
    second = rig.deploy(version=None)
    new = started(rig.reconcile())
    assert len(new) == 2
    rig.start(*ids)
    assert set(rig.start(*new)) >= {Settle(first), Settle(second)}


def test_the_later_one_wins_and_the_other_is_told_so(rig: Rig) -> None:
    first = rig.deploy(num_replicas=1)
    rig.reconcile()
    second = rig.deploy(version="2", num_replicas=1)
    actions = rig.reconcile()
    assert "superseded" in failure(actions, first).text
    assert Settle(second) in rig.start(*started(actions))
    assert rig.state.spec("f").version == "2"


def test_both_are_told_of_a_failure(rig: Rig) -> None:
    first = rig.deploy(num_replicas=1)
    second = rig.deploy(num_replicas=1)
    actions = rig.reconcile()
    for _ in range(3):
        actions = rig.fail(*started(actions) or started(rig.wait(10)))
    assert "boom" in failure(actions, first).text
    assert "boom" in failure(actions, second).text


def test_deploy_and_shutdown(rig: Rig) -> None:
    ticket = rig.deploy()
    rig.reconcile()
    rig.state.shutdown()
    assert "shut down" in failure(rig.reconcile(), ticket).text
