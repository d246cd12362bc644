"""How long calls take in a replica; pure."""

from __future__ import annotations

from math import exp, log

#: How much a call counts beside those before it, for the mean and for what is typical.
WEIGHT, TYPICAL_WEIGHT = 0.1, 0.05
#: What is left of the longest time with each call after it, and how much longer than
#: the mean it may be.
FORGET, STEADY = 0.99, 1.5
#: Less is not told apart, in seconds.
LEAST_S = 1e-6


class Times:
    """Two means: of the times, and of their logarithms.

    The first says how long one waits behind a call. It is carried far away by one call
    that is unlike the others; so the second one is for comparing replicas.

    Examples
    --------
    >>> times = Times()
    >>> for seconds in (0.001, 0.001, 1.0):
    ...     times.add(seconds)
    >>> round(times.mean_s, 3), round(times.typical_s, 5)
    (0.101, 0.00141)
    >>> times.steady
    False
    """

    __slots__ = ("_log", "mean_s", "peak_s")

    def __init__(self) -> None:
        #: 0.0 before the first.
        self.mean_s = 0.0
        #: The longest of late, which is forgotten bit by bit.
        self.peak_s = 0.0
        self._log = 0.0

    @property
    def steady(self) -> bool:
        """Whether no call of late took much longer than the others."""
        return self.peak_s < STEADY * self.mean_s

    @property
    def typical_s(self) -> float:
        """The geometric mean; 0.0 before the first."""
        return exp(self._log) if self.mean_s else 0.0

    def add(self, seconds: float) -> None:
        """Take the time of a call."""
        seconds = seconds if seconds > LEAST_S else LEAST_S
        if self.mean_s:
            self.mean_s += (seconds - self.mean_s) * WEIGHT
            self._log += (log(seconds) - self._log) * TYPICAL_WEIGHT
        else:
            self.mean_s, self._log = seconds, log(seconds)
        self.peak_s *= FORGET
        if seconds > self.peak_s:
            self.peak_s = seconds
