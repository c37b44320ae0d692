"""``python3 -m tests.xen.bed build | run -- pytest words | sh -- script``: see docs/testing.md."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time

from .boot import Machine, boot, failed, fitting, processors, pytest_script
from .debian import install_missing
from .images import build
from .steps import BedError, say


def main() -> int:
    """Status of what ran in dom0; 2 when it could not be built or booted."""
    parser = argparse.ArgumentParser(prog="tests.xen.bed", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("build", help="make the images and nothing else")
    for verb, what in (("run", "pytest words"), ("sh", "script")):
        one = verbs.add_parser(verb, help=f"boot, and run {what} in dom0")
        one.add_argument("--seconds", type=float, default=900, help="end of patience (900)")
        one.add_argument("--cpus", type=int, help="of each machine (two, or what the host has for it)")
        one.add_argument("--memory", type=int, default=Machine.memory, help="MiB of the whole machine")
        one.add_argument("--xenstored", choices=["c", "o"], default="c", help="the C one, or oxenstored")
        one.add_argument("--xen", action="append", default=[], metavar="WORD", help="for Xen's command line")
        one.add_argument("--dom0", action="append", default=[], metavar="WORD", help="for dom0's command line")
        one.add_argument("--again", action="store_true", help="tests that fail: once more, in a machine of their own")
        one.add_argument("--machines", type=int, default=1, help="so many share out the files of tests (1)")
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
        script = " ".join(words) if args.verb == "sh" else pytest_script(words or ["tests/xen"])
        machines, end = fitting(args.machines, args.memory), time.monotonic() + args.seconds
        cpus = args.cpus or processors(machines)
        machine = Machine(cpus, args.memory, xenstored=args.xenstored, xen_words=args.xen, dom0_words=args.dom0)
        status = boot(images, machine, script, args.seconds, machines)
        if status == 1 and args.again and (names := failed()):
            say(f"{len(names)} failed, and are run once more: {' '.join(names)}")
            options = [word for word in words if word.startswith("-") and word not in ("-k", "-m")]
            machine.cpus = args.cpus or processors(1)
            os.environ.pop("PVDRIVERS_XEN_BEGIN", None)  # these have begun
            status = boot(images, machine, pytest_script([*options, *names]), max(end - time.monotonic(), 300))
        return status
    except BedError as e:
        print(f"xen bed: error: {e}", file=sys.stderr)
        return 2


sys.exit(main())
