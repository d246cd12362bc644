"""Run cases against a server, and compare what two servers did."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TypeAlias

from tests.differential import cases_frameworks, cases_http, cases_websocket
from tests.differential.cases import Case
from tests.differential.observe import TIMEOUT_S, Note, Seen, Talk, Target

#: What a server did, by the case's id.
Results: TypeAlias = dict[str, list[Seen]]

CASES = [*cases_http.CASES, *cases_frameworks.CASES, *cases_websocket.CASES]
#: Cases that talk to one server at the same time.
AT_ONCE = 8


def run(cases: Iterable[tuple[Case, Target]]) -> Results:
    """Run cases, several at once."""
    return asyncio.run(_run(list(cases)))


async def _run(cases: list[tuple[Case, Target]]) -> Results:
    room = asyncio.Semaphore(AT_ONCE)

    async def one(case: Case, target: Target) -> list[Seen]:
        async with room:
            return await observe(case, target)

    seen = await asyncio.gather(*(one(case, target) for case, target in cases))
    return {case.id: found for (case, _), found in zip(cases, seen, strict=True)}


async def observe(case: Case, target: Target) -> list[Seen]:
    """Run one case; if it breaks off, that is the last that was seen."""
    talk = Talk(target)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await case.script(talk)
    except TimeoutError:
        talk.note("hangs", "")
    except Exception as err:
        talk.note("breaks off", repr(err))
    finally:
        talk.close()
    return talk.seen


def broken(seen: list[Seen]) -> list[Note]:
    """Return what says that a case did not run to its end."""
    ends = ("hangs", "breaks off")
    return [s for s in seen if isinstance(s, Note) and s.name in ends]
