"""Runs in the peers' environment: the app on BentoML.

README
------
``python bentoml_app.py PORT WORK REPLICAS``: so many workers, which are the HTTP
servers too. A noop runs on their loops, other work on a thread of each.
"""

from __future__ import annotations

import os
import sys

import bentoml
from working import work

# Workers import this module without the command line, but with the environment.
if __name__ == "__main__":
    os.environ["APP_WORK"], os.environ["APP_REPLICAS"] = sys.argv[2:4]
WORK, REPLICAS = os.environ["APP_WORK"], int(os.environ["APP_REPLICAS"])
service = bentoml.service(
    workers=REPLICAS,
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)


@service
class Noop:
    @bentoml.api
    async def noop(self) -> dict[str, object]:
        return {"ok": True}


@service
class Work:
    @bentoml.api
    def noop(self) -> dict[str, object]:
        return work(WORK)


if __name__ == "__main__":
    # Workers import the service by the name of its module.
    import bentoml_app

    served = bentoml_app.Noop if WORK == "none" else bentoml_app.Work
    served.serve_http(host="127.0.0.1", port=int(sys.argv[1]))
