"""The command; see the package's docstring."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

from tests.chaos.scenarios import SCENARIOS, Options


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("scenario", nargs="?", choices=SCENARIOS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="how long the load lasts")
    parser.add_argument("--location", action="append", help="HeadOnly or EveryNode")
    parser.add_argument("--logs", type=Path, help="a file for the clusters' logs")
    parser.add_argument("--list", action="store_true", help="say what there is")
    args = parser.parse_args()
    if args.list:
        for name, function in SCENARIOS.items():
            print(f"{name:12} {inspect.getdoc(function)}")
        return 0
    if args.scenario is None:
        parser.error("which scenario? --list says what there is")
    options = Options(seed=args.seed, seconds=args.seconds, logs=args.logs)
    if args.location:
        options = Options(
            seed=args.seed,
            seconds=args.seconds,
            logs=args.logs,
            locations=tuple(args.location),
        )
    failed = False
    for report in SCENARIOS[args.scenario](options):
        print(report, flush=True)
        failed |= bool(report.breaches)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
