"""Warnings that strangers cause, however many they are: one a minute. Any thread."""

from __future__ import annotations

import logging
import threading
import time

#: Seconds between two warnings.
EVERY_S = 60.0


class Complaints:
    """Log the first of many that do the same, and how many there were.

    Parameters
    ----------
    logger
        Where to.
    what
        What they did, such as ``"connected without the secret"``.
    """

    def __init__(self, logger: logging.Logger, what: str) -> None:
        self._logger = logger
        self._what = what
        self._lock = threading.Lock()
        self._silent_until = 0.0
        self._kept_back = 0

    def about(self, peer: object, why: str) -> None:
        """Note one more.

        Parameters
        ----------
        peer
            The address of who did it, as sockets have it, or None.
        why
            What was wrong.
        """
        now = time.monotonic()
        with self._lock:
            if now < self._silent_until:
                self._kept_back += 1
                return
            self._silent_until = now + EVERY_S
            kept_back, self._kept_back = self._kept_back, 0
        who = peer[0] if isinstance(peer, tuple) and peer else "somebody"
        others = f", and {kept_back} times more before" if kept_back else ""
        self._logger.warning("%s %s: %s%s", who, self._what, why, others)
