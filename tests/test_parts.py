"""Large fields in parts, without connections."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgpack
import pytest

from daskserve.transport.messages import (
    CALL,
    CHUNK,
    ITEM,
    PART,
    RESULT,
    START,
    WHOLE,
    Message,
)
from daskserve.transport.outbox import PORTION_BYTES, Outbox
from daskserve.transport.parts import PART_BYTES, Cutter, Joiner

LARGE = random.Random(0).randbytes(3 * PART_BYTES + 7)


def view(size: int) -> memoryview:
    return memoryview(bytearray(LARGE[:size]))


def drain(outbox: Outbox) -> Iterator[list[Message]]:
    while outbox:
        yield outbox.take()


def over_the_wire(batch: list[Message]) -> list[Message]:
    found: list[Message] = msgpack.unpackb(msgpack.packb(batch), use_list=False)
    return found


@pytest.mark.parametrize(
    "message",
    [
        (RESULT, 7, LARGE),
        (RESULT, 7, (b"pickle", view(70_000))),  # small, and a view all the same
        (RESULT, 7, (b"pickle", view(len(LARGE)), LARGE, view(PART_BYTES))),
        (ITEM, 7, (LARGE, view(PART_BYTES + 1))),
        (CALL, 7, 3, "f", (b"", LARGE), (("x", 0, 1),), None, "", None, LARGE, b"r"),
        (CHUNK, 7, LARGE[:PART_BYTES], True),
        (CHUNK, 7, LARGE, False),
        (START, 7, 200, ((b"a", b"b"),)),
    ],
    ids=lambda message: f"{message[0]}-{sum(map(len, map(str, message[2:])))}",
)
def test_messages_arrive_as_they_were(message: Message) -> None:
    outbox, joiner, arrived = Outbox(), Joiner(), []
    outbox.put(message)
    for batch in drain(outbox):
        assert all(len(m[5]) <= PART_BYTES for m in batch if m[0] == PART)
        arrived += joiner.join(over_the_wire(batch))
    assert arrived == [message]
    values = [v for field in arrived[0] for v in _values(field)]
    were = [v for field in message for v in _values(field)]
    for value, before in zip(values, were, strict=True):
        assert type(value) is type(before)
        if type(value) is memoryview:
            value[:1] = b"!"  # the receiver's own
            assert bytes(before[:1]) != b"!"
    assert not joiner._fields


def _values(field: object) -> Iterator[object]:
    if type(field) is tuple:
        yield from field
    else:
        yield field


def test_others_pass_and_mix() -> None:
    outbox, joiner = Outbox(), Joiner()
    size = 3 * PART_BYTES
    sent: list[Message] = [(RESULT, n, (b"p", view(size))) for n in range(3)]
    for message in sent:
        outbox.put(message)
    batches, arrived = [], []
    for n, batch in enumerate(drain(outbox)):
        if n < 5:
            outbox.put((START, 100 + n, 200, ()))
        batches.append(batch)
        arrived += joiner.join(over_the_wire(batch))
    assert [m for m in arrived if m[0] == RESULT] == sent
    assert all(sum(m[0] == PART for m in batch) <= 1 for batch in batches)
    assert PORTION_BYTES <= PART_BYTES
    # The small ones went at once, each in the next batch.
    assert [m[1] - 100 for b in batches for m in b if m[0] == START] == [0, 1, 2, 3, 4]
    assert all(batches[n + 1][0] == (START, 100 + n, 200, ()) for n in range(5))


def test_what_does_not_fit_is_an_error() -> None:
    *parts, whole = Cutter().cut((RESULT, 7, LARGE))
    joiner = Joiner()
    with pytest.raises(ValueError, match="bytes came of"):
        joiner.join([parts[0], whole])
    joiner = Joiner()
    with pytest.raises(ValueError, match="bytes came of"):
        joiner.join([*parts, parts[0]])
    with pytest.raises(KeyError):
        Joiner().join([whole])
    assert whole[0] == WHOLE
