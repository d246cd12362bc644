"""Whether the contract allows a request's fate, given what was done. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from tests.chaos.load import Fate

#: How long after a process was killed others may still send to it.
NEWS_S = 1.0
#: How long a process that was killed may take to die: its connections end with it.
DYING_S = 0.2
#: What a client may get while nothing need be there to serve it.
OUT_OF_ORDER = frozenset({"refused", "closed", "cut", "502", "503"})


@dataclass(slots=True)
class History:
    """What was done to a cluster; times are those of `time.monotonic`."""

    #: Processes that were killed, and when.
    kills: dict[int, float] = field(default_factory=dict)
    #: Processes whose host was cut off, from when until when.
    cuts: list[tuple[frozenset[int], float, float]] = field(default_factory=list)
    #: When processes were killed that held clients' connections.
    proxy_kills: list[float] = field(default_factory=list)
    #: From when until when nothing need be there to serve.
    outages: list[tuple[float, float]] = field(default_factory=list)
    #: From when on which version, or a newer one, has to answer.
    versions: list[tuple[float, int]] = field(default_factory=list)


class Verdict(StrEnum):
    """FAILED is a failure that the contract allows."""

    OK = "ok"
    FAILED = "failed, as it may"
    BREACH = "breach"


@dataclass(frozen=True, slots=True)
class Judgement:
    verdict: Verdict
    reason: str


def judge(fate: Fate, begun: Iterable[int], history: History) -> Judgement:
    """Judge one request.

    Parameters
    ----------
    fate
        What the client saw.
    begun
        The processes in which user code has begun it, one for each time.
    history
        What was done meanwhile.
    """
    pids = list(begun)
    allowed = 2 * fate.sent if fate.idempotent else 1
    if len(pids) > allowed:
        return _breach(fate, f"begun {len(pids)} times, in {pids}")
    if fate.outcome == "vanished":
        return Judgement(Verdict.OK, "client vanished")
    if fate.outcome == "200":
        return _judge_answer(fate, pids, history)
    reason = _excuse(fate, pids, history)
    if reason is None:
        return _breach(fate, f"{fate.outcome}, begun in {pids}")
    return Judgement(Verdict.FAILED, reason)


def judge_all(
    fates: Iterable[Fate], begun: Mapping[str, Iterable[int]], history: History
) -> list[tuple[Fate, Judgement]]:
    """Judge all requests of a run."""
    return [(fate, judge(fate, begun.get(fate.id, ()), history)) for fate in fates]


def _judge_answer(fate: Fate, pids: list[int], history: History) -> Judgement:
    if fate.pid not in pids:
        return _breach(fate, f"answered by {fate.pid}, begun in {pids}")
    wanted = max((v for at, v in history.versions if at <= fate.began), default=-1)
    if fate.version < wanted:
        return _breach(fate, f"answered by version {fate.version} after {wanted}")
    if fate.sent > 1:
        return Judgement(Verdict.OK, "sent again on a new connection")
    if len(pids) > 1:
        return Judgement(Verdict.OK, "tried again by the proxy")
    return Judgement(Verdict.OK, "answered")


def _excuse(fate: Fate, pids: list[int], history: History) -> str | None:
    """Say why a failure is allowed; None if it is not."""
    for began, ended in history.outages:
        if fate.began <= ended and began <= fate.ended:
            if fate.outcome in OUT_OF_ORDER:
                return "nothing was there"
    if fate.outcome in ("refused", "closed", "cut"):
        if any(_meanwhile(fate, at, DYING_S) for at in history.proxy_kills):
            return "its proxy was killed"
    if fate.outcome not in ("502", "cut"):
        return None
    killed = {pid for pid, at in history.kills.items() if _meanwhile(fate, at, NEWS_S)}
    cut: set[int] = set()
    for there, began, ended in history.cuts:
        if fate.began <= ended + NEWS_S and began <= fate.ended:
            cut |= there
    if not (killed | cut).issuperset(pids):
        return None
    if fate.idempotent:  # a second replica was tried, and lost as well
        return "in two lost workers" if len(set(pids)) > 1 else None
    if not killed.issuperset(pids) or (cut and not killed):
        return "in a worker that was cut off, or on its way"
    if pids:
        return "in the killed worker"
    return "on its way to the killed worker" if killed else None


def _meanwhile(fate: Fate, at: float, later_s: float) -> bool:
    return fate.began <= at + later_s and at <= fate.ended


def _breach(fate: Fate, text: str) -> Judgement:
    return Judgement(Verdict.BREACH, f"{fate.method} {text}")
