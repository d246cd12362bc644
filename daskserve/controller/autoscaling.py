"""How many replicas a load asks for, and when that is heeded. Scheduler, no I/O.

A policy is a function of an `AutoscalingContext` that returns a number. Users may have
their own; what is done about its answers (delays, limits) is the same for all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

from daskserve.config import AutoscalingConfig
from daskserve.controller.records import Goal, Spec

#: Replicas may be overloaded by a tenth before there are more: else a load about as
#: large as n replicas take would add one and remove it for ever.
TOLERANCE = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalingContext:
    """What a policy may look at.

    Parameters
    ----------
    deployment
        Name of the deployment.
    current_replicas
        How many are wanted now.
    running_replicas
        How many of these run.
    requests
        Requests that wait or run now, over all proxies and handles.
    average_requests
        The same, on average over ``look_back_period_s``.
    history
        What that is the average of: ages in seconds and numbers, the oldest first.
    config
        The ``autoscaling_config`` with all its defaults.
    """

    deployment: str
    current_replicas: int
    running_replicas: int
    requests: float
    average_requests: float
    history: tuple[tuple[float, float], ...]
    config: AutoscalingConfig


def default_policy(context: AutoscalingContext) -> int:
    """Return how many replicas have ``target_ongoing_requests`` each.

    Parameters
    ----------
    context
        The load, and what is there.

    Returns
    -------
    int
        The number; limits and delays are not its concern.
    """
    config, there = context.config, context.current_replicas
    load = context.average_requests / config.target_ongoing_requests
    wanted = math.ceil(load - 1e-9)
    if wanted > there and (load > there * TOLERANCE or not there):
        return there + math.ceil((wanted - there) * config.upscaling_factor)
    if wanted < there:
        return there - max(1, int((there - wanted) * config.downscaling_factor))
    return there


def wrong_answer(answer: Any) -> str | None:
    """Say what is wrong with a policy's answer.

    Parameters
    ----------
    answer
        What it returned.

    Returns
    -------
    str or None
        None if it is a number of replicas.
    """
    whole = not isinstance(answer, bool) and isinstance(answer, Integral)
    if whole and int(answer) >= 0:
        return None
    return f"returned {answer!r:.100} and not a whole number of 0 or more"


def with_number(spec: Spec, former: Spec | None) -> Spec:
    """Fill in with how many replicas a deployment that scales itself begins.

    Parameters
    ----------
    spec
        The wish.
    former
        What is there, as many as there are now: it goes on with that number, and new
        code with one at least, so that ``deploy()`` can tell whether it starts.

    Returns
    -------
    Spec
        The wish itself if its number is fixed.
    """
    if spec.autoscaling is None:
        return spec
    config = AutoscalingConfig(**spec.autoscaling)
    number = config.first_number
    if former is not None:
        number = former.num_replicas
        if config.initial_replicas != 0 and not former.same_code(spec):
            number = max(number, 1)
    return replace(spec, num_replicas=config.clamp(number))


@dataclass(slots=True, eq=False)
class Scaling:
    """What is remembered of one deployment's load, and of what it asked for."""

    #: Times and numbers of requests.
    samples: deque[tuple[float, float]] = field(default_factory=deque)
    #: Times and answers of the policy.
    wishes: deque[tuple[float, int]] = field(default_factory=deque)
    #: When it was looked at first; delays count from then at the earliest.
    began: float | None = None
    #: When the next look is due.
    next_at: float = 0.0
    #: Requests per replica, as last heard.
    loads: Mapping[int, float] = field(default_factory=dict)
    #: As long as so many run, more that are on the way are nothing to worry about.
    floor: int | None = None
    #: Requests when it was looked last, on average, and the policy's answer.
    last: tuple[float, float, int] | None = None
    #: Why the number last changed.
    note: str = ""
    #: What is wrong with the policy.
    trouble: str = ""
    _raw: Mapping[str, Any] | None = None
    _config: AutoscalingConfig | None = None

    def config(self, spec: Spec) -> AutoscalingConfig:
        """Return a spec's configuration, checked once.

        Parameters
        ----------
        spec
            One with a configuration.

        Returns
        -------
        AutoscalingConfig
            All of it, with defaults.
        """
        assert spec.autoscaling is not None
        if self._config is None or self._raw is not spec.autoscaling:
            self._raw = spec.autoscaling
            self._config = AutoscalingConfig(**spec.autoscaling)
        return self._config

    def sample(self, now: float, requests: float, config: AutoscalingConfig) -> float:
        """Note a number of requests; return the average of those that count.

        Parameters
        ----------
        now
            Time in seconds.
        requests
            How many wait or run.
        config
            How far to look back.

        Returns
        -------
        float
            The average.
        """
        self.samples.append((now, requests))
        while self.samples[0][0] < now - config.look_back_period_s:
            self.samples.popleft()
        return sum(number for _, number in self.samples) / len(self.samples)

    def decide(
        self, now: float, there: int, wish: int, config: AutoscalingConfig
    ) -> int:
        """Note what the policy wishes; heed what it wished for long enough.

        More replicas if all its answers within ``upscale_delay_s`` are more than there
        are: as many as the last one says. Fewer if all within ``downscale_delay_s``
        are: as many as the largest of them says, so that a load that has only just
        gone is still provided for.

        Parameters
        ----------
        now
            Time in seconds.
        there
            How many replicas are wanted now.
        wish
            The policy's answer, or 1 because a request waits for the first replica.
        config
            Delays and limits.

        Returns
        -------
        int
            How many are wanted from now on.
        """
        wish = config.clamp(wish)
        up, down = config.upscale_delay_s, config.downscale_delay_s
        self.began = now if self.began is None else self.began
        self.wishes.append((now, wish))
        while self.wishes[0][0] < now - max(up, down):
            self.wishes.popleft()
        since = now - self.began
        if wish > there and since >= up:
            if all(number > there for at, number in self.wishes if at >= now - up):
                return wish
        if wish < there and since >= down:
            most = max(number for at, number in self.wishes if at >= now - down)
            return min(most, there)
        return config.clamp(there)

    def needed(self, goal: Goal) -> int:
        """Return how many replicas have to run for all to be well.

        Parameters
        ----------
        goal
            What is wanted.

        Returns
        -------
        int
            Fewer than wanted while more are on the way and none of them failed.
        """
        wanted = goal.spec.num_replicas
        if goal.spec.autoscaling is None or self.floor is None or goal.failures:
            return wanted
        return min(wanted, self.floor)

    def explain(self, goal: Goal, now: float) -> str:
        """Say what the last decision rests on, and when another one may follow.

        Parameters
        ----------
        goal
            What is wanted.
        now
            Time in seconds.

        Returns
        -------
        str
            "" if the number is fixed, or no load was looked at yet.
        """
        if goal.spec.autoscaling is None or self.last is None:
            return ""
        config, there = self.config(goal.spec), goal.spec.num_replicas
        requests, average, wish = self.last
        text = (
            f"{requests:.3g} requests wait or run, {average:.3g} on average over "
            f"{config.look_back_period_s:g} s; {config.target_ongoing_requests:g} for "
            f"each replica; {wish} of {config.min_replicas} to {config.max_replicas} "
            f"replicas called for, {there} wanted"
        )
        if wish == there:
            return text
        delay_s = config.upscale_delay_s if wish > there else config.downscale_delay_s
        since = self.began if self.began is not None else now
        for at, number in self.wishes:
            if (number > there) != (wish > there) or number == there:
                since = at
        left_s = max(0.0, delay_s - (now - since))
        return f"{text}, if that lasts for {left_s:.3g} s more"

    def describe(self, goal: Goal, ready: int, there: int) -> str:
        """Say what goes on, for the status.

        Parameters
        ----------
        goal
            What is wanted.
        ready
            How many replicas run.
        there
            How many there are.

        Returns
        -------
        str
            "" if there is nothing to say.
        """
        if goal.spec.autoscaling is None:
            return ""
        wanted = goal.spec.num_replicas
        if self.floor is None or self.floor > ready:
            note = ""  # it is not the load that there are too few
        elif wanted == 0:
            note = self.note or "no replica until a request comes"
        else:
            note = self.note if not ready == wanted == there else ""
        return "; ".join(filter(None, [note, self.trouble]))
