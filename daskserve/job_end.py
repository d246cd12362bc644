"""When a batch system ends the job that this process is of. Workers and nannies."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from asyncio.subprocess import PIPE
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil
from distributed import Worker

from daskserve.config import Settings

#: How long a command of a batch system may take.
COMMAND_TIMEOUT_S = 10.0
#: And how long its end, once it is killed.
KILLED_S = 1.0
#: How long a process goes on after SIGTERM where nothing is known, in seconds.
UNKNOWN_WAIT_S = 20.0
#: Longer than any worker waits for others to take what it serves, in seconds.
FOR_EVER_S = 86400.0
#: What is left for the process to end by itself before it is killed.
KILL_MARGIN_S = 2.0


@dataclass(frozen=True, slots=True)
class JobEnd:
    """When a job ends; seconds since 1970."""

    #: Its time is over: processes are told so, or killed.
    at: float
    #: They are killed at the latest.
    killed_at: float


@dataclass(frozen=True, slots=True)
class Asked:
    """What a batch system says, of which job, and for how long that has run."""

    text: str
    job: str
    age_s: float

    def field(self, pattern: str) -> str:
        """Return the value of a field that begins a line, or raise `ValueError`."""
        found = re.search(rf"(?m)^\s*{pattern}\s*[=:]\s*([\d:.-]+)", self.text)
        if found is None:  # the text itself has the user's environment, with some
            raise ValueError(f"no {pattern} is told of job {self.job}")
        return found[1]


@dataclass(frozen=True, slots=True)
class BatchSystem:
    """How one batch system is asked.

    Parameters
    ----------
    job
        The variable that names the job, in all of its processes.
    command
        Tells about the job; ``{job}`` stands for it.
    read
        Returns the seconds that are left; None if there is no end.
    kill_wait_s
        Seconds between SIGTERM and SIGKILL; None: not known.
    warns
        Whether SIGTERM comes at the end, too.
    """

    job: str
    command: tuple[str, ...]
    read: Callable[[Asked], float | None]
    kill_wait_s: float | None = None
    warns: bool = True


def _seconds(text: str) -> float:
    """Read ``[days-]hours:minutes:seconds``, or less of it; or plain seconds."""
    days, _, rest = text.strip().rpartition("-")
    seconds = 0.0
    for part in rest.split(":"):
        seconds = seconds * 60 + float(part)
    return seconds + 86400 * int(days or 0)


def _slurm(asked: Asked) -> float | None:
    # Of an array's first task, all others are listed as well.
    words = asked.text.split()
    left = dict(zip(words[::2], words[1::2], strict=True))[asked.job]
    return None if left == "UNLIMITED" else _seconds(left)


def _pbs(asked: Asked) -> float | None:
    with suppress(ValueError):  # Torque's
        return _seconds(asked.field(r"Walltime\.Remaining"))
    limit_s, used_s = _seconds(asked.field(r"Resource_List\.walltime")), 0.0
    with suppress(ValueError):  # looked at now and then
        used_s = _seconds(asked.field(r"resources_used\.walltime"))
    return limit_s - max(used_s, asked.age_s)


def _lsf(asked: Asked) -> float | None:
    # "12:34 L", in hours and minutes.
    return _seconds(asked.text.split()[0]) * 60


def _condor(asked: Asked) -> float | None:
    age_s = asked.age_s
    with suppress(ValueError):
        age_s = time.time() - float(asked.field("JobCurrentStartDate"))
    return _seconds(asked.field("AllowedJobDuration")) - age_s


def _limit(pattern: str) -> Callable[[Asked], float | None]:
    return lambda asked: _seconds(asked.field(pattern)) - asked.age_s


SYSTEMS = (
    BatchSystem(
        "SLURM_JOB_ID", ("squeue", "-h", "-j", "{job}", "-o", "%A %L"), _slurm, 30
    ),
    BatchSystem("PBS_JOBID", ("qstat", "-f", "{job}"), _pbs, 10),
    # At the end it sends SIGUSR2, by which Python ends.
    BatchSystem(
        "LSB_JOBID",
        ("bjobs", "-noheader", "-o", "time_left", "{job}"),
        _lsf,
        10,
        warns=False,
    ),
    BatchSystem("_CONDOR_JOB_AD", ("cat", "{job}"), _condor, 30),
    BatchSystem(
        "OAR_JOB_ID", ("oarstat", "-fj", "{job}"), _limit("walltime"), warns=False
    ),
    BatchSystem(  # Grid Engine
        "JOB_ID",
        ("qstat", "-j", "{job}"),
        _limit(r"hard resource_list:.*?\bh_rt"),
        warns=False,
    ),
)
#: Job time limits in seconds, in the variables of some.
LIMITS = ("PBS_WALLTIME", "OAR_JOB_WALLTIME_SECONDS")


def batch_system(environ: Mapping[str, str] = os.environ) -> BatchSystem | None:
    """Return the batch system that has started this process; None if none has."""
    return next((system for system in SYSTEMS if system.job in environ), None)


def kill_wait_s(settings: Settings, environ: Mapping[str, str] = os.environ) -> float:
    """Return how long this process may go on after SIGTERM, in seconds."""
    if settings.signal_timeout_s is not None:
        return settings.signal_timeout_s
    system = batch_system(environ)
    if system is not None and system.kill_wait_s is not None:
        return system.kill_wait_s - KILL_MARGIN_S
    if "KUBERNETES_SERVICE_HOST" in environ:  # terminationGracePeriodSeconds
        return 30 - KILL_MARGIN_S
    return UNKNOWN_WAIT_S


def end_by_environment(
    settings: Settings, environ: Mapping[str, str] = os.environ
) -> JobEnd | None:
    """Return when this job ends, as the user or its environment says.

    Parameters
    ----------
    settings
        Where the user may have said it; processes may be killed at once then.
    environ
        Where the batch system may have.

    Returns
    -------
    JobEnd or None
        None if nobody says.
    """
    if settings.ends_at is not None:
        return JobEnd(settings.ends_at, settings.ends_at)
    with suppress(KeyError, ValueError):
        return _end(float(environ["SLURM_JOB_END_TIME"]), settings, environ)
    for name in LIMITS:
        with suppress(KeyError, ValueError):
            limit_s = float(environ[name])
            return _end(_began_at(name) + limit_s, settings, environ)
    return None


async def ask_for_end(
    settings: Settings, environ: Mapping[str, str] = os.environ
) -> JobEnd | None:
    """Ask the batch system when this job ends; it must be in one.

    Returns
    -------
    JobEnd or None
        None if the job has no end.

    Raises
    ------
    FileNotFoundError
        There is no command for that here.
    Exception
        It does not answer, or not what is expected.
    """
    system = batch_system(environ)
    assert system is not None
    job = environ[system.job]
    if environ.get("LSB_JOBINDEX", "0") != "0":  # of an array
        job += f"[{environ['LSB_JOBINDEX']}]"
    command = [part.format(job=job) for part in system.command]
    asking = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            text, why = await asking.communicate()
    finally:
        if asking.returncode is None:
            asking.kill()
            with suppress(TimeoutError):
                async with asyncio.timeout(KILLED_S):
                    await asking.wait()
    if asking.returncode:
        error = why.decode(errors="replace").strip()
        raise OSError(f"{command} ended with {asking.returncode}: {error}")
    now = time.time()
    asked = Asked(text.decode(errors="replace"), job, now - _began_at(system.job))
    left_s = system.read(asked)
    return None if left_s is None else _end(now + left_s, settings, environ)


def end_by_lifetime(worker: Worker) -> JobEnd | None:
    """Return when a worker closes by ``--lifetime``, unless it is started anew."""
    # It counts from the worker's start: that of its process, if it has one of its own.
    handler = signal.getsignal(signal.SIGTERM)
    own = worker.nanny or getattr(handler, "__module__", "") == "distributed._signals"
    if not worker.lifetime or worker.lifetime_restart or not own:
        return None
    at = psutil.Process().create_time() + worker.lifetime
    return JobEnd(at, at + FOR_EVER_S)


def earlier(one: JobEnd | None, other: JobEnd | None) -> JobEnd | None:
    """Return what holds of two ends that a process has; None is none."""
    if one is None or other is None:
        return one or other
    return JobEnd(min(one.at, other.at), min(one.killed_at, other.killed_at))


def _end(at: float, settings: Settings, environ: Mapping[str, str]) -> JobEnd:
    system = batch_system(environ)
    warned = system is not None and system.warns
    return JobEnd(at, at + kill_wait_s(settings, environ) if warned else at)


def _began_at(variable: str) -> float:
    """Return when the job began: with the oldest process that has its variable."""
    process: psutil.Process | None = psutil.Process()
    assert process is not None
    began_at: float = process.create_time()
    with suppress(psutil.Error):  # beyond are other users' processes
        while (process := process.parent()) is not None:
            if variable not in process.environ():
                break
            began_at = process.create_time()
    return began_at
