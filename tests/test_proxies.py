from collections.abc import Collection

import pytest

from daskserve.controller.placement import WorkerView
from daskserve.controller.proxies import SCHEDULER, desired_proxies, reachable_url

HOSTS = frozenset({"10.0.0.1", "Head"})


def view(address: str, *, accepting: bool = True) -> WorkerView:
    return WorkerView(
        address=address,
        host=address.partition("://")[2].rpartition(":")[0],
        name=address,
        nthreads=1,
        free_threads=1,
        resources={},
        accepting=accepting,
    )


LOCAL = view("tcp://10.0.0.1:4000")
LOCAL_2 = view("tcp://10.0.0.1:4001")
REMOTE = view("tcp://10.0.0.2:4000")


def desired(
    *views: WorkerView,
    location: str | None = "HeadOnly",
    enabled: bool = True,
    one_per_host: bool = False,
    current: Collection[str] = (),
) -> set[str]:
    return desired_proxies(
        location=location,
        enabled=enabled,
        one_per_host=one_per_host,
        scheduler_hosts=HOSTS,
        views={v.address: v for v in views},
        current=current,
    )


@pytest.mark.parametrize("location", ["NoServer", None])
def test_no_server(location: str | None) -> None:
    assert desired(LOCAL, location=location, current=[LOCAL.address]) == set()


@pytest.mark.parametrize("location", ["HeadOnly", "EveryNode"])
def test_disabled(location: str) -> None:
    assert desired(LOCAL, location=location, enabled=False) == set()


def test_unknown_location() -> None:
    with pytest.raises(ValueError, match="location='Head' is not one of 'HeadOnly'"):
        desired(location="Head")


def test_every_node() -> None:
    paused = view("tcp://10.0.0.3:4000", accepting=False)
    everyone = {LOCAL.address, REMOTE.address, paused.address}
    assert desired(LOCAL, REMOTE, paused, location="EveryNode") == everyone
    assert desired(location="EveryNode", current=[SCHEDULER]) == set()


def test_head_takes_the_lowest_worker_on_the_host() -> None:
    assert desired(REMOTE, LOCAL_2, LOCAL) == {LOCAL.address}


def test_head_needs_a_worker_that_accepts() -> None:
    paused = view(LOCAL.address, accepting=False)
    assert desired(paused, LOCAL_2) == {LOCAL_2.address}
    assert desired(paused) == {SCHEDULER}


def test_head_without_a_local_worker() -> None:
    assert desired(REMOTE) == {SCHEDULER}
    assert desired() == {SCHEDULER}


def test_head_stays_where_it_is() -> None:
    assert desired(LOCAL, LOCAL_2, current=[LOCAL_2.address]) == {LOCAL_2.address}
    paused = view(LOCAL_2.address, accepting=False)
    assert desired(LOCAL, paused, current=[LOCAL_2.address]) == {LOCAL_2.address}
    assert desired(LOCAL, current=[SCHEDULER]) == {SCHEDULER}


def test_head_moves_when_its_worker_is_gone() -> None:
    assert desired(LOCAL, current=[LOCAL_2.address]) == {LOCAL.address}
    assert desired(REMOTE, current=[LOCAL.address]) == {SCHEDULER}


def test_head_leaves_other_hosts() -> None:
    # As when the location changed from EveryNode.
    current = [REMOTE.address, LOCAL.address, LOCAL_2.address]
    assert desired(REMOTE, LOCAL_2, LOCAL, current=current) == {LOCAL.address}
    assert desired(REMOTE, current=[REMOTE.address]) == {SCHEDULER}


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.1.1",
        "localhost",
        "[::1]",
        "::ffff:127.0.0.1",
        "head",
        "::ffff:10.0.0.1",
    ],
)
def test_spellings_of_the_own_host(host: str) -> None:
    local = view(f"tcp://{host}:5000")
    assert desired(local) == {local.address}


@pytest.mark.parametrize("host", ["fe80::1", "other", "10.0.0.11"])
def test_other_hosts(host: str) -> None:
    assert desired(view(f"tcp://{host}:5000")) == {SCHEDULER}


def test_every_node_with_one_address_a_host() -> None:
    views = [LOCAL, LOCAL_2, REMOTE]
    first = desired(*views, location="EveryNode", one_per_host=True)
    assert first == {LOCAL.address, REMOTE.address}
    # Who holds it keeps it; when that one goes, another takes it over.
    holding = {LOCAL_2.address, REMOTE.address}
    again = desired(
        *views, location="EveryNode", one_per_host=True, current=[LOCAL_2.address]
    )
    assert again == holding
    left = desired(LOCAL, REMOTE, location="EveryNode", one_per_host=True)
    assert left == {LOCAL.address, REMOTE.address}
    assert desired(LOCAL, one_per_host=True) == {LOCAL.address}  # HeadOnly


@pytest.mark.parametrize(
    ("bound", "host", "url"),
    [
        ("http://0.0.0.0:8000", "10.0.0.2", "http://10.0.0.2:8000"),
        ("https://[::]:8000", "10.0.0.2", "https://10.0.0.2:8000"),
        ("http://0.0.0.0:8000", "fd00::2", "http://[fd00::2]:8000"),
        ("http://0.0.0.0:8000", "node017", "http://node017:8000"),
        ("http://10.0.0.9:8000", "10.0.0.2", "http://10.0.0.9:8000"),
        ("http://[fd00::9]:8000", "10.0.0.2", "http://[fd00::9]:8000"),
        ("http+unix:///run/serve", "10.0.0.2", "http+unix:///run/serve"),
    ],
)
def test_reachable_url(bound: str, host: str, url: str) -> None:
    assert reachable_url(bound, host) == url
