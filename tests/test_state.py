from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from daskserve.controller.actions import (
    Action,
    Failure,
    ReconfigureReplica,
    ReleaseReplica,
    Settle,
    StartReplica,
    StopReplica,
)
from daskserve.controller.placement import Leaving, WorkerView
from daskserve.controller.records import PYTHON, Spec, last_line
from daskserve.controller.state import ControllerState, default_max_failures
from daskserve.exceptions import EnvironmentMismatchError

TRACEBACK = "Traceback (most recent call last):\n  ...\nValueError: boom\n"

SPEC = Spec(
    name="f",
    version="1",
    code=b"code",
    init=b"init",
    user_config=None,
    route_prefix="/f",
    num_replicas=2,
    max_ongoing_requests=10,
    max_queued_requests=None,
    resources={},
    workers=(),
    request_timeout_s=None,
    deploy_timeout_s=300,
    health_check_period_s=10,
    health_check_timeout_s=30,
    graceful_shutdown_timeout_s=20,
    graceful_shutdown_wait_loop_s=2,
    options=b"options",
)


def view(
    number: int, *, gpus: float = 0, accepting: bool = True, free: int = 4
) -> WorkerView:
    return WorkerView(
        address=f"tcp://10.0.0.{number}:4000",
        host=f"10.0.0.{number}",
        name=f"w{number}",
        nthreads=4,
        free_threads=free,
        resources={"GPU": gpus} if gpus else {},
        accepting=accepting,
    )


def address(number: int) -> str:
    return view(number).address


class Rig:
    """A controller's state with a clock and workers made by hand."""

    def __init__(
        self, workers: int = 3, *, gpus: float = 0, first_id: int = 1, **options: Any
    ) -> None:
        suffixes = count()
        self.state = ControllerState(
            new_suffix=lambda: f"{next(suffixes):06}", first_id=first_id, **options
        )
        self.now = 1000.0
        self.views: dict[str, WorkerView] = {}
        for number in range(1, workers + 1):
            self.join(view(number, gpus=gpus))

    def join(self, worker: WorkerView) -> None:
        self.views[worker.address] = worker

    def deploy(
        self, spec: Spec = SPEC, prev_version: str | None = None, **changes: Any
    ) -> int:
        spec = replace(spec, **changes)
        return self.state.deploy(spec, prev_version=prev_version, now=self.now)

    def reconcile(self) -> list[Action]:
        """Return the actions; a second look must find nothing more to do."""
        actions = self.state.reconcile(self.now, self.views)
        assert self.state.reconcile(self.now, self.views) == []
        return actions

    def wait(self, seconds: float) -> list[Action]:
        self.now += seconds
        return self.reconcile()

    def start(self, *ids: int) -> list[Action]:
        for replica_id in ids:
            self.state.replica_initializing(replica_id, pid=replica_id, now=self.now)
            self.state.replica_started(replica_id, now=self.now)
        return self.reconcile()

    def fail(self, *ids: int, text: str = TRACEBACK) -> list[Action]:
        for replica_id in ids:
            self.state.replica_failed(replica_id, text, now=self.now)
        return self.reconcile()

    def stop(self, *ids: int) -> list[Action]:
        for replica_id in ids:
            self.state.replica_stopped(replica_id)
        return self.reconcile()

    def answer(
        self, *actions: ReconfigureReplica, error: str | None = None
    ) -> list[Action]:
        for action in actions:
            self.answer_only(action, error)
        return self.reconcile()

    def answer_only(self, action: ReconfigureReplica, error: str | None = None) -> None:
        self.state.reconfigured(
            action.replica_id, action.config_generation, error, now=self.now
        )

    def leave(self, *workers: int) -> list[Action]:
        for number in workers:
            del self.views[address(number)]
        return self.reconcile()

    def healthy(self, spec: Spec = SPEC, **changes: Any) -> list[int]:
        """Deploy, start all that is asked for, and return the numbers."""
        ticket = self.deploy(spec, **changes)
        ids = started(self.reconcile())
        done = self.start(*ids)
        assert Settle(ticket) in done
        return ids

    # What is seen from outside

    @property
    def routes(self) -> dict[str, str]:
        routes: dict[str, str] = self.state.routing()["routes"]
        return routes

    def entry(self, name: str = "f") -> dict[str, Any]:
        entry: dict[str, Any] = self.state.routing()["deployments"][name]
        return entry

    def routed(self, name: str = "f") -> list[int]:
        return [replica_id for replica_id, *_ in self.entry(name)["replicas"]]

    def status(self, name: str = "f") -> dict[str, Any]:
        status: dict[str, Any] = self.state.status(now=self.now)[name]
        return status

    def replica(self, replica_id: int, name: str = "f") -> dict[str, Any]:
        replicas = self.status(name)["replicas"]
        found: dict[str, Any]
        (found,) = [r for r in replicas if r["replica_id"] == replica_id]
        return found

    def states(self, name: str = "f") -> dict[int, str]:
        replicas = self.status(name)["replicas"]
        return {r["replica_id"]: r["state"] for r in replicas}


def started(actions: list[Action]) -> list[int]:
    return [a.replica_id for a in actions if isinstance(a, StartReplica)]


def stopped(actions: list[Action]) -> list[int]:
    return [a.replica_id for a in actions if isinstance(a, StopReplica)]


def released(actions: list[Action]) -> list[int]:
    return [a.replica_id for a in actions if isinstance(a, ReleaseReplica)]


def told(actions: list[Action]) -> list[ReconfigureReplica]:
    return [a for a in actions if isinstance(a, ReconfigureReplica)]


def failure(actions: list[Action], ticket: int) -> Failure:
    (error,) = [
        a.error for a in actions if isinstance(a, Settle) and a.ticket == ticket
    ]
    assert error is not None
    assert error.kind == "DeploymentFailedError"
    return error


@pytest.fixture
def rig() -> Rig:
    return Rig()


# Specs


def test_spec_travels() -> None:
    spec = replace(SPEC, resources={"GPU": 1.0}, workers=("w1", "w2"))
    message = spec.to_message()
    assert message["workers"] == ["w1", "w2"]
    assert Spec.from_message(message) == spec


def test_incomplete_spec() -> None:
    with pytest.raises(TypeError, match="version"):
        Spec.from_message({"name": "f"})


def test_code_of_another_python_is_refused() -> None:
    message = {**SPEC.to_message(), "python": "3.99"}
    with pytest.raises(EnvironmentMismatchError, match=f"3.99.*has {PYTHON}"):
        Spec.from_message(message)


def test_same_code() -> None:
    assert SPEC.same_code(replace(SPEC, code=b"pickled again", num_replicas=5))
    for changes in (
        {"version": "2"},
        {"init": b"other"},
        {"resources": {"GPU": 1}},
        {"workers": ("w1",)},
        {"threads": 2},
    ):
        assert not SPEC.same_code(replace(SPEC, **changes))
    assert not replace(SPEC, version=None).same_code(replace(SPEC, version=None))


def test_helpers() -> None:
    assert last_line(TRACEBACK) == "ValueError: boom"
    assert last_line("") == ""
    assert [default_max_failures(n) for n in (1, 2, 100)] == [3, 6, 20]


# The first deploy()


def test_first_deploy(rig: Rig) -> None:
    ticket = rig.deploy()
    assert rig.status()["state"] == "UPDATING"
    assert rig.status()["reason"] == "0 of 2 replicas running: none asked for yet"
    actions = rig.reconcile()
    assert actions == [
        StartReplica(1, "f#000000", address(1), SPEC, 1),
        StartReplica(2, "f#000001", address(2), SPEC, 1),
    ]
    # Requests may come, and wait.
    assert rig.routes == {"/f": "f"}
    assert rig.entry() == {
        "replicas": [],
        "max_ongoing": 10,
        "max_queued": None,
        "max_websockets": 1000,
        "timeout_s": None,
        "hopeless": False,
        "reason": rig.status()["reason"],
    }
    assert rig.status()["reason"] == (
        f"0 of 2 replicas running: f#000000 waiting for a free thread on {address(1)}"
    )
    rig.state.replica_initializing(1, pid=77, now=rig.now)
    assert rig.replica(1)["reason"] == "running the constructor"
    assert rig.start(1) == []
    # Routed as they come, for there is no former version.
    assert rig.routes == {"/f": "f"}
    assert rig.entry()["replicas"] == [[1, "f#000000", address(1), None, None]]
    assert rig.start(2) == [Settle(ticket)]
    assert rig.routed() == [1, 2]
    assert rig.status()["state"] == "HEALTHY"
    assert rig.status()["reason"] == ""
    assert rig.wait(1e6) == []


def test_status(rig: Rig) -> None:
    rig.healthy()
    rig.now += 5
    assert rig.state.status(now=rig.now) == {
        "f": {
            "state": "HEALTHY",
            "reason": "",
            "app": None,
            "version": "1",
            "route_prefix": "/f",
            "target_replicas": 2,
            "running_replicas": 2,
            "replicas": [
                {
                    "replica_id": n,
                    "replica_tag": f"f#00000{n - 1}",
                    "worker": address(n),
                    "host": f"10.0.0.{n}",
                    "pid": n,
                    "state": "RUNNING",
                    "reason": "",
                    "since_s": 5.0,
                }
                for n in (1, 2)
            ],
            "deaths": [],
            "autoscaling": "",
        }
    }


def test_pid_may_come_last(rig: Rig) -> None:
    rig.deploy(num_replicas=1)
    rig.reconcile()
    rig.state.replica_started(1, now=rig.now, pid=99)
    assert rig.replica(1)["pid"] == 99


def test_ids_start_where_told() -> None:
    assert Rig(first_id=41).healthy() == [41, 42]


def test_no_http(rig: Rig) -> None:
    rig.healthy(route_prefix=None)
    assert rig.routes == {}
    assert rig.routed() == [1, 2]


def test_zero_replicas(rig: Rig) -> None:
    ticket = rig.deploy(num_replicas=0)
    assert rig.reconcile() == [Settle(ticket)]
    assert rig.routes == {"/f": "f"}
    assert rig.status()["state"] == "HEALTHY"


def test_many_deployments_in_order(rig: Rig) -> None:
    for name in ("c", "a", "b"):
        rig.healthy(name=name, route_prefix=f"/{name}{name}", num_replicas=1)
    assert list(rig.state.routing()["deployments"]) == ["a", "b", "c"]
    assert list(rig.routes) == ["/aa", "/bb", "/cc"]
    assert list(rig.state.status(now=rig.now)) == ["a", "b", "c"]
    assert rig.state.names() == ["a", "b", "c"]


def test_spec_is_what_is_wanted(rig: Rig) -> None:
    with pytest.raises(KeyError, match="no deployment named 'f'; there are: none"):
        rig.state.spec("f")
    rig.healthy()
    ticket = rig.deploy(version="2")
    assert rig.state.spec("f").version == "2"
    rig.reconcile()
    failure(rig.wait(300), ticket)
    assert rig.state.spec("f").version == "1"
    with pytest.raises(KeyError, match="no deployment named 'g'; there are: f"):
        rig.state.spec("g")


# Refusals


def test_prefix_taken(rig: Rig) -> None:
    rig.deploy()
    with pytest.raises(ValueError, match="'/f' of 'g' is held by deployment 'f'"):
        rig.deploy(name="g")
    rig.deploy(name="g", route_prefix=None)
    rig.deploy(name="h", route_prefix=None)
    assert rig.state.names() == ["f", "g", "h"]


def test_prefix_held_while_it_serves_or_is_wanted(rig: Rig) -> None:
    rig.healthy()
    ticket = rig.deploy(route_prefix="/new", version="2")
    for prefix in ("/f", "/new"):
        with pytest.raises(ValueError, match=f"'{prefix}' of 'g'"):
            rig.deploy(name="g", route_prefix=prefix)
    rig.reconcile()
    failure(rig.wait(300), ticket)
    # The wish failed, so that only the prefix that serves is held.
    rig.deploy(name="g", route_prefix="/new")
    with pytest.raises(ValueError, match="'/f' of 'h'"):
        rig.deploy(name="h")


def test_prefix_is_free_at_once_after_delete(rig: Rig) -> None:
    rig.healthy()
    rig.state.delete("f")
    assert rig.routes == {}
    rig.healthy(name="g")
    assert rig.routes == {"/f": "g"}


def test_prev_version(rig: Rig) -> None:
    with pytest.raises(ValueError, match="prev_version='1', .* no deployment 'f'"):
        rig.deploy(prev_version="1")
    assert rig.state.names() == []
    rig.healthy()
    with pytest.raises(ValueError, match="'2', but deployment 'f' has version '1'"):
        rig.deploy(version="3", prev_version="2")
    assert rig.state.spec("f").version == "1"
    rig.deploy(version="2", prev_version="1")


def test_prev_version_after_a_failure(rig: Rig) -> None:
    rig.healthy()
    rig.deploy(version="2")
    rig.wait(300)
    rig.deploy(version="3", prev_version="1")


# The same version again


def test_nothing_changes(rig: Rig) -> None:
    ids = rig.healthy()
    before = rig.state.routing()
    ticket = rig.deploy(code=b"pickled again")
    assert rig.reconcile() == [Settle(ticket)]
    assert rig.routed() == ids
    assert rig.state.routing() == before


def test_scale_up(rig: Rig) -> None:
    rig.healthy()
    ticket = rig.deploy(num_replicas=4, code=b"pickled again")
    actions = rig.reconcile()
    assert started(actions) == [3, 4]
    assert stopped(actions) == []
    # All replicas of a generation run the same bytes.
    assert {a.spec.code for a in actions if isinstance(a, StartReplica)} == {b"code"}
    # The same code, so that the new ones help as they come.
    assert rig.start(3) == []
    assert rig.routed() == [1, 2, 3]
    assert rig.start(4) == [Settle(ticket)]
    assert rig.routed() == [1, 2, 3, 4]


def test_scale_down_keeps_the_rest_spread(rig: Rig) -> None:
    ids = rig.healthy(num_replicas=5)
    assert [rig.replica(n)["worker"] for n in ids] == [
        address(n) for n in (1, 2, 3, 1, 2)
    ]
    ticket = rig.deploy(num_replicas=2)
    actions = rig.reconcile()
    # The second ones of their workers, and of the rest the newest.
    assert actions == [
        StopReplica(5, address(2), 20, 2),
        StopReplica(4, address(1), 20, 2),
        StopReplica(3, address(3), 20, 2),
        Settle(ticket),
    ]
    assert rig.routed() == [1, 2]
    assert rig.status()["running_replicas"] == 2


def test_scale_down_from_the_busiest_worker(rig: Rig) -> None:
    rig.healthy()
    other = rig.healthy(name="g", route_prefix="/g", num_replicas=2, workers=("w1",))
    assert [rig.replica(n, "g")["worker"] for n in other] == [address(1)] * 2
    rig.deploy(num_replicas=1)
    assert stopped(rig.reconcile()) == [1]


def test_scale_down_stops_first_what_does_not_run() -> None:
    rig = Rig(2, gpus=1)
    spec = replace(SPEC, resources={"GPU": 1}, num_replicas=3)
    rig.deploy(spec)
    assert started(rig.reconcile()) == [1, 2]
    rig.start(2)
    assert rig.states() == {1: "STARTING", 2: "RUNNING", 3: "PENDING"}
    ticket = rig.deploy(spec, num_replicas=1)
    # The pending one just vanishes.
    actions = rig.reconcile()
    assert stopped(actions) == [1]
    assert Settle(ticket) in actions
    assert rig.states() == {1: "STOPPING", 2: "RUNNING"}
    assert rig.stop(1) == [ReleaseReplica(1)]


def test_light_options_take_effect_when_reached(rig: Rig) -> None:
    ids = rig.healthy()
    ticket = rig.deploy(
        max_ongoing_requests=3,
        max_queued_requests=4,
        request_timeout_s=5.0,
        graceful_shutdown_timeout_s=1.0,
    )
    assert rig.entry()["max_ongoing"] == 10
    assert rig.reconcile() == [Settle(ticket)]
    entry = rig.entry()
    assert (entry["max_ongoing"], entry["max_queued"], entry["timeout_s"]) == (3, 4, 5)
    rig.state.delete("f")
    assert rig.reconcile() == [StopReplica(n, address(n), 1.0, 2) for n in ids]


def test_route_moves(rig: Rig) -> None:
    ids = rig.healthy()
    ticket = rig.deploy(route_prefix="/g")
    assert rig.reconcile() == [Settle(ticket)]
    assert rig.routes == {"/g": "f"}
    assert rig.routed() == ids


def test_route_moves_before_anything_runs(rig: Rig) -> None:
    rig.deploy()
    rig.reconcile()
    rig.start(1)
    assert rig.routes == {"/f": "f"}
    rig.deploy(route_prefix="/g")
    assert rig.routes == {"/g": "f"}


# user_config


def test_reconfigure_in_place(rig: Rig) -> None:
    ids = rig.healthy(user_config=b"1")
    tags = [rig.replica(n)["replica_tag"] for n in ids]
    ticket = rig.deploy(user_config=b"2")
    actions = rig.reconcile()
    assert actions == [ReconfigureReplica(n, address(n), b"2", 2) for n in ids]
    assert rig.routed() == ids
    assert rig.replica(1)["reason"] == "running reconfigure()"
    first, second = told(actions)
    assert rig.answer(first) == []
    assert rig.replica(1)["reason"] == ""
    assert rig.status()["reason"].startswith("1 of 2 replicas running: f#000001 run")
    assert rig.answer(second) == [Settle(ticket)]
    assert [rig.replica(n)["replica_tag"] for n in ids] == tags
    assert rig.routed() == ids


def test_new_replicas_start_with_the_new_configuration(rig: Rig) -> None:
    rig.healthy(num_replicas=1, user_config=b"1")
    ticket = rig.deploy(user_config=b"2", num_replicas=2)
    actions = rig.reconcile()
    (start,) = [a for a in actions if isinstance(a, StartReplica)]
    assert (start.config_generation, start.spec.user_config) == (2, b"2")
    assert rig.answer(*told(actions)) == []
    assert rig.start(2) == [Settle(ticket)]


def test_reconfigure_what_was_still_starting(rig: Rig) -> None:
    first = rig.deploy(user_config=b"1")
    rig.reconcile()
    ticket = rig.deploy(user_config=b"2")
    assert (
        "superseded by a newer deploy() of 'f'" in failure(rig.reconcile(), first).text
    )
    rig.state.replica_started(1, now=rig.now)
    assert "f#000000 is to be reconfigured" in rig.status()["reason"]
    one, two = told(rig.reconcile() + rig.start(2))
    assert [one.config_generation, two.config_generation] == [2, 2]
    rig.answer(one)
    assert rig.answer(two) == [Settle(ticket)]


def test_pending_replica_starts_with_the_latest_options() -> None:
    rig = Rig(1, gpus=1)
    spec = replace(SPEC, resources={"GPU": 1}, user_config=b"1")
    rig.deploy(spec)
    assert started(rig.reconcile()) == [1]
    ticket = rig.deploy(spec, user_config=b"2", request_timeout_s=7.0)
    rig.join(view(2, gpus=1))
    (start,) = [a for a in rig.reconcile() if isinstance(a, StartReplica)]
    assert (start.replica_id, start.config_generation) == (2, 2)
    assert (start.spec.user_config, start.spec.request_timeout_s) == (b"2", 7.0)
    # Only the one that was sent before has to be told.
    (action,) = told(rig.start(1, 2))
    assert action.replica_id == 1
    assert rig.answer(action) == [Settle(ticket)]


def test_failing_reconfigure_puts_the_former_one_back(rig: Rig) -> None:
    ids = rig.healthy(user_config=b"1", num_replicas=3)
    ticket = rig.deploy(user_config=b"2", num_replicas=4, max_ongoing_requests=99)
    actions = rig.reconcile()
    assert started(actions) == [4]
    good, bad, late = told(actions)
    rig.answer(good)
    actions = rig.answer(bad, error=TRACEBACK)
    error = failure(actions, ticket)
    assert error.text == (
        "deployment 'f' failed: reconfigure() raised ValueError: boom; its former "
        f"options are back in force\n\n{TRACEBACK}"
    )
    back = [ReconfigureReplica(n, address(n), b"1", 1) for n in ids]
    assert told(actions) == back
    assert stopped(actions) == [4]
    # The same replicas serve on, and the traceback is for the status only.
    assert rig.routed() == ids
    assert rig.entry()["max_ongoing"] == 10
    assert rig.status()["state"] == "DEPLOY_FAILED"
    assert not rig.entry()["hopeless"]
    assert rig.status()["reason"] == error.text
    assert rig.state.spec("f").user_config == b"1"
    # News about the configuration given up comes late.
    assert rig.answer(late, error=TRACEBACK) == []
    for action in back:
        assert rig.answer(action) == []
    assert rig.wait(1000) == [ReleaseReplica(4)]
    assert rig.wait(1000) == []


def test_two_replicas_fail_to_reconfigure(rig: Rig) -> None:
    ids = rig.healthy(user_config=b"1")
    ticket = rig.deploy(user_config=b"2")
    one, two = told(rig.reconcile())
    rig.answer_only(one, TRACEBACK)
    actions = rig.answer(two, error=TRACEBACK)
    failure(actions, ticket)
    assert [a.replica_id for a in told(actions)] == ids


def test_another_try_after_a_failed_reconfigure(rig: Rig) -> None:
    ids = rig.healthy(user_config=b"1", num_replicas=1)
    rig.deploy(user_config=b"2", num_replicas=1)
    (back,) = told(rig.answer(*told(rig.reconcile()), error=TRACEBACK))
    ticket = rig.deploy(user_config=b"2", num_replicas=1)
    (action,) = told(rig.reconcile())
    assert action.config_generation == 3
    # Stale, for the replica has been told something else since.
    assert rig.answer(back) == []
    assert rig.answer(action) == [Settle(ticket)]
    assert rig.routed() == ids


def test_former_configuration_cannot_be_put_back(rig: Rig) -> None:
    rig.healthy(user_config=b"1", num_replicas=1)
    rig.deploy(user_config=b"2", num_replicas=1)
    (back,) = told(rig.answer(*told(rig.reconcile()), error=TRACEBACK))
    actions = rig.answer(back, error=TRACEBACK)
    assert stopped(actions) == [1]
    (start,) = [a for a in actions if isinstance(a, StartReplica)]
    assert start.spec.user_config == b"1"
    assert rig.status()["deaths"][0]["reason"] == "ValueError: boom"
    rig.start(2)
    assert rig.routed() == [2]
    # Drained by now, and still listed: its answers do not count.
    assert rig.answer(back) == []


def test_putting_the_former_configuration_back_hangs(rig: Rig) -> None:
    rig.healthy(user_config=b"1", num_replicas=1)
    rig.deploy(user_config=b"2", num_replicas=1)
    rig.answer(*told(rig.reconcile()), error=TRACEBACK)
    assert rig.wait(299) == []
    actions = rig.wait(1)
    assert (stopped(actions), started(actions)) == ([1], [2])
    text = f"reconfigure() still running after 300 s on {address(1)}"
    assert rig.status()["deaths"][0]["reason"] == text


def test_failing_reconfigure_with_nothing_before(rig: Rig) -> None:
    rig.deploy(user_config=b"1")
    rig.reconcile()
    rig.start(1)
    ticket = rig.deploy(user_config=b"2")
    (action,) = told(rig.reconcile())
    actions = rig.answer(action, error=TRACEBACK)
    assert "back in force" not in failure(actions, ticket).text
    assert stopped(actions) == [1, 2]
    assert rig.routed() == []


def test_error_of_a_configuration_that_is_superseded(rig: Rig) -> None:
    ids = rig.healthy(user_config=b"1", num_replicas=1)
    rig.deploy(user_config=b"2", num_replicas=1)
    (old,) = told(rig.reconcile())
    ticket = rig.deploy(user_config=b"3", num_replicas=1)
    (action,) = told(rig.answer(old, error=TRACEBACK))
    assert action.config_generation == 3
    assert rig.answer(action) == [Settle(ticket)]
    assert rig.routed() == ids


def test_error_of_a_configuration_of_old_code(rig: Rig) -> None:
    rig.healthy(user_config=b"1", num_replicas=1)
    rig.deploy(user_config=b"2", num_replicas=1)
    (old,) = told(rig.reconcile())
    rig.deploy(version="2", num_replicas=1)
    # The old code serves on meanwhile, as it did before.
    actions = rig.answer(old, error=TRACEBACK)
    assert [a.user_config for a in told(actions)] == [b"1"]
    assert (stopped(actions), started(actions)) == ([], [2])


def test_error_of_a_configuration_of_code_that_is_superseded(rig: Rig) -> None:
    rig.deploy(user_config=b"1")
    rig.reconcile()
    rig.start(1)
    rig.deploy(user_config=b"2")
    (old,) = told(rig.reconcile())
    rig.deploy(version="2")
    actions = rig.answer(old, error=TRACEBACK)
    assert (stopped(actions), started(actions)) == ([1, 2], [3, 4])
    assert rig.status()["state"] == "UPDATING"


def test_reconfigure_back_to_what_serves(rig: Rig) -> None:
    rig.healthy(user_config=b"1", num_replicas=1)
    superseded = rig.deploy(user_config=b"2", num_replicas=1)
    rig.reconcile()
    ticket = rig.deploy(user_config=b"1", num_replicas=1)
    actions = rig.reconcile()
    failure(actions, superseded)
    (action,) = told(actions)
    assert (action.user_config, action.config_generation) == (b"1", 1)
    # It fails there too: what it has is unknown, so it is given that again ...
    actions = rig.answer(action, error=TRACEBACK)
    failure(actions, ticket)
    assert told(actions) == [action]
    # ... and when that works, the deployment serves as before.
    rig.answer(action)
    assert rig.routed() == [1]


def test_lost_while_reconfiguring(rig: Rig) -> None:
    rig.healthy(user_config=b"1", num_replicas=1)
    ticket = rig.deploy(user_config=b"2", num_replicas=1)
    (action,) = told(rig.reconcile())
    actions = rig.leave(1)
    (start,) = [a for a in actions if isinstance(a, StartReplica)]
    assert start.spec.user_config == b"2"
    assert rig.answer(action, error=TRACEBACK) == []
    assert rig.start(2) == [Settle(ticket)]


# New code


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"version": "2"}),
        ({}, {"init": b"other"}),
        ({}, {"workers": ("w1", "w2")}),
        ({"version": None}, {}),
    ],
)
def test_cut_over(
    rig: Rig, before: Mapping[str, Any], after: Mapping[str, Any]
) -> None:
    spec = replace(SPEC, **before)
    rig.healthy(spec)
    ticket = rig.deploy(spec, **after, route_prefix="/new")
    actions = rig.reconcile()
    assert (started(actions), stopped(actions)) == ([3, 4], [])
    assert rig.start(3) == []
    assert rig.routed() == [1, 2]
    assert rig.routes == {"/f": "f"}
    rig.state.replica_started(4, now=rig.now)
    assert rig.routed() == [1, 2]
    assert rig.reconcile() == [
        StopReplica(1, address(1), 20, 2),
        StopReplica(2, address(2), 20, 2),
        Settle(ticket),
    ]
    assert rig.routed() == [3, 4]
    assert rig.routes == {"/new": "f"}
    assert rig.states() == {1: "STOPPING", 2: "STOPPING", 3: "RUNNING", 4: "RUNNING"}
    assert rig.stop(1, 2) == [ReleaseReplica(1), ReleaseReplica(2)]
    # Twice, and for one that runs.
    assert rig.stop(1, 3) == []


def test_cut_over_of_a_single_replica(rig: Rig) -> None:
    rig.healthy(num_replicas=1)
    ticket = rig.deploy(version="2", num_replicas=1)
    assert started(rig.reconcile()) == [2]
    assert rig.routed() == [1]
    assert stopped(rig.start(2)) == [1]
    assert rig.routed() == [2]
    assert rig.deploy(version="2", num_replicas=1) == ticket + 1


def test_old_replicas_are_replaced_during_an_update(rig: Rig) -> None:
    rig.healthy()
    rig.deploy(version="2")
    rig.reconcile()
    rig.start(3)
    rig.state.replica_lost(1, "gone", now=rig.now)
    actions = rig.reconcile()
    assert (released(actions), started(actions)) == ([1], [5])
    assert rig.routed() == [2]
    assert started(rig.fail(5)) == []
    assert started(rig.wait(0.2)) == [6]
    rig.start(6)
    assert rig.routed() == [2, 6]
    assert stopped(rig.start(4)) == [2, 6]
    assert rig.routed() == [3, 4]


def test_new_replicas_serve_when_no_old_one_is_left(rig: Rig) -> None:
    rig.healthy()
    ticket = rig.deploy(version="2")
    rig.reconcile()
    for replica_id in (1, 2):
        rig.state.replica_lost(replica_id, "gone", now=rig.now)
    assert started(rig.reconcile()) == [5, 6]
    rig.state.replica_started(3, now=rig.now)
    assert rig.routed() == [3]
    # From now on no old one is started again.
    assert stopped(rig.reconcile()) == [5, 6]
    assert rig.routed() == [3]
    assert rig.fail(5, 6) == [ReleaseReplica(5), ReleaseReplica(6)]
    assert rig.start(4) == [Settle(ticket)]
    assert rig.routed() == [3, 4]


def test_old_replica_fails_when_it_is_wanted_no_more(rig: Rig) -> None:
    rig.healthy()
    rig.deploy(version="2")
    rig.reconcile()
    for replica_id in (1, 2):
        rig.state.replica_lost(replica_id, "gone", now=rig.now)
    rig.reconcile()
    rig.start(3)
    rig.deploy(version="2", num_replicas=3)
    assert started(rig.reconcile()) == [7]
    # Old ones stay away under the newer goal for the same code, too.
    assert rig.states() == {
        3: "RUNNING",
        4: "STARTING",
        5: "STOPPING",
        6: "STOPPING",
        7: "STARTING",
    }


def test_back_to_the_version_that_serves(rig: Rig) -> None:
    rig.healthy()
    superseded = rig.deploy(version="2")
    rig.reconcile()
    rig.start(3)
    ticket = rig.deploy()
    actions = rig.reconcile()
    assert Settle(ticket) in actions
    assert "superseded" in failure(actions, superseded).text
    assert stopped(actions) == [3, 4]
    assert rig.routed() == [1, 2]


def test_newer_code_supersedes_what_is_on_its_way(rig: Rig) -> None:
    superseded = rig.deploy()
    rig.reconcile()
    ticket = rig.deploy(version="2")
    # Fails before it was looked at: nobody wants it any more.
    rig.state.replica_failed(1, TRACEBACK, now=rig.now)
    actions = rig.reconcile()
    failure(actions, superseded)
    assert (stopped(actions), started(actions)) == ([2], [3, 4])
    assert Settle(ticket) in rig.start(3, 4)


# New code when there is no room


def gpu_rig(gpus: int) -> Rig:
    rig = Rig(gpus, gpus=1)
    rig.healthy(resources={"GPU": 1})
    return rig


def test_rolling_update() -> None:
    rig = gpu_rig(3)
    ticket = rig.deploy(version="2", resources={"GPU": 1})
    actions = rig.reconcile()
    assert (started(actions), stopped(actions)) == ([3], [])
    assert rig.replica(4)["reason"] == (
        "waits for a worker: all GPU in use: 3 of 3 held by replicas of f; its old "
        "replicas stop only after new ones run: make room for one more, set "
        "max_unavailable=1, or delete() it first"
    )
    assert rig.routed() == [1, 2]
    # One new one runs, so one old one goes, and both kinds serve.
    assert stopped(rig.start(3)) == [2]
    assert rig.routed() == [1, 3]
    actions = rig.stop(2)
    assert (released(actions), started(actions)) == ([2], [4])
    actions = rig.start(4)
    assert (stopped(actions), actions[-1]) == ([1], Settle(ticket))
    assert rig.routed() == [3, 4]


def test_old_replicas_go_one_for_one() -> None:
    rig = Rig(4, gpus=1)
    spec = replace(SPEC, resources={"GPU": 1}, num_replicas=3)
    rig.healthy(spec)
    rig.deploy(spec, version="2")
    assert started(rig.reconcile()) == [4]
    assert stopped(rig.start(4)) == [3]
    assert started(rig.stop(3)) == [5]
    # A rolled one that is lost is not replaced: the room is for the new code.
    rig.state.replica_lost(2, "gone", now=rig.now)
    assert started(rig.reconcile()) == [6]
    assert rig.routed() == [1, 4]
    assert stopped(rig.start(5)) == []
    assert stopped(rig.start(6)) == [1]


def test_no_more_old_replicas_go_than_new_ones_wait() -> None:
    rig = Rig(5, gpus=1)
    spec = replace(SPEC, resources={"GPU": 1}, num_replicas=3)
    rig.healthy(spec)
    rig.deploy(spec, version="2")
    assert started(rig.reconcile()) == [4, 5]
    for replica_id in (4, 5):
        rig.state.replica_started(replica_id, now=rig.now)
    assert stopped(rig.reconcile()) == [3]
    assert rig.routed() == [1, 2, 4, 5]
    # That one's room is on its way already.
    rig.state.replica_lost(4, "gone", now=rig.now)
    assert (rig.wait(1)[0], rig.routed()) == (ReleaseReplica(4), [1, 2, 5])


def test_last_old_replica_stays_unless_it_makes_the_update_complete() -> None:
    rig = gpu_rig(3)
    ticket = rig.deploy(version="2", resources={"GPU": 1}, num_replicas=4)
    assert started(rig.reconcile()) == [3]
    assert stopped(rig.start(3)) == [2]
    assert started(rig.stop(2)) == [4]
    assert rig.start(4) == []
    assert rig.routed() == [1, 3, 4]
    # Never more than three can run: the old version gets its room back.
    actions = rig.wait(300)
    failure(actions, ticket)
    assert stopped(actions) == [3, 4]
    assert rig.routed() == [1]
    actions = rig.stop(3)
    assert started(actions) == [7]
    rig.start(7)
    assert rig.routed() == [1, 7]


def test_last_old_replica_gives_way_to_the_last_new_one() -> None:
    rig = gpu_rig(3)
    ticket = rig.deploy(version="2", resources={"GPU": 1}, num_replicas=3)
    rig.reconcile()
    assert stopped(rig.start(3)) == [2]
    rig.stop(2)
    assert stopped(rig.start(4)) == [1]
    assert started(rig.stop(1)) == [5]
    assert Settle(ticket) in rig.start(5)


def test_old_replicas_that_only_start_give_way_first() -> None:
    rig = Rig(4, gpus=1)
    spec = replace(SPEC, resources={"GPU": 1}, num_replicas=3)
    rig.healthy(spec)
    ticket = rig.deploy(spec, version="2")
    assert started(rig.reconcile()) == [4]
    for replica_id in (1, 2):
        rig.state.replica_lost(replica_id, "gone", now=rig.now)
    # New ones come first: both GPUs go to them, and the old code waits.
    assert started(rig.reconcile()) == [5, 6]
    # While one of them waits to be tried again, an old one takes its place.
    assert started(rig.fail(5)) == [7]
    assert rig.wait(0.2) == []
    assert stopped(rig.start(6)) == [7]
    assert rig.routed() == [3, 6]
    assert rig.states() == {
        3: "RUNNING",
        4: "STARTING",
        6: "RUNNING",
        7: "STOPPING",
        9: "PENDING",
    }
    assert started(rig.stop(7)) == [9]
    assert Settle(ticket) in rig.start(4, 9)


@pytest.mark.parametrize(("number", "options"), [(2, {"max_unavailable": 0}), (1, {})])
def test_no_room_for_even_one_new_replica(number: int, options: dict[str, Any]) -> None:
    rig = Rig(number, gpus=1)
    spec = replace(SPEC, resources={"GPU": 1}, num_replicas=number)
    rig.healthy(spec)
    running = list(range(1, number + 1))
    ticket = rig.deploy(spec, version="2", **options)
    assert rig.reconcile() == []
    assert rig.routed() == running
    actions = rig.wait(300)
    text = failure(actions, ticket).text
    assert text.startswith(
        f"deployment 'f' failed: 0 of {number} replicas ready after 300 s; its former "
        f"version '1' goes on serving\n\nf#00000{number}: waits for a worker: all GPU "
        f"in use: {number} of {number} held by replicas of f; its old replicas stop "
        "only after new ones run: make room for one more, set max_unavailable=1, or"
    )
    assert actions == [Settle(ticket, Failure("DeploymentFailedError", text))]
    assert rig.routed() == running


def test_without_room_replicas_are_replaced_one_by_one() -> None:
    rig = Rig(3, gpus=1)
    spec = replace(SPEC, resources={"GPU": 1}, num_replicas=3)
    rig.healthy(spec)
    ticket = rig.deploy(spec, version="2")
    assert stopped(rig.reconcile()) == [3]
    assert rig.routed() == [1, 2]
    assert rig.replica(4)["reason"] == (
        "waits for a worker: all GPU in use: 3 of 3 held by replicas of f; its old "
        "replicas give way where that makes room"
    )
    assert rig.wait(1) == []  # not another one meanwhile
    assert started(rig.stop(3)) == [4]
    assert rig.wait(1) == []
    assert stopped(rig.start(4)) == [2]
    assert rig.routed() == [1, 4]
    assert started(rig.stop(2)) == [5]
    assert stopped(rig.start(5)) == [1]
    assert rig.routed() == [4, 5]
    assert started(rig.stop(1)) == [6]
    assert Settle(ticket) in rig.start(6)
    assert rig.routed() == [4, 5, 6]


@pytest.mark.parametrize(("may", "at_once"), [(None, []), (2, [2, 1]), (1, [])])
def test_none_gives_way_where_too_few_may(may: int | None, at_once: list[int]) -> None:
    """A new replica takes the room of two old ones."""
    rig = Rig(1, gpus=3)
    rig.healthy(replace(SPEC, resources={"GPU": 1}, num_replicas=3))
    rig.deploy(version="2", resources={"GPU": 2}, num_replicas=1, max_unavailable=may)
    assert stopped(rig.reconcile()) == [n + 1 for n in at_once]
    rig.wait(10)
    assert len(rig.routed()) == 3 - len(at_once)


def test_what_gave_way_makes_room_for_no_other_deployment() -> None:
    rig = Rig(2, gpus=1)
    other = replace(SPEC, name="a", route_prefix=None, resources={"GPU": 1})
    rig.healthy(resources={"GPU": 1})
    rig.deploy(other, num_replicas=1)
    assert rig.reconcile() == []
    rig.deploy(version="2", resources={"GPU": 1})
    [old] = stopped(rig.reconcile())
    [new] = started(rig.stop(old))
    assert new in rig.states("f")


def test_old_replicas_come_back_when_the_new_code_fails_without_room() -> None:
    rig = gpu_rig(2)
    ticket = rig.deploy(version="2", resources={"GPU": 1})
    assert stopped(rig.reconcile()) == [2]
    actions = rig.stop(2)
    while not any(isinstance(action, Settle) for action in actions):
        assert rig.routed() == [1]
        [new] = started(actions) or started(rig.wait(6))
        actions = rig.fail(new)
    failure(actions, ticket)
    [back] = started(actions)
    rig.start(back)
    assert rig.routed() == [1, back]
    assert rig.status()["state"] == "DEPLOY_FAILED"


@pytest.mark.parametrize(
    ("number", "given", "at_once"),
    [(1, 1, [1]), (1, "99%", []), (4, 2, [4, 3]), (4, "50%", [4, 3]), (4, "24%", [])],
)
def test_how_many_may_be_missing(
    number: int, given: int | str, at_once: list[int]
) -> None:
    rig = Rig(number, gpus=1)
    spec = replace(SPEC, resources={"GPU": 1}, num_replicas=number)
    rig.healthy(spec)
    rig.deploy(spec, version="2", max_unavailable=given)
    assert stopped(rig.reconcile()) == at_once
    assert rig.wait(1) == []


@pytest.mark.parametrize(
    ("number", "surge", "unavailable", "most", "least"),
    [
        (4, 1, None, 5, 4),
        (4, "30%", 0, 6, 4),
        (4, "30%", 1, 6, 3),
        (3, 0, None, 3, 2),
        (3, "0%", 2, 3, 1),
        (1, 0, None, 1, 0),
        (1, 1, None, 2, 1),
        (4, "100%", None, 8, 4),
    ],
)
def test_how_many_more_there_may_be(
    number: int, surge: int | str, unavailable: int | None, most: int, least: int
) -> None:
    """Within these limits, and up to them, until all are new."""
    rig = Rig(9)
    old = rig.healthy(num_replicas=number)
    options = {"max_surge": surge, "max_unavailable": unavailable}
    ticket = rig.deploy(version="2", num_replicas=number, **options)
    seen, serving = [], []
    actions = rig.reconcile()
    for _ in range(3 * number + 3):
        seen.append(sum(bool(r["worker"]) for r in rig.status()["replicas"]))
        serving.append(len(rig.routed()))
        if Settle(ticket) in actions:
            break
        held = [r for r in rig.status()["replicas"] if r["state"] == "PENDING"]
        assert all("max_surge" in r["reason"] for r in held)
        starting = [n for n, state in rig.states().items() if state == "STARTING"]
        for number_ in stopped(actions):
            rig.state.replica_stopped(number_)
        actions = rig.start(*starting[:1]) if starting else rig.wait(0.1)
    assert Settle(ticket) in actions
    assert max(seen) == most
    assert min(serving) == least
    assert not set(rig.routed()) & set(old)


@pytest.mark.parametrize(
    ("old", "new", "options", "changes"),
    [
        (4, 2, {"max_surge": 1}, {}),
        (4, 1, {"max_surge": "25%"}, {}),
        (3, 3, {"max_surge": 0, "max_unavailable": "25%"}, {}),
        (3, 3, {"max_surge": 1}, {"workers": ("w4", "w5", "w6")}),
        (1, 1, {"max_surge": 0}, {"workers": ("w4",)}),
    ],
    ids=["fewer", "much fewer", "nothing by rounding", "elsewhere", "one elsewhere"],
)
def test_an_update_with_max_surge_ends(
    old: int, new: int, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    rig = Rig(6)
    rig.healthy(num_replicas=old, workers=("w1", "w2", "w3"))
    ticket = rig.deploy(version="2", num_replicas=new, **options, **changes)
    assert settles(rig, ticket)
    assert len(rig.routed()) == new


@pytest.mark.parametrize("surge", [0, 1])
def test_an_update_with_max_surge_while_an_old_one_leaves(surge: int) -> None:
    rig = Rig(4)
    rig.healthy(num_replicas=4)
    why = Leaving(reason="is retired", since=rig.now, deadline=rig.now + 300)
    rig.join(replace(view(1), leaving=why))
    ticket = rig.deploy(version="2", num_replicas=4, max_surge=surge)
    assert settles(rig, ticket)


def test_old_replicas_that_do_not_run_hold_up_no_update() -> None:
    rig = Rig(2)
    rig.healthy(num_replicas=1)
    rig.state.replica_lost(1, "it ended", now=rig.now)
    rig.reconcile()
    ticket = rig.deploy(version="2", num_replicas=1, max_surge=0)
    assert settles(rig, ticket)


def settles(rig: Rig, ticket: int) -> bool:
    """Let what is asked for happen, until a deploy is done or 60 s are over."""
    actions = rig.reconcile()
    for _ in range(600):
        if Settle(ticket) in actions:
            return True
        starting = [n for n, state in rig.states().items() if state == "STARTING"]
        for number in stopped(actions):
            rig.state.replica_stopped(number)
        actions = rig.start(*starting[:1]) if starting else rig.wait(0.1)
    return False


def test_max_surge_counts_what_takes_the_place_of_a_lost_one() -> None:
    rig = Rig(9)
    rig.healthy(num_replicas=4)
    rig.deploy(version="2", num_replicas=4, max_surge=1)
    assert started(rig.reconcile()) == [5]
    rig.state.replica_lost(1, "it ended", now=rig.now)
    assert len(started(rig.wait(1))) == 1
    assert sum(bool(r["worker"]) for r in rig.status()["replicas"]) == 5


def test_old_replicas_stay_where_their_room_would_not_help() -> None:
    rig = gpu_rig(2)
    rig.join(view(3, gpus=2))
    # Two GPUs at once are on that one only, and it is full with the first.
    rig.deploy(version="2", resources={"GPU": 2})
    assert started(rig.reconcile()) == [3]
    assert rig.start(3) == []
    assert rig.routed() == [1, 2]


def test_room_held_by_others_does_not_roll() -> None:
    rig = gpu_rig(3)
    spec = replace(SPEC, name="g", route_prefix=None, resources={"GPU": 1})
    rig.healthy(spec, num_replicas=1)
    rig.deploy(spec, version="2", workers=("w1", "w2"))
    assert rig.reconcile() == []
    reason = rig.replica(4, "g")["reason"]
    assert reason == "waits for a worker: all GPU in use: 2 of 2 held by replicas of f"


# Constructors that fail


def test_failed_constructor_is_tried_elsewhere(rig: Rig) -> None:
    ticket = rig.deploy(num_replicas=1)
    rig.reconcile()
    assert rig.fail(1) == [ReleaseReplica(1)]
    assert rig.replica(2)["reason"] == (
        "waits 0.1 s for another try after ValueError: boom"
    )
    assert rig.status()["deaths"] == [
        {
            "replica_tag": "f#000000",
            "worker": address(1),
            "reason": "ValueError: boom",
            "ago_s": 0.0,
        }
    ]
    assert rig.wait(0.05) == []
    (start,) = rig.wait(0.06)
    assert isinstance(start, StartReplica)
    assert (start.replica_id, start.worker) == (2, address(2))
    assert rig.start(2) == [Settle(ticket)]


def test_deploy_fails_after_some_tries(rig: Rig) -> None:
    ticket = rig.deploy(num_replicas=1)
    rig.reconcile()
    rig.fail(1)
    rig.wait(0.1)
    rig.fail(2)
    assert started(rig.wait(0.1)) == []
    assert started(rig.wait(0.1)) == [3]
    actions = rig.fail(3)
    error = failure(actions, ticket)
    assert error.text == (
        "deployment 'f' failed: 3 of 3 tries to start a replica failed, the last "
        f"on {address(3)} with ValueError: boom\n\n{TRACEBACK}"
    )
    # Nothing more happens, but requests are answered by what the table says.
    assert rig.wait(1e6) == []
    assert rig.routes == {"/f": "f"}
    assert rig.status()["state"] == "DEPLOY_FAILED"
    assert rig.routed() == []
    assert rig.status()["target_replicas"] == 1
    assert rig.state.spec("f").version == "1"


def test_failed_deploy_stops_what_runs(rig: Rig) -> None:
    ticket = rig.deploy()
    rig.reconcile()
    rig.start(1)
    rig.state.replica_failed(2, TRACEBACK, now=rig.now)
    for _ in range(5):
        (replica_id,) = started(rig.wait(5))
        rig.state.replica_failed(replica_id, TRACEBACK, now=rig.now)
    # Before anything is stopped it is not routed any more.
    assert rig.routed() == []
    actions = rig.reconcile()
    assert stopped(actions) == [1]
    failure(actions, ticket)


def test_same_version_again_after_a_failure(rig: Rig) -> None:
    rig.deploy(num_replicas=1)
    for replica_id in (1, 2, 3):
        rig.wait(5)
        rig.fail(replica_id)
    ticket = rig.deploy(num_replicas=1, code=b"mended")
    assert rig.status()["state"] == "UPDATING"
    # The route stays where it was, and requests wait again.
    assert rig.routes == {"/f": "f"}
    (start,) = rig.reconcile()
    assert isinstance(start, StartReplica)
    assert start.spec.code == b"mended"
    assert rig.start(4) == [Settle(ticket)]


def test_former_version_serves_on_after_a_failure(rig: Rig) -> None:
    rig.healthy()
    ticket = rig.deploy(version="2", num_replicas=1, route_prefix="/2")
    rig.reconcile()
    for replica_id in (3, 4, 5):
        actions = rig.fail(replica_id)
        rig.wait(5)
    assert "its former version '1' goes on serving" in failure(actions, ticket).text
    assert rig.routed() == [1, 2]
    assert rig.routes == {"/f": "f"}
    assert rig.status()["version"] == "1"
    assert rig.status()["state"] == "DEPLOY_FAILED"
    # It is kept up, still.
    assert started(rig.leave(1)) == [6]
    rig.start(6)
    assert rig.routed() == [2, 6]
    assert rig.status()["state"] == "DEPLOY_FAILED"
    assert rig.deploy(num_replicas=2) and rig.reconcile()
    assert rig.status()["state"] == "HEALTHY"


def test_back_off_doubles_up_to_five_seconds() -> None:
    rig = Rig()
    rig.state = ControllerState(new_suffix=lambda: "x", max_failures=lambda n: 100)
    rig.deploy(num_replicas=1)
    rig.reconcile()
    assert delays(rig, 9) == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5]


def delays(rig: Rig, times: int) -> list[float]:
    """Let constructors fail again and again; return how long was waited."""
    waited = []
    for _ in range(times):
        (replica_id,) = [n for n, state in rig.states().items() if state == "STARTING"]
        rig.fail(replica_id)
        (pending,) = [r for r in rig.status()["replicas"] if r["state"] == "PENDING"]
        waited.append(float(pending["reason"].split()[1]))
        assert rig.wait(waited[-1] - 0.001) == []
        assert started(rig.wait(0.002)) == [pending["replica_id"]]
    return waited


def test_surplus_replica_that_fails_does_not_count(rig: Rig) -> None:
    rig.deploy(num_replicas=1)
    rig.reconcile()
    ticket = rig.deploy(num_replicas=0)
    rig.state.replica_failed(1, TRACEBACK, now=rig.now)
    assert Settle(ticket) in rig.reconcile()
    assert rig.states() == {}


@pytest.mark.parametrize("heard", [True, False])
def test_constructor_that_takes_its_worker_down(rig: Rig, heard: bool) -> None:
    """It is not tried on the next one, whether or not it said that it began."""
    ticket = rig.deploy(num_replicas=1)
    rig.wait(0.1)
    if heard:
        rig.state.replica_initializing(1, pid=1, now=rig.now)
    actions = rig.leave(1)
    text = failure(actions, ticket).text
    assert "worker tcp://10.0.0.1:4000 left" in text
    assert "not tried elsewhere" in text
    assert started(actions) == started(rig.wait(60)) == []
    assert rig.status()["state"] == "DEPLOY_FAILED"


def test_update_that_takes_a_worker_down(rig: Rig) -> None:
    """The former version goes on, and has what was there elsewhere."""
    rig.healthy(num_replicas=3)
    ticket = rig.deploy(version="2", code=b"2", num_replicas=3)
    (first, *_) = started(rig.reconcile())
    rig.state.replica_initializing(first, pid=1, now=rig.now)
    worker = next(
        r["worker"] for r in rig.status()["replicas"] if r["replica_id"] == first
    )
    rig.now += 10
    actions = rig.leave(int(worker.rpartition(".")[2].partition(":")[0]))
    assert "former version '1' goes on" in failure(actions, ticket).text
    assert len(started(actions)) == 1
    assert rig.state.routing()["deployments"]["f"]["replicas"]


def test_workers_loss_counts_once(rig: Rig) -> None:
    rig = Rig(1)
    rig.healthy(num_replicas=6, workers=("w1",))
    rig.now += 1000
    rig.state.worker_lost(address(1), "worker restarts", now=rig.now)
    for number in started(rig.reconcile()):
        rig.state.replica_initializing(number, pid=1, now=rig.now)
    rig.state.worker_lost(address(1), "worker restarts", now=rig.now)
    actions = rig.reconcile()
    assert released(actions) == [7, 8, 9, 10, 11, 12]
    # One of them waits before it tries again.
    assert len(started(actions)) == 5
    assert rig.states()[13] == "PENDING"


def test_code_that_runs_elsewhere_is_not_why_a_worker_is_lost(rig: Rig) -> None:
    rig.healthy(num_replicas=1)
    ticket = rig.deploy(num_replicas=2)
    assert started(rig.reconcile()) == [2]
    rig.state.replica_initializing(2, pid=1, now=rig.now)
    assert rig.leave(2) == [ReleaseReplica(2)]
    assert started(rig.wait(1)) == [3]
    assert Settle(ticket) in rig.start(3)


def test_worker_that_was_to_leave_is_nobodys_fault(rig: Rig) -> None:
    rig.deploy(num_replicas=1)
    rig.reconcile()
    rig.state.replica_initializing(1, pid=1, now=rig.now)
    rig.state.worker_lost(address(1), "it left", now=rig.now, announced=True)
    assert started(rig.reconcile()) == [2]


def test_first_replica_of_new_code_starts_alone() -> None:
    rig = Rig(3, trial_s=1.0)
    ticket = rig.deploy(num_replicas=3)
    assert started(rig.reconcile()) == [1]
    assert {r["reason"] for r in rig.status()["replicas"][1:]} == {
        "starts when the first one has, or a moment after it"
    }
    # Its time begins with its constructor.
    assert started(rig.wait(2)) == []
    rig.state.replica_initializing(1, pid=1, now=rig.now)
    assert started(rig.wait(0.9)) == []
    assert started(rig.wait(0.1)) == [2, 3]
    assert Settle(ticket) in rig.start(1, 2, 3)
    # What serves already needs no trial.
    rig.deploy(num_replicas=5)
    assert len(started(rig.reconcile())) == 2


def test_others_follow_at_once_when_the_first_one_runs() -> None:
    rig = Rig(3, trial_s=1.0)
    rig.deploy(num_replicas=3)
    rig.reconcile()
    assert started(rig.start(1)) == [2, 3]


def test_others_do_not_follow_one_that_took_its_worker_down() -> None:
    rig = Rig(3, trial_s=1.0)
    ticket = rig.deploy(num_replicas=3)
    rig.reconcile()
    rig.now += 0.5
    actions = rig.leave(1)
    assert failure(actions, ticket)
    assert started(actions) == started(rig.wait(60)) == []


def test_loss_before_the_constructor_does_not_count(rig: Rig) -> None:
    rig.deploy(num_replicas=1)
    rig.reconcile()
    rig.now += 5
    assert started(rig.leave(1)) == [2]


def test_back_off_of_one_that_takes_its_workers_down_again_and_again() -> None:
    rig = Rig(9)
    rig.healthy(num_replicas=1)
    rig.now += 1000
    # One that ran for long is replaced at once.
    (replica_id,) = started(rig.leave(1))
    rig.start(replica_id)
    rig.now += 2
    (replica_id,) = started(rig.leave(2))
    delays = []
    for number in range(3, 8):
        rig.start(replica_id)
        rig.now += 2
        assert started(rig.leave(number)) == []
        (pending,) = rig.status()["replicas"]
        delays.append(float(pending["reason"].split()[1]))
        (replica_id,) = started(rig.wait(delays[-1] + 0.01))
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6]
    rig.start(replica_id)
    rig.now += 4
    assert started(rig.leave(8)) == [replica_id + 1]


# deploy_timeout_s


def test_deadline_names_what_each_replica_waited_for() -> None:
    rig = Rig(3, gpus=1)
    ticket = rig.deploy(num_replicas=4, resources={"GPU": 1})
    rig.reconcile()
    rig.start(1)
    rig.now += 100
    rig.state.replica_initializing(2, pid=1, now=rig.now)
    assert rig.wait(199) == []
    text = failure(rig.wait(1), ticket).text
    assert text.splitlines() == [
        "deployment 'f' failed: 1 of 4 replicas ready after 300 s",
        "",
        f"f#000001: constructor still running after 200 s on {address(2)}",
        f"f#000002: waiting for a free thread on {address(3)} for 300 s",
        "f#000003: waits for a worker: all GPU in use: 3 of 3 held by replicas of f",
    ]


def test_deadline_names_a_resource_that_nobody_has(rig: Rig) -> None:
    ticket = rig.deploy(resources={"GPU": 1}, num_replicas=12)
    assert rig.reconcile() == []
    text = failure(rig.wait(300), ticket).text
    assert "no worker offers GPU=1 (0 of 3 workers have GPU)" in text
    assert text.endswith("\nand 2 more")


def test_deadline_shows_the_last_failure(rig: Rig) -> None:
    ticket = rig.deploy(num_replicas=1, deploy_timeout_s=5)
    rig.reconcile()
    rig.fail(1)
    rig.wait(1)
    text = failure(rig.wait(4), ticket).text
    assert text.endswith(f"\nThe last one that failed:\n{TRACEBACK}")


def test_deadline_of_reconfigure(rig: Rig) -> None:
    rig.healthy(user_config=b"1", num_replicas=1)
    ticket = rig.deploy(user_config=b"2", num_replicas=1)
    rig.reconcile()
    actions = rig.wait(300)
    text = failure(actions, ticket).text
    assert f"reconfigure() still running after 300 s on {address(1)}" in text
    assert [a.user_config for a in told(actions)] == [b"1"]


def test_done_in_the_last_moment(rig: Rig) -> None:
    ticket = rig.deploy(num_replicas=1)
    rig.reconcile()
    rig.now += 300
    assert rig.start(1) == [Settle(ticket)]


# After it was healthy


def test_lost_worker_is_replaced_at_once(rig: Rig) -> None:
    rig.healthy()
    actions = rig.leave(1)
    assert actions == [
        ReleaseReplica(1),
        StartReplica(3, "f#000002", address(3), SPEC, 1),
    ]
    assert rig.routed() == [2]
    assert rig.routes == {"/f": "f"}
    assert rig.status()["state"] == "UNHEALTHY"
    assert rig.status()["reason"] == (
        f"1 of 2 replicas running: f#000002 waiting for a free thread on {address(3)}"
    )
    rig.now += 7
    (death,) = rig.status()["deaths"]
    assert death == {
        "replica_tag": "f#000000",
        "worker": address(1),
        "reason": f"worker {address(1)} left the cluster",
        "ago_s": 7.0,
    }
    rig.start(3)
    assert rig.status()["state"] == "HEALTHY"
    assert rig.status()["reason"] == ""


def test_reason_before_the_replacement(rig: Rig) -> None:
    rig.healthy()
    rig.now += 10
    rig.state.replica_lost(1, "health check failed", now=rig.now)
    assert rig.routed() == [2]
    assert rig.status()["reason"] == (
        "1 of 2 replicas running: f#000000 ended: health check failed"
    )


def test_route_stays_when_all_are_dead(rig: Rig) -> None:
    rig.healthy()
    actions = rig.leave(1, 2, 3)
    assert (released(actions), started(actions)) == ([1, 2], [])
    assert rig.routes == {"/f": "f"}
    assert rig.routed() == []
    replica = rig.replica(3)
    assert replica["state"] == "PENDING"
    assert replica["reason"] == "waits for a worker: no worker on the cluster"
    assert (replica["worker"], replica["host"], replica["pid"]) == (None, None, None)
    rig.join(view(9))
    assert started(rig.wait(1000)) == [3, 4]
    rig.start(3, 4)
    assert rig.status()["state"] == "HEALTHY"


def test_restarts_never_give_up(rig: Rig) -> None:
    rig.healthy(num_replicas=1)
    rig.leave(1)
    assert delays(rig, 11)[-3:] == [25.6, 30, 30]
    assert rig.status()["state"] == "UNHEALTHY"
    (last,) = rig.states()
    rig.start(last)
    assert rig.status()["state"] == "HEALTHY"
    # The next time it begins anew.
    rig.state.replica_lost(last, "gone", now=rig.now)
    rig.reconcile()
    assert delays(rig, 1) == [0.1]


def test_failures_are_forgotten_once_all_run(rig: Rig) -> None:
    rig.deploy(num_replicas=1)
    rig.reconcile()
    rig.fail(1)
    rig.wait(0.2)
    rig.start(2)
    rig.state.replica_lost(2, "gone", now=rig.now)
    rig.reconcile()
    # Neither is the first worker avoided, nor is it the second failure.
    assert rig.replica(3)["worker"] == address(1)
    assert delays(rig, 1) == [0.1]


def test_running_replica_that_fails_is_replaced_at_once(rig: Rig) -> None:
    rig.healthy()
    actions = rig.fail(1)
    assert (released(actions), started(actions)) == ([1], [3])


def test_hanging_restart_is_given_up(rig: Rig) -> None:
    rig.healthy(num_replicas=1)
    rig.leave(1)
    rig.state.replica_initializing(2, pid=1, now=rig.now)
    assert rig.wait(299) == []
    assert stopped(rig.wait(1)) == [2]
    assert started(rig.wait(0.1)) == [3]
    assert rig.replica(3)["worker"] == address(3)
    text = f"constructor still running after 300 s on {address(2)}"
    assert rig.status()["deaths"][-1]["reason"] == text


def test_paused_workers_keep_their_replicas(rig: Rig) -> None:
    rig.healthy()
    rig.join(view(1, accepting=False))
    assert rig.reconcile() == []
    assert rig.routed() == [1, 2]


def test_everything_is_lost(rig: Rig) -> None:
    rig.healthy()
    rig.healthy(name="g", route_prefix=None, num_replicas=1)
    rig.state.deploy(
        replace(SPEC, name="h", route_prefix=None, resources={"GPU": 1}),
        prev_version=None,
        now=rig.now,
    )
    rig.reconcile()
    rig.state.all_lost("client.restart()", now=rig.now)
    actions = rig.reconcile()
    assert released(actions) == [1, 2, 3]
    assert len(started(actions)) == 3
    assert rig.status()["deaths"][0]["reason"] == "client.restart()"
    assert len(rig.status("h")["replicas"]) == 2


def test_restart_does_not_count_as_failures(rig: Rig) -> None:
    rig.deploy(num_replicas=1)
    for number in range(1, 9):
        assert started(rig.reconcile()) == [number]
        rig.state.replica_initializing(number, pid=1, now=rig.now)
        rig.state.all_lost("client.restart()", now=rig.now)


def test_worker_is_back_under_its_address(rig: Rig) -> None:
    rig.healthy()
    rig.healthy(name="g", route_prefix=None, workers=("w3",))
    rig.state.worker_lost(address(1), "worker restarts", now=rig.now)
    actions = rig.reconcile()
    assert (released(actions), len(started(actions))) == ([1], 1)


def test_last_ten_deaths(rig: Rig) -> None:
    rig.healthy(num_replicas=1)
    for number in range(1, 13):
        rig.now += 10
        rig.state.replica_lost(number, f"number {number}", now=rig.now)
        rig.start(*started(rig.reconcile()))
    reasons = [death["reason"] for death in rig.status()["deaths"]]
    assert reasons == [f"number {number}" for number in range(3, 13)]


def test_old_news_is_ignored(rig: Rig) -> None:
    rig.healthy()
    rig.deploy(name="g", route_prefix=None, resources={"GPU": 1}, num_replicas=1)
    rig.reconcile()
    for replica_id in (0, 3, 99):
        rig.state.replica_initializing(replica_id, pid=1, now=rig.now)
        rig.state.replica_started(replica_id, now=rig.now)
        rig.state.replica_failed(replica_id, TRACEBACK, now=rig.now)
        rig.state.replica_stopped(replica_id)
        rig.state.replica_lost(replica_id, "gone", now=rig.now)
        rig.state.reconfigured(replica_id, 1, TRACEBACK, now=rig.now)
    # Known, but not asked for.
    rig.state.reconfigured(1, 1, TRACEBACK, now=rig.now)
    rig.state.replica_initializing(1, pid=5, now=rig.now)
    rig.state.replica_started(1, now=rig.now, pid=5)
    rig.state.replica_stopped(1)
    assert rig.reconcile() == []
    assert rig.states() == {1: "RUNNING", 2: "RUNNING"}
    assert rig.replica(1)["pid"] == 1


# delete() and shutdown()


def test_delete(rig: Rig) -> None:
    rig.healthy()
    ticket = rig.state.delete("f")
    assert rig.state.routing() == {"routes": {}, "deployments": {}}
    assert rig.state.names() == []
    assert rig.reconcile() == [StopReplica(n, address(n), 20, 2) for n in (1, 2)]
    status = rig.status()
    assert (status["state"], status["target_replicas"]) == ("DELETING", 0)
    assert status["reason"] == "2 replicas draining"
    assert rig.states() == {1: "STOPPING", 2: "STOPPING"}
    assert rig.stop(1) == [ReleaseReplica(1)]
    again = rig.state.delete("f")
    assert rig.stop(2) == [ReleaseReplica(2), Settle(ticket), Settle(again)]
    assert rig.state.status(now=rig.now) == {}
    with pytest.raises(KeyError, match="no deployment named 'f'"):
        rig.state.delete("f")


def test_delete_what_starts_or_waits() -> None:
    rig = Rig(1, gpus=1)
    deploying = rig.deploy(resources={"GPU": 1})
    rig.reconcile()
    ticket = rig.state.delete("f")
    actions = rig.reconcile()
    assert stopped(actions) == [1]
    assert rig.states() == {1: "STOPPING"}
    assert "was deleted before" in failure(actions, deploying).text
    # Too late: it is to stop.
    rig.start(1)
    assert rig.states() == {1: "STOPPING"}
    assert rig.stop(1) == [ReleaseReplica(1), Settle(ticket)]


def test_delete_what_never_ran(rig: Rig) -> None:
    rig.deploy()
    ticket = rig.state.delete("f")
    assert Settle(ticket) in rig.reconcile()


def test_delete_during_an_update(rig: Rig) -> None:
    rig.healthy()
    deploying = rig.deploy(version="2")
    rig.reconcile()
    rig.state.delete("f")
    actions = rig.reconcile()
    assert stopped(actions) == [1, 2, 3, 4]
    failure(actions, deploying)


def test_draining_ends_some_time(rig: Rig) -> None:
    rig.healthy()
    ticket = rig.state.delete("f")
    rig.reconcile()
    assert rig.wait(24.5) == []
    assert rig.wait(0.5) == [ReleaseReplica(1), ReleaseReplica(2), Settle(ticket)]


def test_lost_while_draining(rig: Rig) -> None:
    rig.healthy()
    ticket = rig.state.delete("f")
    rig.reconcile()
    assert rig.leave(1) == [ReleaseReplica(1)]
    assert rig.status()["deaths"] == []
    rig.state.replica_lost(2, "gone", now=rig.now)
    assert rig.reconcile() == [ReleaseReplica(2), Settle(ticket)]


def test_deploy_beside_what_drains(rig: Rig) -> None:
    rig.healthy()
    gone = rig.state.delete("f")
    with pytest.raises(ValueError, match="there is no deployment 'f'"):
        rig.deploy(prev_version="1")
    ticket = rig.deploy()
    actions = rig.reconcile()
    assert (stopped(actions), started(actions)) == ([1, 2], [3, 4])
    assert rig.states() == {
        3: "STARTING",
        4: "STARTING",
        1: "STOPPING",
        2: "STOPPING",
    }
    assert rig.start(3, 4) == [Settle(ticket)]
    assert Settle(gone) in rig.stop(1, 2)
    assert rig.routed() == [3, 4]


def test_shutdown(rig: Rig) -> None:
    rig.healthy()
    deploying = rig.deploy(name="g", route_prefix=None)
    rig.reconcile()
    ticket = rig.state.shutdown()
    actions = rig.reconcile()
    assert stopped(actions) == [1, 2, 3, 4]
    failure(actions, deploying)
    assert rig.state.routing()["deployments"] == {}
    again = rig.state.shutdown()
    assert Settle(ticket) not in rig.stop(1, 2, 3)
    assert rig.stop(4) == [ReleaseReplica(4), Settle(ticket), Settle(again)]
    assert rig.reconcile() == []


def test_shutdown_of_nothing(rig: Rig) -> None:
    ticket = rig.state.shutdown()
    assert rig.reconcile() == [Settle(ticket)]


# Whatever comes


class Walk:
    """A cluster and users that do things at random; checks what must always hold."""

    NAMES = ("a", "b", "c")

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.rig = Rig(3, gpus=2)
        self.workers = count(4)
        self.actors: dict[int, StartReplica] = {}
        self.stopping: set[int] = set()
        self.gone: set[int] = set()
        self.asked: list[ReconfigureReplica] = []
        self.seen: set[int] = set()
        self.tickets: set[int] = set()
        self.settled: Counter[int] = Counter()

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def step(self) -> None:
        self.rig.now += self.rng.choice([0, 0.05, 0.3, 2, 20])
        if self.chance(0.15):
            self.wish()
        if self.chance(0.1):
            self.change_workers()
        self.live(bad=0.25)
        self.look()

    def wish(self) -> None:
        name = self.rng.choice(self.NAMES)
        state, rng = self.rig.state, self.rng
        if name in state.names() and self.chance(0.3):
            self.tickets.add(state.delete(name))
        elif self.chance(0.02):
            self.tickets.add(state.shutdown())
        else:
            spec = replace(
                SPEC,
                name=name,
                route_prefix=f"/{name}",
                code=b"%d" % len(self.tickets),
                version=rng.choice(["1", "2", None]),
                num_replicas=rng.choice([0, 1, 2, 3]),
                user_config=rng.choice([None, b"1", b"2"]),
                resources=rng.choice([{}, {"GPU": 1.0}]),
                deploy_timeout_s=rng.choice([5.0, 100.0]),
            )
            self.tickets.add(self.rig.deploy(spec))

    def change_workers(self) -> None:
        rig = self.rig
        if self.chance(0.02):
            self.gone |= self.actors.keys()
            rig.state.all_lost("client.restart()", now=rig.now)
        elif self.chance(0.5) and rig.views:
            worker = self.rng.choice(sorted(rig.views))
            del rig.views[worker]
            self.gone |= {n for n, a in self.actors.items() if a.worker == worker}
        elif len(rig.views) < 4:
            rig.join(view(next(self.workers), gpus=2))

    def live(self, *, bad: float) -> None:
        """Let some of the replicas do something."""
        state, now = self.rig.state, self.rig.now
        for action in self.asked:
            if self.chance(0.8):
                error = TRACEBACK if self.chance(bad) else None
                self.rig.answer_only(action, error)
        self.asked.clear()
        for replica_id in sorted(self.actors.keys() - self.gone):
            if replica_id in self.stopping:
                if self.chance(0.5):
                    state.replica_stopped(replica_id)
            elif self.chance(0.3):
                state.replica_initializing(replica_id, pid=1, now=now)
            elif self.chance(bad):
                state.replica_failed(replica_id, TRACEBACK, now=now)
            elif self.chance(0.05 * bad):
                state.replica_lost(replica_id, "gone", now=now)
            else:
                state.replica_started(replica_id, now=now)

    def look(self) -> None:
        handlers: dict[type, Callable[[Any], None]] = {
            StartReplica: self.on_start,
            StopReplica: self.on_stop,
            ReleaseReplica: self.on_release,
            ReconfigureReplica: self.on_reconfigure,
            Settle: self.on_settle,
        }
        for action in self.rig.reconcile():
            handlers[type(action)](action)
        self.check_routing()
        self.check_numbers()

    def on_start(self, action: StartReplica) -> None:
        assert action.replica_id not in self.seen
        assert action.worker in self.rig.views
        self.seen.add(action.replica_id)
        self.actors[action.replica_id] = action

    def on_stop(self, action: StopReplica) -> None:
        assert action.replica_id in self.actors.keys() - self.stopping
        self.stopping.add(action.replica_id)

    def on_release(self, action: ReleaseReplica) -> None:
        del self.actors[action.replica_id]
        self.stopping.discard(action.replica_id)

    def on_reconfigure(self, action: ReconfigureReplica) -> None:
        assert action.replica_id in self.actors.keys() - self.stopping
        self.asked.append(action)

    def on_settle(self, action: Settle) -> None:
        self.settled[action.ticket] += 1

    def check_routing(self) -> None:
        routing = self.rig.state.routing()
        for prefix, name in routing["routes"].items():
            assert prefix == f"/{name}"
        for entry in routing["deployments"].values():
            for replica_id, tag, worker, *_ in entry["replicas"]:
                actor = self.actors[replica_id]
                assert (tag, worker) == (actor.tag, actor.worker)
                assert worker in self.rig.views
                assert replica_id not in self.stopping

    def check_numbers(self) -> None:
        for entry in self.rig.state.status(now=self.rig.now).values():
            # All of a generation run the bytes of its first deploy().
            codes = Counter(
                self.actors[r["replica_id"]].spec.code
                for r in entry["replicas"]
                if r["state"] in ("STARTING", "RUNNING")
            )
            wanted = entry["target_replicas"]
            if entry["state"] == "HEALTHY":
                assert sum(codes.values()) == entry["running_replicas"] == wanted
            elif entry["state"] == "DEPLOY_FAILED":
                assert sum(codes.values()) <= wanted
            else:
                # Two versions at most, with what was wished for each.
                assert len(codes) <= 2
                assert max(codes.values(), default=0) <= 3
        used = Counter(
            a.worker for a in self.actors.values() if a.spec.resources.get("GPU")
        )
        for worker, number in used.items():
            assert number <= self.rig.views[worker].resources["GPU"]
        assert max(self.settled.values(), default=1) == 1

    def behave(self) -> None:
        """Go on with good luck only."""
        for _ in range(60):
            self.rig.now += 1
            self.live(bad=0)
            self.look()


@pytest.mark.parametrize("seed", range(12))
def test_random_walk(seed: int) -> None:
    walk = Walk(seed)
    for _ in range(1500):
        walk.step()
    rig = walk.rig
    for number in range(100, 104):
        rig.join(view(number, gpus=4))
    for name in walk.NAMES:
        spec = replace(SPEC, name=name, route_prefix=f"/{name}", version="good")
        walk.tickets.add(rig.deploy(spec, resources={"GPU": 1.0}))
    walk.behave()
    for entry in rig.state.status(now=rig.now).values():
        assert (entry["state"], entry["running_replicas"]) == ("HEALTHY", 2)
        assert len(entry["replicas"]) == 2
    assert rig.routes == {f"/{name}": name for name in walk.NAMES}
    walk.tickets.add(rig.state.shutdown())
    walk.behave()
    assert walk.actors == {}
    assert walk.settled == Counter(dict.fromkeys(walk.tickets, 1))
    assert rig.state.status(now=rig.now) == {}
