"""A few of many models in each replica: kept, pushed out, and found by requests."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

import daskserve as serve
from daskserve import multiplex
from daskserve.multiplex import Models
from daskserve.replica.context import ReplicaContext, current_replica
from daskserve.transport.messages import MODEL_HEADERS
from daskserve.transport.model_places import EXPECTED_S
from daskserve.transport.router import Router, Slot
from tests.test_http import Site, open_site


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 20))


class Shelf:
    """Models, and what was done to them."""

    def __init__(self, limit: int | None = 2) -> None:
        self.loaded: list[str] = []
        self.unloaded: list[str] = []
        self.broken: set[str] = set()
        self.models = Models(self.load, self.unload, limit)

    async def load(self, model_id: str) -> str:
        self.loaded.append(model_id)
        await asyncio.sleep(0.01)
        if model_id in self.broken:
            raise OSError(f"no {model_id}")
        return model_id.upper()

    async def unload(self, model: str) -> None:
        self.unloaded.append(model)

    async def get(self, model_id: str) -> str:
        """Get a model in a task that ends with it, as a request does."""
        task = asyncio.ensure_future(self.models.get(model_id))
        model: str = await task
        await asyncio.sleep(0)
        return model


def test_the_last_used_ones_stay() -> None:
    async def main() -> None:
        shelf = Shelf()
        for model_id in "abab":
            assert await shelf.get(model_id) == model_id.upper()
        assert shelf.loaded == ["a", "b"]
        await shelf.get("a")
        await shelf.get("c")
        assert shelf.models.ids == ["a", "c"]
        await asyncio.sleep(0)
        assert shelf.unloaded == ["B"]
        await shelf.models.clear()
        assert shelf.unloaded == ["B", "A", "C"]

    run(main())


def test_one_is_loaded_once_however_many_ask_and_go() -> None:
    async def main() -> None:
        shelf = Shelf()
        tasks = [asyncio.ensure_future(shelf.models.get("a")) for _ in range(10)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        assert found[1:] == ["A"] * 9
        assert shelf.loaded == ["a"]

    run(main())


def test_a_failure_is_for_all_who_wait_and_is_not_kept() -> None:
    async def main() -> None:
        shelf = Shelf()
        shelf.broken.add("a")
        calls = (shelf.get("a") for _ in range(3))
        failed = await asyncio.gather(*calls, return_exceptions=True)
        assert [str(error) for error in failed] == ["no a"] * 3
        shelf.broken.clear()
        assert await shelf.get("a") == "A"
        assert shelf.loaded == ["a", "a"]

    run(main())


def test_one_in_use_is_pushed_out_when_those_who_use_it_have_ended() -> None:
    async def main() -> None:
        shelf = Shelf(limit=1)
        go = asyncio.Event()

        async def use() -> None:
            await shelf.models.get("a")
            await go.wait()

        users = [asyncio.ensure_future(use()) for _ in range(2)]
        await asyncio.sleep(0.02)
        next_one = asyncio.ensure_future(shelf.get("b"))
        await asyncio.sleep(0.02)
        assert shelf.loaded == ["a"]
        go.set()
        assert await next_one == "B"
        await asyncio.gather(*users)
        assert shelf.unloaded == ["A"] and shelf.loaded == ["a", "b"]

    run(main())


def test_who_uses_one_and_wants_another_does_not_wait_for_itself() -> None:
    async def main() -> None:
        shelf = Shelf(limit=1)

        async def use_both() -> str:
            return await shelf.models.get("a") + await shelf.models.get("b")

        assert await use_both() == "AB"

    run(main())


def test_one_in_use_for_long_is_unloaded_when_those_who_use_it_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(multiplex, "PATIENCE_S", 0.05)

    async def main() -> None:
        shelf = Shelf(limit=1)
        go = asyncio.Event()

        async def use() -> None:
            await shelf.models.get("a")
            await go.wait()

        users = [asyncio.ensure_future(use()) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert await shelf.get("b") == "B"
        await asyncio.sleep(0.01)
        assert shelf.unloaded == []
        go.set()
        await asyncio.gather(*users)
        await asyncio.sleep(0.01)
        assert shelf.unloaded == ["A"]
        await shelf.models.clear()
        assert shelf.unloaded == ["A", "B"]

    run(main())


def test_no_limit_and_no_unloading() -> None:
    async def main() -> None:
        shelf = Shelf(limit=None)
        for n in range(50):
            await shelf.get(f"m{n}")
        assert len(shelf.models.ids) == 50

    run(main())


def test_decorated_functions_are_checked() -> None:
    with pytest.raises(ValueError, match="0 is not allowed"):
        serve.multiplexed(max_num_models_per_replica=0)
    with pytest.raises(ValueError, match="'x' is not allowed: give a function"):
        serve.multiplexed(unload="x")  # type: ignore[call-overload]

    def sync(model_id: str) -> str:
        return model_id

    async def nothing() -> str:
        return ""

    with pytest.raises(TypeError, match="not an async function"):
        serve.multiplexed(sync)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="has 0 parameters"):
        serve.multiplexed(nothing)

    @serve.multiplexed
    async def get(model_id: str) -> str:
        return model_id

    with pytest.raises(ValueError, match="names no model.*serve_multiplexed_model_id"):
        run(get(""))
    with pytest.raises(ValueError, match="names no model"):
        run(get())  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="model id 7 is not a string"):
        run(get(7))  # type: ignore[arg-type]
    assert run(get("a")) == "a"


def router(replicas: int, max_ongoing: int) -> Router:
    made = Router(random.Random(1))
    slots = (Slot(n, f"D#{n}", f"tcp://w{n}") for n in range(replicas))
    made.update(slots, max_ongoing)
    return made


def test_all_callers_send_a_model_to_the_same_replica_and_spread_models() -> None:
    one, other = router(8, 100), router(8, 100)
    found: Counter[int] = Counter()
    for n in range(800):
        slot, same = (
            one.choose_for_model(f"m{n}", 0),
            other.choose_for_model(f"m{n}", 0),
        )
        assert slot is not None and same is not None
        assert slot.replica_id == same.replica_id
        found[slot.replica_id] += 1
    assert min(found.values()) > 60
    # With one replica fewer, only its own models go elsewhere.
    gone = 3
    slots = [slot for slot in other.slots.values() if slot.replica_id != gone]
    other.update(slots, 100)
    for n in range(800):
        slot, now = one.choose_for_model(f"m{n}", 0), other.choose_for_model(f"m{n}", 0)
        assert slot is not None and now is not None
        assert slot.replica_id in (now.replica_id, gone)


def ask(made: Router, model_id: str, now: float = 0.0) -> Slot:
    slot = made.choose_for_model(model_id, now)
    assert slot is not None
    return slot


def test_models_go_where_there_is_room_for_them() -> None:
    made = router(3, 100)
    made.models.report(made.slots[0], 3, 2.0, [], 0.0)  # as the first one says
    for turn in range(10):
        for n in range(9):
            slot = ask(made, f"m{n}", turn)
            loaded = {*made.models._loaded.get(slot, ()), f"m{n}"}
            made.models.report(slot, 3, 2.0, loaded, turn)
    loads = [len(made.models._loaded[slot]) for slot in made.slots.values()]
    assert loads == [3, 3, 3]


def test_a_hot_model_spreads_when_its_replica_is_busy() -> None:
    made = router(3, 100)
    (first, *others) = made.ranked("hot")
    made.models.report(first, 2, 2.0, ["hot"], 0.0)
    for slot in made.slots.values():
        made.report(slot, 0, 100, 0.1, 0.1, False, 0.0)
    for _ in range(15):
        assert ask(made, "hot") is first
        made.begin(first)
    for _ in range(10):  # what waits there takes more than to load it once more
        made.begin(first)
    second = ask(made, "hot")
    assert second is others[0]
    made.models.report(others[0], 2, 2.0, ["hot"], 0.0)
    made.models.report(others[1], 2, 2.0, ["cold", "colder"], 0.0)
    for _ in range(40):  # and not in the place of others
        slot = ask(made, "hot")
        assert slot is not others[1]
        made.begin(slot)


def test_a_model_that_did_not_load_is_not_expected_for_ever() -> None:
    made = router(2, 100)
    slot = ask(made, "none", 0.0)
    assert slot in made.models.holders("none")
    made.models.report(slot, 1, 2.0, [], 1.0)
    assert not made.models.has_room(slot, 1.0)  # the answer may be on its way
    made.models.report(slot, 1, 2.0, [], EXPECTED_S + 1)
    assert made.models.has_room(slot, EXPECTED_S + 1)
    assert not made.models.holders("none")
    made.models.report(slot, 1, 2.0, ["a"], 9.0)
    made.update([s for s in made.slots.values() if s is not slot], 100)
    assert not made.models.holders("a")


def test_a_full_replica_sends_its_models_to_the_next_one() -> None:
    made = router(3, 2)
    found = []
    for _ in range(7):
        slot = made.choose_for_model("a", 0)
        found.append(None if slot is None else slot.replica_id)
        if slot is not None:
            made.begin(slot)
    assert found[6] is None
    assert [found.count(n) for n in range(3)] == [2, 2, 2]
    assert found[0] == found[1] and found[2] == found[3]


def test_batches_are_made_per_model_which_they_know() -> None:
    batches: list[tuple[str, list[int]]] = []

    @serve.batch(max_batch_size=2, batch_wait_timeout_s=0.05)
    async def echo(items: list[int]) -> list[str]:
        batches.append((serve.get_multiplexed_model_id(), items))
        await asyncio.sleep(0.01)
        return [serve.get_multiplexed_model_id() for _ in items]

    async def main() -> list[str]:
        head = SimpleNamespace(headers=[(MODEL_HEADERS[0], b"a")])
        tasks = []
        for number in range(8):
            context = (
                ReplicaContext("D", "D#1", _head=head)
                if number % 2
                else ReplicaContext("D", "D#1", _model_id="b" if number < 6 else "")
            )
            current_replica.set(context)
            tasks.append(asyncio.create_task(echo(number)))  # type: ignore[arg-type]
        assert serve.get_multiplexed_model_id() == "a"
        return await asyncio.gather(*tasks)

    assert run(main()) == ["b", "a", "b", "a", "b", "a", "", "a"]
    by_model = {key: [items for k, items in batches if k == key] for key in "ab"}
    assert by_model == {"a": [[1, 3], [5, 7]], "b": [[0, 2], [4]]}


@pytest.fixture
def site() -> Iterator[Site]:
    with open_site() as made:
        yield made


@pytest.mark.slow
def test_first_requests_all_at_once_push_no_model_out(site: Site) -> None:
    """How many a replica keeps is known before it has loaded any."""

    class Shelf:
        @serve.multiplexed(max_num_models_per_replica=4)
        async def get_model(self, model_id: str) -> str:
            await asyncio.sleep(0.1)
            return serve.get_replica_context().replica_tag

        async def __call__(self) -> str:
            return str(await self.get_model())  # type: ignore[call-arg]

    for _ in range(3):
        shelf = site.deploy(Shelf, num_replicas=2)
        handle = shelf.get_handle()
        models = [handle.options(multiplexed_model_id=f"m{n}") for n in range(8)]
        calls = [model.remote() for model in models]
        tags = [call.result(timeout_s=20) for call in calls]
        assert sorted(Counter(tags).values()) == [4, 4]


@pytest.mark.slow
def test_requests_find_the_replica_that_has_their_model(site: Site) -> None:
    class Zoo:
        def __init__(self) -> None:
            self.log: list[str] = []

        async def _release(self, model: str) -> None:
            self.log.append(f"-{model}")

        @serve.multiplexed(max_num_models_per_replica=2)
        async def get_model(self, model_id: str) -> str:
            assert serve.get_multiplexed_model_id() == ""
            self.log.append(model_id)
            await asyncio.sleep(0.5)  # what no wait for a replica is worth
            if model_id == "none":
                raise KeyError("no such model")
            return model_id.upper()

        async def __call__(self, request: Any = None) -> Any:
            tag = serve.get_replica_context().replica_tag
            model = await self.get_model()  # type: ignore[call-arg]
            return model, serve.get_multiplexed_model_id(), tag

        def get_log(self) -> list[str]:
            return self.log

    zoo = site.deploy(Zoo, num_replicas=2)

    def get(model_id: str) -> httpx.Response:
        headers = {"serve_multiplexed_model_id": model_id} if model_id else {}
        return httpx.get(site.at(zoo), headers=headers, timeout=20)

    handle = zoo.get_handle()
    with ThreadPoolExecutor(8) as pool:
        answers = [r.json() for r in pool.map(get, ["a", "b", "c", "d"] * 5)]
    tags = {model_id: tag for _, model_id, tag in answers}
    assert len({(model_id, tag) for _, model_id, tag in answers}) == 4
    assert {model for model, _, _ in answers} == {"A", "B", "C", "D"}
    for model_id, tag in tags.items():
        chosen = handle.options(multiplexed_model_id=model_id)
        expected = (model_id.upper(), model_id, tag)
        # At once, though this process has never asked for it.
        assert chosen.remote().result(timeout_s=20) == expected
    assert get("none").status_code == 500
    assert get("").status_code == 400
    with pytest.raises(ValueError, match="names no model"):
        handle.remote().result(timeout_s=20)
    with pytest.raises(TypeError, match="multiplexed_model_id=7 is not a string"):
        handle.options(multiplexed_model_id=7)  # type: ignore[arg-type]
