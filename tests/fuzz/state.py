"""A scheduler's state file: what is not as it was written is refused, by one error."""

from __future__ import annotations

import hashlib
import random

from daskserve.controller.journal import (
    FORMAT,
    MAGIC,
    Journal,
    UnreadableStateError,
    decode,
    encode,
)
from tests.fuzz.mutations import harm
from tests.test_state import Rig

HTTP = {"options": b"\x80pickled", "enabled": True, "host": "::1", "port": 8000}


def _valid() -> bytes:
    rig = Rig()
    rig.healthy()
    return encode(Journal(http=HTTP, deployments=rig.state.saved()), 0)


VALID = _valid()
BODY = VALID.partition(b"\n")[2]


def try_one(rng: random.Random) -> str | None:
    """Read a state file that was changed; return what is wrong with that."""
    sealed = rng.random() < 0.5
    data = harm(rng, BODY if sealed else VALID, rng.choice([1, 2, 9]))
    if sealed:  # as if it had been written so
        digest = hashlib.sha256(data).hexdigest().encode()
        data = b"%s %d %s\n%s" % (MAGIC, FORMAT, digest, data)
    try:
        decode(data, 0)
    except UnreadableStateError:
        return None
    except Exception as err:
        return f"{err!r} for {data!r}"
    if not sealed and data != VALID:
        return f"it was read: {data!r}"

    return None
