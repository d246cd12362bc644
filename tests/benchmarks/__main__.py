"""The command; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from tests.benchmarks import peer_work, peers
from tests.benchmarks.catalog import BENCHES
from tests.benchmarks.rows import Row, measure
from tests.benchmarks.table import HEADER, lines, report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("--rows", default="", help="a regular expression")
    parser.add_argument(
        "--seconds",
        type=float,
        default=5,
        help="of one measurement; wrk takes them rounded to whole ones, at least 1",
    )
    parser.add_argument("--rounds", type=int, default=3, help="A B, so many times")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--list", action="store_true", help="only print rows' names")
    parser.add_argument("--peers", type=Path, help="the virtual environment of others")
    args = parser.parse_args()
    benches = [*BENCHES]
    if args.peers is not None:
        if not (args.peers / "bin" / "python").exists():
            parser.error(f"{args.peers} is no virtual environment")
        benches += [*peers.benches(args.peers), *peer_work.benches(args.peers)]
    chosen = [b.name for b in benches if re.search(args.rows, b.name)]
    if not chosen:
        parser.error(f"no row matches {args.rows!r}")
    if args.seconds <= 0 or args.rounds < 1:
        parser.error("--seconds and --rounds must be above 0")
    if args.list:
        print("\n".join(chosen))
        return 0
    print(HEADER, flush=True)
    rows: list[Row] = []
    try:
        for row in measure(benches, args.rows, args.seconds, args.rounds):
            rows.append(row)
            print("\n".join(lines(row)), flush=True)
    finally:  # also after Ctrl-C: what took minutes to measure is kept
        if args.json:
            document = report(rows, args.seconds, args.rounds)
            if args.peers is not None:
                document["peers"] = peers.versions(args.peers)
            args.json.write_text(json.dumps(document, indent=1) + "\n")
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
