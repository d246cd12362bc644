"""Where a request's session id is, and which replica has the session: no loop."""

from __future__ import annotations

import random
import time

import pytest

from daskserve.transport.affinity import DIGEST_BYTES, Affinity, Bindings, Session
from daskserve.transport.router import Router, Slot


def affinity(**option: str) -> Affinity:
    found = Affinity.of(option)
    assert found is not None
    return found


def test_no_option_is_no_affinity() -> None:
    assert Affinity.of(None) is None


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ([], b""),
        ([(b"x-session", b"a")], b"a"),
        ([(b"x-session", b" a ")], b"a"),
        ([(b"x-session", b"")], b""),
        ([(b"x-session", b"a"), (b"x-session", b"b")], b"a"),
        ([(b"x-session", b"\xff\x80,;=")], b"\xff\x80,;="),
        ([(b"x-session-id", b"a"), (b"cookie", b"x-session=b")], b""),
    ],
)
def test_in_a_header(headers: list[tuple[bytes, bytes]], found: bytes) -> None:
    where = affinity(header="x-session")
    assert where.find(headers, b"x-session=c") == found
    assert where.find_made(headers) == found


@pytest.mark.parametrize(
    ("cookies", "found"),
    [
        ([], b""),
        ([b"sid=a"], b"a"),
        ([b"other=1; sid=a; more=2"], b"a"),
        ([b"other=1;sid=a;"], b"a"),
        ([b'sid="a"'], b"a"),
        ([b"sid=a=b=="], b"a=b=="),
        ([b"sid=a; sid=b"], b"a"),
        ([b"sid=", b"sid=b"], b""),
        ([b"other=1", b"sid=b"], b"b"),
        ([b"xsid=a; sidx=b; x=sid=c"], b""),
        ([b"sid"], b""),
        ([b";;=;= ; sid = a ;\xff\x00"], b"a"),
        ([b"=sid; \x80=1"], b""),
    ],
)
def test_in_a_cookie(cookies: list[bytes], found: bytes) -> None:
    headers = [(b"sid", b"no"), *((b"cookie", line) for line in cookies)]
    assert affinity(cookie="sid").find(headers, b"sid=no") == found


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (b"", b""),
        (b"session_hash=a", b"a"),
        (b"x=1&session_hash=a&y=2", b"a"),
        (b"session_hash=a&session_hash=b", b"a"),
        (b"session_hash=&session_hash=b", b""),
        (b"session_hash", b""),
        (b"xsession_hash=a&session_hashx=b", b""),
        (b"session%5Fhash=a%20b", b"a b"),
        (b"session_hash=a+b%zz%", b"a b%zz%"),
        (b"%&&=&%ff=%fe&session_hash=%ff", b"\xff"),
    ],
)
def test_in_the_query(query: bytes, found: bytes) -> None:
    where = affinity(query="session_hash")
    assert where.find([(b"session_hash", b"no")], query) == found
    assert where.find_made([(b"session_hash", b"no")]) == b""


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([], b""),
        ([b"sid=a; Path=/; HttpOnly"], b"a"),
        ([b"sid=a"], b"a"),
        ([b"other=1; sid=a"], b""),
        ([b"sid=a", b"sid=b; Path=/"], b"b"),
        ([b"sid=; Max-Age=0", b"sid=b"], b"b"),
        ([b'sid=""; Max-Age=0'], b""),
        ([b";", b"=", b"", b"sid"], b""),
    ],
)
def test_cookies_that_a_response_sets(lines: list[bytes], found: bytes) -> None:
    headers = [(b"set-cookie", line) for line in lines]
    assert affinity(cookie="sid").find_made(headers) == found


def test_a_session_is_known_by_a_digest() -> None:
    session = affinity(header="s").session([(b"s", b"x" * 8192)], b"")
    assert session == Session.of(b"x" * 8192)
    assert session.replica_id == 0 and len(session.digest) == DIGEST_BYTES
    assert session != Session.of(b"y")
    assert affinity(header="s").session([(b"s", b"")], b"") is None


def test_a_cookie_of_ours_names_its_replica() -> None:
    line = affinity(cookie="sid").cookie(300, "/chat")
    assert line is not None
    pair, *attributes = line.split(b"; ")
    assert attributes == [b"Path=/chat", b"HttpOnly", b"SameSite=Lax"]
    session = affinity(cookie="sid").session([(b"cookie", pair)], b"")
    assert session is not None and session.replica_id == 300
    assert line != affinity(cookie="sid").cookie(300, "/chat")
    other = affinity(cookie="sid").cookie(1, "")
    assert other is not None and b"; Path=/; " in other
    odd = affinity(cookie="sid").cookie(1, "/é;x")
    assert odd is not None and b"; Path=/%C3%A9%3Bx; " in odd


def test_cookies_that_are_not_ours_to_set() -> None:
    assert affinity(header="sid").cookie(1, "/") is None
    assert affinity(query="sid").cookie(1, "/") is None
    # Browsers take it with more attributes, from servers with TLS, or not at all.
    assert affinity(cookie="__Host-sid").cookie(1, "/") is None


@pytest.mark.parametrize(
    "session_id", [b"serve-1-", b"serve--" + b"0" * 32, b"serve-1-" + b"0" * 33, b"1"]
)
def test_what_is_no_cookie_of_ours(session_id: bytes) -> None:
    assert Session.of(session_id).replica_id == 0


def test_bindings_keep_the_newest() -> None:
    bindings = Bindings(limit=3)
    a, b, c, d = (Session.of(name) for name in (b"a", b"b", b"c", b"d"))
    bindings.bind(1, a.digest + b.digest + c.digest)
    assert bindings.find(a, {1, 2}) == 1  # used: now the newest
    bindings.bind(2, d.digest)
    found = [bindings.find(session, {1, 2}) for session in (a, b, c, d)]
    assert found == [1, 0, 1, 2]
    bindings.bind(2, a.digest)
    assert bindings.find(a, {1, 2}) == 2


def test_bindings_forget_what_a_replica_took_along() -> None:
    bindings = Bindings()
    session = Session.of(b"a")
    bindings.bind(1, session.digest)
    assert bindings.find(session, {2}) == 0
    assert len(bindings) == 0
    named = Session(session.digest, 7)
    assert [bindings.find(named, there) for there in ({7}, {8})] == [7, 0]


def slots(count: int) -> list[Slot]:
    return [Slot(i, f"D#{i}", f"tcp://w{i}") for i in range(1, count + 1)]


def router(count: int) -> Router:
    made = Router(random.Random(0))
    made.update(slots(count), 2)
    return made


def chosen(chooser: Router, session: str, bound: int = 0) -> int:
    slot = chooser.choose_for_session(session, bound, 0)
    assert slot is not None
    return slot.replica_id


def test_a_bound_session_stays_while_there_is_room() -> None:
    chooser = router(3)
    assert [chosen(chooser, "s", i) for i in (1, 2, 3)] == [1, 2, 3]
    for _ in range(2):
        chooser.begin(chooser.slots[2])
    assert chosen(chooser, "s", 2) == chosen(chooser, "s") != 2
    chooser.end(chooser.slots[2])
    chooser.slots[3].reachable = False
    assert chosen(chooser, "s", 3) in (1, 2)
    assert chosen(chooser, "s", 9) == chosen(chooser, "s")


def test_a_session_waits_for_the_thread_of_its_replica() -> None:
    made = Router(random.Random(0))
    made.update([Slot(i, f"D#{i}", f"tcp://w{i}", False, 1) for i in (1, 2)], 5)
    slot = made.slots[1]
    for _ in range(5):
        assert made.choose_for_session("s", 1, 0) is slot
        made.begin(slot)
    assert not made.is_free(slot, 0)
    assert made.choose_for_session("s", 1, 0) is made.slots[2]
    for _ in range(4):
        made.end(slot)
    made.report(slot, 4, 1, 0.01, 0.01, False, 0.0)
    assert made.choose_for_session("s", 1, 0) is made.slots[2]


def test_nothing_is_chosen_when_all_are_full() -> None:
    chooser = router(2)
    for slot in [*chooser.slots.values()] * 2:
        chooser.begin(slot)
    assert chooser.choose_for_session("s", 1, 0) is None
    assert router(0).choose_for_session("s", 1, 0) is None


def test_the_one_to_avoid_is_better_than_none() -> None:
    chooser = router(2)
    first, second = chooser.slots.values()
    assert chooser.choose_for_session("s", 1, 0, avoid=first) is second
    for _ in range(2):
        chooser.begin(second)
    assert chooser.choose_for_session("s", 1, 0, avoid=first) is first


def test_few_sessions_move_when_replicas_come_and_go() -> None:
    names = [f"s{i}" for i in range(999)]
    before = {name: chosen(router(2), name) for name in names}
    after = {name: chosen(router(3), name) for name in names}
    moved = [name for name in names if before[name] != after[name]]
    assert 250 < len(moved) < 420
    assert {after[name] for name in moved} == {3}
    assert 400 < sum(replica == 1 for replica in before.values()) < 600


def test_it_takes_little_time() -> None:
    headers = [(b"h%d" % i, b"v" * 50) for i in range(15)]
    headers.append((b"cookie", b"a=1; b=2; sid=" + b"x" * 40))
    where, bindings, chooser = affinity(cookie="sid"), Bindings(), router(8)
    began = time.perf_counter()
    for _ in range(1000):
        session = where.session(headers, b"")
        assert session is not None
        bound = bindings.find(session, chooser.slots)
        chooser.choose_for_session(session.digest.hex(), bound, 0)
    assert time.perf_counter() - began < 0.05  # mostly 0.006
