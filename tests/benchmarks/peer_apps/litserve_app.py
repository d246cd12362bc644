"""Runs in the peers' environment: the app on LitServe.

README
------
``python litserve_app.py PORT WORK REPLICAS``: so many workers and one API server, with
the queue that is meant for more than a hundred requests a second.
"""

from __future__ import annotations

import sys
from typing import Any

import litserve
from working import work

PORT, WORK, REPLICAS = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])


class App(litserve.LitAPI):
    def setup(self, device: str) -> None:
        pass

    def predict(self, x: Any) -> dict[str, object]:
        return {"ok": True} if WORK == "none" else work(WORK)


if __name__ == "__main__":
    server = litserve.LitServer(
        App(),
        accelerator="cpu",
        devices=1,
        workers_per_device=REPLICAS,
        fast_queue=True,
    )
    server.run(
        host="127.0.0.1",
        port=PORT,
        num_api_servers=1,
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )
