"""Ask users' autoscaling policies, off the scheduler's loop. Scheduler process.

A policy is named ``"module:function"`` and has to be importable where the scheduler
runs: code that travels is never unpickled there. It has a thread, and whatever it does
there, only the number of replicas stays as it is.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from typing import Any

from daskserve.controller.autoscaling import (
    AutoscalingContext,
    default_policy,
    wrong_answer,
)

#: How long a policy may take until the status says so.
PATIENCE_S = 5.0


def load_policy(path: str) -> Callable[[AutoscalingContext], Any]:
    """Import a policy.

    Parameters
    ----------
    path
        ``"module:function"``.

    Returns
    -------
    callable
        The function.

    Raises
    ------
    ValueError
        It cannot be imported, or is no function.
    """
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as err:
        raise ValueError(
            f"autoscaling policy {path!r} cannot be imported on the scheduler, where "
            f"it is to run: {type(err).__name__}: {err}"
        ) from err
    if not callable(found):
        raise ValueError(f"autoscaling policy {path!r} is {found!r} and no function")
    policy: Callable[[AutoscalingContext], Any] = found
    return policy


class Policies:
    """The policies of all deployments."""

    def __init__(self) -> None:
        self._running: dict[str, _Run] = {}

    def ask(self, context: AutoscalingContext) -> int | str | None:
        """Return an answer of a deployment's policy, which may be to the last question.

        Parameters
        ----------
        context
            The question.

        Returns
        -------
        int, str or None
            A number, what is wrong, or None if there is no answer yet.
        """
        path, name = context.config.policy, context.deployment
        if path is None:
            return default_policy(context)
        run = self._running.get(name)
        if run is not None and run.is_alive() and run.path == path:
            elapsed = time.monotonic() - run.began
            if elapsed > PATIENCE_S:
                return f"has not answered for more than {PATIENCE_S:g} s"
            return None
        self._running[name] = fresh = _Run(path, context)
        fresh.start()
        return run.answer if run is not None and run.path == path else None

    def forget(self, names: set[str]) -> None:
        """Keep only what belongs to deployments that are there."""
        for name in self._running.keys() - names:
            del self._running[name]


class _Run(threading.Thread):
    """One call of a policy."""

    def __init__(self, path: str, context: AutoscalingContext) -> None:
        super().__init__(name="daskserve-policy", daemon=True)
        self.path = path
        self.began = time.monotonic()
        self.answer: int | str | None = None
        self._context = context

    def run(self) -> None:
        try:
            answer = load_policy(self.path)(self._context)
        except Exception as err:
            self.answer = f"raised {type(err).__name__}: {err}"
        else:
            self.answer = wrong_answer(answer) or int(answer)
