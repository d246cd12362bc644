"""Numbers of replicas that follow the load: by a fake clock, and then for real."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
from distributed import Client, LocalCluster

import daskserve as serve
from daskserve.config import AutoscalingConfig
from daskserve.controller.actions import Settle, StartReplica, StopReplica
from daskserve.controller.autoscaling import (
    AutoscalingContext,
    default_policy,
    wrong_answer,
)
from daskserve.controller.load import Load, LoadBoard
from daskserve.controller.policies import Policies, load_policy
from daskserve.transport.load_reports import LEAST, LOOKS, LoadReports
from tests.benchmarks.autoscaling import Sleeper, config, run_steps
from tests.test_http import Site, open_site
from tests.test_state import Rig, failure, started, stopped
from tests.utils import poll, scheduler_workers

AUTO: dict[str, Any] = {
    "min_replicas": 1,
    "max_replicas": 10,
    "target_ongoing_requests": 10,
    "upscale_delay_s": 5,
    "downscale_delay_s": 20,
    "look_back_period_s": 5,
}


def auto(**changes: Any) -> dict[str, Any]:
    return AutoscalingConfig(**{**AUTO, **changes}).model_dump()


def spec(**changes: Any) -> dict[str, Any]:
    return {"autoscaling": auto(**changes), "graceful_shutdown_timeout_s": 2.0}


# The policy


def context(average: float, there: int, **changes: Any) -> AutoscalingContext:
    return AutoscalingContext(
        deployment="f",
        current_replicas=there,
        running_replicas=there,
        requests=average,
        average_requests=average,
        history=((0.0, average),),
        config=AutoscalingConfig(**{**AUTO, **changes}),
    )


@pytest.mark.parametrize(
    ("average", "there", "wanted"),
    [
        (0, 1, 0),
        (0, 0, 0),
        (0.01, 0, 1),
        (1, 1, 1),
        (10, 1, 1),
        (10.9, 1, 1),  # hardly more than one takes
        (11.1, 1, 2),
        (50, 1, 5),
        (50, 5, 5),
        (54, 5, 5),
        (41, 5, 5),
        (40, 5, 4),
        (43, 4, 4),
        (5, 5, 1),
        (1000, 5, 100),
    ],
)
def test_default_policy(average: float, there: int, wanted: int) -> None:
    assert default_policy(context(average, there)) == wanted


def test_factors_make_steps_smaller() -> None:
    half = {"upscaling_factor": 0.5, "downscaling_factor": 0.5}
    assert default_policy(context(100, 2, **half)) == 6
    assert default_policy(context(0, 9, **half)) == 5
    assert default_policy(context(0, 1, **half)) == 0  # one at least, each time


@pytest.mark.parametrize("answer", [None, -1, 2.0, 2.5, float("nan"), True, "3", [1]])
def test_answers_that_are_no_number(answer: object) -> None:
    assert repr(answer) in str(wrong_answer(answer))


def test_answers_that_are_one() -> None:
    assert wrong_answer(0) is None
    assert wrong_answer(7) is None


# What is reported


def test_board_adds_up_and_forgets() -> None:
    board = LoadBoard()
    assert board.get("f", 0.0) == Load()
    board.report("a", 1.0, {"f": [3.5, [[1, 2], [2, 1]]], "g": [1, []]}, 10.0)
    board.report("b", 1.0, {"f": [2, [[2, 2]]]}, 11.0)
    assert board.get("f", 11.0) == Load(5.5, {1: 2, 2: 3})
    assert board.get("g", 11.0).requests == 1
    assert board.get("f", 15.5).requests == 2  # a has said nothing for too long
    board.report("b", 1.0, {}, 15.5)
    assert board.get("f", 15.5) == Load()
    board.report("b", 1.0, {"f": [2, []]}, 16.0)
    board.forget("b")
    assert board.get("f", 16.0) == Load()


def test_process_reports_while_it_has_requests() -> None:
    sent: list[Any] = []
    load: dict[str, tuple[int, dict[int, int], int]] = {"f": (0, {}, 0)}

    async def wait_for(count: int) -> None:
        async with asyncio.timeout(5):
            while len(sent) < count:
                await asyncio.sleep(0.002)

    async def check() -> None:
        reports = LoadReports(asyncio.get_running_loop(), lambda name: load[name])
        reports.send = lambda interval_s, loads: sent.append(loads)
        reports.follow({"f": {"load_interval_s": 0.05}, "g": {}})
        await asyncio.sleep(0.2)
        assert sent == []  # there is nothing to tell
        load["f"] = (2, {7: 3}, 5)
        await wait_for(2)
        assert sent[1] == {"f": [5.0, [[7, 3]]]}
        assert 0 < sent[0]["f"][0] <= 5
        load["f"] = (0, {}, 5)
        await wait_for(3)
        while sent[-1]:
            await wait_for(len(sent) + 1)
        count = len(sent)
        await asyncio.sleep(0.2)
        assert len(sent) == count  # that it has none is said once
        load["f"] = (0, {}, 6)  # one came and went between two looks
        await wait_for(count + 2)
        assert sent[count:] == [{"f": [LEAST, []]}, {}]
        reports.follow({})
        await asyncio.sleep(0.05 / LOOKS * 2)
        assert reports._timer is None
        reports.close()

    asyncio.run(check())


# Simulations: what the number of replicas does under a load


class Sim(Rig):
    """A controller whose replicas start in no time or a little, under a load."""

    def __init__(self, workers: int = 3, start_s: float = 2.0) -> None:
        super().__init__(workers)
        self.board = LoadBoard()
        self.policies = Policies()
        self.start_s = start_s
        self.starting: list[tuple[float, int]] = []
        self.stopping: list[tuple[float, int]] = []
        self.troubles: list[str] = []
        #: The number wanted after each second.
        self.numbers: list[int] = []

    def look(self, queued: int = 0) -> None:
        self.troubles += self.state.follow_load(
            self.board, {"f": queued}, self.policies.ask, now=self.now
        )
        for action in self.reconcile():
            if isinstance(action, StartReplica):
                self.starting.append((self.now + self.start_s, action.replica_id))
            elif isinstance(action, StopReplica):
                self.stopping.append((self.now + 1, action.replica_id))

    def run(
        self, seconds: float, load: Callable[[float], float], queued: int = 0
    ) -> list[int]:
        """Let time pass; return the numbers of replicas wanted, second by second."""
        numbers = []
        for second in range(int(seconds)):
            self.now += 1.0
            for due, replica_id in [s for s in self.starting if s[0] <= self.now]:
                self.starting.remove((due, replica_id))
                self.state.replica_started(replica_id, now=self.now)
            for due, replica_id in [s for s in self.stopping if s[0] <= self.now]:
                self.stopping.remove((due, replica_id))
                self.state.replica_stopped(replica_id)
            requests = load(second)
            self.board.report(
                "a", 1.0, {"f": [requests, []]} if requests else {}, self.now
            )
            self.look(queued)
            numbers.append(self.status()["target_replicas"])
            assert len(self.routed()) <= 10
        self.numbers += numbers
        return numbers

    def begin(self, **config: Any) -> None:
        self.deploy(**spec(**config))
        self.look()
        self.run(5, lambda _: 0)


def turns(numbers: list[int]) -> int:
    """Count the changes of direction."""
    steps = [after - before for before, after in pairwise(numbers) if after != before]
    return sum((a > 0) != (b > 0) for a, b in pairwise(steps))


@pytest.mark.parametrize("start_s", [0.0, 2.0, 30.0])
def test_steps(start_s: float) -> None:
    sim = Sim(start_s=start_s)
    sim.begin(min_replicas=0)
    for load, wanted in ((1, 1), (50, 5), (1, 1), (0, 0), (1, 1), (90, 9), (20, 2)):
        numbers = sim.run(60, lambda _, load=load: load, queued=load)
        assert numbers[-1] == wanted
        assert turns(numbers) == 0, (load, numbers)
        status = sim.status()
        assert status["state"] == "HEALTHY"
        assert status["running_replicas"] == wanted


def test_ramp() -> None:
    sim = Sim()
    sim.begin()
    up = sim.run(200, lambda second: second / 2)
    assert up == sorted(up)
    assert up[-1] == 10
    down = sim.run(300, lambda second: max(0.0, 100 - second / 2))
    assert down == sorted(down, reverse=True)
    assert down[-1] == 1


def test_short_bursts_change_nothing() -> None:
    sim = Sim()
    sim.begin(look_back_period_s=10)
    numbers = sim.run(300, lambda second: 60 if second % 30 == 0 else 5)
    assert set(numbers) == {1}


def test_bursts_that_come_again_are_provided_for() -> None:
    sim = Sim()
    sim.begin()
    numbers = sim.run(300, lambda second: 60 if second % 30 < 15 else 0)
    settled = numbers[50:]
    assert len(set(settled)) == 1  # the next one comes before it is forgotten
    assert settled[0] == 6


@pytest.mark.parametrize("mean", [9.5, 10, 20, 35, 40, 50])
def test_noise_does_not_make_it_flap(mean: float) -> None:
    chance = random.Random(1)
    sim = Sim()
    sim.begin(upscale_delay_s=3, downscale_delay_s=10)
    sim.run(60, lambda _: mean)
    numbers = sim.run(1000, lambda _: max(0.0, chance.gauss(mean, mean * 0.1)))
    changes = sum(a != b for a, b in pairwise(numbers))
    assert changes <= 2
    assert -(-mean // 11) <= numbers[-1] <= -(-mean // 9)


def test_a_recorded_day() -> None:
    """Load as of many small clients that come and go: near the target all the time."""
    chance = random.Random(2)
    clients = 5.0
    loads = []
    for second in range(1800):
        clients = max(0.0, clients + chance.gauss(0, 0.5))
        clients = min(clients, 90) + (20 if second in (500, 1200) else 0)
        loads.append(clients + abs(chance.gauss(0, 1)))
    sim = Sim()
    sim.begin(downscale_delay_s=60)
    numbers = sim.run(1800, lambda second: loads[int(second)])
    pairs = zip(loads, numbers, strict=True)
    late = sum(load / 10 > number * 1.1 + 1 for load, number in pairs)
    assert late < 60  # seconds after the two jumps
    assert turns(numbers) <= 40


def test_delays_are_kept() -> None:
    sim = Sim(start_s=0)
    sim.begin(look_back_period_s=1, upscale_delay_s=7, downscale_delay_s=33)
    up = sim.run(60, lambda _: 30)
    assert up.index(3) in (7, 8)
    down = sim.run(60, lambda _: 0)
    assert down.index(1) in (33, 34, 35)


def test_limits() -> None:
    sim = Sim()
    sim.begin(min_replicas=2, max_replicas=4, initial_replicas=3)
    assert sim.numbers[0] == 3
    assert sim.run(60, lambda _: 0)[-1] == 2
    assert sim.run(60, lambda _: 500)[-1] == 4


# What becomes of it


def test_status_while_scaling() -> None:
    sim = Sim(start_s=10)
    sim.deploy(**spec())
    sim.look()
    assert sim.status()["state"] == "UPDATING"
    sim.run(12, lambda _: 0)
    assert (sim.status()["state"], sim.status()["reason"]) == ("HEALTHY", "")
    sim.run(12, lambda _: 50)
    status = sim.status()
    assert status["state"] == "HEALTHY"  # with what there was until now
    assert status["reason"].startswith("1 of ")
    assert "running: scaling up, " in status["reason"]
    assert "requests for 10 each" in status["reason"]
    sim.run(30, lambda _: 50)
    assert (sim.status()["state"], sim.status()["reason"]) == ("HEALTHY", "")
    assert sim.status()["target_replicas"] == 5
    # One that dies is another matter.
    sim.state.replica_lost(sim.routed()[0], "died", now=sim.now)
    sim.look()
    assert sim.status()["state"] == "UNHEALTHY"
    assert "scaling" not in sim.status()["reason"]
    sim.run(30, lambda _: 50)
    assert sim.status()["state"] == "HEALTHY"


def test_status_explains_the_number() -> None:
    sim = Sim()
    delays = {"upscale_delay_s": 5, "downscale_delay_s": 20, "look_back_period_s": 1}
    sim.begin(min_replicas=1, max_replicas=6, target_ongoing_requests=10, **delays)
    assert "0 requests wait or run" in sim.status()["autoscaling"]
    sim.run(2, lambda _: 1000)
    text = sim.status()["autoscaling"]
    assert "1e+03 requests wait or run" in text and "10 for each replica" in text
    assert text.endswith(
        "6 of 1 to 6 replicas called for, 1 wanted, if that lasts for 3 s more"
    )
    sim.run(10, lambda _: 1000)
    assert sim.status()["autoscaling"].endswith("6 replicas called for, 6 wanted")
    sim.run(5, lambda _: 0)
    text = sim.status()["autoscaling"]
    assert "1 of 1 to 6 replicas called for, 6 wanted, if that lasts for 1" in text
    sim.run(30, lambda _: 0)
    assert sim.status()["autoscaling"].endswith("1 wanted")


def test_status_when_new_ones_do_not_start() -> None:
    sim = Sim(start_s=1000)
    sim.deploy(**spec())
    sim.look()
    sim.start(*(replica_id for _, replica_id in sim.starting))
    sim.run(10, lambda _: 20)
    (_, bad) = sim.starting[-1]
    assert sim.status()["state"] == "HEALTHY"
    sim.fail(bad)
    assert sim.status()["state"] == "UNHEALTHY"
    assert "scaling up" in sim.status()["reason"]
    assert "ValueError: boom" in sim.status()["reason"]


def test_to_zero_and_back() -> None:
    sim = Sim()
    sim.begin(min_replicas=0)
    assert sim.numbers[-1] == 1  # so that deploy() sees whether it starts
    sim.run(60, lambda _: 0)
    status = sim.status()
    assert (status["state"], status["running_replicas"]) == ("HEALTHY", 0)
    assert status["reason"] == "scaled to zero, no requests for 20 s"
    assert sim.routes == {"/f": "f"}
    entry = sim.entry()
    assert entry["replicas"] == []
    assert not entry["hopeless"]  # requests wait
    assert entry["load_interval_s"] == 1
    sim.now += 0.1  # at once, whatever the delays
    sim.look(queued=3)
    assert sim.status()["target_replicas"] == 1
    assert "3 requests wait for the first replica" in sim.status()["reason"]
    assert sim.status()["state"] == "HEALTHY"
    numbers = sim.run(19, lambda _: 0)  # it gave up before it was served
    assert set(numbers) == {1}
    assert sim.run(10, lambda _: 0)[-1] == 0


def test_begins_with_none_if_asked_to() -> None:
    sim = Sim()
    ticket = sim.deploy(**spec(min_replicas=0, initial_replicas=0))
    assert sim.reconcile() == [Settle(ticket)]
    assert sim.status()["state"] == "HEALTHY"
    sim.look()
    assert sim.status()["reason"] == "no replica until a request comes"
    assert sim.entry()["asleep"]
    sim.look(queued=1)
    assert sim.status()["target_replicas"] == 1


def test_code_that_does_not_start_any_more() -> None:
    """An update of what was scaled to zero starts one, to see whether that works."""
    sim = Sim()
    sim.begin(min_replicas=0)
    sim.run(60, lambda _: 0)
    assert sim.routed() == []
    ticket = sim.deploy(version="2", **spec(min_replicas=0))
    (replica_id,) = started(sim.reconcile())
    for _ in range(2):
        sim.fail(replica_id)
        (replica_id,) = started(sim.wait(10))
    assert "ValueError: boom" in failure(sim.fail(replica_id), ticket).text
    assert sim.state.spec("f").version == "1"


def test_number_is_kept_across_versions() -> None:
    sim = Sim()
    sim.begin()
    sim.run(40, lambda _: 60)
    old = sim.routed()
    assert len(old) == 6
    ticket = sim.deploy(version="2", **spec())
    new = started(sim.reconcile())
    assert len(new) == 6
    assert Settle(ticket) in sim.start(*new)
    sim.starting.clear()
    assert sim.routed() == new


def test_other_autoscaling_restarts_nothing() -> None:
    sim = Sim()
    sim.begin()
    sim.run(40, lambda _: 60)
    old = sim.routed()
    ticket = sim.deploy(**spec(target_ongoing_requests=20))
    assert sim.reconcile() == [Settle(ticket)]
    assert sim.routed() == old
    sim.run(60, lambda _: 60)
    assert sim.routed() == old[:3]
    # A smaller limit holds at once; so does a fixed number.
    sim.deploy(**spec(max_replicas=2))
    assert len(stopped(sim.reconcile())) == 1
    sim.deploy(num_replicas=4)
    ids = started(sim.reconcile())
    assert len(ids) == 2
    sim.start(*ids)
    assert sim.run(60, lambda _: 0)[-1] == 4
    assert "load_interval_s" not in sim.entry()


def test_an_update_in_progress_is_not_made_smaller() -> None:
    sim = Sim(start_s=1000)
    sim.deploy(**spec(initial_replicas=4))
    sim.look()
    sim.start(*(replica_id for _, replica_id in sim.starting))
    sim.deploy(version="2", **spec())
    assert sim.run(100, lambda _: 0)[-1] == 4
    # But the old code gets more for more requests.
    sim.starting.clear()
    sim.run(20, lambda _: 100)
    assert sim.status()["target_replicas"] == 10
    assert len(sim.starting) == 6 + 6


def test_delays_begin_when_a_deployment_runs() -> None:
    sim = Sim(start_s=100)
    sim.deploy(**spec(min_replicas=0))
    sim.look()
    numbers = sim.run(130, lambda _: 0)
    assert set(numbers[:118]) == {1}
    assert numbers[-1] == 0


def test_least_loaded_and_starting_ones_go_first() -> None:
    sim = Sim(workers=4)
    sim.begin(initial_replicas=4)
    first, second, third, fourth = sim.routed()
    pairs = [[first, 5], [second, 1], [third, 9], [fourth, 2]]
    for _ in range(30):
        sim.now += 1
        sim.board.report("a", 1.0, {"f": [17, pairs]}, sim.now)
        sim.look()
    assert sim.routed() == [first, third]
    # Two more are on their way when the load goes.
    sim.start_s = 1000
    sim.run(12, lambda _: 40)
    assert sim.status()["target_replicas"] == 4
    sim.run(40, lambda _: 20)
    assert sim.routed() == [first, third]
    assert sim.status()["target_replicas"] == 2


# Policies of users


def twice(context: AutoscalingContext) -> int:
    return 2


def moody(context: AutoscalingContext) -> int | None:
    if context.requests == 1:
        raise ZeroDivisionError("no idea")
    return None if context.requests == 2 else 3


unstick = threading.Event()


def stuck(context: AutoscalingContext) -> int:
    unstick.wait(30)
    return 2


def _ask(policies: Policies, question: AutoscalingContext) -> int | str:
    policies.ask(question)

    def answer() -> tuple[int | str] | None:
        found = policies.ask(question)
        return None if found is None else (found,)

    return poll(answer, period=0.001)[0]


def test_policies_are_asked_by_name() -> None:
    policies = Policies()
    assert policies.ask(context(50, 1)) == 5
    assert _ask(policies, context(50, 1, policy=twice)) == 2
    path = f"{__name__}:moody"
    assert _ask(policies, context(0, 1, policy=path)) == 3
    policies = Policies()
    text = "raised ZeroDivisionError: no idea"
    assert _ask(policies, context(1, 1, policy=path)) == text
    policies = Policies()
    text = "returned None and not a whole number of 0 or more"
    assert _ask(policies, context(2, 1, policy=path)) == text


def test_a_policy_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daskserve.controller.policies.PATIENCE_S", 0.05)
    policies = Policies()
    try:
        answer = _ask(policies, context(50, 1, policy=stuck))
        assert "has not answered for more than" in str(answer)
    finally:
        unstick.set()


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("no_such_module_at_all:f", "ModuleNotFoundError"),
        ("math:no_such_function", "AttributeError"),
        ("math:pi", "no function"),
    ],
)
def test_policies_that_are_not_there(path: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"policy '{path}' .*{text}"):
        load_policy(path)


def test_a_bad_policy_leaves_the_number_as_it_is() -> None:
    answers: list[int | str | None] = ["raised ValueError: 1", None, 4, "is bad"]
    sim = Sim()
    sim.deploy(**spec(policy="a:b", upscale_delay_s=0))
    sim.policies.ask = lambda context: answers[0]  # type: ignore[method-assign]
    sim.look()
    assert sim.run(10, lambda _: 100)[-1] == 1
    status = sim.status()
    text = "autoscaling policy 'a:b' raised ValueError: 1; the number stays"
    assert (status["state"], status["reason"]) == ("HEALTHY", text)
    assert sim.troubles == [text]  # told once
    answers.pop(0)
    assert sim.run(5, lambda _: 100)[-1] == 1
    answers.pop(0)
    assert sim.run(5, lambda _: 100)[-1] == 4
    assert "policy" not in sim.status()["reason"]
    answers.pop(0)
    assert sim.run(5, lambda _: 100)[-1] == 4
    assert len(sim.troubles) == 2


# Workers that there are not


def test_missing_workers() -> None:
    rig = Rig(2, gpus=2)

    def missing() -> int:
        rig.reconcile()
        return rig.state.missing_workers(rig.now, rig.views)

    rig.deploy(resources={"GPU": 1.0}, num_replicas=4)
    assert missing() == 0
    rig.deploy(resources={"GPU": 1.0}, num_replicas=7)
    assert missing() == 2  # for three replicas
    rig.deploy(resources={"GPU": 3.0}, name="g", route_prefix=None)
    assert missing() == 2  # a worker like these would not do
    rig.deploy(resources={"GPU": 1.0}, num_replicas=7, workers=("w1",))
    assert missing() <= 2


def test_what_waits_for_its_turn_needs_no_workers() -> None:
    rig = Rig(5, gpus=1, trial_s=1.0)
    options = {"num_replicas": 4, "resources": {"GPU": 1}}
    rig.deploy(**options)
    rig.reconcile()
    assert rig.state.missing_workers(rig.now, rig.views) == 0
    rig.start(*rig.states())
    rig.start(*rig.states())
    rig.deploy(version="2", max_surge=1, **options)
    rig.reconcile()
    assert rig.state.missing_workers(rig.now, rig.views) == 0


def test_missing_workers_of_an_empty_cluster() -> None:
    rig = Rig(0)
    rig.deploy()
    rig.reconcile()
    assert rig.state.missing_workers(rig.now, rig.views) == 1


# For real


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with open_site() as site:
        yield site


@pytest.mark.long
def test_load_steps(site: Site) -> None:
    """1 -> 50 -> 1 -> 0 -> 1 clients, by HTTP and handles: nothing fails or flaps."""
    deployment = site.deploy(Sleeper, autoscaling_config=config(2.4, most=8))
    url = site.at(deployment)
    steps = asyncio.run(run_steps(deployment, url, 2.4))
    for step in steps:
        print(step)
        assert step.failures == []
        assert step.turns <= 1
        assert set(step.states) == {"HEALTHY"}
    one, most, *rest = [step.last for step in steps]
    assert (one, rest) == (1, [1, 0, 1])
    # Clients on a busy machine do not always have a request on its way.
    assert most in (4, 5)
    assert len(steps[1].replicas) == most
    assert steps[4].slowest_s < 2  # it waited for its replica


def test_requests_wait_for_the_first_replica(site: Site) -> None:
    auto = {"min_replicas": 0, "initial_replicas": 0}
    deployment = site.deploy(Sleeper, autoscaling_config=auto)
    status = serve.status().deployments[deployment.name]
    assert (status.state, status.replicas) == ("HEALTHY", [])
    assert status.reason == "no replica until a request comes"
    handle = deployment.get_handle()
    calls = [handle.remote(None) for _ in range(5)]
    response = httpx.get(site.at(deployment), timeout=20)
    assert {call.result(timeout_s=20) for call in calls} == {response.text}
    assert serve.status().deployments[deployment.name].running_replicas == 1


def test_policy_of_a_module(site: Site) -> None:
    """The scheduler imports it; what cannot be imported there fails in deploy()."""
    made = {"max_replicas": 4, "upscale_delay_s": 0, "metrics_interval_s": 0.05}
    policy = {**made, "policy": twice}
    deployment = site.deploy(Sleeper, autoscaling_config=policy)
    poll(lambda: serve.status().deployments[deployment.name].running_replicas == 2)
    other = deployment.options(autoscaling_config={**made, "policy": "nowhere:f"})
    with pytest.raises(ValueError, match="policy 'nowhere:f' cannot be imported on"):
        other.deploy()
    bad = {**made, "policy": f"{__name__}:moody"}
    deployment.options(autoscaling_config=bad).deploy()
    poll(lambda: serve.status().deployments[deployment.name].running_replicas == 3)


def test_adapt_adds_a_worker_for_a_replica_without_room() -> None:
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            resources={"slot": 1},
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster) as client,
    ):
        with serve.start(client, http_options={"port": 0}):
            cluster.adapt(minimum=1, maximum=2, interval="200ms")
            auto = {
                "max_replicas": 2,
                "target_ongoing_requests": 1,
                "upscale_delay_s": 0,
                "metrics_interval_s": 0.1,
                "look_back_period_s": 0.1,
            }
            deployment = serve.deployment(
                resources={"slot": 1}, autoscaling_config=auto
            )(Sleeper)
            deployment.deploy()
            handle = deployment.get_handle()

            def two_answer() -> bool:
                calls = [handle.remote(None) for _ in range(20)]
                return len({call.result(timeout_s=20) for call in calls}) == 2

            poll(two_answer, 25)
            assert len(scheduler_workers(client)) == 2
