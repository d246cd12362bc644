"""From what user code returns to an HTTP response; in a worker, pure."""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import orjson
from fastapi.encoders import ENCODERS_BY_TYPE
from starlette.responses import Response, StreamingResponse

TEXT = b"text/plain; charset=utf-8"
BYTES = b"application/octet-stream"
JSON = b"application/json"

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
        pandas, dataclasses, pydantic and what FastAPI encodes included.

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
    if isinstance(key, uuid.UUID):
        return str(key)
    return key.item() if hasattr(key, "item") else key


def _plain(value: Any) -> Any:
    """Return a form of `value` that orjson knows; its hook for the other types."""
    if hasattr(value, "model_dump"):  # pydantic
        return value.model_dump(mode="json")
    if hasattr(value, "to_dict"):  # pandas
        return _with_plain_keys(_of_pandas(value))
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas' for what is missing
        return None
    if hasattr(value, "tolist"):  # numpy, where orjson's own support ends
        if getattr(value, "dtype", None) is not None and value.dtype.kind == "m":
            value = value / value.dtype.type(1, "s")  # in seconds, as other durations
        return value.tolist()
    if isinstance(value, tuple | range):  # named ones come here
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    for kind in type(value).__mro__:
        if (encode := ENCODERS_BY_TYPE.get(kind)) is not None:
            return encode(value)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__name__ == "Period":  # pandas'
        return str(value)
    raise TypeError(f"{_name(value)} has no JSON form")


def _of_pandas(value: Any) -> Any:
    """Return the rows of a table, or the values of a series by their labels."""
    is_table = hasattr(value, "columns")
    labels: Any = value.columns if is_table else getattr(value, "index", None)
    if getattr(labels, "is_unique", True) is False:
        what = "columns" if is_table else "index"
        raise TypeError(
            f"{_name(value)} has no JSON form without loss: its {what} has the label "
            f"{labels[labels.duplicated()][0]!r} twice"
        )
    if not is_table:
        return value.to_dict()
    if getattr(value.index, "nlevels", 1) > 1:
        raise TypeError(
            f"{_name(value)} has no JSON form without loss: rows have no labels, and "
            "its index has several levels; return it with reset_index()"
        )
    return value.to_dict(orient="records")


def _name(value: object) -> str:
    cls = type(value)
    if cls.__module__ == "builtins":
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"
