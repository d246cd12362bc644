"""Runs in the peers' environment: the noop app on LitServe.

README
------
``python litserve_noop.py PORT``: one worker and one API server, with the queue that is
meant for more than a hundred requests a second.
"""

from __future__ import annotations

import sys
from typing import Any

import litserve


class Noop(litserve.LitAPI):
    def setup(self, device: str) -> None:
        pass

    def predict(self, x: Any) -> dict[str, bool]:
        return {"ok": True}


if __name__ == "__main__":
    server = litserve.LitServer(
        Noop(), accelerator="cpu", devices=1, workers_per_device=1, fast_queue=True
    )
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )
