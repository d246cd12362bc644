"""Runs in the peers' environment: the app on Ray Serve, on a Ray of its own.

README
------
``python ray_app.py PORT WORK REPLICAS [fastapi] [fast]``. ``fast`` is what Ray calls
high throughput: HAProxy in front, which asks replicas directly. Ray's files go to the
working directory; SIGTERM ends it.
"""

from __future__ import annotations

import os
import socket
import sys

PORT, WORK, REPLICAS, *FLAGS = sys.argv[1:]


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


# Read when Ray is imported, and inherited by its processes.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
if "fast" in FLAGS:
    os.environ.update(
        RAY_SERVE_ENABLE_HA_PROXY="1",
        RAY_SERVE_THROUGHPUT_OPTIMIZED="1",
        # Else HAProxy logs every request to a process that parses it.
        RAY_SERVE_HAPROXY_METRICS_ENABLED="0",
        RAY_SERVE_HAPROXY_METRICS_PORT=free_port(),
        RAY_SERVE_HAPROXY_STATS_PORT=free_port(),
        RAY_SERVE_HAPROXY_CONFIG_FILE_LOC=os.path.abspath("haproxy.cfg"),
        RAY_SERVE_HAPROXY_SOCKET_PATH=os.path.abspath("admin.sock"),
        RAY_SERVE_HAPROXY_SERVER_STATE_BASE=os.getcwd(),
        RAY_SERVE_HAPROXY_SERVER_STATE_FILE=os.path.abspath("server-state"),
        RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH=os.path.abspath("metrics.sock"),
    )

import ray  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from ray import serve  # noqa: E402
from starlette.requests import Request  # noqa: E402
from working import work  # noqa: E402

LOGGING = {"enable_access_log": False, "log_level": "WARNING"}
OPTIONS = {
    "num_replicas": int(REPLICAS),
    "max_ongoing_requests": 100,
    "logging_config": LOGGING,
    "ray_actor_options": {"num_cpus": 0},  # as many replicas as are asked for
}
app = FastAPI()


@serve.deployment(**OPTIONS)
class Noop:
    async def __call__(self, request: Request) -> dict[str, bool]:
        return {"ok": True}


@serve.deployment(**OPTIONS)
class Work:
    # One call at a time in each replica, as everywhere: Ray would put a sync method on
    # as many threads as there are requests.
    async def __call__(self, request: Request) -> dict[str, object]:
        return work(WORK)


@serve.deployment(**OPTIONS)
@serve.ingress(app)
class FastAPINoop:
    @app.get("/")
    async def noop(self) -> dict[str, bool]:
        return {"ok": True}


if __name__ == "__main__":
    ray.init("local", include_dashboard=False, _temp_dir=os.getcwd())
    http_options = {"host": "127.0.0.1", "port": int(PORT)}
    serve.start(http_options=http_options, logging_config=LOGGING)
    noop = FastAPINoop if "fastapi" in FLAGS else Noop
    serve.run((noop if WORK == "none" else Work).bind(), blocking=True)
