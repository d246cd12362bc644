"""What user code may return, and what HTTP clients get for it."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import json
import re
import uuid
from collections import deque
from collections.abc import AsyncIterator
from decimal import Decimal
from ipaddress import IPv4Address
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from pydantic import BaseModel, SecretStr
from starlette.responses import JSONResponse, StreamingResponse

from daskserve.replica.encode import BYTES, JSON, TEXT, NotEncodableError, encode


@dataclasses.dataclass
class Point:
    x: int
    y: int


class Pair(NamedTuple):
    a: int
    b: Any


class Color(enum.Enum):
    RED = "red"


class Model(BaseModel):
    at: dt.datetime
    n: int


NOW = dt.datetime(2026, 1, 2, 3, 4, 5)
ID = uuid.UUID(int=7)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ("héllo", (TEXT, "héllo".encode())),
        (b"\x00\xff", (BYTES, b"\x00\xff")),
        (bytearray(b"ab"), (BYTES, b"ab")),
        (memoryview(b"ab"), (BYTES, b"ab")),
        (None, (TEXT, b"")),
    ],
)
def test_plain_bodies(result: Any, expected: tuple[bytes, bytes]) -> None:
    assert encode(result) == expected


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"a": [1, 2.5, None, True]}, {"a": [1, 2.5, None, True]}),
        ([], []),
        (3, 3),
        (True, True),
        ((1, 2), [1, 2]),
        ({1: "a"}, {"1": "a"}),
        (
            {"n": 2**70, "id": ID, "at": NOW},
            {"n": 2**70, "id": str(ID), "at": NOW.isoformat()},
        ),
        ({"s": {3}}, {"s": [3]}),
        (np.arange(3), [0, 1, 2]),
        (np.float32(1.5), 1.5),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.arange(6).reshape(2, 3).T, [[0, 3], [1, 4], [2, 5]]),
        (
            pd.DataFrame({"a": [1, 2], "b": [3, 4]}),
            [{"a": 1, "b": 3}, {"a": 2, "b": 4}],
        ),
        (pd.Series({"x": 1, "y": 2}), {"x": 1, "y": 2}),
        (pd.Series([1], index=[pd.Timestamp(NOW)]), {"2026-01-02T03:04:05": 1}),
        (
            pd.DataFrame([[1, None]], columns=[pd.Timestamp(NOW), 5]).astype("Int64"),
            [{"2026-01-02T03:04:05": 1, "5": None}],
        ),
        (
            pd.DataFrame({"at": [pd.Timestamp(NOW), pd.NaT]}),
            [{"at": "2026-01-02T03:04:05"}, {"at": None}],
        ),
        (pd.Timestamp(NOW), "2026-01-02T03:04:05"),
        (np.arange(3, dtype=">i4"), [0, 1, 2]),
        ({np.int64(1): {np.str_("x"): [np.float32(0.5)]}}, {"1": {"x": [0.5]}}),
        ([{NOW: 1, ID: 2**70}], [{NOW.isoformat(): 1, str(ID): 2**70}]),
        ([Pair(1, np.int64(2))], [[1, 2]]),
        (Point(1, 2), {"x": 1, "y": 2}),
        ([Model(at=NOW, n=1)], [{"at": "2026-01-02T03:04:05", "n": 1}]),
        ({"at": NOW, "id": ID}, {"at": "2026-01-02T03:04:05", "id": str(ID)}),
        ([Decimal("1.5"), Decimal(2)], [1.5, 2]),
        ([dt.timedelta(seconds=90), pd.Timedelta("90s")], [90.0, 90.0]),
        ([np.timedelta64(90, "s"), np.timedelta64(90, "ns")], [90.0, 90e-9]),
        (np.array([1, 2], dtype="m8[m]"), [60.0, 120.0]),
        ([np.datetime64("2026-01-02")], ["2026-01-02T00:00:00"]),
        ([PurePosixPath("/data/x"), Path("y")], ["/data/x", "y"]),
        ([deque([1, 2]), range(3), frozenset([4])], [[1, 2], [0, 1, 2], [4]]),
        ([Color.RED, {Color.RED: Color.RED}], ["red", {"red": "red"}]),
        ([dt.date(2026, 1, 2), dt.time(3, 4)], ["2026-01-02", "03:04:00"]),
        ([IPv4Address("10.0.0.1"), b"ab"], ["10.0.0.1", "ab"]),
        ([SecretStr("s"), re.compile("a+")], ["**********", "a+"]),
        (pd.Series([1], index=["a"], dtype="int8"), {"a": 1}),
        ([pd.Period("2026-01", "M"), pd.NaT, pd.NA], ["2026-01", None, None]),
        (pd.Index([1, 2]), [1, 2]),
        (pd.MultiIndex.from_tuples([(1, "a")]), [[1, "a"]]),
        (pd.Categorical(["a", "b"]), ["a", "b"]),
    ],
)
def test_json(result: Any, expected: Any) -> None:
    encoded = encode(result)
    assert isinstance(encoded, tuple)
    assert encoded[0] == JSON
    assert json.loads(encoded[1]) == expected


def test_responses_are_left_as_they_are() -> None:
    response = JSONResponse({}, 201)
    assert encode(response) is response


def test_generators_stream() -> None:
    async def chunks() -> AsyncIterator[str]:
        yield "a"

    assert isinstance(encode(chunks()), StreamingResponse)
    assert isinstance(encode(c for c in "ab"), StreamingResponse)


class Strange:
    pass


@pytest.mark.parametrize(
    "result",
    [
        Strange(),
        {"a": [Strange()]},
        object,
        {"n": 2**70, "a": Strange()},
        {Strange(): 1},
        [pd.DataFrame([[1, 2]], columns=["type", "type"])],
        pd.Series([1, 2], index=["type", "type"]),
        pd.Series([1], index=pd.MultiIndex.from_tuples([("a", "type")])),
        pd.DataFrame([[1]], index=pd.MultiIndex.from_tuples([("a", "b")])),
        pd.DataFrame([[1]], columns=pd.MultiIndex.from_tuples([("a", "b")])),
    ],
)
def test_what_cannot_be_expressed_is_named(result: Any) -> None:
    with pytest.raises(NotEncodableError, match="cannot be expressed in JSON") as info:
        encode(result)
    assert "Strange" in str(info.value) or "type" in str(info.value)
