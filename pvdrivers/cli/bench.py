"""``pvdrivers bench``: measure, side by side with a peer that does the same work."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

from pvdrivers.bench import report
from pvdrivers.bench.machine import describe

ALL = ("ring", "blk", "net", "xenstore", "fairness", "daemon")


def run(args: argparse.Namespace) -> int:
    """Measure and print. The status says whether it was measured, not whether it was fast."""
    machine = describe()
    rows: list[dict[str, Any]] = []
    for name in ALL if args.what == "all" else (args.what,):
        print(f"bench {name}", file=sys.stderr)
        rows += report.common(name, _measure(name, args))
    if args.json:
        json.dump({"machine": machine, "rows": rows}, sys.stdout, indent=1)
        print()
    elif args.markdown:
        print(report.markdown(rows, machine))
    else:
        print(", ".join(f"{key} {value}" for key, value in machine.items() if value is not None))
        print(report.text(rows))
    return 0


def _measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    measure: Callable[..., list[dict[str, Any]]] = importlib.import_module(f"pvdrivers.bench.{name}").run
    options: dict[str, Any] = {"directory": args.dir} if name in ("blk", "fairness") else {}
    if name in ("blk", "net", "fairness", "daemon"):
        options["say"] = _progress
    if name in ("blk", "net"):
        options["only"] = args.rows
    return measure(args.quick, **options)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
