"""``python3 -m tests.xen.bed build | run -- pytest words | sh -- script``: see docs/testing.md."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from typing import IO

from .boot import PART, Machine, boot, pytest_script
from .debian import install_missing
from .images import build
from .steps import BedError


def run_parts(machines: int) -> int:
    """The same command for several machines at once, each with its part of the tests; the worst status."""
    command = [sys.executable, "-m", "tests.xen.bed", *sys.argv[1:]]
    parts = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, PART: f"{number}/{machines}"})
        for number in range(1, machines + 1)
    ]

    def show(number: int, lines: IO[bytes]) -> None:
        for line in lines:
            sys.stdout.write(f"{number}| {line.decode(errors='replace')}")
            sys.stdout.flush()

    try:
        threads = [threading.Thread(target=show, args=(n, one.stdout)) for n, one in enumerate(parts, 1)]
        for thread in threads:
            thread.start()
        return max(one.wait() for one in parts)
    finally:
        for one in parts:
            if one.poll() is None:
                one.terminate()
        for thread in threads:
            thread.join()


def main() -> int:
    """Status of what ran in dom0; 2 when it could not be built or booted."""
    parser = argparse.ArgumentParser(prog="tests.xen.bed", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("build", help="make the images and nothing else")
    for verb, what in (("run", "pytest words"), ("sh", "script")):
        one = verbs.add_parser(verb, help=f"boot, and run {what} in dom0")
        one.add_argument("--seconds", type=float, default=900, help="end of patience (900)")
        if verb == "run":
            one.add_argument("--machines", type=int, default=1, help="at once, each with a part of the tests (1)")
        one.add_argument("--cpus", type=int, default=Machine.cpus)
        one.add_argument("--memory", type=int, default=Machine.memory, help="MiB of the whole machine")
        one.add_argument("--xenstored", choices=["c", "o"], default="c", help="the C one, or oxenstored")
        one.add_argument("--xen", action="append", default=[], metavar="WORD", help="for Xen's command line")
        one.add_argument("--dom0", action="append", default=[], metavar="WORD", help="for dom0's command line")
        one.usage = f"%(prog)s [options] -- {what}"
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    words = sys.argv[split + 1 :]
    args = parser.parse_args(sys.argv[1:split])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        install_missing()
        images = build()
        if args.verb == "build":
            return 0
        if args.verb == "run" and args.machines > 1 and PART not in os.environ:
            return run_parts(args.machines)
        script = " ".join(words) if args.verb == "sh" else pytest_script(words or ["tests/xen"])
        machine = Machine(args.cpus, args.memory, xenstored=args.xenstored, xen_words=args.xen, dom0_words=args.dom0)
        return boot(images, machine, script, args.seconds)
    except BedError as e:
        print(f"xen bed: error: {e}", file=sys.stderr)
        return 2


sys.exit(main())
