"""When a batch system ends the job that this process is of. Workers and nannies."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil
from distributed import Worker

from daskserve.config import Settings

#: How long a command of a batch system may take.
COMMAND_TIMEOUT_S = 10.0
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
class BatchSystem:
    """How one batch system is asked.

    Parameters
    ----------
    job
        The variable that names the job, in all of its processes.
    command
        Tells about the job; ``{job}`` stands for it.
    read
        Returns the seconds that are left, by what the command printed and how long ago
        the job began; None if it has no end.
    kill_wait_s
        Seconds between SIGTERM and SIGKILL at the end; 0 if there is no SIGTERM.
    """

    job: str
    command: tuple[str, ...]
    read: Callable[[str, float], float | None]
    kill_wait_s: float


def _seconds(text: str) -> float:
    """Read ``[days-]hours:minutes:seconds``, or less of it; or plain seconds."""
    days, _, rest = text.strip().rpartition("-")
    seconds = 0.0
    for part in rest.split(":"):
        seconds = seconds * 60 + float(part)
    return seconds + 86400 * int(days or 0)


def _field(text: str, pattern: str) -> str:
    found = re.search(rf"\b{pattern}\s*[=:]\s*([\d:-]+)", text)
    if found is None:
        raise ValueError(f"no {pattern} in {text!r}")
    return found[1]


def _slurm(text: str, age_s: float) -> float | None:
    # `squeue -o %L`: else it is UNLIMITED, NOT_SET or INVALID.
    return _seconds(text) if text.strip()[:1].isdigit() else None


def _pbs(text: str, age_s: float) -> float | None:
    with suppress(ValueError):  # Torque's
        return _seconds(_field(text, r"Walltime\.Remaining"))
    limit = _seconds(_field(text, r"Resource_List\.walltime"))
    with suppress(ValueError):
        return limit - _seconds(_field(text, r"resources_used\.walltime"))
    return limit - age_s


def _sge(text: str, age_s: float) -> float | None:
    return _seconds(_field(text, "h_rt")) - age_s


def _lsf(text: str, age_s: float) -> float | None:
    # `bjobs -o time_left`: "12:34 L", in hours and minutes.
    return _seconds(text.split()[0]) * 60


def _condor(text: str, age_s: float) -> float | None:
    return _seconds(_field(text, "AllowedJobDuration")) - age_s


def _oar(text: str, age_s: float) -> float | None:
    return _seconds(_field(text, "walltime")) - age_s


SYSTEMS = (
    BatchSystem(
        "SLURM_JOB_ID", ("squeue", "-h", "-j", "{job}", "-o", "%L"), _slurm, 30
    ),
    BatchSystem("PBS_JOBID", ("qstat", "-f", "{job}"), _pbs, 10),
    BatchSystem(
        "LSB_JOBID", ("bjobs", "-noheader", "-o", "time_left", "{job}"), _lsf, 10
    ),
    BatchSystem("_CONDOR_JOB_AD", ("cat", "{job}"), _condor, 30),
    BatchSystem("OAR_JOB_ID", ("oarstat", "-fj", "{job}"), _oar, 0),
    BatchSystem("JOB_ID", ("qstat", "-j", "{job}"), _sge, 0),  # Grid Engine
)  # fmt: skip
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
    if system is not None and system.kill_wait_s:
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
            return _end(_began_at() + limit_s, settings, environ)
    return None


def ask_for_end(
    settings: Settings, environ: Mapping[str, str] = os.environ
) -> JobEnd | None:
    """Ask the batch system when this job ends; takes a while.

    Returns
    -------
    JobEnd or None
        None if the job has no end.

    Raises
    ------
    OSError, ValueError
        It cannot be asked, or does not say.
    """
    system = batch_system(environ)
    if system is None:
        raise ValueError("this is no job of a batch system that is known")
    job = environ[system.job]
    command = [part.format(job=job) for part in system.command]
    try:
        asked = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as err:
        raise OSError(f"{err}") from None
    if asked.returncode:
        raise OSError(
            f"{command} ended with {asked.returncode}: {asked.stderr.strip()}"
        )
    now = time.time()
    left_s = system.read(asked.stdout, now - _began_at())
    return None if left_s is None else _end(now + left_s, settings, environ)


def end_by_lifetime(worker: Worker) -> JobEnd | None:
    """Return when a worker closes by ``--lifetime``, unless it is started anew."""
    # It counts from the worker's start: that of its process, if it has one of its own.
    own = worker.nanny or threading.current_thread() is threading.main_thread()
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
    told = system is not None and system.kill_wait_s > 0
    return JobEnd(at, at + kill_wait_s(settings, environ) if told else at)


def _began_at() -> float:
    """Return when the job began: not later than the oldest process that is our own."""
    process, oldest = psutil.Process(), time.time()
    uid = process.uids().real
    with suppress(psutil.Error):
        while process is not None and process.uids().real == uid:
            oldest = process.create_time()
            process = process.parent()
    return oldest
