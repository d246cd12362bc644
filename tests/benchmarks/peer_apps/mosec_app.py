"""Runs in the peers' environment: the app on Mosec.

README
------
``python mosec_app.py PORT WORK REPLICAS``: so many workers, without batches: no other
app here has them, and a noop only waits for them.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from mosec import Server, Worker
from working import work


class Noop(Worker):
    def forward(self, data: Any) -> dict[str, object]:
        return {"ok": True}


class Work(Worker):
    def forward(self, data: Any) -> dict[str, object]:
        return work(os.environ["APP_WORK"])


if __name__ == "__main__":
    port, what, replicas = sys.argv[1:]
    # Mosec reads the command line itself, and workers import this module with that.
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", port, "--log-level", "warning"]
    os.environ["APP_WORK"] = what
    server = Server()
    server.append_worker(Noop if what == "none" else Work, num=int(replicas))
    server.run()
