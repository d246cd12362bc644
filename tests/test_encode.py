"""What user code may return, and what HTTP clients get for it."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import enum
import ipaddress
import json
import math
import re
import types
import uuid
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from pydantic import BaseModel
from starlette.responses import JSONResponse, StreamingResponse

from daskserve.replica.encode import BYTES, JSON, TEXT, NotEncodableError, encode


@dataclasses.dataclass
class Point:
    x: int
    y: int


@dataclasses.dataclass
class Held:
    by: dict[Any, Any]


class Pair(NamedTuple):
    a: int
    b: Any


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
        (
            [Held({1: {None: 2, 0.5: 3}, ID: 4})],
            [{"by": {"1": {"null": 2, "0.5": 3}, str(ID): 4}}],
        ),
        ([Model(at=NOW, n=1)], [{"at": "2026-01-02T03:04:05", "n": 1}]),
        ({"at": NOW, "id": ID}, {"at": "2026-01-02T03:04:05", "id": str(ID)}),
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
    ],
)
def test_what_cannot_be_expressed_is_named(result: Any) -> None:
    with pytest.raises(NotEncodableError, match="cannot be expressed in JSON") as info:
        encode(result)
    assert "Strange" in str(info.value) or "type" in str(info.value)


class Color(enum.Enum):
    RED = "r"
    HOME = PurePosixPath("/home")


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (Decimal("1.50"), 1.5),
        (Decimal("3"), 3),
        (Decimal("1.0"), 1.0),
        (Decimal("NaN"), None),
        (Decimal(10**30), 10**30),
        (dt.timedelta(seconds=1.5), 1.5),
        (PurePosixPath("/a"), "/a"),
        (collections.deque([1, Decimal("0.5")]), [1, 0.5]),
        (range(3), [0, 1, 2]),
        ({"a": (n for n in (1, 2))}, {"a": [1, 2]}),
        ({"a": 1}.keys(), ["a"]),
        ([{Decimal("0.5")}, frozenset([Color.RED])], [[0.5], ["r"]]),
        (Color.HOME, "/home"),
        (ipaddress.ip_address("::1"), "::1"),
        (re.compile("a+"), "a+"),
        (types.MappingProxyType({"a": 1}), {"a": 1}),
        ({PurePosixPath("/a"): 1, Decimal("2"): 3}, {"/a": 1, "2": 3}),
        (Pair(1, Decimal("0.5")), [1, 0.5]),
        (np.datetime64("NaT", "s"), None),
        (np.array(["2026-01-02", "NaT"], "M8[D]"), ["2026-01-02T00:00:00", None]),
        (np.array(["2026-01-02", "NaT"], "M8[ns]"), ["2026-01-02T00:00:00", None]),
        (
            [
                {"at": np.array(["NaT", "2026-01-02"], f"M8[{unit}]"), "x": math.nan}
                for unit in ("D", "h", "s", "us", "ns")
            ],
            [{"at": [None, "2026-01-02T00:00:00"], "x": None}] * 5,
        ),
        (
            {
                "at": dt.datetime(1970, 1, 1),
                "x": np.array([math.inf]),
                "t": np.array(["NaT"], "m8[s]"),
            },
            {"at": "1970-01-01T00:00:00", "x": [None], "t": [None]},
        ),
        (
            # A date that NaT may look like changes nothing of the rest.
            {"at": dt.datetime(1970, 1, 1), "x": np.float32(0.1), "kind": Color.RED},
            {"at": "1970-01-01T00:00:00", "x": 0.1, "kind": "r"},
        ),
        ({"n": 2**70, "kind": Color.RED}, {"n": 2**70, "kind": "r"}),
        (np.timedelta64(1500, "ms"), 1.5),
        (np.array([1_500_000_000, "NaT"], "m8[ns]"), [1.5, None]),
        (np.array([Decimal("0.5"), None], object), [0.5, None]),
        (pd.Timedelta("1.5s"), 1.5),
        (pd.Period("2026-01"), "2026-01"),
        (pd.Interval(0, 1), "(0, 1]"),
        (pd.MultiIndex.from_tuples([("a", 1)]), [["a", 1]]),
        (
            pd.DataFrame({"p": pd.period_range("2026-01", periods=1, freq="M")}),
            [{"p": "2026-01"}],
        ),
        (
            pd.DataFrame({"t": pd.to_timedelta(["1.5s", None])}),
            [{"t": 1.5}, {"t": None}],
        ),
    ],
)
def test_what_the_standard_library_and_pandas_have(result: Any, expected: Any) -> None:
    content_type, body = encode(result)  # type: ignore[misc]
    assert content_type == JSON
    found = json.loads(body)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "'a' stand there more than once"),
        (pd.Series([1, 2], index=["x", "x"]), "'x' stand there more than once"),
        (pd.Series([1], index=pd.MultiIndex.from_tuples([("a", 1)])), "tuple"),
        (
            pd.DataFrame([[1]], index=pd.MultiIndex.from_tuples([("a", 1)])),
            "several levels",
        ),
        (np.timedelta64(3, "M"), "numpy.timedelta64"),
        ({(1, 2): 3}, "tuple"),
        ({1: "a", "1": "b"}, "the same in JSON: 1, '1'"),
        ([Held({True: 1, "true": 2})], "the same in JSON: True, 'true'"),
        (
            pd.DataFrame({"n": [1]}, index=pd.Index(["Ulm"], name="city")),
            r"index 'city' \(\w+\) would be lost.*reset_index",
        ),
        (pd.DataFrame({"n": [1]}).describe(), r"index None \(\w+\) would be lost"),
        (1j, "complex"),
    ],
)
def test_nothing_is_lost_silently(result: Any, text: str) -> None:
    with pytest.raises(NotEncodableError, match=text):
        encode(result)
