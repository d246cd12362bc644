"""The command; see the package's docstring."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tests.benchmarks.rows import measure, names
from tests.benchmarks.table import HEADER, line, report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("--rows", default="", help="a regular expression")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not names(args.rows):
        parser.error(f"no row matches {args.rows!r}")
    print(HEADER, flush=True)
    rows = []
    for row in measure(args.rows, args.seconds, args.rounds):
        print(line(row), flush=True)
        rows.append(row)
    if args.json:
        args.json.write_text(json.dumps(report(rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
