"""What changed between two snapshots makes the second of the first. Pure."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgpack
import pytest
from distributed.comm.core import connect

from daskserve.transport.dispatcher import Dispatcher
from daskserve.transport.snapshots import difference, follow
from tests.test_dispatcher import Place, StandIn, ask, snapshot

EMPTY: dict[str, Any] = {"routes": {}, "deployments": {}}


def as_received(changes: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(changes), use_list=False)


def random_snapshot(chance: random.Random) -> dict[str, Any]:
    deployments = {
        name: {
            "replicas": [
                [i, f"{name}#{i}", "tcp://w:1", chance.choice([None, ["w", 2, "s"]])]
                for i in sorted(chance.sample(range(9), chance.randrange(5)))
            ],
            "max_ongoing": chance.choice([1, 2]),
            "hopeless": chance.random() < 0.2,
        }
        for name in "abcd"
        if chance.random() < 0.7
    }
    routes = {f"/{name}": name for name in deployments if chance.random() < 0.8}
    return {"routes": routes, "deployments": deployments}


@pytest.mark.parametrize("seed", range(100))
def test_changes_lead_from_one_to_the_next(seed: int) -> None:
    chance = random.Random(seed)
    old, new = random_snapshot(chance), random_snapshot(chance)
    changes = difference(old, new)
    before = repr(old)
    if changes is None:
        assert old == new
        return
    assert as_received(follow(old, as_received(changes))) == as_received(new)
    whole = difference(EMPTY, new)
    assert whole is None or follow(EMPTY, whole) == new
    assert repr(old) == before
    assert difference(new, new) is None


def test_routes_stay_in_order() -> None:
    old = {"routes": {"/a": "a", "/c": "c"}, "deployments": {}}
    new = {"routes": {"/a": "a", "/b": "b", "/c": "c"}, "deployments": {}}
    assert list(follow(old, difference(old, new) or {})["routes"]) == ["/a", "/b", "/c"]


def test_only_what_changed_is_sent_and_replaced() -> None:
    replicas = [[i, f"a#{i}", "tcp://w:1", None] for i in range(1000)]
    one = {"replicas": replicas, "max_ongoing": 1}
    old = {"routes": {}, "deployments": {"a": one, "b": one}}
    more = {**one, "replicas": [*replicas[1:], [1000, "a#1000", "tcp://w:1", None]]}
    new = {"routes": {}, "deployments": {"a": more, "b": one}}
    changes = difference(old, new)
    assert changes is not None and len(msgpack.packb(changes)) < 150
    assert follow(old, changes)["deployments"]["b"] is one


def test_a_dispatcher_follows_only_from_where_it_is() -> None:
    async def test() -> None:
        dispatcher = Dispatcher(asyncio.get_running_loop(), connect)
        place = await Place({1: StandIn(), 2: StandIn()}).start()
        first, second = snapshot((1, place)), snapshot((2, place))
        changes = difference(first, second)
        assert changes is not None
        assert dispatcher.update(5, first)
        assert not dispatcher.update(7, changes, base=6)  # the sixth got lost
        assert dispatcher.version == 5 and dispatcher.snapshot is first
        assert list(dispatcher.groups["D"].router.slots) == [1]
        assert dispatcher.update(6, changes, base=5)
        assert list(dispatcher.groups["D"].router.slots) == [2]
        assert dispatcher.update(6, changes, base=5)  # known already, so ignored
        assert dispatcher.snapshot == second
        await ask(dispatcher)
        assert (len(place.replicas[1].messages), len(place.replicas[2].messages)) == (
            0,
            1,
        )
        await dispatcher.close()
        place.stop()

    asyncio.run(test())
