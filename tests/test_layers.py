"""Who may import whom inside daskserve. The tables are the rules."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.utils import ROOT

PACKAGE = ROOT / "daskserve"

#: From top to bottom: a module imports from lower rows, and from its own folder.
LAYERS = [
    "cli",
    "preload",
    "demo*",
    "api",
    "tunnel",
    "apps",
    "local",
    "environment",
    "status",
    "deployment",
    "mapping",
    "handle",
    "arguments",
    "response_stream",
    "controller.*",
    "worker",
    "leaving",
    "nanny",
    "job_end",
    "session",
    "batching",
    "multiplex",
    "proxy.*",
    "replica.*",
    "composition",
    "ingress",
    "frozen_app",
    "class_routes",
    "transport.*",
    "packing",
    "pickling",
    "culprits",
    "reducers",
    "annotations",
    "links",
    "config",
    "exceptions",
]
#: Downward, and still not wanted, but for the modules named: (from, to, but for).
NOT_WANTED = [
    ("controller.*", "worker", []),
    ("controller.*", "proxy.*", ["controller.head"]),
    ("controller.*", "replica.*", ["controller.launcher"]),
    ("proxy.*", "replica.*", []),
]
#: Libraries that only some modules import.
OWNERS = {
    "click": ["cli", "preload"],
    "fastapi": ["demo*", "frozen_app", "ingress"],
    "uvicorn": ["proxy.*protocol", "proxy.express", "proxy.guard", "proxy.server"],
}
#: Modules that never import distributed, themselves or by way of another module ...
PURE = [
    "config",
    "exceptions",
    "transport.affinity",
    "transport.items",
    "transport.group",
    "transport.messages",
    "transport.model_places",
    "transport.outbox",
    "transport.router",
    "transport.snapshots",
    "proxy.routes",
    "proxy.windows",
    "replica.admission",
    "replica.times",
    "controller.*",
]
#: ... and those of them that do the I/O for the others.
IMPURE = [
    f"controller.{name}"
    for name in (
        "departures",
        "head",
        "instance",
        "launcher",
        "plugin",
        "proxy_manager",
        "publisher",
        "relay",
    )
]


def matches(module: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(module, pattern) for pattern in patterns)


def layer(module: str) -> int:
    rows = [row for row, name in enumerate(LAYERS) if fnmatch(module, name)]
    assert rows, f"daskserve.{module} is in no row of LAYERS"
    return rows[0]


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield nodes, those in functions too, but for what only type checkers see."""
    yield tree
    children: Iterable[ast.AST] = ast.iter_child_nodes(tree)
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
        children = tree.orelse
    for child in children:
        yield from run_time_nodes(child)


def imports(source: str) -> set[str]:
    """Return the full names of the modules that a source imports."""
    found = set()
    for node in run_time_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                # In `from daskserve.transport import messages`, that is a module.
                name = f"{node.module}.{alias.name}"
                found.add(name if name in SOURCES else str(node.module))
    return found


def inside(module: str) -> set[str]:
    """Return what a module imports of daskserve, without "daskserve."."""
    names = IMPORTS.get(f"daskserve.{module}", set())
    return {n.removeprefix("daskserve.") for n in names if n.startswith("daskserve.")}


def reached(module: str, seen: frozenset[str] = frozenset()) -> frozenset[str]:
    """Return a module and all of daskserve that it imports directly or not."""
    seen |= {module}
    for other in inside(module) - seen:
        seen |= reached(other, seen)
    return seen


def libraries(module: str) -> set[str]:
    names = IMPORTS.get(f"daskserve.{module}", set())
    return {name.partition(".")[0] for name in names}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


SOURCES = {module_name(path): path for path in PACKAGE.rglob("*.py")}
IMPORTS = {name: imports(path.read_text()) for name, path in SOURCES.items()}
FOLDERS = {"daskserve"} | {module_name(p) for p in PACKAGE.rglob("__init__.py")}
#: All but the root, which gives out the public names, and is above all rows.
MODULES = sorted(name.removeprefix("daskserve.") for name in SOURCES.keys() - FOLDERS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    assert "daskserve" not in IMPORTS[f"daskserve.{module}"], "the package root"
    for other in inside(module):
        own_folder = layer(module) == layer(other) and "." in module
        assert layer(module) < layer(other) or own_folder, f"{module} -> {other}"
        for source, target, but_for in NOT_WANTED:
            if fnmatch(module, source) and fnmatch(other, target):
                assert module in but_for, f"{module} -> {other}"


def test_there_are_no_cycles() -> None:
    try:
        TopologicalSorter({module: inside(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", MODULES)
def test_libraries_have_owners(module: str) -> None:
    for library, owners in OWNERS.items():
        assert library not in libraries(module) or matches(module, owners), library


@pytest.mark.parametrize("module", [m for m in MODULES if matches(m, PURE)])
def test_pure_modules(module: str) -> None:
    if module not in IMPURE:
        assert [m for m in reached(module) if "distributed" in libraries(m)] == []


def test_folders_import_nothing() -> None:
    for folder in FOLDERS - {"daskserve"}:
        assert not IMPORTS.get(folder), folder


def test_what_counts_as_an_import() -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import distributed
else:
    import a.b
def f():
    from daskserve import config
    from daskserve import deployment_of_the_root
    class C:
        import e
"""
    names = {"typing", "a.b", "daskserve.config", "daskserve", "e"}
    assert imports(source) == names
    assert {"config", "exceptions"} <= set(MODULES)
    with pytest.raises(AssertionError, match=r"daskserve\.elsewhere is in no row"):
        layer("elsewhere")
