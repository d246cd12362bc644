"""What a scenario has found: counts, timings, and what the contract does not allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.chaos.contract import Judgement, Verdict
from tests.chaos.load import Fate

#: So many breaches are shown one by one.
SHOWN = 10


@dataclass(slots=True)
class Report:
    """One run of one scenario.

    Parameters
    ----------
    title
        Says which.
    """

    title: str
    lines: list[str] = field(default_factory=list)
    breaches: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.lines.append(text)

    def check(self, is_so: bool, text: str) -> None:
        """Note something that has to be so."""
        (self.lines if is_so else self.breaches).append(text)

    def count(
        self, judged: Iterable[tuple[Fate, Judgement]], *, may_fail: bool
    ) -> None:
        """Count what became of requests.

        Parameters
        ----------
        judged
            All of them.
        may_fail
            Whether some may fail, where the contract allows it.
        """
        judged = list(judged)
        for title, idempotent in (("idempotent", True), ("not idempotent", False)):
            kind = [(f, j) for f, j in judged if f.idempotent == idempotent]
            failed = sum(j.verdict != Verdict.OK for _, j in kind)
            self.note(f"{title}: {failed} failed of {len(kind)}")
            counts = Counter((j.verdict.value, j.reason) for _, j in kind)
            for (verdict, reason), n in counts.most_common():
                if verdict != Verdict.BREACH:
                    self.note(f"  {n:6d} {verdict}: {reason}")
        start = min((fate.began for fate, _ in judged), default=0.0)
        bad = [
            f"{fate.began - start:.3f}-{fate.ended - start:.3f} s, {fate.id}: "
            f"{judgement.reason} ({judgement.verdict})"
            for fate, judgement in judged
            if judgement.verdict == Verdict.BREACH
            or (judgement.verdict == Verdict.FAILED and not may_fail)
        ]
        self.breaches += bad[:SHOWN]
        if len(bad) > SHOWN:
            self.breaches.append(f"and {len(bad) - SHOWN} more")

    def __str__(self) -> str:
        state = "BREACHES" if self.breaches else "ok"
        lines = [f"{self.title}: {state}", *(f"  {line}" for line in self.lines)]
        return "\n".join([*lines, *(f"  ! {text}" for text in self.breaches)])
