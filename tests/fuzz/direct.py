"""Frames at a replica's own port, from strangers and from callers out of their mind."""

from __future__ import annotations

import random
from typing import Any

import msgpack

from tests.fuzz.mutations import harm
from tests.fuzz.target import Target, talk


def _anything(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 3 else 7)
    if kind == 7:
        return tuple(_anything(rng, depth + 1) for _ in range(rng.randrange(6)))
    if kind == 8:
        return {f"k{i}": _anything(rng, depth + 1) for i in range(rng.randrange(4))}
    return rng.choice(
        [
            None,
            True,
            0,
            1,
            -1,
            2**40,
            0.5,
            "",
            "method",
            "\udcff",
            b"",
            rng.randbytes(9),
        ]
    )


def _greedy(rng: random.Random) -> bytes:
    """Announce far more than comes."""
    kinds = [b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"]
    return rng.choice(kinds) + rng.choice([b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff"])


async def try_one(rng: random.Random, target: Target) -> str | None:
    """Say something to the port; return what is wrong with what it does."""
    host, port, secret = target.direct
    hello = bytes(msgpack.packb((secret, f"fuzz{rng.random()}")))
    known = rng.random() < 0.3
    data: list[bytes] = []
    if known:
        data.append(hello)
        for _ in range(rng.choice([1, 5, 50])):
            message = (rng.randrange(-2, 40), rng.randrange(9), 1, *_fields(rng))
            data.append(msgpack.packb(message, unicode_errors="surrogatepass"))
        data[-1] = harm(rng, data[-1])
        data.append(rng.choice([b"\xc1", _greedy(rng)]))
    else:
        # A secret that is wrong in one bit, among others.
        wrong = bytes([secret[0] ^ 1]) + secret[1:]
        data.append(
            rng.choice(
                [
                    rng.randbytes(rng.choice([1, 20, 300, 5000])),
                    _greedy(rng) + rng.randbytes(8),
                    msgpack.packb((wrong, "me")),
                    msgpack.packb(_anything(rng), unicode_errors="surrogatepass"),
                    hello[:-1],
                    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                ]
            )
        )
    answer, closed = await talk(rng, (host, port), data)
    if not known and answer:
        return f"a stranger was told {answer!r}"
    if not known and not closed:
        return "a stranger may stay"
    return None


def _fields(rng: random.Random) -> list[Any]:
    return [_anything(rng) for _ in range(rng.randrange(6))]
