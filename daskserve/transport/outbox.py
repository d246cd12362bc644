"""What waits to be written on a connection: small messages do not queue behind bulk.

Pure; used on the loop of the connection. Many exchanges share one connection, and each
may have a window of data waiting. In one queue, an answer of a few bytes would come
after all of that.
"""

from __future__ import annotations

from collections import Counter, deque

from daskserve.transport.messages import PACKED, Message
from daskserve.transport.parts import PART_BYTES, Cutter

#: A message with so many bytes of data is bulk.
BULK_BYTES = 16 * 1024
#: Bulk goes out in portions of about this size, and small messages between them.
PORTION_BYTES = 256 * 1024


class Outbox:
    """Messages to be written; those of one exchange stay in order.

    Examples
    --------
    >>> outbox = Outbox()
    >>> outbox.put((1, 7, bytes(20_000)))
    >>> outbox.put((2, 8, b"small"))
    >>> [message[1] for message in outbox.take()]
    [8, 7]
    """

    def __init__(self) -> None:
        self._small: list[Message] = []
        self._bulk: deque[tuple[Message, int]] = deque()
        #: How many messages of an exchange are in `_bulk`.
        self._behind: Counter[int] = Counter()
        self._cutter = Cutter()

    def __bool__(self) -> bool:
        return bool(self._small or self._bulk)

    def put(self, message: Message) -> None:
        """Add `message`, in parts if its fields are large."""
        size = data_bytes(message)
        if size >= BULK_BYTES and (size > PART_BYTES or message[0] in PACKED):
            for part in self._cutter.cut(message):
                self._put(part, data_bytes(part))
        else:
            self._put(message, size)

    def _put(self, message: Message, size: int) -> None:
        if size < BULK_BYTES and not (self._behind and message[1] in self._behind):
            self._small.append(message)
        else:
            self._bulk.append((message, size))
            self._behind[message[1]] += 1

    def take(self) -> list[Message]:
        """Take what is to be written next: all that is small, and a portion of bulk."""
        batch, self._small = self._small, []
        size = 0
        while self._bulk and size < PORTION_BYTES:
            message, message_bytes = self._bulk.popleft()
            size += message_bytes
            batch.append(message)
            self._behind[message[1]] -= 1
            if not self._behind[message[1]]:
                del self._behind[message[1]]
        return batch


def data_bytes(message: Message) -> int:
    """Return the size of a message's data, roughly."""
    size = 0
    for field in message:
        kind = type(field)
        if kind is bytes or kind is memoryview:
            size += len(field)
        elif kind is dict:  # an event of a WebSocket
            payload = field.get("bytes") or field.get("text") or b""
            size += len(payload)
        elif kind is tuple and field and message[0] in PACKED:  # a value's buffers
            size += sum(len(p) for p in field if type(p) in (bytes, memoryview))
    return size
