"""All that the demo deploys; in the process of the command line."""

from __future__ import annotations

from typing import cast

from daskserve.demo.digits import DigitClassifier
from daskserve.demo.examples import Api1, Api2, Counter, Hello, Root
from daskserve.deployment import Deployment

# mypy takes a decorated class for the class, whatever the decorator returns.
DEPLOYMENTS = cast(
    "tuple[Deployment, ...]", (DigitClassifier, Counter, Hello, Root, Api1, Api2)
)
