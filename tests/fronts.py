"""Real servers to put in front of daskserve: nginx, haproxy, Jupyter with its proxy."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.utils import Process, free_port, need_program, poll

#: Everything that a package would put under /var/lib and /var/log is in `directory`.
NGINX = """
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
{user}
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {directory}/client_body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    map $http_upgrade $connection_upgrade {{ default upgrade; "" ""; }}
    upstream daskserve {{ server {upstream}; keepalive 8; }}
    server {{
        listen 127.0.0.1:{port} {tls};
        proxy_http_version 1.1;
        # As the client has it, with the port: URLs are made with it.
        proxy_set_header Host $http_host;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection $connection_upgrade;
        {server}
    }}
}}
"""

#: What a location that strips its prefix, or hides TLS, says of it. Headers of the
#: server's block count only where a location sets none itself.
SAY = """
        proxy_set_header Host $http_host;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection $connection_upgrade;
        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        proxy_set_header X-Forwarded-Proto $scheme;
"""


@contextmanager
def run_nginx(
    directory: Path, upstream: str, server: str, certificate: Path | None = None
) -> Iterator[str]:
    """Run nginx; yield its URL.

    Parameters
    ----------
    directory
        For its files.
    upstream
        Host and port, or ``unix:`` and a path; locations know it as "daskserve".
    server
        Directives of the server.
    certificate
        PEM file with certificate and key, for https.
    """
    port = free_port()
    tls = ""
    if certificate is not None:
        tls = "ssl"
        server += f"ssl_certificate {certificate}; ssl_certificate_key {certificate};"
    user = "user root root;" if os.getuid() == 0 else ""
    text = NGINX.format(
        directory=directory,
        upstream=upstream,
        port=port,
        tls=tls,
        server=server,
        user=user,
    )
    config = directory / "nginx.conf"
    config.write_text(text)
    program = need_program("nginx")
    command = [program, "-e", "stderr", "-p", str(directory), "-c", str(config)]
    with _run("nginx", command, directory, port):
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"


HAPROXY = """
global
    maxconn 200
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    option http-keep-alive
    http-reuse always
frontend front
    bind 127.0.0.1:{port} {tls}
    http-request del-header X-User
    default_backend back
backend back
    option forwardfor
    server daskserve {upstream}
"""


@contextmanager
def run_haproxy(
    directory: Path, upstream: str, certificate: Path | None = None
) -> Iterator[str]:
    """Run haproxy, which uses a connection for many clients; yield its URL.

    Parameters
    ----------
    directory
        For its files.
    upstream
        Host and port.
    certificate
        PEM file with certificate and key, for https.
    """
    port = free_port()
    tls = "" if certificate is None else f"ssl crt {certificate}"
    config = directory / "haproxy.cfg"
    config.write_text(HAPROXY.format(port=port, tls=tls, upstream=upstream))
    command = [need_program("haproxy"), "-db", "-f", str(config)]
    with _run("haproxy", command, directory, port):
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"


@contextmanager
def run_jupyter(directory: Path, base_url: str) -> Iterator[str]:
    """Run a Jupyter server with jupyter-server-proxy; yield its URL, the base too."""
    port = free_port()
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.base_url": base_url,
        "ServerApp.root_dir": directory,
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
        "IdentityProvider.token": "",
    }
    command = [sys.executable, "-m", "jupyter_server"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with _run("jupyter", command, directory, port):
        yield f"http://127.0.0.1:{port}{base_url.rstrip('/')}"


@contextmanager
def _run(
    name: str, command: Sequence[str], directory: Path, port: int
) -> Iterator[Process]:
    """Run a server until it listens, then until the block ends."""
    home = {"HOME": str(directory), "JUPYTER_RUNTIME_DIR": str(directory)}
    process = Process(name, command, directory / f"{name}.log", home, directory)

    def listens() -> bool:
        assert process.poll() is None, f"{name} has ended"
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    try:
        poll(listens, 40)
        yield process
    finally:
        process.end_group()
        print(process.log.read_text(errors="replace"))
