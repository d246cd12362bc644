"""How apps come and go: the order, and what is put back; no cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import pytest

from daskserve.controller.actions import Failure
from daskserve.controller.apps import Apps, Wish
from daskserve.controller.records import Spec
from tests.test_state import SPEC


class Deployer:
    """An instance that takes its time, and fails when a spec's code says so."""

    def __init__(self) -> None:
        self.there: dict[str, Spec] = {}
        self.log: list[str] = []
        #: Deployments that do not settle until this is set.
        self.held: dict[str, asyncio.Event] = {}

    async def deploy(self, spec: Spec, prev_version: str | None) -> Failure | None:
        former = self.there.get(spec.name)
        if prev_version is not None and (
            former is None or former.version != prev_version
        ):
            raise ValueError(f"prev_version={prev_version!r}")
        self.log.append(f"deploy {spec.name} {spec.version}")
        self.there[spec.name] = spec
        await asyncio.sleep(0)
        if spec.name in self.held:
            await self.held[spec.name].wait()
        self.log.append(f"settled {spec.name}")
        if spec.code == b"broken":
            if former is not None:
                self.there[spec.name] = former
            return Failure("DeploymentFailedError", f"{spec.name} is broken")
        return None

    async def delete(self, name: str) -> Failure | None:
        del self.there[name]
        await asyncio.sleep(0)
        self.log.append(f"deleted {name}")
        return None

    def names(self) -> list[str]:
        return sorted(self.there)

    def spec(self, name: str) -> Spec:
        return self.there[name]

    def check_route(self, spec: Spec) -> None:
        for other in self.there.values():
            if other.name != spec.name and other.route_prefix == spec.route_prefix:
                raise ValueError(f"{other.name} has it")


def stages(
    *names: Sequence[str], app: str = "a", version: str = "1"
) -> list[list[Wish]]:
    """Make wishes from names; ``!`` at the end of one means that it is broken."""
    place = iter(range(100))
    return [
        [
            (
                replace(
                    SPEC,
                    name=name.rstrip("!"),
                    version=version,
                    code=b"broken" if name.endswith("!") else b"code",
                    route_prefix="/" if stage is names[-1] else None,
                    app=app,
                    app_place=next(place),
                ),
                None,
            )
            for name in stage
        ]
        for stage in names
    ]


def play(scene: Callable[[Deployer, Apps], Awaitable[None]]) -> list[str]:
    async def main() -> list[str]:
        deployer = Deployer()
        async with asyncio.timeout(5):
            await scene(deployer, Apps(deployer))
        return deployer.log

    return asyncio.run(main())


def test_callees_come_first_and_go_last() -> None:
    async def scene(deployer: Deployer, apps: Apps) -> None:
        assert await apps.run("a", stages(["m", "n"], ["in"])) is None
        assert apps.names("a") == ["m", "n", "in"]
        assert await apps.delete("a") is None
        with pytest.raises(KeyError, match="no app named 'a'; there are: none"):
            apps.names("a")

    assert play(scene) == [
        "deploy m 1",
        "deploy n 1",
        "settled m",
        "settled n",
        "deploy in 1",
        "settled in",
        "deleted in",
        "deleted n",
        "deleted m",
    ]


def test_what_is_not_part_of_it_any_more_goes_last() -> None:
    async def scene(deployer: Deployer, apps: Apps) -> None:
        await apps.run("a", stages(["m", "n"], ["in"]))
        deployer.log.clear()
        assert await apps.run("a", stages(["m"], ["in"], version="2")) is None
        assert deployer.log[-2:] == ["settled in", "deleted n"]
        assert sorted(deployer.there) == ["in", "m"]

    play(scene)


def test_what_a_failed_first_run_deployed_goes() -> None:
    async def scene(deployer: Deployer, apps: Apps) -> None:
        failure = await apps.run("a", stages(["m", "n!"], ["in"]))
        assert failure == Failure("DeploymentFailedError", "n is broken")
        assert deployer.there == {}
        assert "deploy in 1" not in deployer.log

    play(scene)


def test_what_ran_before_a_failed_run_is_put_back() -> None:
    async def scene(deployer: Deployer, apps: Apps) -> None:
        await apps.run("a", stages(["m", "n"], ["in"]))
        before = dict(deployer.there)
        failure = await apps.run("a", stages(["m", "new"], ["in!"], version="2"))
        assert failure is not None and failure.text == "in is broken"
        assert deployer.there == before
        assert deployer.log[-3:] == ["deleted new", "deploy m 1", "settled m"]

    play(scene)


def test_one_that_fails_does_not_wait_for_the_others() -> None:
    async def scene(deployer: Deployer, apps: Apps) -> None:
        deployer.held["slow"] = asyncio.Event()
        failure = await apps.run("a", stages(["slow", "m!"], ["in"]))
        assert failure is not None and failure.text == "m is broken"
        assert deployer.there == {}
        deployer.held["slow"].set()
        await asyncio.sleep(0)

    play(scene)


def test_names_and_routes_of_others_are_errors_before_anything_is_deployed() -> None:
    async def scene(deployer: Deployer, apps: Apps) -> None:
        await apps.run("a", stages(["m"], ["in"]))
        deployer.there["alone"] = replace(SPEC, name="alone", route_prefix="/alone")
        deployer.log.clear()
        with pytest.raises(ValueError, match="'m' is there and belongs to app 'a'"):
            await apps.run("b", stages(["m"], ["in2"], app="b"))
        with pytest.raises(ValueError, match="'alone' is there and belongs to no app"):
            await apps.run("b", stages(["alone"], ["in2"], app="b"))
        with pytest.raises(ValueError, match="in has it"):
            await apps.run("b", stages(["m2"], ["in2"], app="b"))
        assert deployer.log == []

    play(scene)


def test_a_prev_version_that_does_not_fit_is_a_failure_like_others() -> None:
    async def scene(deployer: Deployer, apps: Apps) -> None:
        wishes = stages(["m"], ["in"])
        wishes[1] = [(wishes[1][0][0], "0")]
        failure = await apps.run("a", wishes)
        assert failure == Failure("ValueError", "prev_version='0'")
        assert deployer.there == {}

    play(scene)


def test_a_later_run_supersedes_and_knows_what_was_there_first() -> None:
    async def scene(deployer: Deployer, apps: Apps) -> None:
        await apps.run("a", stages(["m"], ["in"]))
        before = dict(deployer.there)
        deployer.held["m"] = asyncio.Event()
        first = asyncio.ensure_future(
            apps.run("a", stages(["m", "new"], ["in"], version="2"))
        )
        await asyncio.sleep(0.01)
        held, deployer.held = deployer.held, {}
        second = await apps.run("a", stages(["m"], ["in!"], version="3"))
        assert second is not None and second.text == "in is broken"
        assert deployer.there == before
        held["m"].set()
        superseded = await first
        assert superseded is not None and "superseded" in superseded.text
        assert deployer.there == before

    play(scene)


def test_deleted_while_it_is_deployed() -> None:
    async def scene(deployer: Deployer, apps: Apps) -> None:
        deployer.held["m"] = asyncio.Event()
        run = asyncio.ensure_future(apps.run("a", stages(["m"], ["in"])))
        await asyncio.sleep(0.01)
        assert await apps.delete("a") is None
        deployer.held["m"].set()
        failure = await run
        assert failure is not None and "superseded" in failure.text
        assert deployer.there == {}

    play(scene)


def test_all_are_deleted_each_in_its_order() -> None:
    async def scene(deployer: Deployer, apps: Apps) -> None:
        await apps.run("a", stages(["m"], ["in"]))
        other = stages(["m2"], ["in2"], app="b")
        other[1] = [(replace(other[1][0][0], route_prefix="/b"), None)]
        assert await apps.run("b", other) is None
        deployer.there["alone"] = replace(SPEC, name="alone", route_prefix="/alone")
        deployer.log.clear()
        await apps.delete_all()
        assert deployer.there.keys() == {"alone"}
        log = deployer.log
        assert log.index("deleted in") < log.index("deleted m")
        assert log.index("deleted in2") < log.index("deleted m2")

    play(scene)


def test_a_deployment_of_an_app_that_is_deployed_alone_stays_in_it() -> None:
    async def scene(deployer: Deployer, apps: Apps) -> None:
        await apps.run("a", stages(["m"], ["in"]))
        alone = replace(SPEC, name="in")
        kept = apps.kept_together(alone)
        assert (kept.app, kept.app_place) == ("a", 1)
        other = replace(SPEC, name="other")
        assert apps.kept_together(other) is other

    play(scene)
