"""Runs in the peers' environment: the noop app on Mosec.

README
------
``python mosec_noop.py PORT``: one worker, without batches: no other app here has them,
and a noop only waits for them.
"""

from __future__ import annotations

import sys
from typing import Any

from mosec import Server, Worker


class Noop(Worker):
    def forward(self, data: Any) -> dict[str, bool]:
        return {"ok": True}


if __name__ == "__main__":
    # Mosec reads the command line itself.
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", sys.argv[1]]
    sys.argv += ["--log-level", "warning"]
    server = Server()
    server.append_worker(Noop, num=1)
    server.run()
