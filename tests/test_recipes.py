"""README's files for Slurm and Kubernetes, as they are: on a real Slurm, as pods."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from distributed import Client, SSHCluster

import daskserve as serve
from tests.hosts import Host, open_hosts
from tests.slurm.cluster import Slurm, open_slurm
from tests.slurm.load import Load, handler, loaded
from tests.test_readme import README, blocks
from tests.utils import ROOT, Process, free_port, need_program, poll

pytestmark = [pytest.mark.slow, pytest.mark.by_hand, pytest.mark.timeout(400)]

FILES = {block.file: block.text for block in blocks() if block.file}


class Login:
    """A folder with README's files, and a shell in it on a machine that has Slurm's.

    What differs from README: the HTTP port, and what tests change: how long jobs run
    and overlap, and what they say of memory, for this Slurm knows none.
    """

    def __init__(self, slurm: Slurm, changes: Mapping[str, str]) -> None:
        self.slurm = slurm
        self.folder = slurm.folder / "home"
        self.folder.mkdir()
        self.port = free_port()
        self._changes = {"8000": str(self.port), **changes}
        for name, text in FILES.items():
            (self.folder / name).write_text(self.changed(text))
        python = [str(Path(sys.executable).parent), os.environ["PATH"]]
        modules = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.env = {
            **os.environ,
            "PATH": os.pathsep.join(python),
            "PYTHONPATH": os.pathsep.join(filter(None, modules)),
            "SLURM_CONF": str(slurm.folder / "slurm.conf"),
            "DASK_DASKSERVE__HTTP__PORT": str(self.port),
            "DASK_DISTRIBUTED__SCHEDULER__DASHBOARD__ADDRESS": ":0",
        }

    def changed(self, text: str) -> str:
        for old, new in self._changes.items():
            text = text.replace(old, new)
        return text

    def run(self, script: str, timeout: float = 120) -> str:
        """Run lines of a shell; return what they print."""
        done = subprocess.run(
            ["bash", "-euc", script],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{script}: {done.stdout} {done.stderr}"
        return done.stdout

    @contextmanager
    def running(self, *command: str) -> Iterator[Process]:
        """Run a program until the block ends."""
        log = self.slurm.folder / f"{Path(command[-1]).name}.log"
        process = Process(log.stem, command, log, self.env, self.folder)
        try:
            yield process
        finally:
            process.end_group()

    @contextmanager
    def client(self) -> Iterator[Client]:
        """Connect to the cluster that the scheduler file names."""
        file = self.folder / "scheduler.json"
        poll(file.exists, 60)
        with Client(scheduler_file=str(file), timeout=60) as client:
            yield client

    def jobs(self, *states: str) -> list[int]:
        """Return the jobs that are in one of some states."""
        text = self.slurm.run("squeue", "-h", "-t", ",".join(states), "-o", "%i")
        return [int(number) for number in text.split()]


@contextmanager
def login(nodes: int = 2, **changes: str) -> Iterator[Login]:
    with open_slurm(nodes) as slurm:
        made = Login(slurm, {"08:00:00": "00:05:00", **changes})
        try:
            yield made
        finally:
            outputs = sorted(made.folder.glob("*.out"))
            print(slurm.logs(), *(path.read_text() for path in outputs), sep="\n")


def test_from_an_empty_folder_to_an_answer() -> None:
    """A job, a program that deploys, and a tunnel on the login node."""
    [block] = [block for block in blocks() if block.command == "slurm"]
    with login() as at:
        script = at.changed(block.text)
        # A background process would keep the pipe open, and has to end.
        script = re.sub(r" &$", " >tunnel.log 2>&1 & echo $! >pid", script, flags=re.M)
        assert at.run(script).endswith("Hello!")
        os.kill(int((at.folder / "pid").read_text()), signal.SIGTERM)
        poll(lambda: "Stopped." in (at.folder / "tunnel.log").read_text(), 20)


def test_a_service_outlives_its_job() -> None:
    """The next job, queued by the one before, has the deployments again."""
    with login(**{"sleep 5": "sleep 1"}) as at:
        at.run("sbatch service.sh && python main.py")
        file = at.folder / "scheduler.json"
        first = file.read_text()
        poll(lambda: len(at.jobs("PENDING")) == 1, 60)
        [running] = at.jobs("RUNNING")
        at.slurm.cancel(running)
        poll(lambda: file.exists() and file.read_text() not in ("", first), 60)
        with at.client() as client:
            assert serve.get_deployment("hello").name == "hello"
            poll(
                lambda: serve.status().deployments["hello"].state == "HEALTHY", 60, 0.2
            )
            handle = serve.get_deployment("hello").get_handle()
            assert handle.remote().result(timeout_s=30) == "Hello!"
            assert client.status == "running"
        poll(lambda: len(at.jobs("PENDING")) == 1, 60)
        at.run("scancel --name=service")
        poll(lambda: not at.jobs("PENDING", "RUNNING", "COMPLETING"), 60)


def test_workers_in_jobs_that_overlap() -> None:
    """Jobs of two minutes, the next a minute after: no request is lost."""
    changes = {"08:00:00": "00:02:00", "+470": "+1"}
    with login(3, **changes) as at:
        scheduler = ["dask", "scheduler", "--scheduler-file", "scheduler.json"]
        with at.running(*scheduler, "--host", at.slurm.address):
            at.run("sbatch worker.sh")
            with at.client() as client:
                instance = serve.start(client, detached=True, http_options={"port": 0})
                made = serve.deployment(name="handler", route_prefix="/handler")
                made(handler).deploy()
                [first] = at.jobs("RUNNING")
                with loaded(Load([f"{instance.http_urls[0]}/handler"], 400)) as load:
                    at.slurm.wait("TIMEOUT", first, timeout=240)
                    time.sleep(5)
            assert load.lost == [], str(load)
            print(load)
            at.run("scancel --name=worker")


@pytest.mark.parametrize(
    "command", ["python jobs.py", "srun --ntasks=4 python runner.py"]
)
def test_programs_of_jobqueue(command: str) -> None:
    pytest.importorskip("dask_jobqueue")
    changes = {'memory="8 GB"': 'memory="8 GB", job_directives_skip=["--mem"]'}
    with login(**changes) as at:
        with at.running(*shlex.split(command)) as process:
            if "runner" in command:
                with at.client():
                    poll(lambda: healthy("hello"), 90, 0.5)
                    handle = serve.get_deployment("hello").get_handle()
                    assert handle.remote().result(timeout_s=30) == "Hello!"
            else:
                url = f"http://127.0.0.1:{at.port}/hello"
                poll(lambda: answer(url) == "Hello!", 90, 0.5)
                job = at.jobs("RUNNING")[0]
                assert "tls://" in at.run(f"scontrol write batch_script {job} -")
            assert process.poll() is None
            if "srun" in command:
                at.slurm.cancel(*at.jobs("RUNNING"))
            else:
                process.send_signal(signal.SIGINT)
            process.wait(60)
        poll(lambda: not at.jobs("PENDING", "RUNNING", "COMPLETING"), 60)


@contextmanager
def sshd(folder: Path, address: str) -> Iterator[dict[str, Any]]:
    """Run a server for SSH; give what its clients have to say."""
    key, port = folder / "key", free_port()
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
    subprocess.run(command, check=True)
    options = {
        "Port": port,
        "ListenAddress": address,
        "HostKey": key,
        "AuthorizedKeysFile": f"{key}.pub",
        "PidFile": folder / "sshd.pid",
        "StrictModes": "no",
    }
    Path("/run/sshd").mkdir(exist_ok=True)
    command = [need_program("sshd"), "-D", "-e", "-f", "/dev/null"]
    command += [f"-o{name}={value}" for name, value in options.items()]
    process = Process("sshd", command, folder / "sshd.log", {}, folder)
    try:
        poll(lambda: "listening" in process.log.read_text(), 10)
        yield {"port": port, "client_keys": [str(key)], "known_hosts": None}
    finally:
        process.end_group()
        print(process.log.read_text())


@contextmanager
def only(host: Host, port: int) -> Iterator[None]:
    """Let a host reach nothing but one port of others."""
    rules = (
        "table inet only { chain out { type filter hook output priority 0; "
        f"policy drop; oif lo accept; tcp dport {port} accept; }}; }}"
    )
    host.run(need_program("nft"), rules)
    try:
        yield
    finally:
        host.run("nft", "delete", "table", "inet", "only")


def test_on_a_laptop() -> None:
    """One that reaches the scheduler's port only, or only SSH on the login node."""
    [block] = [block for block in blocks() if block.command == "slurm"]
    words = README.partition("On your laptop,")[2].partition("\n\n")[0]
    by_ssh, by_dask = (
        next(text for text in re.findall("`([^`]*)`", words) if text.startswith(start))
        for start in ("ssh -L", "dask serve")
    )
    submit, deploy, tunnel, curl = block.text.splitlines()
    with login(3) as at:
        laptop = at.slurm.nodes["n3"]
        at.slurm.drain("n3")
        at.run(f"{submit}\n{deploy}")
        with at.client() as client:
            address = client.scheduler.address
        file = at.folder / "scheduler.json"
        assert address == json.loads(file.read_text())["address"]
        port = int(address.rpartition(":")[2])
        assert port == 8786, "README says that it is Dask's own"
        ask = at.changed(curl)

        command = at.changed(by_dask).replace("ADDRESS", address)
        with (
            only(laptop, port),
            at.running(*laptop.command(*shlex.split(command))),
        ):
            assert laptop.run("bash", "-c", ask) == "Hello!"

        with (
            sshd(at.slurm.folder, at.slurm.address) as way,
            only(laptop, way["port"]),
            at.running("bash", "-c", at.changed(tunnel).removesuffix(" &")),
        ):
            assert at.run(ask) == "Hello!"
            config = at.folder / "config"
            config.write_text(
                f"Host LOGIN\n Hostname {at.slurm.address}\n Port {way['port']}\n"
                f" IdentityFile {way['client_keys'][0]}\n StrictHostKeyChecking no\n"
                f" UserKnownHostsFile {at.folder}/known\n"
            )
            command = at.changed(by_ssh).replace("ssh", f"ssh -N -F {config}")
            with at.running(*laptop.command(*shlex.split(command))):
                assert laptop.run("bash", "-c", ask) == "Hello!"


def test_ssh_cluster(tmp_path: Path) -> None:
    pytest.importorskip("asyncssh")
    with sshd(tmp_path, "127.0.0.1") as way:
        cluster = SSHCluster(
            ["127.0.0.1"] * 3,
            connect_options=way,
            remote_python=f"env PYTHONPATH={ROOT} {sys.executable}",
            scheduler_options={"dashboard_address": ":0"},
        )
        with cluster, Client(cluster) as client:
            instance = serve.start(client, http_options={"port": 0})
            serve.deployment(name="hello", num_replicas=2)(hello).deploy()
            assert answer(f"{instance.http_urls[0]}/hello") == "Hello!"
            serve.shutdown()


def hello() -> str:
    return "Hello!"


def healthy(name: str) -> bool:
    try:
        return serve.status().deployments[name].state == "HEALTHY"
    except (serve.ServeError, KeyError):
        return False


def answer(url: str) -> str | None:
    try:
        return httpx.get(url, timeout=5).text
    except httpx.HTTPError:
        return None


class Pod:
    """A container of the manifest, run on a host; its probe is asked from outside."""

    def __init__(self, host: Host, container: Mapping[str, Any], folder: Path) -> None:
        self.host = host
        self.probe = container.get("readinessProbe")
        self.pre_stop = container.get("lifecycle", {}).get("preStop")
        name = f"{container['name']}-{host.name}"
        args = [arg.replace("$(DASK_WORKER_NAME)", name) for arg in container["args"]]
        env = {e["name"]: e["value"] for e in container.get("env", [])}
        command = host.command(sys.executable, "-m", *args)
        self.process = Process(name, command, folder / f"{name}.log", env, folder)

    def ready(self) -> bool:
        get = self.probe["httpGet"]
        try:
            url = f"http://{self.host.address}:8000{get['path']}"
            return httpx.get(url, timeout=1).status_code == 200
        except httpx.HTTPError:
            return False

    def evict(self, grace_s: float) -> None:
        """End as Kubernetes does: preStop, SIGTERM, SIGKILL when the time is over."""
        began = time.monotonic()
        subprocess.run(self.pre_stop["exec"]["command"], check=True)
        self.process.signal_group(signal.SIGTERM)
        self.process.wait(grace_s - (time.monotonic() - began))


def test_pods_of_kubernetes(tmp_path: Path) -> None:
    """Two workers' pods, one of which is evicted: no request is lost."""
    cluster, service, budget = yaml.safe_load_all(FILES["cluster.yaml"])
    worker, scheduler = (cluster["spec"][k]["spec"] for k in ("worker", "scheduler"))
    labels = {"dask.org/cluster-name": cluster["metadata"]["name"]}
    assert service["spec"]["selector"] == {**labels, "dask.org/component": "worker"}
    assert budget["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    [container] = scheduler["containers"]
    container["args"][-1] = str(tmp_path / "state.json")
    [port] = worker["containers"][0]["ports"]
    assert port["containerPort"] == 8000
    with open_hosts(3) as hosts:
        pods = [Pod(hosts[0], container, tmp_path)]
        address = f"tcp://{hosts[0].address}:8786"
        container = worker["containers"][0]
        container["env"].append({"name": "DASK_SCHEDULER_ADDRESS", "value": address})
        try:
            pods += [Pod(host, container, tmp_path) for host in hosts[1:]]
            with Client(address, timeout=60) as client:
                client.wait_for_workers(2, timeout=60)
                assert not pods[1].ready()
                http = {"location": "EveryNode", "host": "0.0.0.0", "port": 8000}
                serve.start(client, detached=True, http_options=http)
                assert not pods[1].ready()
                made = serve.deployment(name="hello", num_replicas=2)(handler)
                made.deploy()
                poll(lambda: all(pod.ready() for pod in pods[1:]), 20)
                urls = [f"http://{pod.host.address}:8000/hello" for pod in pods[1:]]
                with loaded(Load(urls, 400)) as load:
                    time.sleep(3)
                    pods[2].evict(worker["terminationGracePeriodSeconds"])
                    time.sleep(3)
                assert load.lost == [], str(load)
                assert pods[1].ready() and not pods[2].ready()
        finally:
            for pod in pods:
                pod.process.end_group()
                print(pod.process.log.read_text())
