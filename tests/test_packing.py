"""Values as a pickle and the buffers beside it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from daskserve.exceptions import PicklingError
from daskserve.packing import LARGE_BYTES, Packed, copy, pack, room_for, unpack

BYTES = bytes(range(256)) * (LARGE_BYTES // 256)
ARRAY = np.arange(LARGE_BYTES // 8)
READ_ONLY = np.arange(LARGE_BYTES // 8)
READ_ONLY.flags.writeable = False


def buffers(packed: Packed) -> list[object]:
    return [] if isinstance(packed, bytes) else list(packed[1:])


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (None, 0),
        (b"small", 0),
        (BYTES[1:], 0),
        (BYTES, 1),
        (((BYTES,), {"a": BYTES, "b": 1}), 2),
        ([BYTES], 0),  # as any pickle has it
        (((BYTES.decode("latin-1"),), {}), 0),
        (bytearray(BYTES), 0),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bytes(value: object, count: int) -> None:
    packed = pack(value, what="it")
    assert len(buffers(packed)) == count
    assert all(buffer is BYTES for buffer in buffers(packed))
    back = unpack(packed)
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(
    ("array", "count"),
    [
        (ARRAY, 1),
        (ARRAY[:-1], 0),
        (np.arange(0.0), 0),
        (np.asfortranarray(ARRAY.reshape(64, -1)), 1),
        (np.tile(ARRAY, 4)[::2], 0),  # not in one piece
        (np.array(["x", None] * 10_000, dtype=object), 0),
    ],
    ids=["large", "small", "empty", "columns", "steps", "objects"],
)
def test_arrays(array: np.ndarray, count: int) -> None:
    packed = pack(((array,), {"nested": [{"it": array}]}), what="it")
    assert len(buffers(packed)) == count
    (back,), kwargs = unpack(packed)
    assert kwargs["nested"][0]["it"] is back  # as it was
    np.testing.assert_array_equal(back, array)
    assert back.flags.f_contiguous >= array.flags.f_contiguous  # columns stay so
    back[:] = 0  # it is the receiver's own
    assert array[-1:].tolist() != [0]


def test_later_changes_do_not_matter() -> None:
    array = ARRAY.copy()
    packed = pack([array], what="it")
    array[:] = 7
    (back,) = unpack(packed)
    np.testing.assert_array_equal(back, ARRAY)


def test_what_nobody_can_change_is_not_copied() -> None:
    back = unpack(pack(READ_ONLY, what="it"))
    assert np.shares_memory(back, READ_ONLY)
    assert not back.flags.writeable


def test_copies_are_nobodys_but_the_receivers() -> None:
    packed = pack({"a": [ARRAY], "b": [READ_ONLY], "c": BYTES}, what="it")
    first, second = unpack(packed), unpack(copy(packed))
    assert not np.shares_memory(first["a"][0], second["a"][0])
    assert np.shares_memory(first["b"][0], second["b"][0])
    assert second["c"] is BYTES
    np.testing.assert_array_equal(second["a"][0], ARRAY)
    small = pack(1, what="it")
    assert copy(small) is small


def test_frames() -> None:
    frame = pd.DataFrame({"x": np.arange(20_000), "y": np.arange(20_000) / 2})
    packed = pack(frame, what="it")
    assert buffers(packed)
    back = unpack(packed)
    pd.testing.assert_frame_equal(back, frame)
    back.loc[3, "y"] = 9.0
    assert frame.loc[3, "y"] == 1.5


def test_errors_say_where_it_is() -> None:
    with pytest.raises(PicklingError, match=r"the thing cannot .*'x'.*generator"):
        pack({"x": (n for n in ()), "y": ARRAY}, what="the thing")


def test_room_without_numpy() -> None:
    assert room_for(5).nbytes == 5
    assert not room_for(5).readonly
    script = (
        "import sys; sys.modules['numpy'] = None; import daskserve.packing as p\n"
        "room = p.room_for(3); room[:] = b'abc'; assert bytes(room) == b'abc'\n"
        "assert type(room.obj) is bytearray"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
