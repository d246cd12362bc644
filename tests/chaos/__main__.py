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
    parser.add_argument("--location", nargs="*", default=["HeadOnly", "EveryNode"])
    parser.add_argument("--faults", default="", help="of a storm, all by default, ...")
    parser.add_argument("--logs", type=Path, help="a file for the clusters' logs")
    parser.add_argument("--pause", type=float, default=5, help="... seconds apart")
    parser.add_argument("--list", action="store_true", help="say what there is")
    args = parser.parse_args()
    if args.list:
        for name, function in SCENARIOS.items():
            print(f"{name:12} {inspect.getdoc(function)}")
        return 0
    if args.scenario is None:
        parser.error("which scenario? --list says what there is")
    options = Options(
        seed=args.seed,
        seconds=args.seconds,
        locations=tuple(args.location),
        logs=args.logs,
        pause=args.pause,
        faults=tuple(filter(None, args.faults.split(","))),
    )
    failed = False
    for report in SCENARIOS[args.scenario](options):
        print(report, flush=True)
        failed |= bool(report.breaches)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
