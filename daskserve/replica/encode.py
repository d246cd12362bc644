"""From what user code returns to an HTTP response; in a worker, pure."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import orjson
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
        if hasattr(value, "columns"):
            rows = value.to_dict(orient="records")
            plain = all(isinstance(label, str) for label in value.columns)
            return rows if plain else _with_plain_keys(rows)
        return _with_plain_keys(value.to_dict())
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas' for what is missing
        return None
    if hasattr(value, "tolist"):  # numpy, where orjson's own support ends
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, set | frozenset | tuple):  # named ones come here
        return list(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, bytes):
        return value.decode()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{_name(value)} has no JSON form")


def _name(value: object) -> str:
    cls = type(value)
    if cls.__module__ == "builtins":
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"
