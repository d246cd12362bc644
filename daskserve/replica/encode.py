"""From what user code returns to an HTTP response; in a worker, pure."""

from __future__ import annotations

import dataclasses
import datetime as dt
import ipaddress
import json
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

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


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
    if _numpy_time(result) == "M":  # orjson writes NaT as a date
        result = result.astype("M8[us]").tolist()
    return JSON, to_json(result)


def to_json(value: Any) -> bytes:
    """Return `value` as JSON.

    Raises
    ------
    NotEncodableError
        Something in it has no JSON form; the text names its type.
    """
    try:
        return orjson.dumps(value, default=_plain, option=_OPTIONS)
    except TypeError as err:  # orjson.JSONEncodeError is one
        cause = err.__cause__ or err
        if any(word in str(cause) for word in ("64-bit", "endianness", "Dict key")):
            return _to_json_slowly(_with_plain_keys(value))
        raise NotEncodableError(
            f"a result of type {_name(value)} cannot be expressed in JSON: {cause}"
        ) from err


def _to_json_slowly(value: Any) -> bytes:
    """Do with the standard library what orjson refuses; it is slow and rare."""
    try:
        text = json.dumps(
            value,
            default=_plain,
            allow_nan=False,
            ensure_ascii=False,
            separators=(",", ":"),
        )
    except (TypeError, ValueError) as err:
        raise NotEncodableError(
            f"a result of type {_name(value)} cannot be expressed in JSON: {err}"
        ) from err
    return text.encode()


def _with_plain_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {_key(k): _with_plain_keys(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_with_plain_keys(item) for item in value]
    return value


def _key(key: Any) -> Any:
    """Return a key, of numpy's or a date too, as JSON can have it."""
    if hasattr(key, "isoformat"):
        return key.isoformat()
    if isinstance(key, _TEXTS):
        return str(key)
    if isinstance(key, Decimal | Enum):
        return str(key) if isinstance(key, Decimal) else key.value
    return key.item() if hasattr(key, "item") else key


def _plain(value: Any) -> Any:
    """Return a form of `value` that orjson knows; its hook for the other types."""
    if hasattr(value, "model_dump"):  # pydantic
        return value.model_dump(mode="json")
    if hasattr(value, "to_dict"):  # pandas
        _refuse_doubles(value)
        if hasattr(value, "columns"):
            rows = value.to_dict(orient="records")
            plain = all(isinstance(label, str) for label in value.columns)
            return rows if plain else _with_plain_keys(rows)
        return _with_plain_keys(value.to_dict())
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas' for what is missing
        return None
    if isinstance(value, dt.timedelta):  # pandas' are such
        return value.total_seconds()
    if hasattr(value, "tolist"):  # numpy, where orjson's own support ends
        return _numpy_seconds(value) if _numpy_time(value) == "m" else value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, _SEQUENCES):
        return list(value)
    if isinstance(value, Decimal):
        exponent = value.as_tuple().exponent  # as FastAPI does; a letter if it is NaN
        whole = isinstance(exponent, int) and exponent >= 0
        return int(value) if whole else float(value)
    if isinstance(value, _TEXTS) or type(value).__name__ in ("Period", "Interval"):
        return str(value)
    if isinstance(value, re.Pattern):
        return value.pattern
    if isinstance(value, Mapping):
        return _with_plain_keys(dict(value))
    if isinstance(value, bytes):
        return value.decode()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{_name(value)} has no JSON form")


def _numpy_time(value: Any) -> str:
    """Return "M" for numpy's dates and "m" for its durations, else ""."""
    if type(value).__module__ != "numpy":
        return ""
    kind: str = value.dtype.kind if hasattr(value, "dtype") else ""
    return kind if kind in "Mm" else ""


def _numpy_seconds(value: Any) -> Any:
    import numpy as np

    return (value / np.timedelta64(1, "s")).tolist()  # NaN, and so null, for NaT


def _refuse_doubles(value: Any) -> None:
    """Refuse pandas' values whose labels JSON could have only once."""
    labels = getattr(value, "columns", getattr(value, "index", None))
    if labels is not None and not labels.is_unique:
        doubles = sorted(set(map(repr, labels[labels.duplicated()])))
        raise TypeError(
            f"its labels {', '.join(doubles[:5])} stand there more than once, and an "
            f"object in JSON has each once: rename them, or reset_index()"
        )
    if hasattr(value, "columns") and value.index.nlevels > 1:
        raise TypeError(
            "its index has several levels, and rows in JSON have none: reset_index()"
        )


def _name(value: object) -> str:
    cls = type(value)
    if cls.__module__ == "builtins":
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"
