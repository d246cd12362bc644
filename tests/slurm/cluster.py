"""Slurm's own daemons: a controller here, and a node on each of some hosts.

Only root can have that. All of it lives in a folder of its own, and ends with it.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

import pytest

from tests.hosts import Host, need_hosts, open_hosts
from tests.utils import Process, free_port, need_program, poll

#: Seconds from SIGTERM to SIGKILL: Slurm's own default.
KILL_WAIT_S = 30
#: How Slurm knows the processes of a script or a step; what outlives it is killed. With
#: "pgid" all get its signals, with "cgroup", as on most clusters, only the first one.
Track = Literal["pgid", "cgroup"]
FREEZER = Path("/sys/fs/cgroup/freezer")
#: CPUs that each node says it has.
CPUS = 4
CONF = """
ClusterName=daskserve
SlurmctldHost={controller}({address})
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
# How long a job waits that is requeued: two minutes, if nobody says.
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_s}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
MailProg=/bin/true
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
ProctrackType=proctrack/{track}
TaskPlugin=task/none
SelectType=select/cons_tres
# Jobs spread over the nodes.
SelectTypeParameters=CR_CPU,CR_LLN
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobFileAppend=1
KillWait={kill_wait_s}
MinJobAge=3600
OverTimeLimit=0
PartitionName=low Nodes=ALL Default=YES PriorityTier=1
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF
"""


class Slurm:
    """A running Slurm.

    Parameters
    ----------
    folder
        For all that it writes; jobs' outputs are ``job-ID.log`` there.
    nodes
        Hosts by the names of the nodes.
    address
        Of this machine, as nodes see it.
    """

    def __init__(self, folder: Path, nodes: Mapping[str, Host], address: str) -> None:
        self.folder = folder
        self.nodes = nodes
        self.address = address

    def run(self, *args: str, text: str | None = None) -> str:
        """Run one of Slurm's programs and return what it prints."""
        done = subprocess.run(
            args,
            input=text,
            env={**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=30,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(args)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def submit(self, script: str, *options: str) -> int:
        """Submit a batch script and return the job's number; do not wait for it."""
        options = ("--parsable", "--output=job-%j.log", "--open-mode=append", *options)
        return int(self.run("sbatch", *options, text=f"#!/bin/bash\n{script}\n"))

    def job(self, number: int) -> dict[str, str]:
        """Return what Slurm says of a job: ``JobState``, ``NodeList``, ``EndTime``."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(number))
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def cancel(self, *jobs: int) -> None:
        self.run("scancel", *map(str, jobs))

    def requeue(self, *jobs: int) -> None:
        self.run("scontrol", "requeue", ",".join(map(str, jobs)))

    def drain(self, *nodes: str) -> None:
        """Let no new job run on nodes; those there go on."""
        self._update(nodes, "State=DRAIN", "Reason=test")

    def down(self, *nodes: str) -> None:
        """Give nodes up; those that answer take part again soon."""
        self._update(nodes, "State=DOWN", "Reason=test")

    def _update(self, nodes: tuple[str, ...], *changes: str) -> None:
        self.run("scontrol", "update", f"NodeName={','.join(nodes)}", *changes)

    def wait(self, state: str, *jobs: int, timeout: float = 30) -> None:
        """Wait until jobs are in a state, such as RUNNING."""

        def there() -> bool:
            return all(self.job(number)["JobState"] == state for number in jobs)

        poll(there, timeout, 0.1)

    def logs(self) -> str:
        """Return what the daemons and the jobs have printed until now."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')}"
            for path in sorted(self.folder.glob("*.log"))
        )


def need_slurm() -> None:
    """Skip a test where there can be no Slurm."""
    need_hosts()
    for program in ("munged", "slurmctld", "slurmd", "sbatch"):
        need_program(program)


@contextmanager
def open_slurm(
    count: int = 3,
    *,
    track: Track = "pgid",
    kill_wait_s: int = KILL_WAIT_S,
    requeue_s: int = 5,
) -> Iterator[Slurm]:
    """Run a Slurm with nodes n1, n2, ...; skip where that cannot be."""
    need_slurm()
    if track == "cgroup" and not FREEZER.is_dir():
        pytest.skip(f"there is no {FREEZER}")
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-"))
        folder = Path(name)
        folder.chmod(0o755)  # munged wants that others may come to its socket
        hosts = stack.enter_context(open_hosts(count))
        nodes = {f"n{number}": host for number, host in enumerate(hosts, 1)}
        address = hosts[0].address.rpartition(".")[0] + ".254"
        slurm = Slurm(folder, nodes, address)
        conf = CONF.format(
            controller=socket.gethostname(),
            address=address,
            port=free_port(),
            folder=folder,
            track=track,
            kill_wait_s=kill_wait_s,
            requeue_s=requeue_s,
        )
        conf += "".join(
            f"NodeName={name} NodeAddr={host.address} CPUs={CPUS}\n"
            for name, host in nodes.items()
        )
        (folder / "slurm.conf").write_text(conf)
        # Even if no use is made of it, slurmd ends where it cannot tell the version.
        text = f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/cgroup\n"
        (folder / "cgroup.conf").write_text(text)
        (folder / "cgroup" / "freezer").mkdir(parents=True)
        (folder / "all").mkdir()
        for name in ("state", *(f"spool-{name}" for name in nodes)):
            (folder / name).mkdir()
        for host in hosts:
            stack.enter_context(_names(host, nodes))
            if track == "cgroup":
                stack.callback(_remove_groups, FREEZER / host.name)
        stack.callback(_kill_all, hosts)
        _start(stack, folder, "munged", *_munged(folder))
        _start(stack, folder, "slurmctld", "slurmctld", "-D", "-i")
        for name, host in nodes.items():
            command = f"hostname {name} && exec slurmd -D"
            if track == "cgroup":
                command = f"{_group(folder, host)} && {command}"
            _start(stack, folder, name,
                   *host.command("unshare", "--uts", "sh", "-c", command))  # fmt: skip
        try:
            poll(lambda: _idle(slurm) == count, 30, 0.2)
        except AssertionError as err:
            raise AssertionError(f"Slurm does not start\n{slurm.logs()}") from err
        yield slurm


def _munged(folder: Path) -> list[str]:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    files = {"key-file": key, "socket": folder / "munge.socket"}
    files |= {f"{kind}-file": folder / f"munged.{kind}" for kind in ("pid", "seed")}
    options = [f"--{name}={path}" for name, path in files.items()]
    return ["munged", "--foreground", "--force", *options]


def _start(stack: ExitStack, folder: Path, name: str, *command: str) -> None:
    env = {"SLURM_CONF": str(folder / "slurm.conf")}
    process = Process(name, command, folder / f"{name}.log", env, folder)
    stack.callback(process.end_group)


def _group(folder: Path, host: Host) -> str:
    """Return the command that gives a host control groups of its own."""
    return (
        f"mount -t cgroup -o freezer freezer {folder}/all && "
        f"mkdir {folder}/all/{host.name} && "
        f"mount --bind {folder}/all/{host.name} {folder}/cgroup/freezer"
    )


def _remove_groups(group: Path) -> None:
    for folder, _, _ in os.walk(group, topdown=False):
        os.rmdir(folder)


def _idle(slurm: Slurm) -> int:
    with suppress(RuntimeError):  # the controller is not there yet
        return slurm.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T").count("idle")
    return 0


@contextmanager
def _names(host: Host, nodes: Mapping[str, Host]) -> Iterator[None]:
    """Let processes on a host know the names of all; ``ip netns exec`` sees to it."""
    folder = Path("/etc/netns") / host.name
    folder.mkdir(parents=True)
    lines = ["127.0.0.1 localhost", *(f"{h.address} {n}" for n, h in nodes.items())]
    try:
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        yield
    finally:
        (folder / "hosts").unlink()
        folder.rmdir()
        with suppress(OSError):  # others use it
            folder.parent.rmdir()


def _kill_all(hosts: list[Host]) -> None:
    """Kill whatever runs on hosts: jobs outlive the daemons that started them."""
    deadline = time.monotonic() + 10
    for host in hosts:
        command = ["ip", "netns", "pids", host.name]
        while pids := subprocess.check_output(command, text=True).split():
            assert time.monotonic() < deadline, f"{host.name} still runs {pids}"
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)
