"""What an app does before it answers; runs in the peers' environment and in ours.

README
------
``none``; ``sleep:MS``, so many milliseconds; ``python:ROUNDS``, of a loop that holds
the interpreter's lock.
"""

from __future__ import annotations

import os
import time


def work(text: str) -> dict[str, object]:
    """Do it; return the answer, which tells who worked."""
    kind, _, amount = text.partition(":")
    if kind == "sleep":
        time.sleep(float(amount) / 1000)
    elif kind == "python":
        spin(int(amount))
    else:
        raise ValueError(f"{text!r} is neither sleep:MS nor python:ROUNDS")
    return {"ok": True, "who": os.getpid()}


def spin(rounds: int) -> int:
    """Compute something, one step of the interpreter after the other."""
    total = 0
    for number in range(rounds):
        total += number * number
    return total
