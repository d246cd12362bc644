"""From what user code returns to an HTTP response; in a worker, pure."""

from __future__ import annotations

import dataclasses
import datetime as dt
import ipaddress
import json
import math
import re
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterator, KeysView, Mapping, ValuesView
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from types import GeneratorType
from typing import Any

import orjson
from starlette.responses import Response, StreamingResponse

TEXT = b"text/plain; charset=utf-8"
BYTES = b"application/octet-stream"
JSON = b"application/json"

#: What JSON has as a list; named tuples come to `_plain`, too.
_SEQUENCES = (set, frozenset, tuple, deque, range, GeneratorType, KeysView, ValuesView)
#: What JSON has as text.
_TEXTS = (
    *(uuid.UUID, PurePath),
    *(ipaddress.IPv4Address, ipaddress.IPv4Interface, ipaddress.IPv4Network),
    *(ipaddress.IPv6Address, ipaddress.IPv6Interface, ipaddress.IPv6Network),
)

#: What orjson makes of numpy's NaT in nanoseconds, and in days, hours and the like: it
#: may also be such a date. In other units it refuses it.
_NAT, _NAT_OF_DAYS = b'"1677-09-21T00:12:43.145224"', b'"1970-01-01T00:00:00"'


class NotEncodableError(TypeError):
    """A result that neither is a response nor can be expressed in JSON."""


def encode(result: Any) -> tuple[bytes, bytes] | Response:
    """Return ``(content type, body)`` of a result, or the response that it is.

    Parameters
    ----------
    result
        What user code returned: a ``Response``, ``str``, ``bytes``, None, a generator
        of ``str`` or ``bytes`` (sync or async), or what JSON can express; numpy,
        pandas, dataclasses, pydantic, datetime and UUID included.

    Raises
    ------
    NotEncodableError
        It is none of these.
    """
    if isinstance(result, str):
        return TEXT, result.encode()
    if isinstance(result, dict | list | int | float):
        return JSON, to_json(result)
    if isinstance(result, Response):
        return result
    if isinstance(result, bytes | bytearray | memoryview):
        return BYTES, bytes(result)
    if result is None:
        return TEXT, b""
    if isinstance(result, Iterator | AsyncIterator):
        return StreamingResponse(result, media_type="text/plain")
    return JSON, to_json(result)


def to_json(value: Any) -> bytes:
    """Return `value` as JSON.

    Raises
    ------
    NotEncodableError
        Something in it has no JSON form; the text names its type.
    """
    try:
        return _to_json(value)
    except (TypeError, ValueError) as err:  # orjson.JSONEncodeError is one
        raise NotEncodableError(
            f"a result of type {_name(value)} cannot be expressed in JSON: "
            f"{err.__cause__ or err}"
        ) from err


def _to_json(value: Any, *, simple: bool = False) -> bytes:
    # The option for keys, alone, would write two that are the same as text.
    keys = orjson.OPT_NON_STR_KEYS if simple else 0
    try:
        found = orjson.dumps(value, _plain, orjson.OPT_SERIALIZE_NUMPY | keys)
    except TypeError as err:
        cause = str(err.__cause__ or err)
        if not simple and ("Dict key" in cause or "datetime64" in cause):
            return _to_json(_simplified(value), simple=True)
        if "64-bit" in cause or "endianness" in cause:
            return _to_json_slowly(value)
        raise
    if not simple and (_NAT in found or _NAT_OF_DAYS in found):
        return _to_json(_simplified(value), simple=True)
    return found


def _to_json_slowly(value: Any) -> bytes:
    """Do with the standard library what orjson refuses; it is slow and rare."""
    text = json.dumps(
        _simplified(value),
        default=lambda other: _simplified(_plain(other)),
        allow_nan=False,
        ensure_ascii=False,
        separators=(",", ":"),
    )
    return text.encode()


def _simplified(value: Any) -> Any:
    """Return a value with keys that are text, and without numpy's times, as lists."""
    if _is_numpy_time(value):
        return _numpy_times(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None  # as orjson does
    if isinstance(value, dict):
        plain = {_key(key): _simplified(item) for key, item in value.items()}
        if len(plain) < len(value):
            keys = [repr(key) for key in value]
            raise TypeError(f"some of its keys are the same in JSON: {', '.join(keys)}")
        return plain
    if isinstance(value, list | tuple):
        return [_simplified(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value)]
        return {
            name: _simplified(getattr(value, name))
            for name in fields
            if not name.startswith("_")  # as orjson does
        }
    return value


def _key(key: Any) -> str:
    """Return a key, of numpy's or a date too, as JSON can have it."""
    if isinstance(key, Enum):
        key = key.value
    if hasattr(key, "item"):
        key = key.item()
    if hasattr(key, "isoformat"):
        return str(key.isoformat())
    if isinstance(key, (str, Decimal, *_TEXTS)):
        return str(key)
    if key is None or isinstance(key, int | float):
        return json.dumps(key)
    raise TypeError(f"JSON's keys are text, not {_name(key)}: {key!r}")


def _plain(value: Any) -> Any:
    """Return a form of `value` that orjson knows; its hook for the other types."""
    if hasattr(value, "model_dump"):  # pydantic
        return value.model_dump(mode="json")
    if hasattr(value, "to_dict"):  # pandas
        _refuse_doubles(value)
        if hasattr(value, "columns"):
            rows = value.to_dict(orient="records")
            plain = all(isinstance(label, str) for label in value.columns)
            return rows if plain else _simplified(rows)
        return _simplified(value.to_dict())
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas' for what is missing
        return None
    if isinstance(value, dt.timedelta):  # pandas' are such
        return value.total_seconds()
    if hasattr(value, "tolist"):  # numpy, where orjson's own support ends
        return _numpy_times(value) if _is_numpy_time(value) else value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, _SEQUENCES):
        return list(value)
    if isinstance(value, Decimal):
        exponent = value.as_tuple().exponent  # as FastAPI does; a letter if it is NaN
        whole = isinstance(exponent, int) and exponent >= 0
        return int(value) if whole else float(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, _TEXTS) or type(value).__name__ in ("Period", "Interval"):
        return str(value)
    if isinstance(value, re.Pattern):
        return value.pattern
    if isinstance(value, Mapping):
        return _simplified(dict(value))
    if isinstance(value, bytes):
        return value.decode()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{_name(value)} has no JSON form")


def _is_numpy_time(value: Any) -> bool:
    kind = getattr(value, "dtype", None) if type(value).__module__ == "numpy" else None
    return kind is not None and kind.kind in "Mm"


def _numpy_times(value: Any) -> Any:
    """Return dates or seconds, of an array or one; None for NaT."""
    import numpy as np

    if value.dtype.kind == "M":
        return value.astype("M8[us]").tolist()
    seconds: Any = np.where(np.isnat(value), None, value / np.timedelta64(1, "s"))
    return seconds.tolist()


def _refuse_doubles(value: Any) -> None:
    """Refuse pandas' values whose labels JSON could have only once."""
    labels = getattr(value, "columns", getattr(value, "index", None))
    if labels is not None and not labels.is_unique:
        doubles = sorted(set(map(repr, labels[labels.duplicated()])))
        raise TypeError(
            f"its labels {', '.join(doubles[:5])} stand there more than once, and an "
            f"object in JSON has each once: rename them, or reset_index()"
        )
    if hasattr(value, "columns"):
        if value.index.nlevels > 1:
            raise TypeError(
                "its index has several levels, and rows in JSON have none: "
                "reset_index()"
            )
        if value.index.name is not None or value.index.dtype.kind not in "iu":
            raise TypeError(
                f"its index {value.index.name!r} ({value.index.dtype}) would be "
                f"lost, as rows in JSON have none: reset_index() makes a column of it"
            )


def _name(value: object) -> str:
    cls = type(value)
    if cls.__module__ == "builtins":
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"
