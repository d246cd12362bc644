"""Handlers of messages on Dask's own streams, between scheduler and worker."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")
logger = logging.getLogger(__name__)


def never_raises(handler: Callable[P, None]) -> Callable[P, None]:
    """Log what a stream handler raises.

    Dask closes the stream, and then the worker, when a handler raises.
    """

    @functools.wraps(handler)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            handler(*args, **kwargs)
        except Exception:
            logger.exception("%s failed", handler.__qualname__)

    return guarded
