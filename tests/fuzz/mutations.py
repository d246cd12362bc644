"""Small harm, done to bytes by chance."""

from __future__ import annotations

import random

#: What parsers are known to stumble over.
ODD = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b";", b"\xff", b"\x80", b"0",
    b"-1", b"+1", b"0x10", b"1e3", b"99999999999999999999", b"\r\n\r\n", b"%00",
    b"/../", b"chunked", b"\x0b", b"\xc3\x28", b"\xed\xa0\x80",
]  # fmt: skip


def harm(rng: random.Random, data: bytes, times: int = 1) -> bytes:
    """Change, drop, double or insert something, somewhere."""
    changed = bytearray(data)
    for _ in range(times):
        at = rng.randrange(len(changed) + 1)
        end = min(len(changed), at + rng.choice([1, 1, 2, 8, 40]))
        match rng.randrange(5):
            case 0:
                changed[at:end] = rng.randbytes(end - at)
            case 1:
                del changed[at:end]
            case 2:
                changed[at:at] = changed[at:end] * rng.choice([1, 2, 50])
            case 3:
                changed[at:at] = rng.choice(ODD) * rng.choice([1, 1, 1, 3, 300])
            case 4:
                del changed[at:]
    return bytes(changed)


def pieces(rng: random.Random, data: bytes) -> list[bytes]:
    """Cut data into a few pieces, or into bytes where it is short."""
    if len(data) < 200 and rng.random() < 0.1:
        return [data[i : i + 1] for i in range(len(data))]
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 0, 1, 4])))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
