"""The order in which messages leave a connection."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from daskserve.transport.messages import CHUNK, PUSH, START
from daskserve.transport.outbox import BULK_BYTES, PORTION_BYTES, Outbox, data_bytes

BULK = bytes(BULK_BYTES)


def test_all_small_messages_go_at_once() -> None:
    outbox = Outbox()
    assert not outbox
    sent = [(START, i, 200, []) for i in range(1000)]
    for message in sent:
        outbox.put(message)
    assert outbox
    assert outbox.take() == sent
    assert not outbox
    assert outbox.take() == []


def test_bulk_goes_in_portions_and_others_pass_it() -> None:
    outbox = Outbox()
    for i in range(100):
        outbox.put((CHUNK, i, bytes(65536), True))
    first = outbox.take()
    assert 1 <= len(first) <= PORTION_BYTES // 65536
    outbox.put((START, 1000, 200, []))
    second = outbox.take()
    assert second[0][1] == 1000
    assert [m[1] for m in first + second[1:]] == list(range(len(first + second) - 1))


def test_messages_of_one_exchange_stay_in_order() -> None:
    outbox = Outbox()
    for last in (b"", b"end"):
        outbox.put((START, 1, 200, []))
        outbox.put((CHUNK, 1, BULK, True))
        outbox.put((CHUNK, 1, last, False))
    out = []
    while outbox:
        out += outbox.take()
    assert [len(m[2]) if m[0] == CHUNK else -1 for m in out] == [
        *(-1, BULK_BYTES, 0, -1, BULK_BYTES, 3)
    ]


def test_any_mixture_stays_in_order() -> None:
    rng = random.Random(0)
    outbox, out = Outbox(), []
    for n in range(5000):
        size = rng.choice([0, 10, BULK_BYTES - 1, BULK_BYTES, 100_000])
        outbox.put((CHUNK, rng.randrange(20), bytes(size), n))
        if rng.random() < 0.1:
            out += outbox.take()
    while outbox:
        out += outbox.take()
    assert sorted(message[3] for message in out) == list(range(5000))
    by_exchange = defaultdict(list)
    for message in out:
        by_exchange[message[1]].append(message[3])
    assert all(numbers == sorted(numbers) for numbers in by_exchange.values())
    assert not outbox._behind


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ((START, 1, 200, [(b"a", b"b")]), 0),
        ((CHUNK, 1, b"abc", True), 3),
        ((PUSH, 1, {"type": "websocket.send", "text": "abcd"}), 4),
        ((PUSH, 1, {"type": "websocket.send", "bytes": b"ab", "text": None}), 2),
        ((PUSH, 1, {"type": "websocket.close"}), 0),
    ],
)
def test_data_bytes(message: tuple[object, ...], size: int) -> None:
    assert data_bytes(message) == size
