"""Large fields of messages travel in parts, which others can pass. Pure.

A message with large fields becomes ``PART`` messages, each with a portion of a field,
and then a ``WHOLE`` one with the message, in which the fields' numbers stand for them.
The receiver has room for a field from its first part on, so that carriers can read into
the place where the value will be.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

from msgpack import ExtType

from daskserve.packing import room_for
from daskserve.transport.messages import PART, WHOLE, Message

#: What is larger is cut into parts of this size; smaller ones take much longer in all.
PART_BYTES = 1024 * 1024
#: What a number in place of a field is marked with.
_NUMBER = 1


class Cutter:
    """The sender's side of one connection.

    Examples
    --------
    >>> cut = list(Cutter().cut((19, 7, bytes(2_500_000), "a")))
    >>> [len(part[5]) for part in cut[:-1]], len(cut[-1][2])
    ([1048576, 1048576, 402848], 4)
    >>> Joiner().join(cut) == [(19, 7, bytes(2_500_000), "a")]
    True
    """

    def __init__(self) -> None:
        self._last = 0

    def cut(self, message: Message) -> Iterator[Message]:
        """Yield what to send in place of a message: parts of its fields, and the rest.

        Views of memory are cut however small: else they would arrive as ``bytes``.

        Parameters
        ----------
        message
            Fields may be ``bytes``, and tuples of these and of ``memoryview`` objects,
            which arrive as such, those that can be written to for the receiver alone.
        """
        fields: list[Any] = []
        last = self._last
        for field in message:
            if type(field) is tuple:
                values: list[Any] = []
                for value in field:
                    yield from self._cut(value, message[1], values)
                fields.append(tuple(values))
            else:
                yield from self._cut(field, message[1], fields)
        yield message if last == self._last else (WHOLE, message[1], tuple(fields))

    def _cut(self, value: Any, exchange_id: int, kept: list[Any]) -> Iterator[Message]:
        is_view = type(value) is memoryview
        if not is_view and (type(value) is not bytes or len(value) <= PART_BYTES):
            kept.append(value)
            return
        self._last += 1
        view, total = memoryview(value), len(value)
        for start in range(0, total, PART_BYTES):
            part = view[start : start + PART_BYTES]
            yield PART, exchange_id, self._last, total, is_view, part
        kept.append(ExtType(_NUMBER, self._last.to_bytes(8, "big")))


class Joiner:
    """The receiver's side of one connection."""

    def __init__(self) -> None:
        self._fields: dict[int, _Field] = {}

    def room(self, part: Message, size: int) -> memoryview:
        """Return where the next `size` bytes go, as a ``PART`` message says."""
        _, _, number, total, is_view, *_ = part
        field = self._fields.get(number)
        if field is None:
            field = self._fields[number] = _Field(total, is_view)
        return field.next(size)

    def whole(self, message: Message) -> Message:
        """Return the message that a ``WHOLE`` message is."""
        return tuple(
            tuple(map(self._value, field))
            if type(field) is tuple
            else self._value(field)
            for field in message[2]
        )

    def join(self, batch: Iterable[Message]) -> list[Message]:
        """Return the messages that a batch is; parts have their data with them."""
        messages = []
        for message in batch:
            if message[0] == PART:
                data = message[5]
                self.room(message, len(data))[:] = data
            elif message[0] == WHOLE:
                messages.append(self.whole(message))
            else:
                messages.append(message)
        return messages

    def _value(self, value: Any) -> Any:
        if type(value) is not ExtType:
            return value
        return self._fields.pop(int.from_bytes(value.data, "big")).value()


class _Field:
    """Room for one field, which is filled from its beginning."""

    __slots__ = ("_file", "_filled", "_view")

    def __init__(self, total: int, is_view: bool) -> None:
        self._filled = 0
        self._file: io.BytesIO | None = None
        self._view: memoryview
        if is_view:
            self._view = room_for(total)
        else:
            # `bytes` cannot be filled; a file in memory has some, and hands them out.
            self._file = io.BytesIO()
            self._file.seek(total - 1)
            self._file.write(b"\0")
            self._view = self._file.getbuffer()

    def next(self, size: int) -> memoryview:
        start, self._filled = self._filled, self._filled + size
        if self._filled > len(self._view):
            raise ValueError(f"{self._filled} bytes came of {len(self._view)}")
        return self._view[start : self._filled]

    def value(self) -> bytes | memoryview:
        if self._filled != len(self._view):
            raise ValueError(f"{self._filled} bytes came of {len(self._view)}")
        if self._file is None:
            return self._view
        self._view.release()
        return self._file.getvalue()
