"""The routing table: longest prefix on a segment's boundary."""

from __future__ import annotations

import pytest

from daskserve.proxy.routes import RouteTable


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/api", ("/api", "A")),
        ("/api/", ("/api", "A")),
        ("/api/x/y", ("/api", "A")),
        ("/api/v2", ("/api/v2", "B")),
        ("/api/v2/x", ("/api/v2", "B")),
        ("/api/v22", ("/api", "A")),
        ("/apiv2", None),
        ("/API", None),
        ("/", None),
        ("", None),
        ("//api", None),
    ],
)
def test_longest_prefix_on_a_boundary(
    path: str, expected: tuple[str, str] | None
) -> None:
    table = RouteTable({"/api": "A", "/api/v2": "B"})
    assert table.match(path) == expected


@pytest.mark.parametrize("path", ["/", "/x", "/apiv2", "//", ""])
def test_root_prefix_takes_the_rest(path: str) -> None:
    table = RouteTable({"/": "root", "/api": "A"})
    assert table.match(path) == ("/", "root")
    assert table.match("/api/x") == ("/api", "A")


def test_empty_table_matches_nothing() -> None:
    assert RouteTable({}).match("/") is None


def test_table_is_a_copy() -> None:
    routes = {"/a": "A"}
    table = RouteTable(routes)
    routes["/b"] = "B"
    assert table.match("/b") is None
