"""What is asked of each app: a name, an app, and a script that talks to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from tests.differential.observe import Talk

Script: TypeAlias = Callable[[Talk], Awaitable[None]]


@dataclass(frozen=True)
class Case:
    """One case."""

    app: str
    name: str
    script: Script

    @property
    def id(self) -> str:
        """What lists and test reports call it."""
        return f"{self.app}: {self.name}"


def ask(
    app: str, path: str = "/", method: str = "GET", name: str = "", **parts: Any
) -> Case:
    """Return the case of one request, on a connection of its own."""

    async def script(talk: Talk) -> None:
        await talk.ask(path, method, **parts)

    return Case(app, name or f"{method} {path}", script)


def raw(app: str, name: str, data: bytes, method: str = "GET") -> Case:
    """Return the case of bytes that are sent as they are, but for the prefix."""

    async def script(talk: Talk) -> None:
        await talk.raw(data, method)

    return Case(app, name, script)


class Scripts:
    """Collects functions as scripts."""

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def __call__(self, app: str) -> Callable[[Script], Script]:
        """Return a decorator; the function's name is the case's."""

        def add(script: Script) -> Script:
            name = getattr(script, "__name__").replace("_", " ")  # noqa: B009
            self.cases.append(Case(app, name, script))
            return script

        return add
