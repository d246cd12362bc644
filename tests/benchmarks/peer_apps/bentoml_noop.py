"""Runs in the peers' environment: the noop app on BentoML.

README
------
``python bentoml_noop.py PORT``: one worker, which is the HTTP server too.
"""

from __future__ import annotations

import sys

import bentoml


@bentoml.service(
    workers=1,
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
class Noop:
    @bentoml.api
    async def noop(self) -> dict[str, bool]:
        return {"ok": True}


if __name__ == "__main__":
    # The worker imports the service by the name of its module.
    from bentoml_noop import Noop as service

    service.serve_http(host="127.0.0.1", port=int(sys.argv[1]))
