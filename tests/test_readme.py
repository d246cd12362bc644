"""Every code block of README.md does what it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import dask
import pytest
import yaml

import daskserve as serve
from daskserve.config import DeploymentOptions, HTTPOptions
from tests.utils import ROOT, Process, ProcessCluster, free_port, poll, run_script

README = (ROOT / "README.md").read_text()
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

#: Runs blocks one after the other; "  # text" after a command is what it is to print.
RUNNER = """
import contextlib, io, json, subprocess, time

BLOCKS = json.loads(BLOCKS)

def expected(line):
    return line.partition("  # ")[2].strip()

def run_python(text):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, "README.md", "exec"), globals())
    wanted = [expected(l) for l in text.splitlines() if l.strip().startswith("print(")]
    assert printed.getvalue().splitlines() == wanted, (printed.getvalue(), wanted)

def run_bash(line):
    if line.endswith("&"):
        return subprocess.run(["bash", "-c", line], check=True)
    command = ["bash", "-euo", "pipefail", "-c", line]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert expected(line) in printed.stdout, (line, printed.stdout)

for language, text in BLOCKS:
    started = time.monotonic()
    if language == "python":
        run_python(text)
    else:
        for line in text.splitlines():
            run_bash(line)
    print(f"{time.monotonic() - started:.1f} s:", text.splitlines()[0], flush=True)
"""


class Block(NamedTuple):
    language: str
    text: str
    #: What a comment before the block calls it, as a command or as a file.
    command: str
    file: str

    @property
    def elsewhere(self) -> bool:
        """Whether others run it, who have Slurm (`test_recipes`) or a fresh machine."""
        return bool(self.command or self.file)


def blocks() -> list[Block]:
    pattern = r"(?:<!-- (command|file): (\S+) -->\n)?^```(\w+)\n(.*?)^```$"
    found = re.findall(pattern, README, re.M | re.S)
    assert len(found) == README.count("```") / 2
    return [
        Block(language, text, *((name, "") if kind == "command" else ("", name)))
        for kind, name, language, text in found
    ]


def of_language(language: str) -> list[Block]:
    return [block for block in blocks() if block.language == language]


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) < 500
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) >= 2
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link
    assert {block.language for block in blocks()} == {"bash", "python", "yaml"}


@pytest.mark.slow
def test_blocks_in_order_on_a_cluster() -> None:
    http, scheduler = str(free_port()), str(free_port())
    host = "--host 127.0.0.1 --dashboard-address 127.0.0.1:0"
    changes = {
        "dask scheduler &": f"dask scheduler {host} --port {scheduler} &",
        "--nworkers 2": f"--nworkers 2 --nthreads 1 --memory-limit 0 {host}",
        "scheduler:8786": f"127.0.0.1:{scheduler}",
        "8000": http,
    }
    chosen = []
    for block in blocks():
        if block.language == "yaml" or block.elsewhere or "tls://" in block.text:
            continue
        text = block.text.replace("curl ", "curl -sS ")
        for old, new in changes.items():
            text = text.replace(old, new)
        chosen.append((block.language, text))
    assert len(chosen) > 10
    script = f"BLOCKS = {json.dumps(chosen)!r}\n{RUNNER}"
    env = {"PATH": PATH, "DASK_DASKSERVE__HTTP__PORT": http}
    print(run_script(script, env=env).stdout)


def test_shell_blocks_can_be_read() -> None:
    parsed = [block for block in of_language("bash") if block.elsewhere]
    assert len(parsed) == 6
    for block in parsed:
        subprocess.run(["bash", "-n", "-c", block.text], check=True)


@pytest.mark.slow
def test_demo_command(tmp_path: Path) -> None:
    [block] = [block for block in blocks() if block.command == "demo"]
    *_, install, run = block.text.strip().split(" && ")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [extra] = re.findall(r"'\.\[(\w+)\]'", install)
    assert extra in extras["optional-dependencies"]
    assert run == ".venv/bin/dask serve demo"
    command = [*shlex.split(run.removeprefix(".venv/bin/")), "--port", "0"]
    log = tmp_path / "demo.log"
    process = Process("demo", command, log, {"PATH": PATH}, tmp_path)
    try:
        poll(lambda: "Ctrl-C" in log.read_text() or process.poll() is not None, 30)
        lines = log.read_text().splitlines()
        [line] = [line for line in lines if line.startswith("curl ")]
        digit = re.findall(r"(\d):$", "\n".join(lines), re.M)
        answer = subprocess.run(
            shlex.split(line), check=True, stdout=subprocess.PIPE, timeout=20
        )
        assert [str(json.loads(answer.stdout)["digit"])] == digit
    finally:
        process.end_group()
        print(log.read_text())


def test_configuration() -> None:
    for block in of_language("yaml"):
        if block.elsewhere:
            continue
        with dask.config.set(yaml.safe_load(block.text)):
            assert HTTPOptions.from_user(None).port == 8080


def test_options_table() -> None:
    """Its options are there, and have the defaults it says."""
    rows = re.findall(r"^\| (`.+?) \| (.*?) \|", README, re.M)
    options = DeploymentOptions(name="x")
    checked = 0
    for names, default in rows:
        for name in re.findall(r"`(\w+)`", names):
            value = getattr(options, name)
            if re.fullmatch(r"\d+", default):
                assert value == int(default), name
                checked += 1
            if default == "`None`":
                assert value is None, name
                checked += 1
    assert checked >= 9


@pytest.mark.slow
def test_tls_blocks() -> None:
    chosen = [block for block in of_language("bash") if "tls://" in block.text]
    assert chosen
    with ProcessCluster(1, nanny=False, protocol="tls") as cluster:
        with cluster.client() as client:
            serve.start(client, detached=True, http_options={"port": 0})
        for block in chosen:
            text = block.text.replace("tls://scheduler:8786", cluster.address)
            result = subprocess.run(
                ["bash", "-euc", text.replace("ca.pem", "cert.pem")],
                cwd=cluster.directory,
                env={**os.environ, "PATH": PATH},
                stdout=subprocess.PIPE,
                text=True,
                timeout=30,
            )
            assert result.returncode == 0
            assert "HEALTHY" in result.stdout
